"""The digits that come with the package."""

from __future__ import annotations

import json

import pytest
import torch

import fastdiff
from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.checkpoint.open import ASSETS
from fastdiff.training import TRAINING_PRESETS

SHIPPED = ASSETS / "digits"

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="fastdiff/assets/digits is not there")


def test_the_shipped_bundle_is_small_and_whole() -> None:
    bundle = load_bundle("digits")
    assert bundle.denoiser is not None
    assert bundle.autoencoder is not None
    assert bundle.class_names == tuple("0123456789")
    size = sum(path.stat().st_size for path in bundle.path.glob("*.safetensors"))
    assert size <= 8 * 2**20
    assert bundle.provenance["facts"], "the command that trained it should be recorded"


def test_the_shipped_digits_are_digits() -> None:
    """Twenty samples: the right classes under a judge that saw real digits only."""
    pytest.importorskip("sklearn", reason="the judge needs fastdiff[train]")
    from fastdiff.evaluation import Judge, digits_reference

    model = fastdiff.load("digits")
    labels = list(range(10)) * 2
    images = model.generate(classes=labels, seeds=range(20), steps=15).tensor
    assert Judge(digits_reference(32)).accuracy(images, torch.tensor(labels)) >= 0.85


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_the_documented_command_is_the_one_that_trained_them(stage: str) -> None:
    """The preset equals the config of the run that made the weights; its log is complete."""
    preset = TRAINING_PRESETS[f"digits-{stage}"]
    run = type(preset).from_json(json.loads((SHIPPED / f"{stage}-run.json").read_text()))
    assert run == preset
    last = json.loads((SHIPPED / f"{stage}-log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == preset.optimization.steps


def test_the_evaluation_is_of_these_weights_and_meets_its_limits() -> None:
    record = json.loads((SHIPPED / "evaluation.json").read_text())
    assert record["provenance"]["weights"] == load_bundle("digits").weights_hash
    assert record["results"]["samples"]["count"] >= 1000
    assert record["provenance"]["settings"]["steps"] <= 50
    assert record["failures"] == []
