"""Kernels for the processor, compiled by LLVM for the instructions it has."""
