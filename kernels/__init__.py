"""Fused ops for diffusion models, each with a readable reference: ``fastdiff.kernels``."""

from __future__ import annotations

if __name__ != "fastdiff.kernels":
    raise ImportError(
        f"this package was imported as {__name__!r}; its name is 'fastdiff.kernels' "
        "(a top-level 'kernels' belongs to another project): use 'from fastdiff import kernels'"
    )
