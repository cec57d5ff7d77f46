"""The loss of the denoiser on one batch: noise levels and their weights.

It is the simple loss of DDPM (Ho et al. 2020, eq. 14) on any prediction, optionally weighted by
min-SNR (Hang et al. 2023), plus the variational bound of IDDPM (Nichol and Dhariwal 2021, eq. 16)
if the network also returns a variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.flow import shifted
from fastdiff.diffusion.losses import min_snr_weight, simple_losses, variational_bound
from fastdiff.diffusion.predictions import target, to_denoised
from fastdiff.diffusion.schedules import FlowSchedule, NoiseSchedule
from fastdiff.names import Prediction


@dataclass(frozen=True, kw_only=True)
class DenoiserLossConfig:
    """Distribution of noise levels in training, and their weights in the loss."""

    weighting: Literal["simple", "min-snr", "bound"] = "simple"
    """simple: DDPM eq. 14, with a learned variance L_hybrid of IDDPM (eq. 16); min-snr: Hang et al.
    2023 (arXiv 2303.09556); bound: the variational bound alone, L_vlb of IDDPM."""

    min_snr_gamma: float = 5.0
    """Signal-to-noise ratio above which the min-snr weight stops growing."""

    timesteps: Literal["uniform", "stratified", "logit-normal", "second-moment"] = "uniform"
    """uniform: DDPM; stratified: uniform, but spread evenly over each batch (Kingma et al. 2021,
    appendix I.1), which makes the gradient less noisy; logit-normal: the sigmoid of a normal
    variable (Esser et al. 2024, section 3.1), which puts more weight on the middle; second-moment:
    importance sampling by past losses, with weights that compensate for it (IDDPM section 3.3),
    which makes the gradient of the bound less noisy."""

    logit_mean: float = 0.0
    """Mean of logit-normal's normal variable."""

    logit_std: float = 1.0
    """Standard deviation of logit-normal's normal variable."""

    bound_weight: float = 1e-3
    """Weight of the variational bound for models with learned variance (IDDPM eq. 16)."""

    bin_width: float = 2 / 255
    """Distance between grey levels in [-1, 1], for the bound; 0.125 for the digits' 17 levels."""

    def __post_init__(self) -> None:
        if self.weighting not in ("simple", "min-snr", "bound"):
            raise ValueError(f"weighting must be simple, min-snr or bound, got {self.weighting!r}")
        if self.timesteps not in ("uniform", "stratified", "logit-normal", "second-moment"):
            raise ValueError(
                "timesteps must be uniform, stratified, logit-normal or second-moment, got "
                f"{self.timesteps!r}"
            )
        for name in ("min_snr_gamma", "logit_std", "bin_width"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not (math.isfinite(self.bound_weight) and self.bound_weight >= 0):
            raise ValueError(f"bound_weight must be 0 or more, got {self.bound_weight}")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of one batch as a function of the network output."""

    config: DenoiserLossConfig
    schedule: NoiseSchedule
    prediction: Prediction
    learned_sigma: bool = False
    """Whether the network returns twice the channels: its prediction, then its variance."""

    def timesteps(self, count: int, source: torch.Generator) -> Tensor:
        """Noise levels of a batch: (count,) on the CPU, int64, or fp64 for logit-normal and flows.

        Those of second-moment depend on the losses so far: `SecondMomentResampler.draw`.
        """
        config, total = self.config, self.schedule.num_timesteps
        if isinstance(self.schedule, FlowSchedule):
            s = self._shares(count, source)
            return shifted(s, self.schedule.shift) * total
        if config.timesteps == "logit-normal":
            normal = torch.randn(count, generator=source, dtype=torch.float64)
            return torch.sigmoid(config.logit_mean + config.logit_std * normal) * (total - 1)
        if config.timesteps == "stratified":
            # One offset u for all: sample i of N gets i/N + u, so every t is equally likely.
            offset = torch.rand((), generator=source, dtype=torch.float64)
            strata = torch.randperm(count, generator=source) / count
            return (((offset + strata.double()) % 1) * total).long().clamp(max=total - 1)
        return torch.randint(total, (count,), generator=source)

    def _shares(self, count: int, source: torch.Generator) -> Tensor:
        """Noise levels s of flow matching, in (0, 1], before the shift: (count,), fp64."""
        config = self.config
        if config.timesteps == "logit-normal":
            normal = torch.randn(count, generator=source, dtype=torch.float64)
            return torch.sigmoid(config.logit_mean + config.logit_std * normal)
        if config.timesteps == "stratified":
            offset = torch.rand((), generator=source, dtype=torch.float64)
            strata = torch.randperm(count, generator=source) / count
            return 1 - (offset + strata.double()) % 1
        return 1 - torch.rand(count, generator=source, dtype=torch.float64)

    def loss(self, output: Tensor, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The mean over the batch of `losses`. Returns ()."""
        return self.losses(output, x, x0, noise, t).mean()

    def losses(self, output: Tensor, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Weighted simple loss, plus the variational bound if the variance is learned.

        With weighting "bound" it is the bound alone, from which the prediction learns too (L_vlb of
        IDDPM).

        output: (N, C, ...), or (N, 2C, ...) with learned_sigma: the network's output for x. x, x0,
        noise: (N, C, ...), fp32 or fp64, with x the schedule's `add_noise`. t: (N,).

        Returns (N,), in fp32 (fp64 stays fp64).
        """
        schedule, config = self.schedule, self.config
        variance: Tensor | None = None
        if self.learned_sigma:
            output, variance = output.chunk(2, dim=1)
        if config.weighting == "bound":
            assert variance is not None, "checked by the run's config"
            return self._bound(output, variance, x, x0, t)
        wanted = target(self.prediction, x0, noise, schedule.alpha(t), schedule.sigma(t))
        weight = None
        if config.weighting == "min-snr":
            weight = min_snr_weight(schedule.snr(t), self.prediction, gamma=config.min_snr_gamma)
        losses = simple_losses(output, wanted, weight)
        if variance is not None and config.bound_weight:
            # detached: only the variance learns from it
            bound = self._bound(output.detach(), variance, x, x0, t)
            losses = losses + config.bound_weight * bound
        return losses

    def _bound(self, output: Tensor, variance: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """T * L_t: (N,), whose mean over uniform t is the whole bound but for its prior term."""
        bits = variational_bound(
            self.schedule,
            x0,
            x,
            self._denoised(output, x, t),
            variance.float(),
            t,
            bin_width=self.config.bin_width,
        )
        return self.schedule.num_timesteps * bits

    def _denoised(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0, (N, C, ...), from a prediction at each sample's own t."""
        levels = [
            to_denoised(float(a), float(s), self.prediction)
            for a, s in zip(self.schedule.alpha(t), self.schedule.sigma(t), strict=True)
        ]
        shape = (2, -1, *(1,) * (x.ndim - 1))
        u, v = torch.tensor(levels, dtype=x.dtype, device=x.device).T.reshape(shape)
        return u * x + v * output.to(x.dtype)
