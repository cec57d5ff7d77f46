"""The library with the CUDA kernels, and calls into it.

A launcher is a C function of ``csrc/cuda/<op>.cu`` in the compiled module, called through ctypes.
It takes addresses, sizes and the stream, starts the kernels and returns null or an error message.
The same source, compiled with g++ for a host emulation (tests/cuda_host), exports the same C
functions but takes CPU tensors; `using_library` substitutes it for the compiled module.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import compiled, plans
from ..choose import EMULATED, UNAVAILABLE, forget_candidates
from ..tracing import constant_in_graphs

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""Dtype codes of csrc/cuda/common.cuh; fp64 for parameters only."""
SUPPORTED = tuple(DTYPES)[:3]

_TYPES = {
    "i": ctypes.c_int,
    "q": ctypes.c_int64,
    "p": ctypes.c_void_p,
    "f": ctypes.c_float,
}
_library: ctypes.CDLL | None = None
if compiled.native is not None and compiled.native.build()["cuda_architectures"]:
    _library = ctypes.CDLL(compiled.native.__file__)
_emulated = False
_declared: dict[str, str] = {}
_functions: dict[str, Any] = {}


def built() -> bool:
    """Whether a library with CUDA kernels is loaded: the compiled module or an emulation."""
    return _library is not None


def declare(name: str, arguments: str) -> None:
    """Declare the C function ``fastdiff_cuda_<name>``, with a letter for each argument.

    i: int, q: int64, p: pointer (the address of a tensor, a ctypes array or None), f: float.
    """
    _declared[name] = arguments


def function(name: str) -> Any:
    """Look up a declared C function. Raises RuntimeError if there are no CUDA kernels.

    A module older than csrc/ may expect other arguments. ctypes cannot detect that, so it is also a
    RuntimeError.
    """
    found = _functions.get(name)
    if found is None:
        if _library is None:
            raise RuntimeError("the compiled module was built without CUDA kernels")
        if not _emulated and compiled.stale():
            raise RuntimeError(
                "csrc/ has changed since the compiled module was built; run 'make build'"
            )
        found = getattr(_library, f"fastdiff_cuda_{name}")
        found.argtypes = [_TYPES[letter] for letter in _declared[name]]
        found.restype = ctypes.c_char_p
        _functions[name] = found
    return found


def address(x: Tensor | None) -> int | None:
    """A tensor's data pointer; None for None."""
    return None if x is None else x.data_ptr()


def parameter(x: Tensor | None) -> tuple[int | None, int]:
    """Address and dtype code of a dense parameter tensor; (None, 0) for None.

    Raises:
        ValueError: a dtype that the kernels do not support.
    """
    if x is None:
        return None, 0
    if x.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"a parameter must be one of {known}, got {x.dtype}; use its .float()")
    return x.data_ptr(), DTYPES[x.dtype]


def ask(name: str, device: int, *arguments: Any) -> str | None:
    """Call a function that starts no kernel, with the device as its first argument.

    Returns:
        Its error message, or None.
    """
    with nullcontext() if _emulated else torch.cuda.device(device):
        error = function(name)(device, *arguments)
    return None if error is None else error.decode()


def launch(name: str, x: Tensor, *arguments: Any) -> None:
    """Call a launcher, passing the device and the current stream of x as its first two arguments.

    Raises:
        RuntimeError: CUDA reported an error; the message includes the shape of x.
    """
    if x.is_cuda:
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            error = function(name)(x.device.index, stream, *arguments)
    else:
        error = function(name)(0, None, *arguments)
    if error is not None:
        raise RuntimeError(f"{name}: {error.decode()} ({_described(x)})")
    notes = plans.recording()
    if notes is not None:
        notes.launched(_start(name, x), arguments, _declared[name][2:])


def _described(x: Tensor) -> str:
    return f"x: {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"


def _start(name: str, x: Tensor) -> plans.Start:
    """Starts a launcher again, for tensors like x."""
    launcher, device, described = function(name), x.device.index or 0, _described(x)

    def start(stream: int | None, arguments: list[Any]) -> None:
        error = launcher(device, stream, *arguments)
        if error is not None:
            raise RuntimeError(f"{name}: {error.decode()} ({described})")

    return start


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all tensors are aligned to 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


declare("usable", "i")


@lru_cache
def _refusal(device: int) -> str | None:
    error = ask("usable", device)
    if error is None:
        return None
    assert compiled.native is not None
    name = torch.cuda.get_device_name(device)
    built = compiled.native.build()["cuda_architectures"]
    return (
        f"the compiled kernels do not run on cuda:{device} ({name}): {error}; they were "
        f"built for {built}; to change that, set TORCH_CUDA_ARCH_LIST and reinstall fastdiff"
    )


@constant_in_graphs  # Dynamo does not trace ctypes
def refusal(device: int) -> str | None:
    """Why a device cannot run the kernels (an old driver, no code for it), or None."""
    return _refusal(device)


@contextmanager
def using_library(library: ctypes.CDLL) -> Iterator[None]:
    """Use the launchers of another library, on CPU tensors, when backend "cuda" is forced."""
    global _library, _emulated
    before = _library, _emulated
    reason, devices = UNAVAILABLE.pop("cuda", None), EMULATED.get("cuda")
    _library, _emulated = library, True
    EMULATED["cuda"] = ("cpu",)
    _functions.clear()
    forget_candidates()
    try:
        yield
    finally:
        _library, _emulated = before
        EMULATED.pop("cuda")
        if devices is not None:
            EMULATED["cuda"] = devices
        if reason is not None:
            UNAVAILABLE["cuda"] = reason
        _functions.clear()
        forget_candidates()
