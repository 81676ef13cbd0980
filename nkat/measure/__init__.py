"""Figures with their errors: perplexity, paired changes, speed, start, TPE. Imports `nkat.engine` and below."""
