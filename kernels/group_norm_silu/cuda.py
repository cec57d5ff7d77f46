"""The CUDA kernels of `group_norm_silu`, `add_group_norm_silu` and `cat_group_norm_silu`; their
launchers are in csrc/cuda/group_norm_silu.cu."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import cuda
from ..choose import without
from ..views import all_contiguous, memory_format_of, rows_apart
from .joined import joined_like, of_two_inputs

cuda.declare("group_norm_plan", "iiiqiqiiqiip")
cuda.declare("group_norm_backward_plan", "iiiqiqiiqiip")
cuda.declare("group_norm_silu", "ipiiqiqipppippppipipipiqppfi")
cuda.declare("group_norm_silu_backward", "ipiiqiqippppippppppipipipppi")

ON_CHIP: int | None = None
"""Limit on the shared memory of a block of the CUDA kernel, in bytes; None: the device's limit."""
CLUSTER: int | None = None
"""Blocks that share a sample's groups through a cluster's shared memory; None: the plan decides."""


@dataclass(frozen=True)
class _CudaLayout:
    """x as the CUDA kernels expect it: dense, (N, S, C) if channels_last, else (N, C, S); and skip,
    laid out like x, whose channels follow those of x."""

    x: Tensor
    skip: Tensor | None
    n: int
    c: int
    """Channels of both."""
    s: int
    channels_last: bool

    def dense(self, t: Tensor) -> Tensor:
        """Convert a tensor of x's shape to its layout and dtype."""
        return t.to(self.x.dtype).contiguous(memory_format=memory_format_of(self.x))

    def like(self, t: Tensor | None) -> Tensor | None:
        """`dense` for a tensor that may be None."""
        return None if t is None else self.dense(t)

    def plan(self, groups: int, *tensors: Tensor | None, backward: bool = False) -> Any:
        """How the kernels split x, given ON_CHIP and CLUSTER (NCHW backward uses no clusters)."""
        limit = -1 if ON_CHIP is None else ON_CHIP
        cluster = 0 if CLUSTER is None or (backward and not self.channels_last) else CLUSTER
        device, dtype = self.x.device.index or 0, cuda.DTYPES[self.x.dtype]
        packed = cuda.aligned(self.x, self.skip, *tensors)
        if self.skip is not None:  # a pack of 16 bytes must not have channels of both
            packed = packed and self.x.shape[1] * self.x.element_size() % 16 == 0
        sizes = self.n, self.c, self.s, groups, packed
        name = "group_norm_backward_plan" if backward else "group_norm_plan"
        return cuda_plan(
            name, device, dtype, self.channels_last, *sizes, limit, cluster, cluster > 0
        )


@lru_cache(4096)
def cuda_plan(name: str, *arguments: int) -> Any:
    """NormPlan of csrc/cuda/norm_plan.h as an array of its fields.

    Args:
        name: "group_norm_plan" or "group_norm_backward_plan".
        arguments: the device, a code of DTYPES, channels_last, N, C, S, the number of groups,
            whether all tensors are aligned, and limits; see csrc/cuda/group_norm_silu.cu.

    Raises:
        RuntimeError: a group does not fit into a cluster of the requested size.
    """
    fields = (ctypes.c_int64 * 10)()
    error = cuda.ask(name, *arguments, ctypes.addressof(fields))
    if error is not None:
        device, dtype, last, n, c, s, groups, _, limit, cluster, _ = arguments
        kind = next(key for key, code in cuda.DTYPES.items() if code == dtype)
        layout = f"({n}, {s}, {c})" if last else f"({n}, {c}, {s})"
        raise RuntimeError(
            f"{name}: {error} (x: {kind} {layout} in memory, {groups} groups, on cuda:{device}; "
            f"clusters of {cluster or 'any size'}, "
            f"{'all' if limit < 0 else limit} bytes of shared memory per block)"
        )
    return fields


