"""A language model: architecture, vocabulary, layers, loading. Imports `nkat.kernels` and what lies below."""
