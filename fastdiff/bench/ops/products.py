"""Matrix products with what surrounds them: a gated GELU, additions, a concatenation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.providers import Arguments, Make, Subject
from fastdiff.bench.shapes import Call, Job


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
    Subject(op="cat_linear", arguments=arguments, eager=cat_eager),
)
