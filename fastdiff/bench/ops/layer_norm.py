"""LayerNorm: x once in, y once out; with a residual, x and residual in, total and y out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.providers import Arguments, Make, Subject
from fastdiff.bench.shapes import Call, Job


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def add_eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias), total


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    return tuple(make(*shape) for shape in call.tensors), {}


SUBJECT = Subject(
    op="layer_norm",
    operands=lambda x: (x, x[-1:], x[-1:]),
    arguments=arguments,
    eager=eager,
)
ADD_SUBJECT = Subject(
    op="add_layer_norm",
    operands=lambda x: (x, x, x[-1:], x[-1:]),
    arguments=arguments,
    eager=add_eager,
)
SUBJECTS = (SUBJECT, ADD_SUBJECT)
