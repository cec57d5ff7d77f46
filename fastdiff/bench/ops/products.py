"""Matrix products with what surrounds them: a gated GELU, additions, a concatenation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.providers import LATER, Arguments, Make, Subject
from fastdiff.bench.run import Case
from fastdiff.bench.shapes import GPU_BATCHES, Call, Job


def geglu_eager(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def add_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    y = F.linear(x if addend is None else x + addend, weight, bias)
    return y if residual is None else y + residual


def cat_eager(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias)


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    """Weights as a layer begins with, so that results are of the size of x."""
    tensors = [make(*shape) for shape in call.tensors]
    for place in call.weights:
        tensors[place] *= tensors[place].shape[-1] ** -0.5
    return tuple(tensors), {name: make(*shape) for name, shape in call.options}


WIDTHS = {1: 320, 2: 640, 4: 1280, 8: 1280}
"""The latent's side over that of a level -> the level's channels, in SD 1.5."""
GEGLU = Subject(op="linear_geglu", arguments=arguments, eager=geglu_eager)
ADD = Subject(op="linear_add", arguments=arguments, eager=add_eager)
CAT = Subject(op="cat_linear", arguments=arguments, eager=cat_eager)


def gpu_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """The feed-forward layers, last projections and shortcuts of two levels of SD 1.5's decoder,
    which networks call on a GPU only."""
    found = []
    for batch in batches:
        for part in (1, 4):
            tokens, c = (size // part) ** 2, WIDTHS[part]
            skip = 320 if part == 1 else 640
            x, y = (batch, tokens, c), (batch, tokens, skip)
            for subject, call in (
                (GEGLU, Call("linear_geglu", (x, (8 * c, c), (8 * c,)))),
                (ADD, Call("linear_add", (x, (c, c), (c,)), (("addend", x), ("residual", x)))),
                (CAT, Call("cat_linear", (x, y, (c, c + skip), (c,)))),
            ):
                job = Job(network="unet", preset="sd1", size=size, batch=batch)
                found.append(
                    Case(
                        subject=subject, job_name="", job=job, call=call,
                        providers=LATER, priority=1,
                    )
                )  # fmt: skip
    return found
