"""Matrix products with what surrounds them: a gated GELU, additions, a concatenation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.ops.cat_group_norm_silu import BLOCKS
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


SUBJECTS = (
    Subject(op="linear_geglu", arguments=arguments, eager=geglu_eager),
    Subject(op="linear_add", arguments=arguments, eager=add_eager),
)
WIDTHS = {1: 320, 2: 640, 4: 1280, 8: 1280}
"""The latent's side over that of a level -> the level's channels."""
CAT = Subject(op="cat_linear", arguments=arguments, eager=cat_eager)


def gpu_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """The shortcuts over the concatenations of SD 1.5's decoder; recorded networks concatenate."""
    found = []
    for batch in batches:
        for left, right, part in BLOCKS:
            tokens, out = (size // part) ** 2, WIDTHS[part]
            x, skip = ((batch, tokens, c) for c in (left, right))
            call = Call("cat_linear", (x, skip, (out, left + right), (out,)))
            job = Job(network="unet", preset="sd1", size=size, batch=batch)
            found.append(
                Case(subject=CAT, job_name="", job=job, call=call, providers=LATER, priority=1)
            )
    return found
