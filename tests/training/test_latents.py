"""What the denoiser is trained on: scale, fresh noise, and which first stage it came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.training import train_autoencoder, train_diffusion
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.task import DiffusionTask
from tests.training import runs


def test_class_dropout_has_its_rate_and_the_scale_factor_unit_variance(tmp_path: Path) -> None:
    images = runs.image_folder(tmp_path / "images", count=12)
    autoencoder = Autoencoder(runs.autoencoder_model())
    first = Model(layout="bundle", image_size=16, image_channels=1, autoencoder=autoencoder)
    save_bundle(first, tmp_path / "first")
    base = runs.diffusion_run(images, tmp_path / "run")
    for views in (0, 2):
        run = runs.diffusion_run(
            images,
            tmp_path / "run",
            autoencoder=str(tmp_path / "first"),
            model=runs.denoiser_model(2),
            class_dropout=0.25,
            latent_views=views,
            data=runs.autoencoder_run(images, tmp_path).data,
            optimization=runs.optimization(batch_size=24),
        )
        task = DiffusionTask(run)
        assert float(task.batch(0)["x0"].std()) == pytest.approx(1.0, abs=1e-5)
        labels = torch.cat([task.batch(step)["y"] for step in range(20)])
        assert 0.18 < float((labels == 2).double().mean()) < 0.32
        if views:  # encoded before or during training: the same latents in the first epochs
            reference = task.latents.unscaled(0)[0]
        else:
            expected = task.latents.unscaled(0)[0]
    torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-5)
    assert base.model.in_channels == 1


def test_posterior_noise_is_fresh_in_every_step(images: Path, tmp_path: Path) -> None:
    run = runs.autoencoder_run(images, tmp_path / "first", optimization=runs.optimization(steps=1))
    task = AutoencoderTask(run)
    noises = [task.batch(step)["noise"] for step in (0, 1, 0)]
    assert torch.equal(noises[0], noises[2])
    assert not torch.isclose(noises[0], noises[1]).any()
    train_autoencoder(run)
    for views in (0, 1):
        second = runs.diffusion_run(
            images,
            tmp_path / "second",
            data=dataclasses.replace(run.data, augment=type(run.data.augment)()),
            autoencoder=str(tmp_path / "first"),
            model=runs.denoiser_model(2),
            latent_views=views,
            optimization=runs.optimization(batch_size=12),  # every step sees all images
        )
        denoiser = DiffusionTask(second)
        sorted_rows = []
        for step in (0, 1):
            order = denoiser.batches.order.batch(step)[0].argsort()
            batch = denoiser.batch(step)
            sorted_rows.append((batch["x0"][order], batch["noise"][order]))
        for one, other in zip(*sorted_rows, strict=True):
            assert not torch.isclose(one, other, rtol=1e-4).all(dim=(1, 2, 3)).any()


def test_resuming_on_another_first_stage_is_refused(images: Path, tmp_path: Path) -> None:
    short = runs.optimization(steps=1)
    first = runs.autoencoder_run(images, tmp_path / "first", optimization=short)
    train_autoencoder(first)
    run = runs.diffusion_run(
        images,
        tmp_path / "second",
        data=first.data,
        autoencoder=str(tmp_path / "first"),
        model=runs.denoiser_model(2),
        optimization=short,
    )
    train_diffusion(run)
    other = runs.with_output(dataclasses.replace(first, seed=1), folder=str(tmp_path / "other"))
    train_autoencoder(other)
    (tmp_path / "first").rename(tmp_path / "away")
    (tmp_path / "other").rename(tmp_path / "first")
    with pytest.raises(ValueError, match=r"autoencoder in .* has changed since"):
        train_diffusion(run, resume=True)
