"""What a denoiser's run refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdiff.training import DenoiserLossConfig
from tests.training import runs


def test_impossible_combinations_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole timesteps, got timesteps 'logit-normal'"):
        runs.diffusion_run(
            tmp_path / "nowhere",
            tmp_path / "run",
            model=runs.denoiser_model(out_channels=2, learned_sigma=True),
            loss=DenoiserLossConfig(timesteps="logit-normal"),
        )
