"""Noise schedules: the shares of signal and noise at each timestep, in fp64.

All formulas are in the variance-preserving space x = alpha * x0 + sigma * n, where alpha² + sigma²
= 1 and alpha² = alphas_cumprod (DDPM, Ho et al. 2020, eq. 4). The signal-to-noise ratio is alpha² /
sigma²; sigma / alpha is the noise level of variance-exploding papers (Karras et al. 2022) and of
k-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, get_args

import numpy as np
import torch
from torch import Tensor

from fastdiff.configs import LATER
from fastdiff.names import ScheduleKind, SigmaSpacing, TimestepSpacing

FLOW = "flow"
"""The kind of schedule of flow matching."""
MAX_TIMESTEPS = 10**6  # 1000 is usual; this limits the memory of the schedule's tables


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The noise schedule that a model was trained with."""

    kind: ScheduleKind = "linear"
    """Shape of the betas. CompVis's "linear" (LDM, Stable Diffusion) is our "scaled_linear"; "flow"
    is flow matching, which has none."""
    num_timesteps: int = 1000
    """T, the number of training timesteps; t runs from 0 to T - 1."""
    beta_start: float = 1e-4
    """beta at t = 0 (linear, scaled_linear, sigmoid). Stable Diffusion: 0.00085."""
    beta_end: float = 0.02
    """beta at t = T - 1 (linear, scaled_linear, sigmoid). Stable Diffusion: 0.012."""
    rescale_ends: bool = False
    """Multiply both ends by 1000 / T, as OpenAI's "linear" does; no effect at T = 1000."""
    cosine_offset: float = 0.008
    """s of the cosine schedule (IDDPM eq. 17)."""
    max_beta: float = 0.999
    """Upper limit of the cosine schedule's betas."""
    zero_terminal_snr: bool = False
    """Shift and scale so that t = T - 1 is pure noise (Lin et al. 2023, algorithm 1)."""
    shift: float = field(default=1.0, metadata=LATER)
    """Flow matching only: shift of the noise levels of sampling and training towards more noise
    (Esser et al. 2024, eq. 23). Stable Diffusion 3: 3."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ValueError(
                f"unknown schedule kind {self.kind!r}; expected one of "
                f"{', '.join(get_args(ScheduleKind))}"
            )
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps must be at least 2, got {self.num_timesteps}; 1000 is usual"
            )
        if self.num_timesteps > MAX_TIMESTEPS:
            raise ValueError(
                f"num_timesteps must be at most {MAX_TIMESTEPS}, got {self.num_timesteps}; "
                "1000 is usual"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                "betas must satisfy 0 < beta_start <= beta_end < 1, got "
                f"{self.beta_start} and {self.beta_end}; DDPM uses 1e-4 and 0.02"
            )
        if self.rescale_ends and self.beta_end * 1000 >= self.num_timesteps:
            raise ValueError(
                "beta_end must be less than 1, got "
                f"{self.beta_end * 1000 / self.num_timesteps:g} after rescale_ends; "
                "use more timesteps or a smaller beta_end"
            )
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be positive and finite, got {self.shift}; SD3 uses 3")
        if self.kind == "flow" and self.zero_terminal_snr:
            raise ValueError(
                "zero_terminal_snr must be False with schedule 'flow', which ends in pure noise"
            )
        if self.kind != "flow" and self.shift != 1:
            raise ValueError(f"shift is for schedule 'flow', got {self.shift} with {self.kind!r}")
        if not (0 < self.max_beta < 1 and self.cosine_offset >= 0):
            raise ValueError(
                "the cosine schedule needs 0 < max_beta < 1 and cosine_offset >= 0, got "
                f"{self.max_beta} and {self.cosine_offset}; IDDPM uses 0.999 and 0.008"
            )


def linear_betas(config: ScheduleConfig) -> Tensor:
    """Betas linear in t (DDPM, Ho et al. 2020, section 4). Returns (T,), fp64."""
    start, end = _ends(config)
    return torch.linspace(start, end, config.num_timesteps, dtype=torch.float64)


def scaled_linear_betas(config: ScheduleConfig) -> Tensor:
    """Betas whose square root is linear in t (LDM, Rombach et al. 2022). Returns (T,), fp64."""
    start, end = _ends(config)
    roots = torch.linspace(start**0.5, end**0.5, config.num_timesteps, dtype=torch.float64)
    return roots.square()


def cosine_betas(config: ScheduleConfig) -> Tensor:
    """Betas of alphas_cumprod = f(t) / f(0), f(t) = cos²((t/T + s) / (1 + s) pi/2) (IDDPM eq. 17).

    Returns (T,), fp64, clipped at max_beta as in section 3.2.
    """
    s = config.cosine_offset
    u = torch.arange(config.num_timesteps + 1, dtype=torch.float64) / config.num_timesteps
    f = torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()
    return (1 - f[1:] / f[:-1]).clamp(max=config.max_beta)


def sigmoid_betas(config: ScheduleConfig) -> Tensor:
    """Betas along a sigmoid over [-6, 6] (GeoDiff, Xu et al. 2022). Returns (T,), fp64."""
    start, end = _ends(config)
    ramp = torch.linspace(-6, 6, config.num_timesteps, dtype=torch.float64)
    return torch.sigmoid(ramp) * (end - start) + start


def _ends(config: ScheduleConfig) -> tuple[float, float]:
    factor = 1000 / config.num_timesteps if config.rescale_ends else 1.0
    return config.beta_start * factor, config.beta_end * factor


BETAS: dict[str, Callable[[ScheduleConfig], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) to end at 0 (Lin et al. 2023, alg. 1); the start stays.

    betas: (T,), fp64. Returns (T,), fp64; the last beta is exactly 1.
    """
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return _betas_of(alpha.square())


