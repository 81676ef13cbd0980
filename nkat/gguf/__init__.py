"""Files of ggml: metadata, tensors, block formats and their quantisers; bytes, not models. Imports `nkat.host`."""
