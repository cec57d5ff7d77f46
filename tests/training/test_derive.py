"""A run on other images than the digits trains and samples without further options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.cli.train import Train, main
from fastdiff.data import DataConfig
from fastdiff.training import TRAINING_PRESETS, AutoencoderRun, DiffusionRun, for_data


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Images in colour: three classes in a/, none in b/."""
    source = np.random.default_rng(0)
    for name in ("a/x", "a/y", "a/z", "b"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(source.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
            tmp_path / name / "0.png"
        )
    return tmp_path


def test_channels_and_augmentation_follow_from_the_images(photographs: Path) -> None:
    digits = TRAINING_PRESETS["digits-autoencoder"]
    assert isinstance(digits, AutoencoderRun)
    run = for_data(digits, DataConfig(source="folder", path=str(photographs / "a")))
    assert (run.data.channels, run.model.image_channels, run.discriminator.image_channels) == (
        *(3, 3, 3),
    )
    assert run.data.augment.flip
    assert (run.data.augment.rotation, run.data.augment.shear, run.data.augment.shift) == (0, 0, 0)
    assert run.data.augment.fill == "reflection"


@pytest.mark.parametrize(("name", "classes"), [("a", 3), ("b", None)])
def test_a_denoiser_on_pixels_takes_the_classes_there_are(
    photographs: Path, name: str, classes: int | None
) -> None:
    digits = dataclasses.replace(
        TRAINING_PRESETS["digits-diffusion"], autoencoder="", latent_views=0
    )
    assert isinstance(digits, DiffusionRun)
    run = for_data(digits, DataConfig(source="folder", path=str(photographs / name)))
    assert (run.model.in_channels, run.model.out_channels) == (3, 3)
    assert (run.model.num_classes, run.model.null_class) == (classes, classes is not None)
    assert run.class_dropout == (0.1 if classes else 0.0)
    assert run.preview.guidance_scale == (1.5 if classes else 1.0)


def test_the_command_derives_what_is_not_said(
    photographs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options override derived values; a preset is used unchanged."""
    seen: list[Train] = []
    monkeypatch.setattr("fastdiff.cli.train.run", lambda options: seen.append(options) or 0)
    words = ["--data.source", "folder", "--data.path", str(photographs / "b")]
    assert main(["autoencoder", *words, "--data.augment.rotation", "5"]) == 0
    assert main(["autoencoder", "--preset", "digits-autoencoder", *words]) == 0
    assert main(["diffusion", "--autoencoder", "", *words]) == 0
    derived, preset, pixels = (options.run for options in seen)
    assert (derived.data.channels, derived.data.augment.rotation) == (3, 5)
    assert (preset.data.channels, preset.data.augment.rotation) == (1, 8)
    assert (pixels.model.in_channels, pixels.model.num_classes) == (3, None)
