"""Flow matching on the training system: trained, exported, sampled; what cannot go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.diffusion.schedules import ScheduleConfig, noise_schedule
from fastdiff.evaluation.bits import bits_per_dimension
from fastdiff.generate.job import SampleSettings
from fastdiff.training import (
    DenoiserLossConfig,
    DiffusionRun,
    OptimizationConfig,
    PreviewConfig,
    train_diffusion,
)
from fastdiff.training.monitor import read_log
from fastdiff.training.task import DiffusionTask
from tests.support.drawing import class_jobs
from tests.support.drawing import images as images_of
from tests.training import runs

FLOW = ScheduleConfig(kind="flow", shift=1.5)


def flow_run(images: Path, folder: Path, **changes: Any) -> DiffusionRun[Any]:
    defaults: dict[str, Any] = {
        "prediction": "flow",
        "schedule": FLOW,
        "loss": DenoiserLossConfig(timesteps="logit-normal"),
        "preview": PreviewConfig(count=4, steps=3, sampler="flow-heun"),
    }
    return runs.diffusion_run(images, folder, **{**defaults, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> DiffusionRun[Any]:
    folder = tmp_path_factory.mktemp("flow")
    optimization = OptimizationConfig(
        steps=150, batch_size=16, learning_rate=3e-3, warmup_steps=10, clip_norm=1.0, ema_decay=0.9
    )
    run = flow_run(runs.image_folder(folder / "images"), folder / "run", optimization=optimization)
    train_diffusion(runs.with_output(run, preview_every=0, log_every=25))
    return run


def test_it_learns(trained: DiffusionRun[Any]) -> None:
    """Twelve images: the loss falls well below E[(n - x0)²], which a network of zeros has."""
    losses = [record["loss"] for record in read_log(Path(trained.output.folder))]
    assert losses[0] > 0.9
    assert losses[-1] < 0.6 * losses[0]


def test_the_bundle_says_what_it_was_trained_with(trained: DiffusionRun[Any]) -> None:
    bundle = load_bundle(trained.output.folder)
    assert (bundle.prediction, bundle.schedule) == ("flow", FLOW)


@pytest.mark.parametrize("sampler", ["flow-euler", "flow-heun", "dpmpp-2m", "ddpm"])
def test_samples_are_as_smooth_and_as_bright_as_the_images(
    trained: DiffusionRun[Any], sampler: str
) -> None:
    """Whatever the sampler. Noise is twice as rough as the images."""
    bundle = load_bundle(trained.output.folder)
    task = DiffusionTask(trained)
    x0 = torch.cat([task.batch(step)["x0"] for step in range(8)])

    def roughness(images: Tensor) -> float:
        return float(images.diff(dim=-1).abs().mean() / images.std())

    settings = SampleSettings(sampler=sampler, steps=12, guidance_scale=1.5)
    made = images_of(bundle, class_jobs([0, 1] * 8, range(16), settings))
    assert 1.8 * roughness(x0) < roughness(torch.randn(x0.shape))
    assert roughness(made) == pytest.approx(roughness(x0), rel=0.35)
    assert float(made.std()) == pytest.approx(float(x0.std()), rel=0.35)
    assert float(made.mean()) == pytest.approx(float(x0.mean()), abs=0.2)


def test_previews_are_what_the_exported_bundle_samples(trained: DiffusionRun[Any]) -> None:
    bundle = load_bundle(trained.output.folder)
    preview = DiffusionTask(trained).sample(bundle.denoiser, [0, 1], [0, 1])
    guidance = trained.preview.guidance_scale
    settings = SampleSettings(sampler="flow-heun", steps=3, guidance_scale=guidance, clamp=1.0)
    again = images_of(load_bundle(trained.output.folder), class_jobs([0, 1], [0, 1], settings))
    assert torch.equal(again, preview)


def test_from_an_image_with_little_strength_it_stays_near_it(trained: DiffusionRun[Any]) -> None:
    model = fastdiff.load(trained.output.folder)
    image = DiffusionTask(trained).batch(0)["x0"][0]
    near, far = (
        model.generate(
            image=image, strength=strength, steps=20, sampler="flow-euler", classes=0, seeds=[3]
        ).tensor[0]
        for strength in (0.1, 0.9)
    )
    assert (near - image).abs().mean() < 0.5 * (far - image).abs().mean()


def test_what_cannot_go_with_it(trained: DiffusionRun[Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"schedule": ScheduleConfig()}, "prediction 'flow' and a schedule of kind 'flow' belong"),
        ({"prediction": "eps"}, "prediction 'flow' and a schedule of kind 'flow' belong"),
        ({"loss": DenoiserLossConfig(timesteps="second-moment")}, "needs a schedule with betas"),
        (
            {
                "model": runs.denoiser_model(out_channels=2, learned_sigma=True),
                "loss": DenoiserLossConfig(),
            },
            "learned_sigma needs a schedule with betas",
        ),
        ({"prediction": "foo"}, "prediction must be eps, v, x0 or flow, got 'foo'"),
    ):
        with pytest.raises(ValueError, match=message):
            flow_run(tmp_path, tmp_path, **changes)
    bundle = load_bundle(trained.output.folder)
    with pytest.raises(ValueError, match="trained by flow matching"):
        bits_per_dimension(bundle, torch.zeros(1, 1, 8, 8), None, bin_width=0.1)
    assert noise_schedule(FLOW).num_timesteps == 1000
