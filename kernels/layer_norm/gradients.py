"""The gradients that the backward passes of `layer_norm` and `add_layer_norm` fill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate dx, dweight and dbias; the last two are empty if they are not needed."""
    dweight, dbias = (
        torch.empty(
            x.shape[-1] if need else 0, dtype=x.dtype if p is None else p.dtype, device=x.device
        )
        for p, need in zip((weight, bias), needs, strict=True)
    )
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dweight, dbias
