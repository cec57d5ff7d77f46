"""A denoiser's run rejects invalid values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdiff.training import DenoiserLossConfig, DiffusionRun, PreviewConfig
from tests.training import runs


def test_impossible_combinations_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="integer timesteps, got timesteps 'logit-normal'"):
        runs.diffusion_run(
            tmp_path / "nowhere",
            tmp_path / "run",
            model=runs.denoiser_model(out_channels=2, learned_sigma=True),
            loss=DenoiserLossConfig(timesteps="logit-normal"),
        )


def test_a_previews_sampler_is_known_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"unknown sampler 'dim'; expected one of .*ddim"):
        PreviewConfig(sampler="dim")


def test_a_config_without_a_kind_is_a_unets(tmp_path: Path) -> None:
    run = runs.diffusion_run(tmp_path / "images", tmp_path / "run")
    data = json.loads(json.dumps(run.to_json()))
    assert data["network"] == "unet"
    assert DiffusionRun.from_json(data) == run
    del data["network"]
    assert DiffusionRun.from_json(data) == run
    for kind, message in (("nothing", "unknown kind of denoiser 'nothing'"), (3, "expected str")):
        with pytest.raises(ValueError, match=message):
            DiffusionRun.from_json({**data, "network": kind})
    del data["preview"]  # as if from before there were previews
    assert DiffusionRun.from_json(data).preview == PreviewConfig()
    with pytest.raises(ValueError, match=r"^DiffusionRun: speed: unknown field"):
        DiffusionRun.from_json({**data, "speed": 1})
    with pytest.raises(ValueError, match=r"^DiffusionRun: model.num_res_blocks: expected int"):
        DiffusionRun.from_json({**data, "model": {**data["model"], "num_res_blocks": "2"}})
    with pytest.raises(ValueError, match="expected an object with the fields of DiffusionRun"):
        DiffusionRun.from_json([])
