"""Θ: its algebra, the set of a model's Θ, the files that hold it; true of every Θ. Imports `nkat.gguf`."""
