"""NKAT for language models: antisymmetric INT8 Θ tensors in GGUF files, and the star product."""
