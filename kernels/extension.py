"""The compiled module `fastdiff.kernels._native`, or the reason why there is none.

It is built from ``csrc/`` by setup.py and holds no torch header: its functions take addresses,
sizes and strides. Its loops run on the threads of torch's own pool, through the C function
``torch_parallel_for``; where a torch does not have that one, they run on the calling thread.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import UNAVAILABLE, Implementation, Op, _no_objection

native: Any = None
"""The module; None where it is not built or does not load."""


def _why_missing(error: ImportError) -> str:
    if find_spec("fastdiff.kernels._native") is not None:
        return f"the compiled module does not load: {error}"
    told = Path(__file__).with_name("_native_missing.txt")  # setup.py left it
    if told.exists():
        return f"the compiled module was not built: {told.read_text().strip()}"
    return (
        "the compiled module is not built here; with a C++ compiler, 'make build' or "
        "installing again builds it"
    )


try:
    native = import_module("fastdiff.kernels._native")
except ImportError as error:
    MISSING = _why_missing(error)
    UNAVAILABLE["cpu"] = UNAVAILABLE["cuda"] = MISSING

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The codes of csrc/kernels.h."""


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
    if native is None or not (sources / "bindings.cpp").exists():
        return False
    total = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            total.update(path.name.encode() + path.read_bytes())
    return bool(total.hexdigest()[:16] != native.build()["digest"])


def address(x: Tensor | None) -> int:
    """Where the numbers of a dense tensor begin; 0 for None and for no numbers."""
    return 0 if x is None else x.data_ptr()


def room(*shape: int, zeros: bool = False) -> Tensor:
    """fp32 memory on the CPU for a kernel to fill, whatever PyTorch's default dtype and device."""
    make = torch.zeros if zeros else torch.empty
    return make(shape, dtype=torch.float32, device="cpu")


def as_float(x: Tensor | None) -> Tensor | None:
    """A parameter as dense fp32."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def as_dtype_or_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x if it has the dtype, else as fp32: what a kernel takes for a second operand."""
    return x if x.dtype is dtype or x.dtype is torch.float32 else x.float()


def register(
    op: Op,
    function: Callable[..., Any],
    registered: Callable[..., Any],
    objection: Callable[..., str | None] = _no_objection,
    *,
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES),
    slower: Callable[..., str | None] = _no_objection,
) -> None:
    """Enter the CPU implementation of an op, if the module is there.

    function: what plain tensors go to; registered: the same, known to PyTorch. objection, dtypes,
    slower: as `why_not`, `dtypes` and `slower` of `Implementation`.
    """
    if native is not None:
        implementation = Implementation(
            backend="cpu",
            function=registered,
            direct=function,
            why_not=objection,
            devices=("cpu",),
            dtypes=dtypes,
            slower=slower,
        )
        op.register(implementation)


def reference_gradients(
    reference: Callable[..., Any], inputs: Sequence[Any], outputs_gradient: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of a reference, differentiable once more: for second derivatives.

    A backward pass calls it when a graph of it is wanted (gradients are enabled in it).
    """
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    y = reference(*inputs)
    outputs = y if isinstance(y, tuple) else (y,)
    found = iter(torch.autograd.grad(outputs, leaves, outputs_gradient, create_graph=True))
    return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)
