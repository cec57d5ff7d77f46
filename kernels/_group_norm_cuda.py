"""The CUDA kernels of `group_norm_silu` and `add_group_norm_silu`; their launchers are in
csrc/group_norm_silu.cu."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels import _cuda
from fastdiff.kernels._group_norm import memory_format_of

_cuda.declare("group_norm_plan", "iiiqiqiiqiip")
_cuda.declare("group_norm_backward_plan", "iiiqiqiiqiip")
_cuda.declare("group_norm_silu", "ipiiqiqippppppipipipiqppfi")
_cuda.declare("group_norm_silu_backward", "ipiiqiqippppppppipipipppi")

ON_CHIP: int | None = None
"""Bytes of shared memory that a block of the CUDA kernel may fill; None: what the device has."""
CLUSTER: int | None = None
"""Blocks that share a sample's groups through a cluster's shared memory; None: as planned."""


@dataclass(frozen=True)
class _CudaLayout:
    """x as the CUDA kernels take it: dense, (N, S, C) with channels_last, else (N, C, S)."""

    x: Tensor
    n: int
    c: int
    s: int
    channels_last: bool

    def dense(self, t: Tensor) -> Tensor:
        """A tensor of x's shape in its layout and dtype."""
        return t.to(self.x.dtype).contiguous(memory_format=memory_format_of(self.x))

    def like(self, t: Tensor | None) -> Tensor | None:
        """`dense` of a tensor that may be None."""
        return None if t is None else self.dense(t)

    def plan(self, groups: int, *tensors: Tensor | None, backward: bool = False) -> Any:
        """How the kernels cut it up, by ON_CHIP and CLUSTER (NCHW has no clusters backward)."""
        limit = -1 if ON_CHIP is None else ON_CHIP
        cluster = 0 if CLUSTER is None or (backward and not self.channels_last) else CLUSTER
        device, dtype = self.x.device.index or 0, _cuda.DTYPES[self.x.dtype]
        sizes = self.n, self.c, self.s, groups, _cuda.aligned(self.x, *tensors)
        name = "group_norm_backward_plan" if backward else "group_norm_plan"
        return cuda_plan(
            name, device, dtype, self.channels_last, *sizes, limit, cluster, cluster > 0
        )


@lru_cache(4096)
def cuda_plan(name: str, *arguments: int) -> Any:
    """The fields of csrc/norm_plan.h's NormPlan, by "group_norm_plan" or the backward pass's.

    arguments: the device, a code of DTYPES, channels_last, N, C, S, the groups, whether all is
    aligned, and limits: see csrc/group_norm_silu.cu.

    Raises:
        RuntimeError: a cluster of the size asked for does not hold a group.
    """
    fields = (ctypes.c_int64 * 10)()
    error = _cuda.ask(name, *arguments, ctypes.addressof(fields))
    if error is not None:
        device, dtype, last, n, c, s, groups, _, limit, cluster, _ = arguments
        kind = next(key for key, code in _cuda.DTYPES.items() if code == dtype)
        layout = f"({n}, {s}, {c})" if last else f"({n}, {c}, {s})"
        raise RuntimeError(
            f"{name}: {error} (x: {kind} {layout} in memory, {groups} groups, on cuda:{device}; "
            f"clusters of {cluster or 'any size'}, "
            f"{'all' if limit < 0 else limit} bytes of shared memory a block)"
        )
    return fields


def _cuda_layout(x: Tensor) -> _CudaLayout:
    form = memory_format_of(x)
    x = x.contiguous(memory_format=form)
    n, c = x.shape[:2]
    s = math.prod(x.shape[2:])
    return _CudaLayout(x, n, c, s, form != torch.contiguous_format or s == 1)


def _dense(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if p is None else p.contiguous() for p in parameters)


def why_not_cuda(x: Tensor, num_groups: int, *parameters: Any, **others: Any) -> str | None:
    """What stands against the CUDA kernels of both norms, or None."""
    named = dict(zip(("weight", "bias"), parameters, strict=False))
    return _cuda.elsewhere(x, **named, **others)


