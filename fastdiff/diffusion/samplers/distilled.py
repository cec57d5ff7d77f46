"""Samplers of networks that were distilled to jump from any level to a clean image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from fastdiff.diffusion.levels import Level, levels_at
from fastdiff.diffusion.samplers.rows import Row, check_eta, sampler
from fastdiff.diffusion.schedules import NoiseSchedule

SIGMA_DATA = 0.5
"""The deviation of the data in the consistency models' boundary conditions."""


@sampler("lcm", order=None)
def lcm(levels: Sequence[Level], *, timestep_scaling: float = 10.0) -> list[Row]:
    """Latent consistency models, multistep (Luo et al. 2023, algorithm 3; Song et al. 2023, eq. 5).

    With the boundary conditions c_skip = 0.25 / (u² + 0.25) and c_out = u / sqrt(u² + 0.25), u =
    timestep_scaling * t, the consistency function is f = c_skip * x + c_out * D, and x' = alpha' *
    f + sigma' * noise.
    """
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        u = timestep_scaling * now.t
        skip = SIGMA_DATA**2 / (u**2 + SIGMA_DATA**2)
        out = u / math.hypot(u, SIGMA_DATA)
        rows.append(Row(at=now, step=step, a=to.alpha * skip, b=to.alpha * out, s=to.sigma))
    return rows


@sampler("tcd", order=None)
def tcd(
    levels: Sequence[Level], *, schedule: NoiseSchedule | None = None, eta: float = 0.3
) -> list[Row]:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4, "strategic" sampling).

    DDIM without noise to s = floor((1 - eta) t'), then noise from there to t':
    x' = alpha' / alpha_s * (alpha_s * D + sigma_s * eps_hat) + sqrt(1 - alpha'² / alpha_s²) *
    noise. eta is the paper's gamma; 0 is DDIM, and 1 is the multistep sampling of consistency
    models.
    """
    check_eta(eta)
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        low = to
        if eta and to.sigma and step < len(levels) - 2:
            if schedule is None:
                raise ValueError("eta > 0 needs the noise schedule; pass schedule= or set eta=0")
            # in fp32 like the authors' code; in fp64 1 - 0.9 is below 0.1, so floor would give 0
            before = torch.floor((1 - eta) * torch.tensor(to.t, dtype=torch.float32))
            (low,) = levels_at(schedule, [float(before)])
        ratio = to.alpha / low.alpha
        a = ratio * low.sigma / now.sigma  # eps_hat = (x - alpha * D) / sigma
        s = math.sqrt(max(1 - ratio**2, 0.0))
        rows.append(Row(at=now, step=step, a=a, b=to.alpha - now.alpha * a, s=s))
    return rows
