"""Imports of the packages that tests compare ours with."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from torch import Tensor


def import_diffusers(*names: str) -> ModuleType:
    """Import diffusers and the classes that a test needs, which diffusers itself imports lazily."""
    return _import("diffusers", names)


def import_transformers(*names: str) -> ModuleType:
    """Import transformers in the same way."""
    return _import("transformers", names)


def _import(package: str, names: tuple[str, ...]) -> ModuleType:
    """Import a package and access `names` in it.

    Warnings during the import, by the package or those it imports (transformers, torchvision, ...),
    must not become errors; warnings while the test runs still do. These packages also look for
    another project's package `kernels`. With the root of the repository on the path they would find
    our directory of that name, so it is hidden during the import.
    """
    absent = sys.modules.setdefault("kernels", None) is None  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(package)
            for name in names:
                getattr(module, name)
    finally:
        if absent:
            del sys.modules["kernels"]
    return module


K_DIFFUSION = Path(sys.prefix) / "k-diffusion" / "k_diffusion" / "sampling.py"
"""Where `make venv` puts k-diffusion: its package imports torchvision, its samplers do not."""


def k_diffusion_sampling() -> ModuleType:
    """k-diffusion's `sampling.py` alone, with its solvers of other packages left out.

    Raises:
        FileNotFoundError: `make venv` has not installed it.
    """

    def append_dims(x: Tensor, ndim: int) -> Tensor:
        return x[(..., *[None] * (ndim - x.ndim))]

    utils = ModuleType("k_diffusion.utils")
    utils.append_dims = append_dims  # type: ignore[attr-defined]
    torchdiffeq = ModuleType("torchdiffeq")
    torchdiffeq.odeint = None  # type: ignore[attr-defined]
    package = ModuleType("k_diffusion")
    package.__path__ = []
    package.utils = utils  # type: ignore[attr-defined]
    absent = {"torchdiffeq": torchdiffeq, "torchsde": ModuleType("torchsde")}
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", K_DIFFUSION)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"k_diffusion": package, "k_diffusion.utils": utils, **absent}):
        spec.loader.exec_module(module)
    return module
