"""A Gaussian mixture in the plane, whose best denoiser, and with it the sampling ODE, is known
exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from fastdiff.diffusion.samplers import SamplerTable
from fastdiff.diffusion.sampling import Predict
from fastdiff.diffusion.schedules import NoiseSchedule

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-0.8, 0.3], [0.7, 0.6], [0.2, -0.9]], dtype=torch.float64)
STDS = torch.tensor([0.35, 0.25, 0.45], dtype=torch.float64)
MEAN = (WEIGHTS[:, None] * MEANS).sum(0)
VARIANCE = (WEIGHTS[:, None] * (STDS[:, None] ** 2 + MEANS**2)).sum(0) - MEAN**2


def denoise(y: Tensor, sigma: float) -> Tensor:
    """E[x0 | y] for y = x0 + sigma * n. y: (N, 2), fp64."""
    variance = STDS**2 + sigma**2  # (3,)
    shrunk = (MEANS * sigma**2 + y[:, None] * STDS[:, None] ** 2) / variance[:, None]  # (N, 3, 2)
    return (responsibilities(y, sigma)[..., None] * shrunk).sum(1)


def responsibilities(y: Tensor, sigma: float = 0.0) -> Tensor:
    """The probability that y comes from each part of the mixture; (N, 3), of mean WEIGHTS."""
    variance = STDS**2 + sigma**2  # (3,)
    distance = (y[:, None] - MEANS).square().sum(-1)  # (N, 3)
    return (WEIGHTS.log() - variance.log() - distance / variance / 2).softmax(-1)


def along(table: SamplerTable, network: Callable[[Tensor, float], Tensor]) -> Predict:
    """A network of (x, t) as the sampling loop calls it."""
    timesteps = table.timesteps.tolist()
    return lambda x, row: network(x, timesteps[row])


def exact_network(
    schedule: NoiseSchedule, prediction: str = "eps"
) -> Callable[[Tensor, float], Tensor]:
    def predict(x: Tensor, t: float) -> Tensor:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        d = denoise(x.double() / alpha, sigma / alpha)
        if prediction == "x0":
            return d
        eps_hat = (x - alpha * d) / sigma
        return eps_hat if prediction == "eps" else alpha * eps_hat - sigma * d

    return predict


def exact_end(x: Tensor, table: SamplerTable) -> Tensor:
    """Solve the probability-flow ODE dy / dsigma = (y - D) / sigma from x, to 1e-12."""

    def slope(sigma: float, flat: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(flat).reshape(x.shape)
        return ((y - denoise(y, sigma)) / sigma).flatten().numpy()

    start, end = float(table.sigmas[0]), table.final_sigma
    y = (x * (1 + start**2) ** 0.5).flatten().numpy()
    solution = solve_ivp(slope, (start, end), y, method="DOP853", rtol=1e-12, atol=1e-12)
    assert solution.success
    return torch.from_numpy(solution.y[:, -1]).reshape(x.shape) / (1 + end**2) ** 0.5
