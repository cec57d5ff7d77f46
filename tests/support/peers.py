"""Other people's code that ours is compared with."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType


def import_diffusers(*names: str) -> ModuleType:
    """diffusers, the classes that a test needs already imported: it does so when first asked."""
    return _import("diffusers", names)


def import_transformers(*names: str) -> ModuleType:
    """transformers, in the same way."""
    return _import("transformers", names)


def _import(package: str, names: tuple[str, ...]) -> ModuleType:
    """What the package and those it tries (transformers, torchvision, ...) warn about while they
    are imported is not ours, and must not become an error; warnings while the test runs still do.
    They also look for the package `kernels` of another project; with the repository's root on the
    path they would find our directory of that name, so during the import there is none.
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
