"""The compiled module `fastdiff.kernels._native`, or the reason why it is missing.

It is built from ``csrc/`` by setup.py without torch headers: its functions take addresses, sizes
and strides. Its loops run on torch's own thread pool, through the C function
``torch_parallel_for``; if torch does not export that function, they run on the calling thread.
"""

from __future__ import annotations

import ctypes
import hashlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .choose import UNAVAILABLE

NAME = f"{__package__}._native"
native: Any = None
"""The module; None if it is not built or does not load."""


def _why_missing(error: ImportError) -> str:
    if find_spec(NAME) is not None:
        return f"the compiled module failed to load: {error}"
    reason = Path(__file__).with_name("_native_missing.txt")  # written by setup.py
    if reason.exists():
        return f"the compiled module was not built: {reason.read_text().strip()}"
    return (
        "the compiled module has not been built; install a C++ compiler, then run 'make build' "
        "or reinstall fastdiff"
    )


try:
    native = import_module(NAME)
except ImportError as error:
    MISSING = _why_missing(error)
    UNAVAILABLE["cpu"] = UNAVAILABLE["cuda"] = MISSING


def _find_parallel_for() -> int:
    """The address of ``torch_parallel_for``, or 0 if this torch does not export it."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            function = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
            return ctypes.cast(function, ctypes.c_void_p).value or 0 if function else 0
    return 0


if native is not None:
    native.set_parallel_for(_find_parallel_for())
    if not native.build()["cuda_architectures"]:
        UNAVAILABLE["cuda"] = (
            f"the compiled module was built without CUDA kernels: {native.build()['without_cuda']}"
        )


def describe() -> dict[str, Any]:
    """What ``fastdiff doctor`` reports about the module."""
    if native is None:
        return {"missing": MISSING}
    return {
        "path": native.__file__,
        **native.build(),
        "isa": native.isa(),
        "threads": "torch's pool"
        if native.has_parallel_for()
        else "one: torch does not export torch_parallel_for",
        "stale": stale(),
    }


def stale() -> bool:
    """Whether this is a checkout whose ``csrc/`` changed since the module was built."""
    sources = Path(__file__).resolve().parent.parent / "csrc"
    if native is None or not (sources / "common" / "bindings.cpp").exists():
        return False
    total = hashlib.sha256()
    for path in sorted(sources.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            total.update(path.relative_to(sources).as_posix().encode() + path.read_bytes())
    return bool(total.hexdigest()[:16] != native.build()["digest"])
