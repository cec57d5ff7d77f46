"""The variational bound on -log p(x0), term by term, in bits per dimension.

    L = L_T + sum over t of L_t                                  (DDPM eq. 5, IDDPM eq. 4-7)
    L_T = KL(q(x_T | x0) || N(0, 1))                             the prior term, without a network
    L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))           t > 0
    L_0 = -log p(x0's bin | x_1)                                 DDPM eq. 13

Every term is an expectation over the noise of x_t; one draw per image and term estimates it without
bias. On a respaced schedule the same formulas hold with its betas (IDDPM section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastdiff.diffusion.losses import bound_term, learned_log_variance
from fastdiff.diffusion.predictions import to_denoised
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.names import Prediction

Variance = Literal["fixed_small", "fixed_large", "learned"]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A bound's terms, in bits per dimension.

    Attributes:
        timesteps: what the network was given, the cleanest first.
        terms: (N, len(timesteps)), fp64; L_0 first.
        prior: (N,), fp64; L_T.
    """

    timesteps: tuple[int, ...]
    terms: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """(N,), fp64: the whole bound of each sample."""
        return self.terms.sum(1) + self.prior


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """L_T: how far q(x_T | x0) is from the noise that sampling starts with (IDDPM eq. 7).

    0.5 * (sigma_T² + alpha_T² x0² - 1 - log sigma_T²), the mean over dimensions. x0: (N, ...).
    Returns (N,), fp64, bits per dimension.
    """
    last = schedule.num_timesteps - 1
    variance = 1 - schedule.alphas_cumprod[last].to(x0.device)
    nats = 0.5 * (variance + (1 - variance) * x0.double().square() - 1 - variance.log())
    return nats.flatten(1).mean(1) / math.log(2)


@torch.no_grad()
def bound(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Callable[[int], Tensor],
    *,
    prediction: Prediction,
    variance: Variance,
    bin_width: float,
    timesteps: Sequence[int] | None = None,
    clamp: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bound:
    """The bound of a network on samples: one evaluation per timestep.

    Args:
        network: called as network(x, t) with x (N, C, ...) and t (N,) int64; returns (N, C, ...),
            or (N, 2C, ...) with a learned variance.
        schedule: the noise it was trained with.
        x0: (N, C, ...), clean samples, fp32 or fp64; pixels in [-1, 1].
        noise: called with the index of a timestep; returns noise N(0, 1) like x0.
        prediction: what the network returns.
        variance: of p: the posterior's ("fixed_small", at t = 0 that of t = 1), the step's beta
            ("fixed_large", likewise), or the network's ("learned", IDDPM eq. 15). A network that
            learned its variance has a second half in its output, which the other two ignore.
        bin_width: distance between two grey levels of x0.
        timesteps: the ones to visit, any order; None: all. See `NoiseSchedule.respaced`.
        clamp: limit of |D|; 1 for pixels.
        progress: called after each timestep with how many are done, and of how many.

    Raises:
        ValueError: an unknown variance, or an output that does not have its channels.
    """
    if variance not in get_args(Variance):
        raise ValueError(
            f"unknown variance {variance!r}; expected one of {', '.join(get_args(Variance))}"
        )
    visited = sorted(range(schedule.num_timesteps) if timesteps is None else timesteps)
    process = schedule if timesteps is None else schedule.respaced(visited)
    terms = torch.empty(len(x0), len(visited), dtype=torch.float64)
    for done, index in enumerate(reversed(range(len(visited))), start=1):
        t = torch.full((len(x0),), index, device=x0.device)
        x = process.add_noise(x0, noise(index), t)
        output = network(x, torch.full_like(t, visited[index]))
        mean, second = _halves(output, x0, variance)
        alpha, sigma = (float(f(index)) for f in (process.alpha, process.sigma))
        u, v = to_denoised(alpha, sigma, prediction)
        denoised = u * x + v * mean.to(x)
        if clamp is not None:
            denoised = denoised.clamp(-clamp, clamp)
        log_variance = _log_variance(process, variance, second, x, t)
        term = bound_term(process, x0, x, denoised, log_variance, t, bin_width=bin_width)
        terms[:, index] = term.cpu().double()
        if progress is not None:
            progress(done, len(visited))
    return Bound(timesteps=tuple(visited), terms=terms, prior=prior_term(process, x0).cpu())


def _halves(output: Tensor, x0: Tensor, variance: Variance) -> tuple[Tensor, Tensor | None]:
    """The network's prediction, and what it says of the variance."""
    channels = x0.shape[1]
    if output.shape[1] == 2 * channels:
        first, second = output.chunk(2, dim=1)
        return first, second.to(x0)
    if output.shape[1] != channels or variance == "learned":
        raise ValueError(
            f"the network returned {output.shape[1]} channels for {channels}, expected "
            f"{2 * channels if variance == 'learned' else channels}; variance 'learned' is for "
            "networks with learned_sigma"
        )
    return output, None


def _log_variance(
    schedule: NoiseSchedule, variance: Variance, second: Tensor | None, x: Tensor, t: Tensor
) -> Tensor:
    """log of p's variance at t (N,), to broadcast against x."""
    if variance == "learned":
        assert second is not None
        return learned_log_variance(schedule, second, t)
    small = schedule.posterior_log_variance_clipped
    large = torch.cat([small[:1], schedule.betas[1:].log()])
    values = small if variance == "fixed_small" else large
    return values.to(t.device)[t].to(x).reshape(-1, *(1,) * (x.ndim - 1))
