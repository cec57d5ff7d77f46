"""Binomial diffusion of binary data (Sohl-Dickstein et al. 2015, section 2 and table App.1).

    q(x_t | x_{t-1}) = B(x_{t-1} (1 - beta_t) + beta_t / 2)      every bit on its own
    q(x_t | x_0)     = B(x_0 abar_t + (1 - abar_t) / 2),         abar = prod (1 - beta)
    p(x_{t-1} | x_t) = B(f(x_t, t)),   p(x_T) = B(1/2)

Bits do not fit the rows of a sampler table, so this process has its own loop. The network says how
probable it is that each bit of x_0 is 1, given all of x_t; f is the posterior q(x_{t-1} | x_t, x_0)
averaged over that (the parametrisation of D3PM, Austin et al. 2021, eq. 4), so one network serves
all steps, and with the true probabilities f is the true rate of each bit.

Timesteps count from 0, as everywhere: x_t of the paper is x at t - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x (N, D), t (N,) int64) -> the probability that each bit of x0 is 1, (N, D)."""


class BinomialProcess:
    """The forward process with beta_t = 1 / (T - t), which erases an equal part of the signal in
    each step (section 2.4.1), and what follows from it.

    Attributes:
        num_timesteps: T.
        betas, alphas_cumprod: (T,), fp64; alphas_cumprod falls from 1 - 1/T to 0 in equal steps.
    """

    def __init__(self, num_timesteps: int) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
        self.num_timesteps = num_timesteps
        left = torch.arange(num_timesteps, 0, -1, dtype=torch.float64)  # T - t
        self.betas = 1 / left
        self.alphas_cumprod = (left - 1) / num_timesteps
        self._before = left / num_timesteps

    def rate(self, x0: Tensor, t: Tensor) -> Tensor:
        """Probability that a bit of x is 1 at t: x0 abar_t + (1 - abar_t) / 2.

        x0: (N, D), 0 or 1, or a probability; t: (N,), int64. Returns (N, D), x0's dtype.
        """
        kept = self._at(self.alphas_cumprod, t, x0)
        return x0 * kept + (1 - kept) / 2

    def noised(self, x0: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw of x at t. x0: (N, D), float, 0 or 1. Returns its shape and dtype."""
        return torch.bernoulli(self.rate(x0, t), generator=generator)

    def posterior(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Probability that a bit is 1 one step before t, given its values x at t and x0.

        Bayes: q(x | before) q(before | x0), normalised. At t = 0 that is x0. x, x0: (N, D), 0 or 1.
        t: (N,), int64. Returns (N, D).
        """
        flip = self._at(self.betas, t, x) / 2
        kept = self._at(self._before, t, x)
        one = x0 * kept + (1 - kept) / 2
        if_one = x * (1 - flip) + (1 - x) * flip
        if_zero = x * flip + (1 - x) * (1 - flip)
        return if_one * one / (if_one * one + if_zero * (1 - one))

    def reverse(self, x: Tensor, probability: Tensor, t: Tensor) -> Tensor:
        """The rate f(x, t) of the reverse step: the posterior averaged over what x0 may be.

        x: (N, D); probability: (N, D), that each bit of x0 is 1. Returns (N, D).
        """
        if_one = self.posterior(x, torch.ones_like(x), t)
        if_zero = self.posterior(x, torch.zeros_like(x), t)
        return probability * if_one + (1 - probability) * if_zero

    def term(self, x0: Tensor, x: Tensor, probability: Tensor, t: Tensor) -> Tensor:
        """The bound's term of t: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), in bits per sample.

        At t = 0 that is -log2 p(x0 | x). There is no prior term: alphas_cumprod ends at 0.
        x0, x, probability: (N, D), float. Returns (N,).
        """
        q, p = self.posterior(x, x0, t), self.reverse(x, probability, t)
        tiny = torch.finfo(p.dtype).tiny
        p = p.clamp(tiny, 1 - torch.finfo(p.dtype).eps)
        nats = torch.xlogy(q, q) - torch.xlogy(q, p)
        nats = nats + torch.xlogy(1 - q, 1 - q) - torch.xlogy(1 - q, 1 - p)
        return nats.flatten(1).sum(1) / math.log(2)

    @torch.no_grad()
    def bound(
        self, predict: Predict, x0: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Each term of the bound on -log2 p(x0), with one draw of x: (N, T), bits per sample."""
        terms = [
            self.term(x0, x, predict(x, t), t)
            for t in self._each(x0)
            for x in (self.noised(x0, t, generator),)
        ]
        return torch.stack(terms, 1)

    @torch.no_grad()
    def sample(
        self,
        predict: Predict,
        shape: tuple[int, int],
        generator: torch.Generator | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Samples from noise: x ~ B(1/2), then T reverse steps.

        shape: (N, D). on_step: called with t and x after the step from t. Returns (N, D), fp32.
        """
        x = torch.bernoulli(torch.full(shape, 0.5), generator=generator)
        for t in reversed(list(self._each(x))):
            x = torch.bernoulli(self.reverse(x, predict(x, t), t), generator=generator)
            if on_step is not None:
                on_step(int(t[0]), x)
        return x

    def _each(self, x: Tensor) -> Iterator[Tensor]:
        return (torch.full((len(x),), t, device=x.device) for t in range(self.num_timesteps))

    @staticmethod
    def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """values (T,) at t (N,), to broadcast against (N, D)."""
        return values.to(t.device)[t].to(like).reshape(-1, *(1,) * (like.ndim - 1))
