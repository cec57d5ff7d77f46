"""The statistics that every backend of `attention` saves for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_like(q: Tensor) -> Tensor:
    """Room for two fp32 numbers per query, (2, N, H, L); each backend defines their meaning."""
    n, length, heads, _ = q.shape
    return torch.empty(2, n, heads, length, dtype=torch.float32, device=q.device)
