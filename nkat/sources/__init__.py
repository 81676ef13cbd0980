"""Where Θ comes from: the weight, a better copy, a text. Makes P and Q. Imports `nkat.measure` and what lies below."""
