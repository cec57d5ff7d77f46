"""The tunable of the Triton kernels of `sampler_step`: candidates, calls to time and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastdiff.bench.tunables.tunable import Tunable, define_tunable
from fastdiff.kernels.sampler_step.triton import forward
from fastdiff.kernels.tuning import Config


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for block in (64, 128, 256):
        for warps in (2, 4, 8):
            if 1 <= block // (32 * warps) <= 2:
                yield {"BLOCK": block, "num_warps": warps}


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    """SD's latents, with the prediction in channels_last as from a U-Net, and x in fp32, NCHW.

    Then: everything contiguous; rows that may rescale; learned variance (ADM-256); log-densities.
    """

    def call(
        shape: tuple[int, ...],
        prediction_dtype: torch.dtype,
        *,
        guided: bool = True,
        learned: bool = False,
        layout: torch.memory_format = torch.contiguous_format,
        rescale: bool = False,
        density: bool = False,
    ) -> Callable[[], Any]:
        n, c, *rest = shape
        x = torch.zeros(shape, device=device)
        history, table = torch.zeros(3, *shape, device=device), torch.zeros(20, 20, device=device)
        rows, seeds, cond, uncond = torch.arange(n, device=device).repeat(4, 1)
        finite = torch.ones(n, dtype=torch.bool, device=device)
        prediction = torch.zeros(
            n * (1 + guided), c * (1 + learned), *rest, dtype=prediction_dtype, device=device
        ).contiguous(memory_format=layout)
        own, other = (cond + n, uncond) if guided else (None, None)
        log_prob = torch.zeros(n, device=device) if density else None
        state = x, prediction, history, table, rows, seeds
        return lambda: forward(*state, own, other, None, finite, log_prob, rescale)

    latents, pixels, half = (4, 4, 64, 64), (4, 3, 256, 256), torch.bfloat16
    return [
        call(latents, half, layout=torch.channels_last),
        call(latents, torch.float32, guided=False),
        call(latents, half, rescale=True),
        call(pixels, half, learned=True, layout=torch.channels_last),
        call(latents, half, layout=torch.channels_last, density=True),
    ]


define_tunable(
    Tunable(
        name="sampler_step",
        shape_classes=("any",),
        candidates=_candidates,
        calls=_calls,
        dtypes=(torch.float32,),
    )
)
