"""Training losses of the denoiser, per sample, and their weights over noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.names import Prediction


def simple_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over samples of `simple_losses`. Returns ()."""
    return simple_losses(prediction, target, weight).mean()


def simple_losses(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted mean squared error (DDPM eq. 14).

    prediction, target: (N, ...), any float dtype; computed in fp32 (fp64 stays). weight: (N,), such
    as `min_snr_weight`. Returns (N,), weight * MSE of each sample.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, expected the target's "
            f"{tuple(target.shape)}; with learned variance, pass only the first half of the "
            "channels"
        )
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    errors = (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
    return errors if weight is None else errors * weight.to(errors)


def min_snr_weight(snr: Tensor, prediction: Prediction, *, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma weights (Hang et al. 2023).

    The weight is min(SNR, gamma) for a loss on x0. It is divided by SNR for a loss on eps, because
    |n - n_hat|² = SNR |x0 - D|², by SNR + 1 for a loss on v, and by (sqrt(SNR) + 1)² for a loss on
    the flow n - x0. snr: any shape, alpha² / sigma², 0 allowed. Returns its shape and dtype.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}; the paper uses 5")
    if prediction == "x0":
        return snr.clamp(max=gamma)
    if prediction == "eps":
        return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, and 1 at SNR = 0
    if prediction == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    if prediction == "flow":
        return snr.clamp(max=gamma) / (snr.sqrt() + 1).square()
    raise ValueError(f"unknown prediction {prediction!r}; expected one of eps, v, x0, flow")


def variational_bound(
    schedule: NoiseSchedule,
    x0: Tensor,
    x: Tensor,
    denoised: Tensor,
    variance: Tensor,
    t: Tensor,
    *,
    bin_width: float,
) -> Tensor:
    """`bound_term` of a network that learns its variance (IDDPM eq. 4-6 and 15).

    L_hybrid = simple_loss + 0.001 * L_vlb (eq. 16) detaches `denoised`, so that only the variance
    learns from the bound. For the whole bound, multiply the mean over uniform t by T.

    Args:
        variance: (N, ...), the second half of the network's channels, -1 to 1.
        schedule, x0, x, denoised, t, bin_width: as in `bound_term`.

    Returns:
        (N,).
    """
    dtype = torch.promote_types(torch.float32, x.dtype)
    log_variance = learned_log_variance(schedule, variance.to(dtype), t)
    return bound_term(schedule, x0, x, denoised, log_variance, t, bin_width=bin_width)


def bound_term(
    schedule: NoiseSchedule,
    x0: Tensor,
    x: Tensor,
    denoised: Tensor,
    log_variance: Tensor,
    t: Tensor,
    *,
    bin_width: float,
) -> Tensor:
    """The term L_t of the variational bound, in bits per dimension (DDPM eq. 5, IDDPM eq. 4-6).

    For t > 0 it is the KL divergence from q(x_{t-1} | x_t, x0) to the model's normal distribution;
    for t = 0 it is the negative log likelihood of x0's bin (DDPM eq. 13).

    Args:
        x0, x: (N, ...), clean in [-1, 1] and noisy at t. Computed in fp32 (fp64 stays).
        denoised: (N, ...), the network's estimate of x0.
        log_variance: of the model's distribution, any shape that broadcasts against x.
        t: (N,), int64.
        bin_width: distance between two grey levels of x0; 2 / 255 for 8 bits in [-1, 1].

    Returns:
        (N,).
    """
    if not bin_width > 0:
        raise ValueError(f"bin_width must be positive, got {bin_width}; 8-bit images have 2 / 255")
    dtype = torch.promote_types(torch.float32, x.dtype)
    x0, x, denoised, log_variance = (a.to(dtype) for a in (x0, x, denoised, log_variance))
    true_mean, _, true_log_variance = schedule.posterior(x, x0, t)
    mean, _, _ = schedule.posterior(x, denoised, t)

    divergence = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = _bin_log_likelihood(x0, mean, (0.5 * log_variance).exp(), bin_width)
    first = (t == 0).reshape(-1, *(1,) * (x.ndim - 1))
    nats = torch.where(first, -likelihood, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def learned_log_variance(schedule: NoiseSchedule, variance: Tensor, t: Tensor) -> Tensor:
    """Log variance from the network's second output v in [-1, 1] (IDDPM eq. 15).

    It is f * log beta + (1 - f) * log beta-tilde with f = (v + 1) / 2; beta-tilde is clipped at
    t = 0. variance: (N, ...); t: (N,), int64. Returns (N, ...), variance's dtype.
    """
    shape = (-1, *(1,) * (variance.ndim - 1))
    high = schedule.betas.log().to(t.device)[t].to(variance).reshape(shape)
    low = schedule.posterior_log_variance_clipped.to(t.device)[t].to(variance).reshape(shape)
    fraction = (variance + 1) / 2
    return fraction * high + (1 - fraction) * low


def _bin_log_likelihood(x0: Tensor, mean: Tensor, std: Tensor, bin_width: float) -> Tensor:
    """Log probability of x0's bin under a normal distribution; the end bins extend to infinity.

    It is a difference of two tails. If the bin lies above the mean, the upper tails are used,
    because the lower ones are so close to 1 that fp32 has no digits left.
    """
    upper, lower = (x0 + bin_width / 2 - mean) / std, (x0 - bin_width / 2 - mean) / std
    upper = torch.where(x0 > 1 - bin_width / 2, math.inf, upper)
    lower = torch.where(x0 < -1 + bin_width / 2, -math.inf, lower)
    above = upper + lower > 0
    far, near = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    probability = torch.special.ndtr(near) - torch.special.ndtr(far)
    return probability.clamp(min=1e-12).log()