def _cuda_layout(x: Tensor, skip: Tensor | None = None) -> _CudaLayout:
    form = memory_format_of(x)
    x = x.contiguous(memory_format=form)
    n, c = x.shape[:2]
    if skip is not None:
        skip = skip.to(x.dtype).contiguous(memory_format=form)
        c += skip.shape[1]
    s = math.prod(x.shape[2:])
    return _CudaLayout(x, skip, n, c, s, form != torch.contiguous_format or s == 1)


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
    keep: bool,
    *,
    skip: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((y, total), statistics) for x + channel_add + residual; without addends total is x.
    The norm is that of the total followed by the channels of skip.

    statistics: (N, G, 3) fp32, the mean in two parts and 1 / sqrt(v + eps). The kernels pass them
    to each other, so they are written whether or not `keep` is set.
    """
    add = channel_add is not None or residual is not None
    layout = _cuda_layout(x, skip)
    x, skip = layout.x, layout.skip
    y = torch.empty_like(x) if skip is None else joined_like(x, skip)
    total = torch.empty_like(x) if add else x
    statistics = torch.empty(layout.n, num_groups, 3, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return (y, total), statistics
    weight, bias, scale_shift = all_contiguous(weight, bias, scale_shift)
    channel_add, add_stride = rows_apart(channel_add)
    residual = layout.like(residual)
    plan = layout.plan(num_groups, y, total, residual)
    workspace = torch.empty(plan[8], dtype=torch.float32, device=x.device)
    cuda.launch(
        "group_norm_silu", x, cuda.DTYPES[x.dtype], layout.channels_last,
        layout.n, layout.c, layout.s, num_groups, plan,
        x.data_ptr(), cuda.address(skip), x.shape[1], y.data_ptr(), statistics.data_ptr(),
        workspace.data_ptr(),
        *cuda.parameter(weight), *cuda.parameter(bias), *cuda.parameter(scale_shift),
        *cuda.parameter(channel_add), add_stride, cuda.address(residual),
        total.data_ptr() if add else None, eps, activation == "silu",
    )  # fmt: skip
    return (y, total), statistics


def gradients(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
    statistics: Tensor,
    needs: Sequence[bool],
    *,
    skip: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x (the total), weight, bias, channel_add, scale_shift and skip."""
    layout = _cuda_layout(x, skip)
    x, c = layout.x, layout.c
    dx = torch.empty_like(x)
    dskip = None if layout.skip is None else torch.empty_like(layout.skip)
    dweight, dbias = (torch.zeros(c, dtype=torch.float32, device=x.device) for _ in range(2))
    parameters = weight, bias, scale_shift
    weight, bias, scale_shift = all_contiguous(*parameters)
    film = 0 if scale_shift is None else scale_shift.numel()
    dscale_shift = torch.zeros(film, dtype=torch.float32, device=x.device)
    if scale_shift is not None:
        dscale_shift = dscale_shift.view(scale_shift.shape)
    if dy.numel():
        _run_backward(
            layout, (dy, dtotal, dx, dskip), statistics, (weight, bias, scale_shift), activation,
            (dweight, dbias, dscale_shift if film else None),
        )  # fmt: skip
    dchannel_add = None
    if needs[3] and channel_add is not None:
        over = [*([] if channel_add.ndim == 2 else [0]), *range(2, dx.ndim)]
        dchannel_add = dx.sum(over, dtype=torch.float32) if over else dx.clone()
        dchannel_add = dchannel_add.to(channel_add.dtype)
    pairs = zip(parameters, (dweight, dbias, dscale_shift), strict=True)
    of_weight, of_bias, of_film = (None if p is None else g.to(p.dtype) for p, g in pairs)
    return dx, of_weight, of_bias, dchannel_add, of_film, dskip


def backward(*args: Any) -> tuple[Tensor | None, ...]:
    """`gradients` without that of skip."""
    return gradients(*args)[:-1]


def _run_backward(
    layout: _CudaLayout,
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    statistics: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
    sums: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Fill dx and dskip, the last of the tensors (dy, dtotal, dx, dskip), and the sums dweight,
    dbias and dscale_shift, which are fp32 zeros on entry."""
    x, c, groups = layout.x, layout.c, statistics.shape[1]
    dy, dtotal, dx, dskip = tensors
    dy, dtotal = layout.dense(dy), layout.like(dtotal)
    plan = layout.plan(groups, dy, dtotal, dx, dskip, backward=True)
    numbers = plan[8] + 2 * layout.n * (c + groups)
    workspace = torch.empty(numbers, dtype=torch.float32, device=x.device)
    cuda.launch(
        "group_norm_silu_backward", x, cuda.DTYPES[x.dtype], layout.channels_last,
        layout.n, c, layout.s, groups, plan,
        dy.data_ptr(), x.data_ptr(), cuda.address(layout.skip), x.shape[1], cuda.address(dtotal),
        dx.data_ptr(), cuda.address(dskip), statistics.data_ptr(), workspace.data_ptr(),
        *(part for p in parameters for part in cuda.parameter(p)),
        *map(cuda.address, sums), activation == "silu",
    )  # fmt: skip


def _settings() -> tuple[int | None, int | None]:
    return ON_CHIP, CLUSTER


_cat_forward, _cat_backward = of_two_inputs(forward, gradients)
CAT = cuda.cuda_backend(forward=_cat_forward, backward=_cat_backward, settings=_settings)
"""The backend of `cat_group_norm_silu`."""
ADDING = cuda.cuda_backend(forward=forward, backward=backward, settings=_settings)
"""The backend of `add_group_norm_silu`."""
BACKEND = without(ADDING, slice(4, 6), gradients=slice(3, 4))
