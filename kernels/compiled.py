"""The compiled module `fastdiff.kernels._native`, or the reason why there is none.

It is built from ``csrc/`` by setup.py and holds no torch header: its functions take addresses,
sizes and strides. Its loops run on the threads of torch's own pool, through the C function
``torch_parallel_for``; where a torch does not have that one, they run on the calling thread.
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
"""The module; None where it is not built or does not load."""


def _why_missing(error: ImportError) -> str:
    if find_spec(NAME) is not None:
        return f"the compiled module does not load: {error}"
    told = Path(__file__).with_name("_native_missing.txt")  # setup.py left it
    if told.exists():
        return f"the compiled module was not built: {told.read_text().strip()}"
    return (
        "the compiled module is not built here; with a C++ compiler, 'make build' or "
        "installing again builds it"
    )


try:
    native = import_module(NAME)
except ImportError as error:
    MISSING = _why_missing(error)
    UNAVAILABLE["cpu"] = UNAVAILABLE["cuda"] = MISSING


def _find_parallel_for() -> int:
    """The address of torch's thread pool, 0 where this torch does not have it."""
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
    """What ``fastdiff doctor`` tells about the module."""
    if native is None:
        return {"missing": MISSING}
    return {
        "path": native.__file__,
        **native.build(),
        "isa": native.isa(),
        "threads": "torch's pool"
        if native.has_parallel_for()
        else "one: torch lacks its C function",
        "stale": stale(),
    }


def stale() -> bool:
    """True in a checkout whose ``csrc/`` is not what the module was built from."""
    sources = Path(__file__).resolve().parent.parent / "csrc"
    if native is None or not (sources / "common" / "bindings.cpp").exists():
        return False
    total = hashlib.sha256()
    for path in sorted(sources.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            total.update(path.relative_to(sources).as_posix().encode() + path.read_bytes())
    return bool(total.hexdigest()[:16] != native.build()["digest"])
