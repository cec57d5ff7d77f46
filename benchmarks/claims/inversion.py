"""DDIM: the error of encoding and decoding falls at order 1."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.claim import SEEDS, Claim, Tell, shown, spread, table
from fastdiff.checkpoint.open import load
from fastdiff.data import digits_split
from fastdiff.diffusion.levels import levels_at
from fastdiff.diffusion.samplers import SamplerTable, table_of_levels
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule

STEPS = (25, 50, 100, 200)
IMAGES = 4
HIGHEST = 0.98
"""Fraction of the timesteps up to which images are encoded: above it sigma / alpha of the cosine
schedule grows so fast that this many steps do not resolve it."""


def measure(runs: Path, tell: Tell) -> dict[str, Any]:
    """Encode latents of held-out digits with the shipped network and decode them, in fp64."""
    model = load("digits")
    assert model.denoiser is not None
    assert model.autoencoder is not None
    assert model.schedule is not None
    network, schedule = model.denoiser.double(), NoiseSchedule(model.schedule)
    images, labels = digits_split("held-out")
    errors: dict[int, list[float]] = {steps: [] for steps in STEPS}
    done, total = 0, 2 * len(SEEDS) * sum(STEPS)
    for seed in SEEDS:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        chosen = order[:IMAGES]
        with torch.no_grad():
            x0 = model.autoencoder.encode_latent(images[chosen]).double() * model.scale_factor
        y = labels[chosen]

        def along(table: SamplerTable, x: Tensor, y: Tensor = y) -> Tensor:
            nonlocal done

            def predict(x: Tensor, row: int) -> Tensor:
                nonlocal done
                done += 1
                tell(done, total)
                return network(x, table.timesteps[row].expand(len(x)), y=y)

            return sample(predict, table, x, range(len(x)))

        for steps in STEPS:
            last = HIGHEST * (schedule.num_timesteps - 1)
            levels = levels_at(schedule, [last * i / steps for i in range(steps + 1)])
            up, down = (
                table_of_levels("ddim", path, prediction=model.prediction)
                for path in (levels, levels[::-1])
            )
            back = along(down, along(up, x0))
            errors[steps].append(float((back - x0).norm() / x0.norm()))
    return {
        "seeds": list(SEEDS),
        "images": IMAGES,
        "weights": model.weights_hash,
        "errors": {str(steps): values for steps, values in errors.items()},
    }


def orders(errors: dict[str, list[float]]) -> dict[str, list[float]]:
    """The order between consecutive numbers of steps, per seed: log2 of the errors' ratio."""
    names = list(errors)
    return {
        fine: [math.log2(a / b) for a, b in zip(errors[coarse], errors[fine], strict=True)]
        for coarse, fine in pairwise(names)
    }


def section(found: dict[str, Any]) -> str:
    errors = found["errors"]
    between = orders(errors)
    rows = [
        [steps, shown(values, ".2e"), shown(between[steps], ".2f") if steps in between else ""]
        for steps, values in errors.items()
    ]
    order, deviation = spread(list(between.values())[-1])
    holds = abs(order - 1) <= max(0.1, deviation)
    word = "**Holds**" if holds else "**Not reached yet**"
    return f"""{word}: the order between the two finest is {order:.2f} ± {deviation:.2f}, theory 1.

{table(["steps up, and down", "relative error", "order"], rows)}

Latents of {found["images"]} held-out digits for each of three seeds, the shipped network in fp64,
steps even in t from 0 to {HIGHEST:.0%} of T. The cause: a step up and the same step down use the
network's output at different ends of the step, which differ by O(h), so each pair leaves O(h²) and
all of them O(h).
"""


CLAIM = Claim(
    title="The error of encoding and decoding with DDIM falls at order 1",
    paper="Song et al. 2021, section 4.3 and table 2",
    measure=measure,
    section=section,
)