def _betas_of(alphas_cumprod: Tensor) -> Tensor:
    """beta_t = 1 - alphas_cumprod_t / alphas_cumprod_{t-1}, where alphas_cumprod_{-1} = 1."""
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / before


class NoiseSchedule:
    """alpha, sigma and signal-to-noise ratio at any real timestep, from a config or from betas.

    Attributes:
        betas: (T,), fp64, on the CPU, as the others.
        alphas_cumprod: (T,).
        posterior_variance: (T,), beta-tilde of DDPM eq. 7; 0 at t = 0.
        posterior_log_variance_clipped: (T,), its log. The first value, log 0, is replaced by the
            second (as in IDDPM's code; DDPM section 3.2 leaves this open).
        num_timesteps: T.

    The methods take t as a number or a tensor on any device, () or (N,), with integers or reals in
    [0, T - 1]. Between two timesteps the log-SNR is linear in t (k-diffusion interpolates log sigma
    in the same way). Just before a timestep without signal (zero terminal SNR), where the log-SNR
    is -inf, alpha / sigma is linear instead.
    """

    def __init__(self, source: ScheduleConfig | Tensor) -> None:
        if isinstance(source, ScheduleConfig):
            if source.kind not in BETAS:
                raise ValueError(
                    f"schedule {source.kind!r} has no betas; make it with noise_schedule"
                )
            betas = BETAS[source.kind](source)
            if source.zero_terminal_snr:
                betas = zero_terminal_snr(betas)
        else:
            betas = source.detach().to("cpu", torch.float64)
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(
                "betas must be (T,) with T >= 2 and 0 < beta <= 1, got "
                f"{betas.min():g} to {betas.max():g} in shape {tuple(betas.shape)}; "
                "a ScheduleConfig makes valid ones"
            )
        if bool((betas[:-1] == 1).any()):
            raise ValueError(
                "only the last beta may be 1, because no signal is left after it, got an earlier "
                "one; lower max_beta or beta_end"
            )
        self.betas = betas
        self.num_timesteps = len(betas)
        self.alphas_cumprod = (1 - betas).cumprod(0)
        before = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        self.posterior_variance = betas * (1 - before) / (1 - self.alphas_cumprod)
        clipped = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]])
        self.posterior_log_variance_clipped = clipped.log()
        self._before = before
        self._signal_to_noise = (self.alphas_cumprod / (1 - self.alphas_cumprod)).sqrt()

    def alpha(self, t: float | Tensor) -> Tensor:
        """Share of the signal, sqrt(alphas_cumprod). Returns t's shape, fp64, t's device."""
        ratio = self._ratio(t)
        return ratio / (1 + ratio.square()).sqrt()

    def sigma(self, t: float | Tensor) -> Tensor:
        """Share of the noise, sqrt(1 - alphas_cumprod). Returns t's shape, fp64, t's device."""
        return (1 + self._ratio(t).square()).rsqrt()

    def snr(self, t: float | Tensor) -> Tensor:
        """Signal-to-noise ratio alpha² / sigma². Returns t's shape, fp64, on t's device."""
        return self._ratio(t).square()

    def log_snr(self, t: float | Tensor) -> Tensor:
        """log(alpha² / sigma²); -inf where no signal is left. Returns t's shape, fp64."""
        return 2 * self._ratio(t).log()

    def timestep(self, sigmas: Tensor) -> Tensor:
        """The real t at which sigma / alpha has the given value, limited to [0, T - 1].

        sigmas: any shape, variance-exploding noise levels > 0. Returns the same shape, fp64, CPU.
        """
        knots = (
            -self._signal_to_noise.log()
        )  # log(sigma / alpha), ascending; +inf at zero terminal SNR
        wanted = sigmas.detach().to("cpu", torch.float64).log()
        low = (torch.searchsorted(knots, wanted, right=True) - 1).clamp(0, self.num_timesteps - 2)
        weight = ((wanted - knots[low]) / (knots[low + 1] - knots[low])).clamp(0, 1)
        last = torch.isinf(knots[low + 1])
        linear = 1 - wanted.neg().exp() / self._signal_to_noise[low]  # alpha / sigma falls to 0
        return low + torch.where(last, linear.clamp(0, 1), weight)

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """x = alpha(t) * x0 + sigma(t) * noise (DDPM eq. 4), at any real t.

        x0, noise: (N, ...), any float dtype. t: () or (N,). Returns x0's shape and dtype.
        """
        return self._like(self.alpha(t), x0) * x0 + self._like(self.sigma(t), x0) * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """v = alpha(t) * noise - sigma(t) * x0 (Salimans and Ho 2022, appendix D). x0: (N, ...)."""
        return self._like(self.alpha(t), x0) * noise - self._like(self.sigma(t), x0) * x0

    def posterior(self, x: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0) (DDPM eq. 6-7).

        x, x0: (N, ...). t: () or (N,), integers. Returns the mean, (N, ...), and the other two with
        trailing axes of size 1 that broadcast against it; all in x's dtype.
        """
        beta, total, before = (
            values.to(t.device)[t] for values in (self.betas, self.alphas_cumprod, self._before)
        )
        weight_x0 = before.sqrt() * beta / (1 - total)
        weight_x = (1 - beta).sqrt() * (1 - before) / (1 - total)
        mean = self._like(weight_x0, x) * x0 + self._like(weight_x, x) * x
        variance = self._like(self.posterior_variance.to(t.device)[t], x)
        log_variance = self._like(self.posterior_log_variance_clipped.to(t.device)[t], x)
        return mean, variance, log_variance

    def respaced(self, timesteps: Sequence[int]) -> NoiseSchedule:
        """The shorter schedule that visits only these timesteps (IDDPM section 4).

        beta_i = 1 - alphas_cumprod[S_i] / alphas_cumprod[S_{i-1}]. The order of the timesteps does
        not matter.
        """
        kept = sorted(timesteps)
        if (
            len(kept) < 2
            or len(set(kept)) < len(kept)
            or kept[0] < 0
            or kept[-1] >= len(self.betas)
        ):
            raise ValueError(
                "timesteps must be at least 2 different integers from 0 to "
                f"{self.num_timesteps - 1}, got {len(kept)}: {kept[:3]}...; "
                "timestep_spacing() makes valid ones"
            )
        return NoiseSchedule(_betas_of(self.alphas_cumprod[torch.tensor(kept)]))

    def _ratio(self, t: float | Tensor) -> Tensor:
        """alpha / sigma at t."""
        # keep a Python float in fp64, which as_tensor would round to the default dtype
        t = torch.as_tensor(t, dtype=torch.float64 if isinstance(t, float) else None)
        # Checking the range of a GPU tensor would wait for the device; indexing asserts there.
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= self.num_timesteps - 1)).all()):
            raise ValueError(
                f"timesteps must be in [0, {self.num_timesteps - 1}], got {float(t.min()):g} to "
                f"{float(t.max()):g}; t = 0 has the least noise"
            )
        table = self._signal_to_noise.to(t.device)
        if not t.is_floating_point():
            return table[t.long()]
        t = t.double()
        low = t.floor().long().clamp(max=self.num_timesteps - 2)
        weight = t - low
        left, right = table[low], table[low + 1]
        geometric = left.pow(1 - weight) * right.pow(weight)
        return torch.where(right > 0, geometric, left * (1 - weight))

    @staticmethod
    def _like(values: Tensor, x: Tensor) -> Tensor:
        """Convert values, () or (N,), to x's dtype and device, shaped to broadcast with x."""
        values = values.to(x.device, x.dtype)
        return (
            values.reshape(values.shape + (1,) * (x.ndim - values.ndim)) if values.ndim else values
        )


