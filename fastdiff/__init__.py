"""Diffusion models with fused kernels: a complete, readable, proven system."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FROM = {
    "backend": "fastdiff.kernels",
    "accelerate": "fastdiff.integrations",
    "compile_pass": "fastdiff.integrations",
    "load": "fastdiff.generate.model",
}


def __getattr__(name: str) -> Any:
    """`fastdiff.accelerate` and so on: nothing heavy is imported before it is asked for."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
