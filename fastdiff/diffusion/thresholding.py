"""Dynamic thresholding of the x0 estimate (Saharia et al. 2022, Imagen, section 2.3).

    s  = max(1, quantile of |D| over a sample's values, most)
    D' = clamp(D, -s, s) / s

A quantile is no number that a row of a table could hold, so it is not an option of a sampler but a
function predict -> predict, as guidance by gradients is: the prediction is replaced by the F' whose
estimate is D'. It composes with guidance of every kind; it belongs after all of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.diffusion.gradients import At, Guidance, PredictAt


def dynamic_threshold(quantile: float = 0.995, *, most: float = math.inf) -> Guidance:
    """Dynamic thresholding as a guidance, for `sample(guidance=[..., dynamic_threshold()])`.

    quantile: of |D| that becomes the limit s; Imagen uses 0.995, and 1 is the largest value. most:
    the largest s (diffusers' sample_max_value; 1 clips to [-1, 1] and no more). For pixels in
    [-1, 1]; latents have no such range.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1], got {quantile}; Imagen uses 0.995")
    if not most >= 1:
        raise ValueError(f"most must be at least 1, got {most}; math.inf sets no limit")

    def guidance(predict: PredictAt) -> PredictAt:
        def limited(x: Tensor, at: At) -> Tensor:
            prediction = predict(x, at).to(x.dtype)
            channels = x.shape[1]
            f, variance = prediction[:, :channels], prediction[:, channels:]
            estimate = at.column("U", x) * x + at.column("V", x) * f
            shift = thresholded(estimate, quantile, most) - estimate
            return torch.cat([f + shift / at.column("V", x), variance], dim=1)

        return limited

    return guidance


def thresholded(estimate: Tensor, quantile: float, most: float = math.inf) -> Tensor:
    """D' of x0 estimates D: (N, ...), fp32 or fp64; the quantile interpolates linearly."""
    size = estimate.flatten(1).abs().sort(dim=1).values
    place = quantile * (size.shape[1] - 1)
    low = math.floor(place)
    high = min(low + 1, size.shape[1] - 1)
    s = torch.lerp(size[:, low], size[:, high], place - low).clamp(1, most)
    s = s.reshape(-1, *(1,) * (estimate.ndim - 1))
    return estimate.clamp(-s, s) / s
