"""The noise that samples start from."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels import INITIAL_NOISE, int64_bits, philox_normal


def initial_noise(
    seed: int, shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Noise N(0, 1) that depends on the seed only: (*shape)."""
    seeds = torch.tensor([int64_bits(seed)], dtype=torch.int64, device=device)
    return philox_normal(seeds, shape, step=0, stream=INITIAL_NOISE)[0].to(dtype)


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
