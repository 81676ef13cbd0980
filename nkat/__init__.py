"""NKAT for language models: antisymmetric INT8 Θ tensors in GGUF files, and the star product."""

import os

__version__ = "0.2.0.dev0"

# Threads that wait for each other shall sleep instead of spin. On a quiet machine that costs about 5 %; with one other
# busy process on two cores, spinning made the same work 5 to 25 times slower. OpenMP reads this when torch is loaded,
# so it has to be said before; a value the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
