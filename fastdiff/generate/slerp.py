"""The great circle between two samples (White 2016, arXiv 1609.04468, "slerp")."""

from __future__ import annotations

import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """sin((1 - s) theta) / sin(theta) a + sin(s theta) / sin(theta) b; theta is their angle.

    a, b: the same shape. share: s; 0 gives a, 1 gives b.
    """
    u, v = a.double().flatten(), b.double().flatten()
    cosine = torch.dot(u, v) / (u.norm() * v.norm())
    theta = torch.arccos(cosine.clamp(-1, 1))
    if theta.sin() < 1e-6:  # parallel or antiparallel: the great circle is undefined
        return torch.lerp(a, b, share)
    weights = torch.sin((1 - share) * theta), torch.sin(share * theta)
    mixed = (weights[0] * u + weights[1] * v) / theta.sin()
    return mixed.reshape(a.shape).to(a.dtype)
