"""Prediction types: what the network predicts, and how that becomes an estimate of x0.

With x = alpha * x0 + sigma * n:

    eps  F = n                           D = (x - sigma * F) / alpha     (DDPM eq. 15)
    v    F = alpha * n - sigma * x0      D = alpha * x - sigma * F       (Salimans and Ho 2022)
    x0   F = x0                          D = F
    flow F = n - x0                      D = (x - sigma * F) / (alpha + sigma)

The network of "flow" sees x / (alpha + sigma), the straight path between data and noise.
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from fastdiff.names import Prediction


def to_denoised(alpha: float, sigma: float, prediction: Prediction) -> tuple[float, float]:
    """Return (u, v) such that D = u * x + v * F at one noise level.

    Raises:
        ValueError: the prediction is unknown, or it is "eps" where alpha is 0: there x is pure
            noise and contains no information about x0.
    """
    if prediction == "eps":
        if alpha == 0:
            raise ValueError(
                "prediction 'eps' contains no information about x0 at alpha = 0 (the last timestep "
                "of a zero-terminal-SNR schedule); use prediction 'v' or 'x0', or spacing 'leading'"
            )
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha, -sigma
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    raise _unknown(prediction)


def input_scale(alpha: float, sigma: float, prediction: Prediction) -> float:
    """The factor of x = alpha * x0 + sigma * n that the network sees; 1 at both ends."""
    return 1 / (alpha + sigma) if prediction == "flow" else 1.0


def target(
    prediction: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The training target: what the network should return for x = alpha * x0 + sigma * noise.

    x0, noise: (N, ...), any float dtype. alpha, sigma: () or (N,) or anything that broadcasts.
    Returns x0's shape and dtype.
    """
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "flow":
        return noise - x0
    if prediction == "v":
        alpha, sigma = (
            c.to(x0).reshape(c.shape + (1,) * (x0.ndim - c.ndim)) for c in (alpha, sigma)
        )
        return alpha * noise - sigma * x0
    raise _unknown(prediction)


def _unknown(prediction: str) -> ValueError:
    return ValueError(
        f"unknown prediction {prediction!r}; expected one of {', '.join(get_args(Prediction))}"
    )