def norm_cuda(
    x: Tensor,
    num_groups: int,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    eps: float,
    silu: bool,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    add: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the total (x itself without `add`) and the statistics (N, G, 3).

    parameters: weight, bias, scale_shift.
    """
    layout = _cuda_layout(x)
    x = layout.x
    y = torch.empty_like(x)
    total = torch.empty_like(x) if add else x
    stats = torch.empty(layout.n, num_groups, 3, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, total, stats
    weight, bias, scale_shift, channel_add = _dense(*parameters, channel_add)
    residual = layout.like(residual)
    plan = layout.plan(num_groups, y, total, residual)
    workspace = torch.empty(plan[8], dtype=torch.float32, device=x.device)
    _cuda.launch(
        "group_norm_silu", x, _cuda.DTYPES[x.dtype], layout.channels_last,
        layout.n, layout.c, layout.s, num_groups, ctypes.addressof(plan),
        x.data_ptr(), y.data_ptr(), stats.data_ptr(), workspace.data_ptr(),
        *_cuda.parameter(weight), *_cuda.parameter(bias), *_cuda.parameter(scale_shift),
        *_cuda.parameter(channel_add),
        layout.c if channel_add is not None and channel_add.ndim == 2 else 0,
        _cuda.address(residual), total.data_ptr() if add else None, eps, silu,
    )  # fmt: skip
    return y, total, stats


def norm_backward_cuda(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    silu: bool,
    *,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (with dtotal added), and fp32 dweight (C,), dbias (C,), dscale_shift (N, 2C).

    dscale_shift is (0,) where there is no scale_shift.
    """
    layout = _cuda_layout(x)
    x, c, groups = layout.x, layout.c, stats.shape[1]
    dx = torch.empty_like(x)
    dweight, dbias = (torch.zeros(c, dtype=torch.float32, device=x.device) for _ in range(2))
    weight, bias, scale_shift = _dense(*parameters)
    film = 0 if scale_shift is None else scale_shift.numel()
    dscale_shift = torch.zeros(film, dtype=torch.float32, device=x.device)
    if scale_shift is not None:
        dscale_shift = dscale_shift.view(scale_shift.shape)
    if x.numel() == 0:
        return dx, dweight, dbias, dscale_shift
    dy, dtotal = layout.dense(dy), layout.like(dtotal)
    plan = layout.plan(groups, dy, dtotal, dx, backward=True)
    numbers = plan[8] + 2 * layout.n * (c + groups)
    workspace = torch.empty(numbers, dtype=torch.float32, device=x.device)
    _cuda.launch(
        "group_norm_silu_backward", x, _cuda.DTYPES[x.dtype], layout.channels_last,
        layout.n, c, layout.s, groups, ctypes.addressof(plan),
        dy.data_ptr(), x.data_ptr(), _cuda.address(dtotal), dx.data_ptr(), stats.data_ptr(),
        workspace.data_ptr(), *_cuda.parameter(weight), *_cuda.parameter(bias),
        *_cuda.parameter(scale_shift), dweight.data_ptr(), dbias.data_ptr(),
        dscale_shift.data_ptr() if film else None, silu,
    )  # fmt: skip
    return dx, dweight, dbias, dscale_shift


@torch.library.custom_op("fastdiff::group_norm_silu_backward_cuda", mutates_args=())
def norm_backward_cuda_op(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    dtotal: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_backward_cuda` as PyTorch knows it."""
    parameters = (weight, bias, scale_shift)
    return norm_backward_cuda(dy, x, stats, parameters, silu, dtotal=dtotal)


@norm_backward_cuda_op.register_fake
def _norm_backward_cuda_fake(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    dtotal: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format_of(x))
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    film = (0,) if scale_shift is None else scale_shift.shape
    return dx, dweight, dbias, x.new_empty(film, dtype=torch.float32)


def parameter_gradients(
    parameters: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Each gradient in its parameter's dtype; None where there is no parameter."""
    return tuple(
        None if p is None else g.to(p.dtype) for p, g in zip(parameters, gradients, strict=True)
    )
