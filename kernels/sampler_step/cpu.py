"""The CPU kernel of `sampler_step`, in csrc/cpu/sampler_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import compiled
from ..cpu import DTYPES, address, cpu_backend
from ..philox_normal.streams import SAMPLER_NOISE
from ..views import all_contiguous
from .table import check_places


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
    if not (
        x.is_contiguous()
        and history.is_contiguous()
        and (denoised is None or denoised.is_contiguous())
        and (finite is None or finite.is_contiguous())
        and (log_prob is None or log_prob.is_contiguous())
    ):
        outputs = x, history, denoised, finite, log_prob
        dense = all_contiguous(*outputs)
        written = dict(zip(("x", "history", "denoised", "finite", "log_prob"), dense, strict=True))
        given = {"prediction": prediction, "table": table, "rows": rows, "seeds": seeds}
        options = {"cond": cond, "uncond": uncond, "rescale": rescale, "keep": keep}
        forward(**written, **given, **options)  # type: ignore[arg-type]
        for output, filled in zip(outputs, dense, strict=True):
            if output is not None and filled is not None:
                output.copy_(filled)
        return None, None
    n, c = x.shape[:2]
    space = x.numel() // (n * c)
    if prediction.dtype not in DTYPES:
        prediction = prediction.float()
    images, channels = prediction.shape[:2]
    channels_last = not prediction.is_contiguous()
    if channels_last and not (
        x.ndim == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    ):
        prediction = prediction.movedim(1, -1).contiguous()
    runs, length, stride = (c, space, channels) if channels_last else (1, c * space, 1)
    table, rows, seeds = table.contiguous(), rows.contiguous(), seeds.contiguous()
    cond, uncond = all_contiguous(cond, uncond)
    bad = compiled.native.sampler_step(
        DTYPES[prediction.dtype], channels == 2 * c, rescale,
        x.data_ptr(), prediction.data_ptr(), history.data_ptr(), table.data_ptr(), rows.data_ptr(),
        seeds.data_ptr(), address(cond), address(uncond), address(denoised), address(finite),
        address(log_prob), n, len(table), images, runs, length, channels * space, 1, stride,
        c if channels_last else c * space, int(SAMPLER_NOISE),
    )  # fmt: skip
    if bad >= 0:
        check_places(prediction, table, rows, cond, uncond, rescale)
    return None, None


BACKEND = cpu_backend(forward=forward, dtypes=(torch.float32,))
