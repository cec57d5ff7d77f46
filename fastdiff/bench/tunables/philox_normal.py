"""The tunable of the Triton kernel of `philox_normal`: candidates, calls to time and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastdiff.bench.tunables.tunable import Tunable, define_tunable
from fastdiff.kernels.philox_normal.streams import INITIAL_NOISE, SAMPLER_NOISE
from fastdiff.kernels.philox_normal.triton import forward
from fastdiff.kernels.tuning import Config


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for block in (64, 128, 256, 512):
        for warps in (1, 2, 4, 8):
            if 1 <= block // (32 * warps) <= 4:
                yield {"BLOCK": block, "num_warps": warps}


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    """SDXL's latents at 1024 x 1024 for four images; the step as a number and as a tensor."""
    seeds = torch.empty(4, dtype=torch.int64, device=device)
    step = torch.empty((), dtype=torch.int64, device=device)
    return [
        lambda: forward(seeds, (4, 128, 128), None, 0, INITIAL_NOISE),
        lambda: forward(seeds, (4, 128, 128), step, 0, SAMPLER_NOISE),
    ]


define_tunable(
    Tunable(
        name="philox_normal",
        shape_classes=("any",),
        candidates=_candidates,
        calls=_calls,
        dtypes=(torch.float32,),
    )
)
