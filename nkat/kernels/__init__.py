"""Packed weight × x and what lies between, by device; `nkat.lm.linear` picks one. Imports `nkat.theta` and below."""
