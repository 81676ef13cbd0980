"""What KoboldCpp calls each backend: its flags and its libraries."""

from __future__ import annotations

BACKENDS = ("cuda", "vulkan", "clblast", "cpu", "failsafe")
ON_GPU = ("cuda", "vulkan", "clblast")
GPU_FLAGS = {"cuda": ("--usecuda", "--usecublas"), "vulkan": ("--usevulkan",), "clblast": ("--useclblast",)}
GPU_LIBRARIES = {"cuda": ("cublas", "hipblas"), "vulkan": ("vulkan",), "clblast": ("clblast",)}
GPU_OLD_LIBRARIES = {"cuda": (), "vulkan": ("vulkan_noavx2",), "clblast": ("clblast_noavx2",)}  # with --noavx2
