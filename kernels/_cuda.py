"""What the CUDA kernels of all ops share: the library they are in, the calls, the registration.

A launcher is a C function of ``csrc/<op>.cu`` in the compiled module, called through ctypes: it
takes addresses, sizes and the stream, starts the kernels and returns null or what went wrong. The
same source compiled with g++ under a host emulation (tests/cuda_host) has the same C functions and
takes CPU tensors; `using_library` puts it in the module's place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels import extension
from fastdiff.kernels.dispatch import OPS, Implementation, Op, _no_objection, first_tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""The codes of csrc/common.cuh; fp64 for parameters only."""
SUPPORTED = tuple(DTYPES)[:3]
IMPLEMENTATIONS: dict[str, Implementation] = {}
"""Op -> its CUDA implementation, whether or not the module has the kernels."""

_TYPES = {
    "i": ctypes.c_int,
    "q": ctypes.c_int64,
    "p": ctypes.c_void_p,
    "f": ctypes.c_float,
}
_library: ctypes.CDLL | None = None
if extension.native is not None and extension.native.build()["cuda_architectures"]:
    _library = ctypes.CDLL(extension.native.__file__)
_emulated = False
_declared: dict[str, str] = {}
_functions: dict[str, Any] = {}


def declare(name: str, arguments: str) -> None:
    """Enter the C function ``fastdiff_cuda_<name>`` with a letter for each argument.

    i: int, q: int64, p: pointer (a tensor, an address or None), f: float.
    """
    _declared[name] = arguments


def function(name: str) -> Any:
    """The C function. Raises RuntimeError where no library has it.

    A module older than csrc/ may take other arguments, which ctypes cannot tell: it is an error.
    """
    found = _functions.get(name)
    if found is None:
        if _library is None:
            raise RuntimeError("the compiled module has no CUDA kernels here")
        if not _emulated and extension.stale():
            raise RuntimeError(
                "csrc/ has changed since the compiled module was built; run 'make build'"
            )
        found = getattr(_library, f"fastdiff_cuda_{name}")
        found.argtypes = [_TYPES[letter] for letter in _declared[name]]
        found.restype = ctypes.c_char_p
        _functions[name] = found
    return found


