"""Imports of the packages that tests compare ours with."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType


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