class FlowSchedule(NoiseSchedule):
    """alpha, sigma and signal-to-noise ratio of flow matching at any real t in [0, T].

    The share of noise in x_s = (1 - s) * x0 + s * n is s = t / T (`fastdiff.diffusion.flow`), so
    alpha = (1 - s) / h and sigma = s / h with h = sqrt((1 - s)² + s²). It has no betas: there is no
    `posterior`, and it cannot be respaced.

    Attributes:
        num_timesteps: T.
        shift: of the noise levels of sampling and training; see `flow.shifted`.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        if config.kind != FLOW:
            raise ValueError(f"expected a schedule of kind 'flow', got {config.kind!r}")
        self.num_timesteps, self.shift = config.num_timesteps, config.shift

    def share(self, t: float | Tensor) -> Tensor:
        """s = t / T, the share of the noise. Returns t's shape, fp64, on t's device."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= self.num_timesteps)).all()):
            raise ValueError(
                f"timesteps must be in [0, {self.num_timesteps}], got {float(t.min()):g} to "
                f"{float(t.max()):g}; t = 0 has no noise"
            )
        return t / self.num_timesteps

    def alpha(self, t: float | Tensor) -> Tensor:
        s = self.share(t)
        return (1 - s) / torch.hypot(1 - s, s)

    def sigma(self, t: float | Tensor) -> Tensor:
        s = self.share(t)
        return s / torch.hypot(1 - s, s)

    def snr(self, t: float | Tensor) -> Tensor:
        s = self.share(t)
        return ((1 - s) / s).square()

    def log_snr(self, t: float | Tensor) -> Tensor:
        return self.snr(t).log()

    def timestep(self, sigmas: Tensor) -> Tensor:
        """The t at which sigma / alpha has the given value; inf is T. Returns fp64, CPU."""
        return self.num_timesteps / (1 + 1 / sigmas.detach().to("cpu", torch.float64))

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """x_s = (1 - s) * x0 + s * noise, which the network sees.

        x0, noise: (N, ...), any float dtype. t: () or (N,). Returns x0's shape and dtype.
        """
        s = self.share(t)
        return self._like(1 - s, x0) * x0 + self._like(s, x0) * noise

    def posterior(self, x: Tensor, x0: Tensor, t: Tensor) -> NoReturn:
        raise ValueError("flow matching has no betas, so there is no posterior of a step")

    def respaced(self, timesteps: Sequence[int]) -> NoReturn:
        raise ValueError("flow matching has no betas, so its schedule cannot be respaced")


