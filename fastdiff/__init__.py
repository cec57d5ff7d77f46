"""Diffusion models with fused kernels: a complete, readable, proven system."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`fastdiff.backend`, the context manager; torch is not imported before it is asked for."""
    if name == "backend":
        from fastdiff.kernels import backend

        return backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
