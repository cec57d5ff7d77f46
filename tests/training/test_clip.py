"""Training of a noised CLIP: it learns, resumes bit for bit, and fits what it guides."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.cli import main
from fastdiff.data import DataConfig
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.training import (
    TRAINING_PRESETS,
    ClipConfig,
    ClipRun,
    OptimizationConfig,
    TextConfig,
    for_data,
    train_clip,
)
from fastdiff.training.clip import ClipTask, for_guided_clip
from fastdiff.training.ranks import Ranks
from tests.support.tiny import AUTOENCODER, UNET, randomize, tiny_model, tiny_unet
from tests.training import runs

DATA = DataConfig(source="scenes", image_size=16, channels=3, scenes=12)
TEXT = TextConfig(layers=1, heads=2, tokens=24, vocabulary=320)
MODEL = ClipConfig(widths=(8, 16), dim=8, text_width=16)


def clip_run(folder: Path, **changes: Any) -> ClipRun:
    defaults: dict[str, Any] = {
        "model": MODEL,
        "text": TEXT,
        "data": DATA,
        "optimization": runs.optimization(batch_size=8),
        "output": runs.output(folder),
        "device": "cpu",
    }
    return ClipRun(**{**defaults, **changes})


def denoiser_bundle(folder: Path, **change: Any) -> Path:
    """A denoiser that reads text, on the latents of an autoencoder of RGB pictures."""
    config = dataclasses.replace(UNET, num_classes=None, null_class=False, context_dim=16)
    first = Autoencoder(dataclasses.replace(AUTOENCODER, image_channels=3))
    randomize(first, 2)
    fields = {"class_names": (), "denoiser": tiny_unet(config), "autoencoder": first}
    save_bundle(tiny_model(**{**fields, "image_channels": 3, **change}), folder)
    return folder


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_it_resumes_bit_for_bit_after_sigterm(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = clip_run(tmp_path / "whole")
    if kind == "latents":
        whole = for_guided_clip(whole, str(denoiser_bundle(tmp_path / "guided")))
        whole = dataclasses.replace(whole, latent_views=2)
    train_clip(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        runs.signal_at(patch, ClipTask, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_clip(cut)
    train_clip(cut, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    bundle = load_bundle(tmp_path / "cut")
    assert bundle.denoiser is bundle.autoencoder is None
    assert bundle.clip is not None
    average = runs.final_tensors(tmp_path / "cut")
    for name, value in bundle.clip.model.state_dict().items():
        assert torch.equal(value, average[f"ema.safetensors:{name}"].float()), name


def test_it_finds_captions_where_there_is_less_noise(tmp_path: Path) -> None:
    optimization = OptimizationConfig(
        steps=250, batch_size=12, learning_rate=3e-3, warmup_steps=10, clip_norm=1.0, ema_decay=0.9
    )
    run = clip_run(
        tmp_path / "run",
        optimization=optimization,
        model=ClipConfig(widths=(16, 32), dim=16, text_width=16),
        text=dataclasses.replace(TEXT, full_caption=1.0),
    )
    train_clip(runs.with_output(run, preview_every=0, log_every=25))
    trained = load_bundle(tmp_path / "run").clip
    assert trained is not None
    # among the captions of the twelve scenes that it was trained on; chance finds one in twelve
    task = ClipTask(run)
    task.run = dataclasses.replace(run, data=dataclasses.replace(DATA, split="held-out"))
    by_timestep, _, held_out = task.accuracies(trained.model)
    assert not held_out
    assert by_timestep[125] > 0.6
    assert by_timestep[125] > by_timestep[875] + 0.2


def test_it_belongs_to_one_denoiser(tmp_path: Path) -> None:
    guided = denoiser_bundle(tmp_path / "guided")
    run = for_guided_clip(clip_run(tmp_path / "run"), str(guided))
    task = ClipTask(run)
    assert task.latents.scale_factor == tiny_model().scale_factor
    assert task.batch(0)["x0"].shape == (8, 3, 8, 8)
    other = dataclasses.replace(run, schedule=ScheduleConfig(kind="cosine"))
    with pytest.raises(ValueError, match="the noise schedule differs"):
        ClipTask(other)
    classes = tmp_path / "classes"
    denoiser_bundle(classes, denoiser=tiny_unet())
    with pytest.raises(ValueError, match="does not read text, so its images have no caption"):
        ClipTask(dataclasses.replace(run, guides=str(classes), data=DATA))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DataConfig()}, "trained on captions .* use source emoji or scenes"),
        ({"text": TextConfig()}, "trained on captions .* and 0 layers"),
        ({"latent_views": 2}, "latent_views must be 0 or more, and 0 when training on pixels"),
        ({"model": ClipConfig(widths=(12,))}, "widths must be multiples of norm_groups 8"),
        ({"optimization": runs.optimization(batch_size=2)}, "must be at least 4, since pictures"),
    ],
)
def test_impossible_runs_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_run(tmp_path, **change)


def test_images_without_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained on captions"):
        for_data(clip_run(tmp_path), DataConfig(source="folder", path=str(tmp_path)))


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.training.clip.ranks", lambda: Ranks(0, 2))
    with pytest.raises(ValueError, match="one process trains it, got 2; start it without torchrun"):
        train_clip(clip_run(tmp_path))


def test_the_preset_is_described_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    preset: Any = TRAINING_PRESETS["scenes-clip"]
    assert ClipRun.from_json(preset.to_json()) == preset
    assert preset.schedule == TRAINING_PRESETS["scenes-text"].schedule
    assert main(["train", "clip", "--dry-run"]) == 0
    assert "clip, at most: " in capsys.readouterr().out
