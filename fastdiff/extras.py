"""Optional packages: imported where they are used, with an error that names what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(name: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        name: dotted module name, such as ``"sklearn.datasets"``.
        extra: the optional dependency group of fastdiff that installs it, such as ``"train"``.

    Raises:
        ImportError: the package is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"this needs the package {package!r}: pip install 'fastdiff[{extra}]'", name=package
        ) from error
