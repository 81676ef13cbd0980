"""NKAT for images: a small vision transformer whose attention holds learned antisymmetric gauge terms."""

# `nkat` says how threads shall wait before torch is loaded, which is when OpenMP reads it.
import nkat  # noqa: F401
