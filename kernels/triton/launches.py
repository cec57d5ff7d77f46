"""Launching Triton kernels, or recording the launches without running them.

Every kernel is started by `launch`, so `recording_launches` can record launches instead of running
them: a call on meta tensors then shows which kernels, grids and constants a real call would use.
`benchmarks.resources` compiles those ahead of time for GPUs that this machine does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import plans
from ..choose import EMULATED, UNAVAILABLE

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
    UNAVAILABLE["triton"] = "the package triton is not installed (it has wheels only for Linux)"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""True under TRITON_INTERPRET=1: kernels run in Python, on CPU tensors too. Fixed at import."""
if INTERPRETED:
    EMULATED["triton"] = ("cpu",)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without triton, returns the function unchanged (it is never called then)."""
    return function if triton is None else triton.jit(function)


def constexpr_function(function: Callable[..., Any]) -> Any:
    """`triton.constexpr_function`: plain Python on constants, called inside a kernel."""
    return function if triton is None else triton.constexpr_function(function)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel, with its arguments by parameter name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Tensors, numbers and None, then constants."""
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None
_architecture: str | None = None


def recorded_architecture() -> str | None:
    """The architecture passed to `recording_launches`; None outside of it."""
    return _architecture


@contextmanager
def recording_launches(architecture: str | None = None) -> Iterator[list[Launch]]:
    """Record launches in a list instead of running them, with the configs of `architecture`.

    Meant for calls on meta tensors: the outputs hold no data.
    """
    global _recorded, _architecture
    before = _recorded, _architecture
    _recorded, _architecture = [], architecture
    try:
        with plans.paused():
            yield _recorded
    finally:
        _recorded, _architecture = before


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run a kernel on the device and the current stream of its first tensor.

    Args:
        kernel: a function under `jit`.
        grid: programs along up to three axes; nothing runs if one is 0.
        arguments: the kernel's tensors and numbers, in order.
        constants: its `tl.constexpr` parameters.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        names = kernel.arg_names
        bound = {**dict(zip(names, arguments, strict=False)), **constants}
        assert set(bound) == set(names), f"{set(names) ^ set(bound)} of {kernel.__name__}"
        _recorded.append(
            Launch(
                kernel=kernel,
                grid=tuple(grid),
                arguments=bound,
                num_warps=num_warps,
                num_stages=num_stages,
            )
        )
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    notes = plans.recording()
    with (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        nullcontext() if notes is None else notes.suspended(),
    ):
        compiled = kernel[tuple(grid)](
            *arguments, **constants, num_warps=num_warps, num_stages=num_stages
        )
    if notes is not None:
        bound = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
        ordered = [bound[name] for name in kernel.arg_names]
        if INTERPRETED:
            warps = {"num_warps": num_warps, "num_stages": num_stages}
            notes.launched(_interpreted(kernel, tuple(grid), ordered, warps), ordered)
        elif kernel.pre_run_hooks or not hasattr(compiled, "packed_metadata"):
            notes.reason = f"{kernel.__name__} has hooks, or is compiled in the background"
        else:
            notes.launched(_compiled(compiled, (*grid, 1, 1)[:3]), ordered)


def _compiled(kernel: Any, grid: Sequence[int]) -> plans.Start:
    """Starts a kernel that Triton has compiled, as `JITFunction.run` does once it has found it.

    Triton's launcher accepts addresses in the place of tensors.
    """
    run, runtime = kernel.run, triton.knobs.runtime
    x, y, z = grid
    function, metadata = kernel.function, kernel.packed_metadata

    def start(stream: int | None, arguments: list[Any]) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if _has_hooks(enter) or _has_hooks(leave):  # of a profiler
            described = kernel.launch_metadata((x, y, z), stream or 0, *arguments)
            run(
                x, y, z, stream or 0, function, metadata, described, enter, leave, *arguments
            )  # fmt: skip
        else:
            run(x, y, z, stream or 0, function, metadata, None, None, None, *arguments)

    return start


def _has_hooks(chain: Any) -> bool:
    """Whether a hook is set. Since Triton 3.5 a hook is a chain of functions that may be empty."""
    return bool(getattr(chain, "calls", chain))


def _interpreted(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], warps: dict[str, int]
) -> plans.Start:
    """Starts a kernel in Triton's interpreter, which needs tensors."""
    tensors = [
        (place, plans.span(a), a.dtype)
        for place, a in enumerate(arguments)
        if isinstance(a, Tensor) and a.numel()
    ]

    def start(stream: int | None, arguments: list[Any]) -> None:
        for place, size, dtype in tensors:
            arguments[place] = plans.as_tensor(arguments[place], size, dtype)
        kernel[grid](**dict(zip(kernel.arg_names, arguments, strict=True)), **warps)

    return start
