"""Kernel launches, bytes and FLOPs of a training step of a network, counted without a GPU.

The rules are those of launches.py, for the forward pass that keeps what the backward pass needs and
for the backward pass. Beyond them:

    convolution, backward       1 for each gradient: of the input, the weight and the bias
    linear layer, backward      its two products, and 1 for the bias, a sum
    group_norm, backward        3, as PyTorch launches them: sums, scales per group, result
    attention of PyTorch        3, as flash attention launches them; its products count 5 times a
                                product of Q and K, because it computes the scores again
    ops of fastdiff.kernels     what the Triton backend's backward function launches, and what it
                                leaves to PyTorch

Weights are bf16, as are their gradients. The loss and the optimizer are not counted: they are the
same whatever computes the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import kernels
from fastdiff.bench.launches import (
    DTYPE,
    LAUNCHES,
    OURS,
    Attention,
    Count,
    Counting,
    diffusers_network,
    moved_bytes,
)
from fastdiff.bench.predict import H200
from fastdiff.bench.shapes import GPU_JOBS
from fastdiff.extras import import_extra
from fastdiff.kernels import shapes_only
from fastdiff.kernels.triton import recording_launches
from fastdiff.models.network import network_family

BACKWARD: dict[str, tuple[str, int]] = {
    "native_group_norm_backward": ("norm", 3),
    "native_layer_norm_backward": ("norm", 2),  # the input's gradient; those of weight and bias
    "silu_backward": ("other", 1),
    "gelu_backward": ("other", 1),
    "upsample_nearest2d_backward": ("other", 1),
    "embedding_dense_backward": ("other", 1),
    "slice_backward": ("other", 2),  # zeros, then the slice
    "select_backward": ("other", 2),
    "sum": ("other", 1),
    "stack": ("concatenation", 1),
    "neg": ("other", 1),
    "zero_": ("other", 1),
    "new_zeros": ("other", 1),
    "ones_like": ("other", 1),
}
"""PyTorch's operators of backward passes -> their group and launches, besides `LAUNCHES`."""
FLASH_BACKWARD = 3
NAME = "SD 1.5 U-Net"
BATCH = 8


class CountingTraining(Counting):
    """Counts what autograd runs too."""

    table: Mapping[str, tuple[str, int]] = MappingProxyType({**LAUNCHES, **BACKWARD})
    keeps = True

    def other(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if name == "convolution_backward":
            return self._convolution_backward(func, args)
        return super().other(name, func, args, kwargs)

    def ours(self, name: str, args: tuple[Any, ...]) -> None:
        if not name.endswith("_backward"):
            super().ours(name, args)
            return
        op = kernels.OPS[name.removesuffix("_backward")]
        *rest, _mark, needs = args
        backward = op.backends["triton"].backward
        assert backward is not None, f"no backward pass of {op.name} in Triton"
        with recording_launches(H200.architecture) as launched, torch.no_grad(), self:
            backward(*rest, needs)
        self.found.recorded += launched
        work = op.work(*op.kept_arguments(rest), backward=True)
        self.add(OURS[op.name], len(launched), work.bytes, work.flops, ours=True)

    def _convolution_backward(self, func: Any, args: tuple[Any, ...]) -> Any:
        made = func(*args)
        gradient, x, weight = args[:3]
        flops = 2 * gradient.numel() * math.prod(weight.shape[1:])
        operands = (gradient, weight), (gradient, x)
        for of, result in zip(operands, made[:2], strict=True):
            if result is not None:
                self.add("convolution", 1, moved_bytes(of, result), flops)
        if made[2] is not None:
            self.add("convolution bias", 1, moved_bytes(gradient, made[2]))
        return made


class _Attention(Attention):
    """PyTorch's attention and its backward pass as flash attention runs them."""

    def count(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = _Flash.apply(self.counting, q, k, v)
        return made


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counting: Counting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.counting = counting
        ctx.save_for_backward(q, k, v)
        n, heads, length, d = q.shape
        with _uncounted():
            made = q.new_empty((n, length, heads, v.shape[-1])).transpose(1, 2)
        flops = 2 * n * heads * length * k.shape[2] * (d + v.shape[-1])
        counting.add("attention", 1, moved_bytes((q, k, v), made), flops)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        n, heads, length, d = q.shape
        with _uncounted():
            made = tuple(torch.empty_like(t) for t in (q, k, v))
        flops = 10 * n * heads * length * k.shape[2] * d
        moved = moved_bytes((gradient, gradient, q, k, v), made)  # and the output, as large
        ctx.counting.add("attention", FLASH_BACKWARD, moved, flops)
        return None, *made


def _uncounted() -> Any:
    return torch.utils._python_dispatch._disable_current_modes()


def count(module: nn.Module, inputs: dict[str, Any]) -> Count:
    """Count the forward and the backward pass of a network on the meta device.

    Raises:
        ValueError: it uses an operator without a number of launches.
    """
    module.train().requires_grad_(requires_grad=True)
    with ExitStack() as modes:
        counting = modes.enter_context(CountingTraining())
        modes.enter_context(_Attention(counting))
        modes.enter_context(kernels.backend("auto"))
        modes.enter_context(shapes_only())
        y = module(**inputs)
        y = y[0] if isinstance(y, tuple) else y
        with _uncounted():
            gradient = torch.empty_like(y)
        y.backward(gradient)
    return counting.found


def native() -> Count:
    """fastdiff's U-Net of Stable Diffusion 1.5."""
    job = GPU_JOBS[NAME]
    with torch.device("meta"):
        network: nn.Module = network_family(job.network).network(job.config)
    module = network.to(DTYPE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return count(module, replace(job, batch=BATCH).inputs("meta", DTYPE))


def of_diffusers(*, accelerated: bool) -> Count:
    """diffusers' U-Net, `accelerated` by `fastdiff.accelerate`."""
    module, inputs = diffusers_network(NAME, batch=BATCH)
    if accelerated:
        import_extra("fastdiff.integrations", extra="diffusers").accelerate(module)
    with torch.device("meta"):
        return count(module, inputs)


HEAD = ("implementation", "launches", "follow", "GB moved", "TFLOP", "norm", "attention", "other")


@cache
def counts() -> dict[str, Count]:
    """Implementation -> its count."""
    return {
        "fastdiff": native(),
        "diffusers, accelerated": of_diffusers(accelerated=True),
        "diffusers": of_diffusers(accelerated=False),
    }


def rows() -> list[tuple[str, ...]]:
    """One row per implementation, after the header."""
    found: list[tuple[str, ...]] = [HEAD]
    for implementation, of in counts().items():
        amounts = f"{of.bytes / 1e9:.2f}", f"{of.flops / 1e12:.2f}"
        kinds = (str(of.launches[kind]) for kind in ("norm", "attention", "other"))
        found.append((implementation, f"{of.total}", f"{of.after_ours}", *amounts, *kinds))
    return found
