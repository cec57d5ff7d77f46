"""Ahead-of-time compilation: the GPU resources of the kernels, without a GPU."""
