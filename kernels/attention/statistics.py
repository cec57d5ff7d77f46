"""What every backend of `attention` keeps for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_like(q: Tensor) -> Tensor:
    """Room for two fp32 numbers of each query, (2, N, H, L), whose meaning is the backend's own."""
    n, length, heads, _ = q.shape
    return torch.empty(2, n, heads, length, dtype=torch.float32, device=q.device)
