"""Samplers of order 1: one evaluation per step and no history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fastdiff.diffusion.levels import Level
from fastdiff.diffusion.samplers.rows import Churn, Row, Variance, check_eta, euler_row, sampler
from fastdiff.diffusion.schedules import NoiseSchedule


@sampler("ddpm", order=1, ancestral=True)
def ddpm(levels: Sequence[Level], *, variance: Variance = "fixed_small") -> list[Row]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) on any timesteps (IDDPM section 4).

    x' = mean of q(x' | x, D) (eq. 7) + sqrt(variance) * noise. The variance is eq. 7's beta-tilde
    ("fixed_small"), the step's beta ("fixed_large"), or the network's interpolation between the two
    in log space ("learned", IDDPM eq. 15; the network then returns 2C channels).
    """
    if variance not in ("fixed_small", "fixed_large", "learned"):
        raise ValueError(
            f"unknown variance {variance!r}; expected one of fixed_small, fixed_large, learned"
        )
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        beta = 1 - (now.alpha / to.alpha) ** 2
        small = beta * (to.sigma / now.sigma) ** 2
        s, log_variance = math.sqrt(beta if variance == "fixed_large" else small), None
        if to.sigma == 0 or beta == 0:  # algorithm 2, line 3: no noise in the last step
            s = 0.0
        elif variance == "learned":
            s, log_variance = 1.0, (math.log(small), math.log(beta))
        a = (now.alpha / to.alpha) * (to.sigma / now.sigma) ** 2
        b = to.alpha * beta / now.sigma**2
        rows.append(Row(at=now, step=step, a=a, b=b, s=s, log_variance=log_variance))
    return rows


@sampler("ddim", order=1)
def ddim(levels: Sequence[Level], *, eta: float = 0.0) -> list[Row]:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    x' = alpha' * D + sqrt(sigma'² - s²) * eps_hat + s * noise,
    s = eta * sigma' / sigma * sqrt(1 - alpha² / alpha'²).
    eta = 0 is an ODE solver of order 1, eta = 1 is DDPM. Without noise the levels may also ascend,
    which encodes a sample (section 4.3, the reverse of the ODE).

    Raises:
        ValueError: the levels ascend with eta > 0, or begin at the clean sample.
    """
    check_eta(eta)
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        if not now.sigma:
            raise ValueError(
                "levels must not begin at the clean sample, because its noise is unknown; "
                "begin at t = 0"
            )
        if eta and to.sigma * now.alpha > now.sigma * to.alpha:
            raise ValueError(f"eta must be 0 for ascending levels (encoding), got {eta}")
        s = eta and eta * to.sigma / now.sigma * math.sqrt(1 - (now.alpha / to.alpha) ** 2)
        a = math.sqrt(max(to.sigma**2 - s**2, 0.0)) / now.sigma  # eps_hat = (x - alpha * D) / sigma
        rows.append(Row(at=now, step=step, a=a, b=to.alpha - now.alpha * a, s=s))
    return rows


@sampler("euler", order=1)
def euler(
    levels: Sequence[Level],
    *,
    schedule: NoiseSchedule | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> list[Row]:
    """Euler steps of the probability-flow ODE in sigma / alpha (Karras et al. 2022, eq. 1 and 3).

    y' = y + (sigma_ve' - sigma_ve) * (y - D) / sigma_ve with y = x / alpha. Multiplied by alpha',
    this equals DDIM with eta = 0 term by term, so the table is the same. With s_churn, noise is
    added before each step as in algorithm 2 (`churned`), without the second-order correction.
    """
    churn = Churn(levels, schedule, s_churn, s_tmin, s_tmax, s_noise)
    steps = enumerate(zip(churn.raised, levels[1:], strict=True))
    return [churn.then(euler_row(now, to, step)) for step, (now, to) in steps]


@sampler("flow-euler", order=1)
def flow_euler(levels: Sequence[Level]) -> list[Row]:
    """Euler steps along the straight paths of flow matching (Lipman et al. 2023; SD3, Esser 2024).

    x_s' = x_s + (s' - s) * F with F = (x_s - D) / s = n_hat - D, so x_s' = (s' / s) * x_s +
    (1 - s' / s) * D. Divided by the factors of x, that is DDIM's step with eta = 0, so the table is
    DDIM's.
    """
    return [euler_row(now, to, step) for step, (now, to) in enumerate(pairwise(levels))]


@sampler("euler-ancestral", order=1)
def euler_ancestral(levels: Sequence[Level], *, eta: float = 1.0) -> list[Row]:
    """Euler to sigma_down, then noise of sigma_up, as in k-diffusion.

    sigma_up² = eta² * sigma_ve'² * (1 - sigma_ve'² / sigma_ve²), sigma_down² = sigma_ve'² -
    sigma_up². Multiplied by alpha', sigma_up is DDIM's s and sigma_down its sqrt(sigma'² - s²), so
    this is DDIM's table with eta = 1.
    """
    return ddim(levels, eta=eta)


@sampler("fastdpm", order=1, spacing="var-linear")
def fastdpm(levels: Sequence[Level], *, eta: float = 1.0) -> list[Row]:
    """FastDPM (Kong and Ping 2021): DDIM's update at VAR or STEP noise levels; eta is kappa.

    eta = 1 is DDPM-rev, 0 DDIM-rev. The levels are the spacing's: "var-linear", "var-quadratic",
    "step-linear" or "step-quadratic" (`fastdiff.diffusion.fastdpm`).
    """
    return ddim(levels, eta=eta)
