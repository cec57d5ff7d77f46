"""The second stage from images to samples, in every kind that can be trained."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.images import contact_sheet
from fastdiff.models.network import NETWORKS, Family
from fastdiff.training import (
    DenoiserLossConfig,
    DiffusionRun,
    PreviewConfig,
    describe,
    train_autoencoder,
    train_diffusion,
)
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.task import DiffusionTask
from fastdiff.training.trainer import PREVIEW_CELL, Trainer, fit, open_run
from tests.support.drawing import class_jobs
from tests.support.drawing import images as images_of
from tests.training import runs
from tests.training.plain_network import KIND, Plain, PlainConfig

SETTINGS = SampleSettings(steps=4, guidance_scale=1.0)


def flat_folder(folder: Path) -> Path:
    """Eight grey images without classes."""
    folder.mkdir()
    source = np.random.default_rng(0)
    for number in range(8):
        pixels = source.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_vq_latents_are_trained_on_and_sampled(images: Path, tmp_path: Path) -> None:
    first = runs.autoencoder_run(
        images, tmp_path / "first", "vq", optimization=runs.optimization(steps=20)
    )
    train_autoencoder(first)
    start = AutoencoderTask(first).autoencoder.state_dict()
    trained = load_bundle(tmp_path / "first").autoencoder
    assert trained is not None
    moved = [name for name, value in trained.state_dict().items() if not value.equal(start[name])]
    assert any("codebook" in name for name in moved), "the codebook never learned"
    second = runs.diffusion_run(
        images,
        tmp_path / "second",
        data=first.data,
        autoencoder=str(tmp_path / "first"),
        model=runs.denoiser_model(2),
        optimization=runs.optimization(steps=20),
    )
    train_diffusion(second)
    bundle = load_bundle(tmp_path / "second")
    assert bundle.scale_factor != 1.0
    assert bundle.autoencoder is not None
    for name, value in bundle.autoencoder.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), "the first stage must not move"
    sampled = images_of(bundle, class_jobs([0, 1], [3, 4], SETTINGS))
    assert sampled.shape == (2, 1, 16, 16)
    assert not torch.equal(sampled[0], sampled[1])


def test_learned_variance_on_pixels_is_trained_and_sampled(images: Path, tmp_path: Path) -> None:
    """The variance half learns from the bound alone, the mean half from the simple loss alone."""
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        model=runs.denoiser_model(out_channels=2, learned_sigma=True, dropout=0.0),
        prediction="eps",
        loss=DenoiserLossConfig(bound_weight=1e-3),
        optimization=runs.optimization(steps=10, batch_size=8),
    )
    gradients = {}
    for weight in (0.0, 1e-3, 1.0):
        changed = dataclasses.replace(run, loss=DenoiserLossConfig(bound_weight=weight))
        task = DiffusionTask(changed)
        loss, _ = task.losses(task.batch(0), 0)
        loss["unet"].backward()
        gradients[weight] = task.denoiser.conv_out.weight.grad.clone()
    mean, variance = 0, 1
    torch.testing.assert_close(gradients[0.0][mean], gradients[1.0][mean], rtol=1e-5, atol=1e-7)
    assert gradients[0.0][variance].abs().max() == 0
    assert gradients[1e-3][variance].abs().max() > 0
    thousandfold = gradients[1e-3][variance] * 1000
    assert (thousandfold - gradients[1.0][variance]).norm() < 1e-4 * thousandfold.norm()
    train_diffusion(run)
    bundle = load_bundle(tmp_path / "run")
    assert bundle.denoiser is not None
    start = DiffusionTask(run).denoiser.conv_out.weight
    assert (bundle.denoiser.conv_out.weight != start).flatten(1).any(1).all(), "both halves learned"
    settings = dataclasses.replace(SETTINGS, sampler="ddpm", clamp=1.0)
    sampled = images_of(bundle, class_jobs([0, 1], [3, 4], settings))
    assert sampled.shape == (2, 1, 8, 8)
    with torch.no_grad():  # the second half reaches the sampler: another variance, another image
        bundle.denoiser.conv_out.bias[variance] += 3
    assert not torch.equal(images_of(bundle, class_jobs([0, 1], [3, 4], settings)), sampled)


def test_an_upsampler_is_trained_and_enlarges(images: Path, tmp_path: Path) -> None:
    """It reads the area means, enlarged bilinearly, behind x; generating does the same to a small
    image."""
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        model=runs.denoiser_model(in_channels=2, out_channels=1, dropout=0.0),
        low_resolution=2,
    )
    task = DiffusionTask(run)
    batch = task.batch(0)
    small = batch["x0"].unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    torch.testing.assert_close(batch["extra"][:, :, 0, 0], small[:, :, 0, 0])
    wide = batch["extra"][:, :, 3:5, 0]  # on both sides of the middle: 5/8 and 3/8 of the two rows
    torch.testing.assert_close(wide[:, :, 0], (5 * small[:, :, 0, 0] + 3 * small[:, :, 1, 0]) / 8)
    train_diffusion(run)
    bundle = load_bundle(tmp_path / "run")
    job = ClassJob(label=0, seed=3, image=small[0], settings=SETTINGS)
    sampled = images_of(bundle, [job])
    other = images_of(bundle, [dataclasses.replace(job, image=small[0].flip(1))])
    assert (sampled - other).abs().max() > 1e-3, "the small image matters"
    for change, message in (
        ({"low_resolution": 8}, "low_resolution must be from 1 to 7"),
        ({"model": runs.denoiser_model()}, "takes 2, got in_channels=1; set model in_channels, or"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffusionTask(dataclasses.replace(run, **change))


def test_images_without_classes_train_a_model_without_classes(tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "flat")
    model = runs.denoiser_model(num_classes=None, null_class=False)
    run = runs.diffusion_run(images, tmp_path / "run", model=model, class_dropout=0.5)
    assert set(DiffusionTask(run).batch(0)) == {"x0", "noise", "t"}
    train_diffusion(run)
    with Image.open(tmp_path / "run/samples/step_00000006.png") as sheet:
        shown = 2 * PREVIEW_CELL  # four samples make a square
        assert shown <= min(sheet.size)
        assert max(sheet.size) < 2 * shown
    bundle = load_bundle(tmp_path / "run")
    assert bundle.class_names == ()
    sampled = images_of(bundle, class_jobs([None], [3], SETTINGS))
    assert sampled.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"has 2 classes, the data has 0.*num_classes to None"):
        train_diffusion(dataclasses.replace(run, model=runs.denoiser_model()))


@pytest.mark.parametrize("kind", ["latents", "pixels", "learned variance", "upsampler"])
def test_previews_show_what_the_exported_bundle_samples(
    images: Path, tmp_path: Path, kind: str
) -> None:
    """Previews use the scale, guidance, null class, clamp, variance and noise of sampling."""
    changes: dict[str, Any] = {}
    sampler, clamp = "ddim", 1.0
    if kind == "latents":
        first = runs.autoencoder_run(images, tmp_path / "first", optimization=runs.optimization())
        train_autoencoder(first)
        changes = {"data": first.data, "autoencoder": first.output.folder}
        changes["model"] = runs.denoiser_model(2)
        clamp = None
    elif kind == "learned variance":
        changes = {"model": runs.denoiser_model(out_channels=2, learned_sigma=True)}
        sampler = "ddpm"
    elif kind == "upsampler":
        changes = {"model": runs.denoiser_model(in_channels=2, out_channels=1), "low_resolution": 2}
    run = runs.diffusion_run(
        images,
        tmp_path / "second",
        prediction="eps",
        preview=PreviewConfig(count=4, steps=3, guidance_scale=3.0, sampler=sampler),
        optimization=runs.optimization(steps=30, learning_rate=1e-2, ema_decay=0.0),
        **changes,
    )
    task = DiffusionTask(run)
    open_run(run, resume=False)
    fit(task, run, resume=False)
    before = copy.deepcopy(task.denoiser.state_dict())
    preview = task.sample(task.denoiser, [0, 1, 7], [0, 1, 1])
    bundle = load_bundle(tmp_path / "second")
    settings = SampleSettings(sampler=sampler, steps=3, guidance_scale=3.0, clamp=clamp)
    jobs = class_jobs([0, 1, 1], [0, 1, 7], settings)
    if kind == "upsampler":  # previews enlarge the first images of each class
        own = [torch.nonzero(task.batches.dataset.labels == label).flatten() for label in (0, 1)]
        whole = task.batches.dataset.batch(torch.stack([own[0][0], own[1][0], own[1][1]]))[0]
        small = torch.nn.functional.adaptive_avg_pool2d(whole, 2)
        jobs = [
            dataclasses.replace(job, image=image) for job, image in zip(jobs, small, strict=True)
        ]
    sampled = images_of(bundle, jobs)
    if kind == "latents":  # the decoder of a preview runs on the whole batch, not in blocks
        torch.testing.assert_close(preview, sampled, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(preview, sampled)
    plain = dataclasses.replace(settings, guidance_scale=1.0)
    unguided = images_of(bundle, [dataclasses.replace(job, settings=plain) for job in jobs])
    assert (unguided - sampled).abs().max() > 1e-3, "guidance did nothing: the test sees nothing"
    assert type(task.denoiser.conv_out) is torch.nn.Conv2d, "the network in training was prepared"
    for name, value in task.denoiser.state_dict().items():
        assert torch.equal(value, before[name])


def test_dropout_and_dropped_classes_are_drawn_anew_for_every_step_and_piece(
    images: Path, tmp_path: Path
) -> None:
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        class_dropout=0.5,
        optimization=runs.optimization(batch_size=32, accumulate=2),
    )
    trainer = Trainer(DiffusionTask(run), run)
    task, seen = trainer.task, []
    losses = task.losses

    def note(part: dict[str, torch.Tensor], step: int) -> object:
        seen.append(torch.random.get_rng_state())  # what the dropout layers will draw from
        return losses(part, step)

    task.losses = note  # type: ignore[method-assign, assignment]
    trainer.step()
    trainer.step()
    assert len({state.numpy().tobytes() for state in seen}) == 4
    dropped = [task.batch(step)["y"] == 2 for step in range(3)]
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(dropped[1], task.batch(1)["y"] == 2)


def test_models_that_do_not_fit_the_data_are_refused(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(images, tmp_path / "run")
    for changes, message in (
        ({"model": runs.denoiser_model(3)}, "3 channels, the data has 1"),
        ({"model": runs.denoiser_model(num_classes=7)}, "7 classes, the data has 2"),
        ({"data": dataclasses.replace(run.data, image_size=9)}, "multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train_diffusion(dataclasses.replace(run, **changes))
    assert not (tmp_path / "run").exists(), "a mistake leaves no folder behind"


def test_any_network_is_trained_exported_and_resumed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, KIND, Family(PlainConfig, Plain))
    run = runs.diffusion_run(
        images, tmp_path / "run", model=PlainConfig(), optimization=runs.optimization(steps=2)
    )
    longer = runs.diffusion_run(images, tmp_path / "whole", model=PlainConfig())
    train_diffusion(longer)
    with monkeypatch.context() as patch:
        runs.signal_at(patch, DiffusionTask, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_diffusion(runs.with_output(longer, folder=str(tmp_path / "cut")))
    text = (tmp_path / "cut/config.json").read_text()
    assert json.loads(text)["network"] == KIND
    again = DiffusionRun.from_json(json.loads(text))
    assert again.model == PlainConfig()
    train_diffusion(again, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")

    denoiser = load_bundle(tmp_path / "whole").denoiser
    assert isinstance(denoiser, Plain)
    average = runs.final_tensors(tmp_path / "whole")
    for name, value in denoiser.state_dict().items():
        assert torch.equal(value, average[f"ema.safetensors:{name}"])
    assert f"{KIND}: " in describe(run)
    with pytest.raises(ValueError, match="network: 'plain' there, 'unet' now"):
        train_diffusion(dataclasses.replace(longer, model=runs.denoiser_model()), resume=True)
    checkpointed = runs.with_optimization(run, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing to False"):
        train_diffusion(checkpointed)


def test_previews_are_labelled_sheets(images: Path, tmp_path: Path) -> None:
    """They show step, settings and class names, and the images in their places."""
    run = runs.diffusion_run(images, tmp_path / "run")
    task = DiffusionTask(run)
    sampled = task.sample(task.denoiser, range(4), [0, 1, 0, 1])
    drawn: dict[str, Any] = {}

    def sheet(shown: torch.Tensor, *rows: Any, **options: Any) -> Image.Image:
        drawn.update(options, shown=shown)
        return contact_sheet(shown, *rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.training.task.contact_sheet", sheet)
        made = task.preview(task.denoiser, 1234)
    assert torch.equal(drawn["shown"], sampled)
    assert (drawn["columns"], drawn["column_labels"]) == (2, ["a", "b"])
    assert (drawn["title"], drawn["caption"]) == (
        "step 1,234",
        "ddim, 3 steps, guidance 2, averaged weights",
    )
    assert min(made.size) >= 2 * 96
    first = runs.autoencoder_run(images, tmp_path / "first")
    pairs = AutoencoderTask(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.training.autoencoder.contact_sheet", sheet)
        patch.setattr("fastdiff.training.autoencoder._COLUMNS", 4)
        pairs.preview(pairs.autoencoder, 7)
    originals = pairs.batches.fixed(12)
    with torch.no_grad():
        restored = pairs.autoencoder(originals)[0].clamp(-1, 1)
    for row in range(3):
        place = slice(8 * row, 8 * row + 4), slice(4 * row, 4 * row + 4)
        assert torch.equal(drawn["shown"][place[0]], originals[place[1]])
        after = drawn["shown"][8 * row + 4 : 8 * row + 8]
        assert torch.equal(after, restored[place[1]])
    assert drawn["title"] == "step 7"
