"""Noise levels of FastDPM (Kong and Ping 2021, arXiv 2106.00132): S steps for a network of T.

Both methods choose S noise levels, each with the real timestep to pass to the network:

    VAR    S variances eta_1..eta_S, linear or quadratic in their index, from the first training
           variance to the one whose product reaches the noise of T - 1 (section 3);
           gamma_s = prod (1 - eta_i), and the timestep t with alphas_cumprod(t) = gamma_s.
    STEP   S of the training timesteps, linear or quadratic in their index.

The reverse process with kappa is then DDIM with eta = kappa (Song et al. 2021, eq. 12 and 16): 1
for DDPM-rev, 0 for DDIM-rev. The lists equal those of the authors' program, FastDPM_pytorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch

from fastdiff.diffusion.schedules import NoiseSchedule

Curve = Literal["linear", "quadratic"]
LAST_VARIANCE, STRIDE_SHARE = 0.99, 0.95
"""VAR: the largest last variance (linear), and the largest stride relative to 1 / (S sqrt(beta_0))
(quadratic); the authors' program searches up to these limits."""
STEP_QUADRATIC_END = 0.8
"""STEP, quadratic: the first step is at this fraction of T (the authors' program, CIFAR-10)."""


def variances(curve: Curve, steps: int, schedule: NoiseSchedule) -> list[float]:
    """The VAR list eta, smallest first.

    linear: from beta_0 in equal strides; quadratic: beta_0 * (1 + i * x)². The stride is chosen so
    that prod (1 - eta_i) = alphas_cumprod[T - 1], but no larger than the authors' limits: the last
    variance is at most 0.99, and x at most 0.95 / (S sqrt(beta_0)). With few quadratic steps the
    limit applies, so that they start with less noise than T - 1 has (20 steps of DDPM start at
    t = 930), as with the authors' program.

    Raises:
        ValueError: there are fewer than 2 steps, the schedule has zero terminal SNR (the product
            would be 0), or there are so many steps that beta_0 alone is too much noise.
    """
    first, goal = float(schedule.betas[0]), float(schedule.alphas_cumprod[-1])
    name = f"var-{curve}"
    _at_least_two(name, steps)
    if not goal:
        raise ValueError(
            f"spacing {name!r} needs some signal at the last timestep, got none (a "
            "zero-terminal-SNR schedule); use spacing 'trailing'"
        )
    if steps * math.log1p(-first) < math.log(goal):
        raise ValueError(
            f"spacing {name!r} cannot fit {steps} steps of at least the first beta, {first:g}; "
            f"use at most {int(math.log(goal) / math.log1p(-first))} steps"
        )

    def listed(stride: float) -> list[float]:
        if curve == "linear":
            return [first + i * stride for i in range(steps)]
        return [first * (1 + i * stride) ** 2 for i in range(steps)]

    if curve == "linear":
        limit = (LAST_VARIANCE - first) / (steps - 1)
    else:
        limit = STRIDE_SHARE / (math.sqrt(first) * steps)
    stride = _root(
        lambda x: sum(math.log1p(-eta) for eta in listed(x)) - math.log(goal), (0.0, limit)
    )
    return listed(stride)


def var_levels(curve: Curve, steps: int, schedule: NoiseSchedule) -> list[tuple[float, float]]:
    """(t, alphas_cumprod) of the VAR steps, the noisiest first."""
    etas = torch.tensor(variances(curve, steps, schedule), dtype=torch.float64)
    gammas = torch.log1p(-etas).cumsum(0).exp().tolist()
    levels = list(zip(_timesteps(schedule, gammas), gammas, strict=True))
    return levels[::-1]


def step_timesteps(curve: Curve, steps: int, num_timesteps: int) -> list[int]:
    """The STEP list, highest first.

    linear: floor(i * (T - 1) / (S - 1)); quadratic: floor((i * sqrt(0.8 T) / (S - 1))²).

    Raises:
        ValueError: there are fewer than 2 steps, or so many that a timestep repeats.
    """
    name = f"step-{curve}"
    _at_least_two(name, steps)
    end = num_timesteps - 1 if curve == "linear" else math.sqrt(STEP_QUADRATIC_END * num_timesteps)
    if curve == "linear":
        timesteps = [math.floor(i * (end / (steps - 1))) for i in range(steps)]
    else:
        timesteps = [math.floor((i * (end / (steps - 1))) ** 2) for i in range(steps)]
    if any(a == b for a, b in pairwise(timesteps)):
        most = num_timesteps if curve == "linear" else math.floor(end) + 1
        raise ValueError(
            f"spacing {name!r} visits a timestep twice with {steps} steps of {num_timesteps}; use "
            f"at most {most} steps, or spacing 'var-{curve}'"
        )
    return timesteps[::-1]


def _timesteps(schedule: NoiseSchedule, gammas: Sequence[float]) -> list[float]:
    """The real t with alphas_cumprod(t) = gamma, for each of gammas.

    For betas that are linear in t, the Gamma function continues the product to real t (the paper's
    R): log alphas_cumprod(t) = (t + 1) log d + log Gamma(c + 1) - log Gamma(c - t), where d is the
    stride of the betas and c = (1 - beta_0) / d. For other schedules the log-SNR is linear between
    timesteps, as everywhere in fastdiff.
    """
    wanted = torch.tensor(gammas, dtype=torch.float64)
    sigmas = ((1 - wanted) / wanted).sqrt()
    betas = schedule.betas
    stride = float(betas[-1] - betas[0]) / (len(betas) - 1)
    strides = betas.diff()
    if stride <= 0 or not torch.allclose(
        strides, torch.full_like(strides, stride), rtol=1e-6, atol=0
    ):
        return [float(t) for t in schedule.timestep(sigmas)]
    c = (1 - float(betas[0])) / stride
    bounded = [math.floor(t) for t in schedule.timestep(sigmas).tolist()]

    def log_product(t: float) -> float:
        return (t + 1) * math.log(stride) + math.lgamma(c + 1) - math.lgamma(c - t)

    last = float(len(betas) - 1)
    found = []
    for gamma, low in zip(gammas, bounded, strict=True):
        ends = max(low - 1.0, 0.0), min(low + 2.0, last)
        goal = math.log(gamma)
        t = _root(lambda t, goal=goal: log_product(t) - goal, ends)  # type: ignore[misc]
        found.append(t)
    return found


def _root(f: Callable[[float], float], ends: tuple[float, float]) -> float:
    """Root of a decreasing function, by bisection to the last bit.

    If the function does not change sign between the ends, returns the end closer to the root.
    """
    low, high = ends
    if f(low) <= 0:
        return low
    if f(high) >= 0:
        return high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return low


def _at_least_two(name: str, steps: int) -> None:
    if steps < 2:
        raise ValueError(
            f"spacing {name!r} needs at least 2 steps, got {steps}; its first and last step are "
            "fixed"
        )
