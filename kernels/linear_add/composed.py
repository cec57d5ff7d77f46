"""`linear_add` as PyTorch's product and additions, on a GPU (cuBLAS) and on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from .. import cuda
from ..checks import without_autocast
from ..cpu import cpu_backend


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    with without_autocast(x.device.type):
        y = F.linear(x if addend is None else x + addend, weight, bias)
    return (y if residual is None else y.add_(residual)).contiguous(), None


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return dx, dweight, dbias."""
    with without_autocast(x.device.type):
        flat = dy.reshape(-1, dy.shape[-1])
        total = x if addend is None else x + addend
        return (
            (flat @ weight).view(x.shape) if needs[0] else None,
            flat.mT @ total.reshape(-1, x.shape[-1]) if needs[1] else None,
            flat.sum(0) if bias is not None and needs[2] else None,
        )


CPU = cpu_backend(forward=forward, backward=backward)
CUDA = replace(
    cuda.cuda_backend(forward=forward, backward=backward),
    planned=False,  # a plan cannot repeat PyTorch's product
)
