"""The CUDA kernels of `sampler_step`; their launchers are in csrc/sampler_step.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import cuda
from ._sampler_step import _by_memory, _strides
from .philox_normal.streams import SAMPLER_NOISE
from .triton import cdiv

cuda.declare("sampler_step", "ip" + "i" + "ppppppp" + "p" + "qqqqqq" + "fqii")

PART = 1024
"""The fewest numbers of an image that a block takes the moments of."""
PARTS = 128
"""The most blocks that share the moments of an image."""


def run_step(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    guidance_rescale: float,
) -> None:
    """`sampler_step` by the CUDA kernels."""
    if x.numel() == 0:
        return
    n, c = x.shape[:2]
    elements, space = x[0].numel(), x[0, 0].numel()
    guided, learned = prediction.shape[0] == 2 * n, prediction.shape[1] == 2 * c
    prediction, (f_c, f_s), f_dense = _strides(prediction, 1)
    written, x_strides, x_dense = _strides(x, 1)
    slots, h_strides, h_dense = _strides(history, 2)
    table, seeds = table.contiguous(), seeds.contiguous()
    inner, images, *along = _by_memory(prediction, c, space, f_c, f_s)
    in_order = f_dense or (f_s == c and f_c == 1)
    layouts = (ctypes.c_int64 * 20)(
        *(written.stride(0), *x_strides, space, x_dense),
        *(prediction.stride(0), f_c, f_s, space, f_dense),
        *(slots.stride(1), *h_strides, space, h_dense),
        *(images, *along, inner, in_order),
    )
    moments, parts = None, min(PARTS, cdiv(elements, PART))
    if guided and guidance_rescale > 0:
        moments = torch.empty(n, parts, 5, dtype=torch.float32, device=x.device)
    cuda.launch(
        "sampler_step", x, cuda.DTYPES[prediction.dtype],
        written.data_ptr(), prediction.data_ptr(), slots.data_ptr(), table.data_ptr(),
        step.data_ptr(), seeds.data_ptr(), cuda.address(moments), ctypes.addressof(layouts),
        slots.stride(0), c * f_c, n, len(table), elements, parts,
        guidance_rescale, int(SAMPLER_NOISE), guided, learned,
    )  # fmt: skip
    if written is not x:
        x.copy_(written)
    if slots is not history:
        history.copy_(slots)
