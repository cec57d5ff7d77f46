"""IDDPM: training by L_hybrid gives a lower NLL than by L_simple."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.claims.claim import SEEDS, Claim, Tell, shown, table, verdict
from benchmarks.claims.small import TIMESTEPS, small_run
from fastdiff.checkpoint.open import load
from fastdiff.evaluation import digits_bits
from fastdiff.training import train_diffusion

STEPS = 160
BATCH = 32
IMAGES = 32


def measure(runs: Path, tell: Tell) -> dict[str, Any]:
    """Train with both losses, and bound the NLL of the same held-out images with the same noise."""
    found: dict[str, list[dict[str, float]]] = {"simple": [], "hybrid": []}
    done, total = 0, 2 * len(SEEDS)
    for seed in SEEDS:
        for name, values in found.items():
            with tempfile.TemporaryDirectory() as folder:
                run = small_run(
                    Path(folder),
                    steps=STEPS,
                    seed=seed,
                    learned=name == "hybrid",
                    batch_size=BATCH,
                )
                with contextlib.redirect_stdout(io.StringIO()):  # the log of the training
                    train_diffusion(run)
                bits = digits_bits(load(folder), count=IMAGES)
            values.append({"bits": bits.mean, **bits.parts})
            done += 1
            tell(done, total)
    return {
        "seeds": list(SEEDS),
        "steps": STEPS,
        "batch_size": BATCH,
        "timesteps": TIMESTEPS,
        "images": IMAGES,
        **found,
    }


def section(found: dict[str, Any]) -> str:
    simple, hybrid = found["simple"], found["hybrid"]
    names = {
        "bits": "whole bound",
        "likelihood": "L_0",
        "divergences": "L_1 to L_{T-1}",
        "prior": "L_T",
    }
    rows = [
        [title, *(shown([values[key] for values in each]) for each in (simple, hybrid))]
        for key, title in names.items()
    ]
    titles = ["bits per dimension", "L_simple, posterior variance", "L_hybrid, learned variance"]
    bits = [[values["bits"] for values in each] for each in (hybrid, simple)]
    return f"""{verdict(*bits)}

{table(titles, rows)}

A U-Net of 16 channels on the scans (8 x 8, 17 grey levels), T = {found["timesteps"]}, cosine
schedule, {found["steps"]} steps of {found["batch_size"]} images; the bound on {found["images"]}
held-out scans, all timesteps, the same noise for both. The term in which they differ names the
cause: both networks learn the mean by the same loss, so what is left is the variance of the steps.
"""


CLAIM = Claim(
    title="L_hybrid has a lower NLL than L_simple",
    paper="Nichol and Dhariwal 2021, section 3.1",
    measure=measure,
    section=section,
)
