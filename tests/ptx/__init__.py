"""Kernels run as PTX on a CPU: an interpreter with checks, a launch layer for Triton and CUDA, and their tests."""
