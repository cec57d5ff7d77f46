"""Adaptive LayerNorm: x in, y out; the tokens of DiT-XL at 256 x 256 and 512 x 512 pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.providers import LATER, Arguments, Make, Subject
from fastdiff.bench.run import Case
from fastdiff.bench.shapes import GPU_BATCHES, Call, Job

WIDTH = 1152
"""Width of DiT-XL (Peebles & Xie 2023, table 1)."""


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The norm, the product and the sum as in the authors' DiT code."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    return tuple(make(*shape) for shape in call.tensors), {}


SUBJECT = Subject(
    op="ada_layer_norm",
    operands=lambda x: (x, (x[0], x[-1]), (x[0], x[-1])),
    arguments=arguments,
    eager=eager,
)


def gpu_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """A token is a patch of 2 x 2 latents; none of our networks calls this op yet."""
    tokens = (size // 2) ** 2
    return [
        Case(
            subject=SUBJECT,
            job_name="",
            job=Job(network="unet", preset="sd1", size=size, batch=batch),
            call=Call("ada_layer_norm", ((batch, tokens, WIDTH), (batch, WIDTH), (batch, WIDTH))),
            providers=LATER,
            priority=1,
        )
        for batch in batches
    ]
