"""A small run on the scans of the digits, 8 x 8, that trains in a minute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.presets import UNETS
from fastdiff.training import TRAINING_PRESETS, DiffusionRun
from fastdiff.training.objective import DenoiserLossConfig

TIMESTEPS = 200
BATCH = 64
_LARGE = TRAINING_PRESETS["tiny-iddpm"]


def small_run(
    folder: Path, *, steps: int, seed: int, learned: bool, batch_size: int = BATCH, **loss: Any
) -> DiffusionRun[Any]:
    """tiny-iddpm with 16 channels and 200 timesteps.

    learned: whether the network returns a variance. loss: fields of `DenoiserLossConfig`.
    """
    assert isinstance(_LARGE, DiffusionRun)
    model = replace(
        UNETS["tiny-pixels"],
        model_channels=16,
        norm_groups=8,
        dropout=0.0,
        out_channels=2 if learned else 1,
        learned_sigma=learned,
    )
    return replace(
        _LARGE,
        model=model,
        seed=seed,
        device="cpu",
        schedule=ScheduleConfig(kind="cosine", num_timesteps=TIMESTEPS),
        loss=DenoiserLossConfig(bin_width=0.125, **loss),
        optimization=replace(
            _LARGE.optimization,
            steps=steps,
            batch_size=batch_size,
            learning_rate=2e-3,
            warmup_steps=50,
            ema_decay=0.98,
        ),
        output=replace(
            _LARGE.output,
            folder=str(folder),
            preview_every=steps,
            save_every=steps,
            export_dtype="fp32",
        ),
    )
