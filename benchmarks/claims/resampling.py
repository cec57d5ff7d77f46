"""IDDPM: the second-moment resampler lowers the variance of L_vlb's gradient."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.claim import SEEDS, Claim, Tell, shown, table, verdict
from benchmarks.claims.small import BATCH, TIMESTEPS, small_run
from fastdiff.training.rates import learning_rate
from fastdiff.training.task import DiffusionTask

STEPS = 120
BATCHES = 40


def measure(runs: Path, tell: Tell) -> dict[str, Any]:
    """Train by L_vlb with the resampler, then compare gradients with and without it."""
    found: dict[str, list[float]] = {"uniform": [], "resampled": [], "most_likely": []}
    done, total = 0, len(SEEDS) * (STEPS + 2 * BATCHES)

    def told() -> None:
        nonlocal done
        done += 1
        tell(done, total)

    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            run = small_run(
                Path(folder),
                steps=STEPS,
                seed=seed,
                learned=True,
                weighting="bound",
                timesteps="second-moment",
            )
            task = DiffusionTask(run)
        parameters = list(task.denoiser.parameters())
        optimizer = torch.optim.AdamW(parameters)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run.optimization)
            gradient(task, step)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            told()
        assert task.resampler is not None
        chances = task.resampler.probabilities()
        found["most_likely"].append(float(chances.max()) * len(chances))
        # The same images and noise for both, further than training went.
        for name in ("resampled", "uniform"):
            if name == "uniform":
                plain = replace(run.loss, timesteps="uniform")
                task.resampler, task.run = None, replace(run, loss=plain)
                task.objective = replace(task.objective, config=plain)
            whole = torch.zeros((), dtype=torch.float64)
            mean: Tensor = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
            for index in range(BATCHES):
                g = gradient(task, STEPS + index)
                whole += g.square().sum()
                mean += g
                told()
            mean /= BATCHES
            squares = whole / BATCHES - mean.square().sum()
            found[name].append(float(squares) * BATCHES / (BATCHES - 1))
    return {
        "seeds": list(SEEDS),
        "steps": STEPS,
        "batches": BATCHES,
        "batch_size": BATCH,
        "timesteps": TIMESTEPS,
        **found,
    }


def gradient(task: DiffusionTask, step: int) -> Tensor:
    """The gradient of the loss of a step's batch: (parameters,), fp64; also left in the grads."""
    parameters = list(task.denoiser.parameters())
    for parameter in parameters:
        parameter.grad = None
    losses, _ = task.losses(task.batch(step), step)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])


def section(found: dict[str, Any]) -> str:
    ratios = [b / a for a, b in zip(found["resampled"], found["uniform"], strict=True)]
    rows = [
        ["uniform timesteps", shown(found["uniform"], ".3g")],
        ["second-moment resampler", shown(found["resampled"], ".3g")],
        ["ratio", shown(ratios, ".2f")],
    ]
    return f"""{verdict(found["resampled"], found["uniform"])}

{table(["", "variance of the gradient"], rows)}

The trace of the covariance of one batch's gradient, over {found["batches"]} batches of
{found["batch_size"]} images, after {found["steps"]} steps of training by L_vlb with the resampler
(T = {found["timesteps"]}); images and noise are the same for both. The cause: the terms of L_vlb
differ in size, and the resampler draws the largest {max(found["most_likely"]):.0f} times as often
as a uniform choice would, with a weight that is as much smaller.
"""


CLAIM = Claim(
    title="The second-moment resampler lowers the variance of the gradient of L_vlb",
    paper="Nichol and Dhariwal 2021, section 3.3",
    measure=measure,
    section=section,
)