def address(x: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for None."""
    return None if x is None else x.data_ptr()


def parameter(x: Tensor | None) -> tuple[int | None, int]:
    """Address and dtype code of a dense parameter tensor; (None, 0) for None.

    Raises:
        ValueError: a dtype that the kernels do not read.
    """
    if x is None:
        return None, 0
    if x.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"a parameter must be one of {known}, got {x.dtype}; use its .float()")
    return x.data_ptr(), DTYPES[x.dtype]


def ask(name: str, device: int, *arguments: Any) -> str | None:
    """Call a function that starts no kernel, on a device, its first argument; what it refuses."""
    with nullcontext() if _emulated else torch.cuda.device(device):
        error = function(name)(device, *arguments)
    return None if error is None else error.decode()


def launch(name: str, x: Tensor, *arguments: Any) -> None:
    """Call a launcher on the device and the current stream of x; its first two arguments are those.

    Raises:
        RuntimeError: CUDA refused, with the shape of x.
    """
    if x.is_cuda:
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            error = function(name)(x.device.index, stream, *arguments)
    else:
        error = function(name)(0, None, *arguments)
    if error is not None:
        raise RuntimeError(
            f"{name}: {error.decode()} (x: {str(x.dtype).removeprefix('torch.')} "
            f"{tuple(x.shape)} on {x.device})"
        )


def aligned(*tensors: Tensor | None) -> bool:
    """True where all begin at a multiple of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


@dataclass(frozen=True)
class Launch:
    """A launch and what it takes of its GPU, as CUDA's runtime tells it (csrc/launch.cuh)."""

    kernel: str
    """The C++ name, mangled."""
    blocks: int
    threads: int
    """Of a block."""
    cluster: int
    """Blocks of a cluster; 1: without clusters."""
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread's memory: arrays that are indexed at run time, and spilled registers."""
    fixed_shared: int
    """Bytes of a block's shared memory whose size stands in the source."""
    shared: int
    """Bytes of a block's shared memory that the launch asks for."""
    binary: int
    """The architecture whose code runs: 90 is sm_90."""
    resident: int
    """Blocks that a multiprocessor has room for at a time."""
    clusters: int
    """Clusters that the GPU has room for at a time; 0 without clusters."""
    multiprocessors: int
    most_threads: int
    """Of a multiprocessor."""

    @property
    def occupancy(self) -> float:
        """Threads a multiprocessor has room for, as a share of the most it can have."""
        return self.resident * self.threads / self.most_threads


declare("watch", "ii")
declare("seen", "qqpp")


@contextmanager
def watched(*, start: bool = True) -> Iterator[list[Launch]]:
    """The launches of the CUDA kernels inside the block; the list is filled at its end.

    start: False asks what launches would take and starts no kernel: results stay unwritten.
    Backward passes run on the calling thread inside the block, since each thread has its own list.

    Raises:
        RuntimeError: there are no CUDA kernels here.
    """
    watch, seen = function("watch"), function("seen")
    found: list[Launch] = []
    watch(1, start)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield found
        name, fields = ctypes.create_string_buffer(4096), (ctypes.c_int64 * 12)()
        where = ctypes.addressof(name), ctypes.addressof(fields)
        while seen(len(found), len(name), *where) is None and name.value:
            found.append(Launch(name.value.decode(), *fields))
    finally:
        watch(0, True)


declare("usable", "i")


@lru_cache
def _refusal(device: int) -> str | None:
    error = ask("usable", device)
    if error is None:
        return None
    assert extension.native is not None
    name = torch.cuda.get_device_name(device)
    built = extension.native.build()["cuda_architectures"]
    return (
        f"the compiled kernels do not run on cuda:{device} ({name}): {error}; they were "
        f"built for {built} (TORCH_CUDA_ARCH_LIST names others when fastdiff is installed)"
    )


@torch.compiler.assume_constant_result  # Dynamo does not trace ctypes
def refusal(device: int) -> str | None:
    """Why a device cannot run the kernels (an old driver, no code for it), or None."""
    return _refusal(device)


def elsewhere(x: Tensor, **others: Any) -> str | None:
    """What stands against tensors on another device than x, by their names, or None."""
    for name, t in others.items():
        if isinstance(t, Tensor) and t.device != x.device:
            return f"{name} must be on the device of x, {x.device}, got {t.device}"
    return None


def register(
    op: Op,
    function: Callable[..., Any],
    registered: Callable[..., Any],
    objection: Callable[..., str | None] = _no_objection,
    *,
    dtypes: tuple[torch.dtype, ...] = SUPPORTED,
) -> None:
    """Enter the CUDA implementation of an op; into the dispatcher if there are kernels to run.

    function: what plain tensors go to; registered: the same, known to PyTorch, for those that want
    a gradient or are traced. objection, dtypes: as `why_not` and `dtypes` of `Implementation`.
    """

    def why_not(*args: Any, **kwargs: Any) -> str | None:
        x = first_tensor(args, kwargs)
        refused = refusal(x.device.index or 0) if x.is_cuda else None
        return refused or objection(*args, **kwargs)

    implementation = Implementation(
        backend="cuda",
        function=registered,
        direct=function,
        why_not=why_not,
        devices=("cuda",),
        dtypes=dtypes,
    )
    IMPLEMENTATIONS[op.name] = implementation
    if _library is not None:
        op.register(implementation)


@contextmanager
def using_library(library: ctypes.CDLL) -> Iterator[None]:
    """Run the launchers of another library, on CPU tensors when "cuda" is asked for by name."""
    global _library, _emulated
    before = _library, _emulated, {name: op.implementations for name, op in OPS.items()}
    _library, _emulated = library, True
    _functions.clear()
    for name, implementation in IMPLEMENTATIONS.items():
        OPS[name].register(replace(implementation, emulated_on=("cpu",)))
    try:
        yield
    finally:
        _library, _emulated = before[:2]
        _functions.clear()
        for name, registered in before[2].items():
            OPS[name].implementations = registered