def noise_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The noise schedule of any config."""
    return FlowSchedule(config) if config.kind == FLOW else NoiseSchedule(config)


def check_flow(kind: str, prediction: str) -> None:
    """Raise ValueError unless prediction "flow" and a schedule of kind "flow" come together."""
    if (kind == FLOW) != (prediction == "flow"):
        raise ValueError(
            "prediction 'flow' and a schedule of kind 'flow' belong together, got prediction "
            f"{prediction!r} and schedule {kind!r}; set both"
        )


def timestep_spacing(
    kind: TimestepSpacing, steps: int, num_timesteps: int, *, offset: int = 0
) -> list[int]:
    """Choose `steps` of the training timesteps, highest first (Lin et al. 2023, table 2).

    leading: multiples of T // steps, plus `offset` (diffusers' steps_offset; Stable Diffusion uses
        1). It leaves out T - 1, so the first step assumes less noise than x actually has.
    trailing: from T - 1 down in strides of T / steps.
    linspace: evenly spaced including both ends, rounded. (diffusers' Euler and Heun do not round;
        its DPM-Solver++ spaces steps + 1 points and drops the last, and its "leading" has strides
        of T // (steps + 1).)
    simple: T - 1 - floor(i * T / steps), ComfyUI's spacing of the same name.

    Raises:
        ValueError: steps is not in 1..T, the offset leads beyond T - 1, or the kind is unknown.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(
            f"steps must be 1 to {num_timesteps} with spacing {kind!r}, got {steps}; "
            "spacing 'karras' or 'exponential' allows more"
        )
    if offset and kind != "leading":
        raise ValueError(
            f"steps_offset must be 0 with spacing {kind!r}, got {offset}; it is for spacing "
            "'leading'"
        )
    last, stride = num_timesteps - 1, num_timesteps / steps
    if kind == "leading":
        timesteps = [i * (num_timesteps // steps) + offset for i in reversed(range(steps))]
    elif kind == "trailing":
        # np.arange and np.linspace round half-way cases as diffusers does; [:steps] drops the extra
        # timestep that an inexact stride can produce.
        timesteps = [int(t) - 1 for t in np.arange(num_timesteps, 0, -stride)[:steps].round()]
    elif kind == "linspace":
        first = 0 if steps > 1 else last
        timesteps = [int(t) for t in np.linspace(first, last, steps).round()[::-1]]
    elif kind == "simple":
        timesteps = [last - int(i * stride) for i in range(steps)]
    else:
        raise ValueError(
            f"unknown timestep spacing {kind!r}; expected one of "
            f"{', '.join(get_args(TimestepSpacing))}"
        )
    if not 0 <= timesteps[-1] <= timesteps[0] <= last:
        raise ValueError(
            f"the first timestep must be at most {last}, got {timesteps[0]} with steps_offset "
            f"{offset} and {steps} steps; use a smaller offset or fewer steps"
        )
    return timesteps


def sigma_spacing(
    kind: SigmaSpacing, steps: int, sigma_min: float, sigma_max: float, *, rho: float = 7.0
) -> list[float]:
    """Noise levels sigma / alpha from sigma_max down to sigma_min, both included.

    karras: linear in sigma^(1/rho) (Karras et al. 2022, eq. 5).
    exponential: linear in log sigma, and so in log-SNR.

    Raises:
        ValueError: steps < 1, not 0 < sigma_min < sigma_max < inf, or the kind is unknown.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}; 20 to 50 are usual")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"spacing {kind!r} needs 0 < sigma_min < sigma_max < inf, got {sigma_min:g} and "
            f"{sigma_max:g} (inf: a zero-terminal-SNR schedule); use spacing 'trailing'"
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if kind == "karras":
        high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        sigmas = (high + ramp * (low - high)) ** rho
    elif kind == "exponential":
        sigmas = (math.log(sigma_max) + ramp * math.log(sigma_min / sigma_max)).exp()
    else:
        raise ValueError(
            f"unknown sigma spacing {kind!r}; expected one of {', '.join(get_args(SigmaSpacing))}"
        )
    return [float(sigma) for sigma in sigmas]
