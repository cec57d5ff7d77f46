"""`cat_linear` as two products of PyTorch, on a GPU (cuBLAS) and on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cuda
from ..checks import without_autocast
from ..cpu import cpu_backend


def forward(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, keep: bool
) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    k = x.shape[-1]
    with without_autocast(x.device.type):
        y = F.linear(x, weight[:, :k], bias).contiguous()
        y.view(-1, len(weight)).addmm_(skip.reshape(-1, skip.shape[-1]), weight[:, k:].mT)
    return y, None


def backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return dx, dskip, dweight, dbias."""
    k = x.shape[-1]
    with without_autocast(x.device.type):
        flat = dy.reshape(-1, dy.shape[-1])
        dweight = None
        if needs[2]:
            dweight = torch.cat(
                [flat.mT @ x.reshape(-1, k), flat.mT @ skip.reshape(-1, skip.shape[-1])], dim=1
            )
        return (
            (flat @ weight[:, :k]).view(x.shape) if needs[0] else None,
            (flat @ weight[:, k:]).view(skip.shape) if needs[1] else None,
            dweight,
            flat.sum(0) if bias is not None and needs[3] else None,
        )


CPU = cpu_backend(forward=forward, backward=backward)
CUDA = replace(
    cuda.cuda_backend(forward=forward, backward=backward),
    planned=False,  # a plan cannot repeat PyTorch's product
)
