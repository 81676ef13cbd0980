"""This computer and its user: terminal, disk, processor, processes. Imports `nkat.errors` only."""
