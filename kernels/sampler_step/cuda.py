"""The CUDA kernels of `sampler_step`; their launchers are in csrc/cuda/sampler_step.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import cuda
from ..philox_normal.streams import SAMPLER_NOISE
from ..triton import cdiv
from ..views import all_contiguous
from .layout import by_memory, strides_of, why_not

cuda.declare("sampler_step", "ip" + "i" + "pppppppppp" + "pp" + "pp" + "qqqqqqq" + "qi")

PART = 1024
"""Fewest elements of an image whose moments one block computes."""
PARTS = 128
"""Most blocks that share the moments of an image."""
PER_WARP = 128
"""Elements of an image per warp, as in `warps_of` of csrc/cuda/sampler_step.cuh."""


def forward(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    cond: Tensor | None,
    uncond: Tensor | None,
    denoised: Tensor | None,
    finite: Tensor | None,
    log_prob: Tensor | None,
    rescale: bool,
    keep: bool,
) -> tuple[None, None]:
    """Update x, history, denoised, finite and log_prob in place."""
    if x.numel() == 0:
        return None, None
    n, c = x.shape[:2]
    elements, space = x[0].numel(), x[0, 0].numel()
    prediction, (f_c, f_s), f_dense = strides_of(prediction, 1)
    written, x_strides, x_dense = strides_of(x, 1)
    slots, h_strides, h_dense = strides_of(history, 2)
    estimate, d_strides, d_dense = strides_of(x if denoised is None else denoised, 1)
    table, rows, seeds = table.contiguous(), rows.contiguous(), seeds.contiguous()
    cond, uncond, flags, found = all_contiguous(cond, uncond, finite, log_prob)
    inner, images, *along = by_memory(prediction, c, space, f_c, f_s)
    in_order = f_dense or (f_s == c and f_c == 1)
    layouts = (ctypes.c_int64 * 25)(
        *(written.stride(0), *x_strides, space, x_dense),
        *(prediction.stride(0), f_c, f_s, space, f_dense),
        *(slots.stride(1), *h_strides, space, h_dense),
        *(images, *along, inner, in_order),
        *(estimate.stride(0), *d_strides, space, d_dense),
    )
    moments, parts = None, min(PARTS, cdiv(elements, PART))
    if uncond is not None and rescale:
        moments = torch.empty(n, parts, 5, dtype=torch.float32, device=x.device)
    sums = None
    if log_prob is not None:
        sums = torch.empty(n, cdiv(elements, PER_WARP), dtype=torch.float32, device=x.device)
    cuda.launch(
        "sampler_step", x, cuda.DTYPES[prediction.dtype],
        written.data_ptr(), prediction.data_ptr(), slots.data_ptr(), table.data_ptr(),
        rows.data_ptr(), seeds.data_ptr(), cuda.address(cond), cuda.address(uncond),
        None if denoised is None else estimate.data_ptr(), cuda.address(flags),
        cuda.address(moments), layouts, cuda.address(sums), cuda.address(found),
        slots.stride(0), c * f_c, n, len(table), len(prediction), elements, parts,
        int(SAMPLER_NOISE), prediction.shape[1] == 2 * c,
    )  # fmt: skip
    pairs = ((x, written), (history, slots), (denoised, estimate), (finite, flags))
    for given, filled in (*pairs, (log_prob, found)):
        if given is not None and filled is not None and filled is not given:
            given.copy_(filled)
    return None, None


BACKEND = cuda.cuda_backend(
    forward=forward, why_not=why_not, dtypes=(torch.float32,), settings=lambda: PARTS
)
