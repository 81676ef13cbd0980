"""Implementations of `packed weight × x + star term`; `nkat.star` picks one."""
