"""Diffusion models with fused kernels: a complete, readable, tested system.

model = fastdiff.load(path)                           any checkpoint, as one `Model`
images = model.generate("a cat", seeds=[0, 1])        one call for the common case
for result in fastdiff.generate(model, jobs): ...     any mix of jobs, streamed
fastdiff.accelerate(pipeline)                         makes existing modules faster
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff import kernels as kernels
    from fastdiff.generate.model import load as load
    from fastdiff.generate.run import generate as generate
    from fastdiff.integrations import accelerate as accelerate
    from fastdiff.integrations import compile_pass as compile_pass
    from fastdiff.kernels import backend as backend

__version__ = "0.1.0"
__all__ = ["accelerate", "backend", "compile_pass", "generate", "kernels", "load"]

_FROM = {
    "accelerate": "fastdiff.integrations",
    "backend": "fastdiff.kernels",
    "compile_pass": "fastdiff.integrations",
    "load": "fastdiff.generate.model",
}
_MODULES = ("generate", "kernels")  # packages; `fastdiff.generate` is callable as well


def __getattr__(name: str) -> Any:
    """Import `fastdiff.accelerate` and the others on first use, so that importing stays cheap."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastdiff.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
