"""The providers that can do an op's work, and how an op declares that work to benchmarks."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastdiff import kernels
from fastdiff.bench.shapes import Call, Job, Shape
from fastdiff.kernels import Work
from fastdiff.kernels.choose import bound_arguments

Direction = Literal["forward", "backward"]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
LIBRARY = tuple(SDPA)
FAST_BYTES, FAST_FLOPS = 4e12, 8e14
"""Rates of a fast current GPU; they decide the timing method, which all providers share."""
LAUNCH_S = 10e-6
OURS = ("triton", "cuda")
CHOICES = (*OURS, "library")
"""Backends among which measurements decide what `auto` tries first on a GPU."""
EVERYTHING = (*CHOICES, "reference", "eager", "eager channels_last", "compile", *LIBRARY)
LATER = tuple(name for name in EVERYTHING if name not in ("reference", "compile", "sdpa math"))
"""Providers timed at less important shapes: without those that are slow to compile or to run."""


@dataclass(frozen=True)
class Make:
    """Makes the operands of a call: random numbers, because zeros multiply faster."""

    dtype: torch.dtype
    device: torch.device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def channels_last(self, *shape: int) -> Tensor:
        return self(*shape).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The declaration of an op for benchmarks."""

    op: str
    arguments: Callable[[Call, Job, Make], Arguments]
    """Makes the operands, in the layout of `runtime.prepare`."""
    eager: Callable[..., Any]
    """What people write, with the op's signature."""
    operands: Callable[[Shape], tuple[Shape, ...]] | None = None
    """Shape of x -> the shapes of all positional tensors; None: x alone does not determine them."""
    gradients_first: bool = False
    """Whether the gradients have a goal: then they are measured among the first."""
    norm: bool = False
    """Whether eager is also measured on NCHW."""
    written_out: Callable[..., Any] | None = None
    """What people write without a library, if `eager` is a library's kernel."""
    sdpa: bool = False
    """Whether `eager` is PyTorch's attention, each of whose kernels is measured."""

    def work(
        self, call: Call, job: Job, dtype: torch.dtype, direction: Direction = "forward"
    ) -> Work:
        """The work that the op declares for these operands."""
        args, kwargs = self.arguments(call, job, Make(dtype, torch.device("meta")))
        op, passed = kernels.OPS[self.op], bound_arguments(self.op, args, kwargs)
        return op.work(*passed, **({"backward": True} if direction == "backward" else {}))

    @property
    def limit(self) -> Literal["copy", "matmul"]:
        return "matmul" if self.sdpa else "copy"

    @property
    def providers(self) -> tuple[str, ...]:
        names = [*OURS, "reference", "eager"]
        names += ["eager channels_last"] if self.norm else []
        names += ["library", *LIBRARY] if self.sdpa else ["compile"]
        return tuple(names)

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """Provider -> function of the operands, for benchmarks/bench_ops.py."""
        by_hand = {"reference": self.ours, "eager": self.written_out or self.eager}
        return {**by_hand, "library": self.eager} if self.written_out else by_hand

    @property
    def cpu_providers(self) -> tuple[str, ...]:
        return (*self.functions, "compile", "sgemm" if self.limit == "matmul" else "copy")

    def ours(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(kernels, self.op)(*args, **kwargs)


def compiled_for(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str = "inductor",
) -> Callable[..., Any]:
    """``torch.compile(function)``, compiled for these arguments."""
    torch.compiler.reset()
    result = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
    result(*args, **kwargs)
    return result


def import_diffusers() -> Any:
    """Import diffusers, silencing its warnings.

    It must not mistake our folder `kernels` for the package of that name.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError("diffusers is not installed")
    absent = sys.modules.setdefault("kernels", None) is None  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers

            for name in ("UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler"):
                getattr(diffusers, name)
    finally:
        if absent:
            del sys.modules["kernels"]
    return diffusers
