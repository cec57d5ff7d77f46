"""DDIM: the error of encoding and decoding falls at order 1."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.claim import SEEDS, Claim, Tell, shown, spread, table
from fastdiff.data import digits_split
from fastdiff.diffusion.levels import levels_at
from fastdiff.diffusion.samplers import SamplerTable, table_of_levels
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig

STEPS = (25, 50, 100, 200, 400)
CENTRES = 100
IMAGES = 16
WIDTH = 0.3
"""Standard deviation of the data around each centre."""
SCHEDULES = {"linear": ScheduleConfig(), "cosine": ScheduleConfig(kind="cosine")}


def measure(runs: Path, tell: Tell) -> dict[str, Any]:
    """Encode samples of a mixture of Gaussians around real digits, decode them, in fp64."""
    scans, _ = digits_split("held-out", image_size=8)
    centres = scans[:CENTRES].flatten(1).double()
    found: dict[str, dict[str, list[float]]] = {}
    done, total = 0, 2 * len(SCHEDULES) * len(SEEDS) * sum(STEPS)
    for name, config in SCHEDULES.items():
        schedule = NoiseSchedule(config)
        errors = found[name] = {str(steps): [] for steps in STEPS}
        for seed in SEEDS:
            source = torch.Generator().manual_seed(seed)
            place = torch.randint(CENTRES, (IMAGES,), generator=source)
            noise = torch.randn(IMAGES, centres.shape[1], generator=source, dtype=torch.float64)
            x0 = centres[place] + WIDTH * noise
            for steps in STEPS:
                last = schedule.num_timesteps - 1
                levels = levels_at(schedule, [last * i / steps for i in range(steps + 1)])

                def along(path: SamplerTable, x: Tensor, rows: Any) -> Tensor:
                    return sample(lambda x, row: rows(x, path, row), path, x, range(len(x)))

                def predict(
                    x: Tensor, path: SamplerTable, row: int, at: NoiseSchedule = schedule
                ) -> Tensor:
                    nonlocal done
                    done += 1
                    tell(done, total)
                    t = float(path.timesteps[row])
                    return best_x0(x, float(at.alpha(t)), float(at.sigma(t)), centres)

                up, down = (
                    table_of_levels("ddim", path, prediction="x0")
                    for path in (levels, levels[::-1])
                )
                back = along(down, along(up, x0, predict), predict)
                relative = (back - x0).norm(dim=1) / x0.norm(dim=1)
                errors[str(steps)].append(float(relative.median()))
    return {"seeds": list(SEEDS), "images": IMAGES, "errors": found}


def best_x0(x: Tensor, alpha: float, sigma: float, centres: Tensor) -> Tensor:
    """E[x0 | x] for equal parts N(centre, WIDTH²) and x = alpha x0 + sigma n. x: (N, D), fp64."""
    variance = (alpha * WIDTH) ** 2 + sigma**2
    chances = (-torch.cdist(x, alpha * centres).square() / variance / 2).softmax(-1)
    return (alpha * WIDTH**2 * x + sigma**2 * chances @ centres) / variance


def orders(errors: dict[str, list[float]]) -> dict[str, list[float]]:
    """The order between consecutive numbers of steps, per seed: log2 of the errors' ratio."""
    return {
        fine: [math.log2(a / b) for a, b in zip(errors[coarse], errors[fine], strict=True)]
        for coarse, fine in pairwise(errors)
    }


def section(found: dict[str, Any]) -> str:
    rows, sentences = [], []
    for name, errors in found["errors"].items():
        between = orders(errors)
        order, deviation = spread(list(between.values())[-1])
        word = "**holds**" if abs(order - 1) <= max(0.1, deviation) else "**not reached yet**"
        sentences.append(f"- {name} schedule: {word}, order {order:.2f} ± {deviation:.2f}")
        rows += [
            [
                f"{name}, {steps}",
                shown(values, ".2e"),
                shown(between[steps], ".2f") if steps in between else "",
            ]
            for steps, values in errors.items()
        ]
    listed = "\n".join(sentences)
    return f"""The order between the two finest, theory 1:

{listed}

{table(["schedule, steps up and down", "median relative error", "order"], rows)}

Data: a Gaussian of deviation {WIDTH:g} around each of {CENTRES} held-out scans (8 x 8), whose best
denoiser has a closed form, so that nothing but the solver errs; the median of {found["images"]}
samples for each of three seeds, fp64, steps even in t over all of T. It is the median because a few
samples lie between two scans, where a small error decides which of them they return to; for those
many more steps are needed. The cause of the order: a step up and the same step down use the
network's output at different ends of the step, which differ by O(h), so each pair leaves O(h²) and
all of them O(h).
"""


CLAIM = Claim(
    title="The error of encoding and decoding with DDIM falls at order 1",
    paper="Song et al. 2021, section 4.3 and table 2",
    measure=measure,
    section=section,
)
