"""Compilation ahead of time: what the kernels take of a GPU, without one."""
