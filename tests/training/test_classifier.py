"""Training of a noisy classifier: it learns, resumes bit for bit, and fits what it guides."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.checkpoint.guide import with_classifier
from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.data import DataConfig
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.evaluation.classifier import Judge, digits_reference
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.models.classifier import ClassifierConfig
from fastdiff.training import (
    TRAINING_PRESETS,
    ClassifierRun,
    DiffusionRun,
    OptimizationConfig,
    for_data,
    train_classifier,
)
from fastdiff.training.classifier import RANGES, ClassifierTask, for_guided
from fastdiff.training.monitor import read_log
from tests.support.drawing import images as images_of
from tests.support.tiny import AUTOENCODER, UNET, tiny_model, tiny_unet
from tests.training import runs

MODEL = ClassifierConfig(
    in_channels=1,
    num_classes=2,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_depth=(0, 1),
    sample_size=16,
    head_dim=16,
    norm_groups=4,
    dropout=0.1,
)


def classifier_run(images: Path, folder: Path, **changes: Any) -> ClassifierRun:
    defaults: dict[str, Any] = {
        "model": MODEL,
        "data": DataConfig(
            source="folder", path=str(images), image_size=16, channels=1, augment=runs.AUGMENT
        ),
        "optimization": runs.optimization(batch_size=8),
        "output": runs.output(folder),
        "device": "cpu",
    }
    return ClassifierRun(**{**defaults, **changes})


def denoiser_bundle(folder: Path, **change: Any) -> Path:
    """A denoiser of two classes on the latents of an autoencoder."""
    config = dataclasses.replace(UNET, num_classes=2)
    fields: dict[str, Any] = {"class_names": ("a", "b"), "denoiser": tiny_unet(config)}
    save_bundle(tiny_model(**{**fields, **change}), folder)
    return folder


def guiding_run(images: Path, folder: Path, guided: Path, **changes: Any) -> ClassifierRun:
    return for_guided(classifier_run(images, folder, **changes), str(guided))


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_it_resumes_bit_for_bit_after_sigterm(
    images: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = classifier_run(images, tmp_path / "whole")
    if kind == "latents":
        guided = denoiser_bundle(tmp_path / "guided")
        whole = guiding_run(images, tmp_path / "whole", guided)
        whole = dataclasses.replace(whole, latent_views=2)
    train_classifier(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        runs.signal_at(patch, ClassifierTask, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_classifier(cut)
    train_classifier(cut, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    bundle = load_bundle(tmp_path / "cut")
    assert bundle.denoiser is bundle.autoencoder is None
    assert bundle.class_names == ("a", "b")
    average = runs.final_tensors(tmp_path / "cut")
    assert bundle.classifier is not None
    for name, value in bundle.classifier.state_dict().items():
        assert torch.equal(value, average[f"ema.safetensors:{name}"]), "the average is exported"


def test_it_learns_more_where_there_is_less_noise(images: Path, tmp_path: Path) -> None:
    """Twelve images of two classes: all are told apart without noise, none in pure noise."""
    optimization = OptimizationConfig(
        steps=150, batch_size=32, learning_rate=3e-3, warmup_steps=10, clip_norm=1.0, ema_decay=0.9
    )
    data = DataConfig(source="folder", path=str(images), image_size=16, channels=1)
    run = classifier_run(images, tmp_path / "run", optimization=optimization, data=data)
    train_classifier(runs.with_output(run, preview_every=0, log_every=25))
    first, last = (read_log(tmp_path / "run")[at] for at in (0, -1))
    assert abs(first["loss"] - 0.69) < 0.1
    assert last["accuracy/t0-249"] > 0.9
    assert last["accuracy/t0-249"] > last["accuracy/t750-999"] + 0.2
    assert last["loss/t0-249"] < 0.3
    assert last["loss/t750-999"] > 0.5
    facts = load_bundle(tmp_path / "run").provenance["facts"]["accuracy"]
    assert facts["held out"] is False
    by_timestep = list(facts["by timestep"].items())
    assert [t for t, _ in by_timestep] == ["125", "375", "625", "875"]
    assert by_timestep[0][1] > 0.9


def test_the_ranges_of_the_log_average_to_the_whole(images: Path, tmp_path: Path) -> None:
    """Timesteps are spread evenly, so each range has a quarter of the batch."""
    train_classifier(classifier_run(images, tmp_path / "run"))
    for record in read_log(tmp_path / "run"):
        for name in ("loss", "accuracy"):
            parts = [value for key, value in record.items() if key.startswith(f"{name}/")]
            assert len(parts) == RANGES
            assert sum(parts) / RANGES == pytest.approx(record[name], abs=1e-6)


def test_a_range_without_timesteps_is_not_nan(images: Path, tmp_path: Path) -> None:
    """Of 10 timesteps, an even spread over 4 images may leave out 3 and 4, the second range."""
    run = classifier_run(images, tmp_path / "run", schedule=ScheduleConfig(num_timesteps=10))
    task = ClassifierTask(runs.with_optimization(run, accumulate=2))
    part = {name: value[:4] for name, value in task.batch(0).items()}
    _, logged = task.losses({**part, "t": torch.tensor([0, 2, 5, 8])}, 0)
    assert logged["loss/t2-4"] == logged["accuracy/t2-4"] == 0
    assert all(value.isfinite() for value in logged.values())


@pytest.mark.parametrize("kind", ["linear", "flow"])
def test_every_accumulated_part_covers_all_ranges(images: Path, tmp_path: Path, kind: Any) -> None:
    """Under flow matching t is real and ends at T; its shift concerns the denoiser only."""
    schedule = ScheduleConfig(kind=kind, shift=3.0 if kind == "flow" else 1.0)
    run = classifier_run(images, tmp_path / "run", schedule=schedule)
    run = runs.with_optimization(run, accumulate=2)
    task = ClassifierTask(run)
    for step in range(5):
        for part in task.batch(step)["t"].split(4):
            places = (part * RANGES / 1000).floor().clamp(max=RANGES - 1)
            assert sorted(places.tolist()) == list(range(RANGES))
        if step == 0:
            _, logged = task.losses(task.batch(step), step)
            assert all(value.isfinite() for value in logged.values())
    with pytest.raises(ValueError, match="batch_size / accumulate must be at least 4"):
        runs.with_optimization(run, accumulate=4)


def test_what_it_guides_decides_samples_schedule_and_scale(images: Path, tmp_path: Path) -> None:
    schedule = ScheduleConfig(kind="cosine", num_timesteps=200)
    guided = denoiser_bundle(tmp_path / "guided", schedule=schedule)
    run = guiding_run(images, tmp_path / "run", guided)
    assert run.schedule == schedule
    assert run.model.in_channels == AUTOENCODER.latent_channels
    assert (run.model.sample_size, run.model.num_classes) == (8, 2)
    train_classifier(run)
    made = fastdiff.load(tmp_path / "run")
    assert made.scale_factor == tiny_model().scale_factor
    model = fastdiff.load(guided, classifier=tmp_path / "run")
    images_ = model.generate(classes=["a", "b"], steps=2, classifier_scale=2.0)
    assert [image.job.settings.classifier_class for image in images_] == [0, 1]
    facts = made.provenance["facts"]
    assert facts["guides"] == {"model": "guided", "weights": load_bundle(guided).weights_hash}
    assert facts["run"]["guides"] == "guided"


def test_latents_are_those_of_the_denoiser(images: Path, tmp_path: Path) -> None:
    """x0 is scaled by the denoiser's factor, not by one of the classifier's own first batch."""
    guided = denoiser_bundle(tmp_path / "guided")
    task = ClassifierTask(guiding_run(images, tmp_path / "run", guided))
    x0, labels, held_out = task.examples()
    pictures, expected = task.batches.dataset.batch(torch.arange(12))
    first = load_bundle(guided).autoencoder
    assert first is not None
    latents = first.encode_latent(pictures) * tiny_model().scale_factor
    torch.testing.assert_close(x0, latents, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == expected.tolist()
    assert not held_out


def test_the_accuracy_on_digits_is_that_on_held_out_ones(tmp_path: Path) -> None:
    preset: Any = TRAINING_PRESETS["tiny-classifier"]
    task = ClassifierTask(
        runs.with_output(dataclasses.replace(preset, latent_views=0), folder=str(tmp_path))
    )
    x0, _, held_out = task.examples()
    assert held_out
    assert x0.shape == (360, 4, 8, 8)
    sheet = task.preview(task.classifier.eval(), 0)
    assert sheet.width > 4 * 96


def test_it_continues_from_trained_weights(images: Path, tmp_path: Path) -> None:
    train_classifier(classifier_run(images, tmp_path / "first"))
    again = classifier_run(images, tmp_path / "second", init_from=str(tmp_path / "first"))
    task = ClassifierTask(again)
    train_classifier(runs.with_optimization(again, steps=1, learning_rate=1e-12))
    first = load_bundle(tmp_path / "first").classifier
    second = load_bundle(tmp_path / "second").classifier
    assert first is not None
    assert second is not None
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=1e-6)
    assert not torch.equal(task.classifier.time_embed[0].weight, first.time_embed[0].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": ScheduleConfig(kind="cosine")}, "the noise schedule differs"),
        ({"model": {"in_channels": 4}}, "channels: 4 for the classifier, 3 for the denoiser"),
        ({"model": {"sample_size": 16}}, "side of x: 16 for the classifier, 8 for the denoiser"),
        ({"model": {"num_classes": 3}}, "the classifier has 3 classes, the data has 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    images: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = guiding_run(images, tmp_path / "run", denoiser_bundle(tmp_path / "guided"))
    if isinstance(change.get("model"), dict):
        change = {"model": dataclasses.replace(run.model, **change["model"])}
    with pytest.raises(ValueError, match=message):
        train_classifier(dataclasses.replace(run, **change))


def test_wrong_runs_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latent_views must be 0 or more, and 0 when training on"):
        classifier_run(images, tmp_path, latent_views=2)
    data = dataclasses.replace(classifier_run(images, tmp_path).data, image_size=32)
    with pytest.raises(ValueError, match="x must be 16 x 16 for this classifier"):
        train_classifier(classifier_run(images, tmp_path / "run", data=data))
    with pytest.raises(ValueError, match="does not denoise; train it with 'fastdiff train classi"):
        DiffusionRun(model=MODEL, optimization=runs.optimization(), output=runs.output(tmp_path))
    save_bundle(tiny_model(denoiser=None, schedule=None), tmp_path / "first")
    with pytest.raises(ValueError, match="contains no denoiser to guide"):
        guiding_run(images, tmp_path / "run", tmp_path / "first")


def test_a_run_survives_its_config(images: Path, tmp_path: Path) -> None:
    run = classifier_run(images, tmp_path / "run", guides="digits", latent_views=3)
    assert ClassifierRun.from_json(run.to_json()) == run
    with pytest.raises(ValueError, match="ClassifierRun: prediction: unknown field"):
        ClassifierRun.from_json({**run.to_json(), "prediction": "eps"})


def test_other_images_change_classes_and_channels(images: Path) -> None:
    preset: Any = TRAINING_PRESETS["tiny-classifier"]
    data = DataConfig(source="folder", path=str(images))
    pixels = dataclasses.replace(preset, guides="", latent_views=0)
    found = for_data(pixels, data)
    assert (found.model.num_classes, found.model.in_channels) == (2, 1)
    assert found.model.sample_size == found.data.image_size
    assert for_data(preset, data).model.in_channels == 4


def test_an_averaged_classifier_is_the_one_that_guides(images: Path, tmp_path: Path) -> None:
    guided = denoiser_bundle(tmp_path / "guided")
    train_classifier(guiding_run(images, tmp_path / "run", guided))
    model = with_classifier(load_bundle(guided), load_bundle(tmp_path / "run"))
    assert model.classifier is not None
    average = runs.final_tensors(tmp_path / "run")["ema.safetensors:time_embed.0.weight"]
    assert torch.equal(model.classifier.time_embed[0].weight, average)


@pytest.mark.slow
def test_a_short_training_makes_an_unconditional_model_draw_classes(tmp_path: Path) -> None:
    """The shipped model without its own class: 10% of the images show the class by chance."""
    preset: Any = TRAINING_PRESETS["tiny-classifier"]
    run = runs.with_optimization(preset, steps=400, warmup_steps=50)
    run = dataclasses.replace(run, latent_views=2, device="cpu")
    run = runs.with_output(run, folder=str(tmp_path / "guide"), preview_every=0, tensorboard=False)
    train_classifier(run)
    model = fastdiff.load("digits", classifier=tmp_path / "guide")
    judge, labels = Judge(digits_reference()), torch.arange(10).repeat(3)
    found = {}
    for scale in (0.0, 6.0):
        settings = SampleSettings(steps=15, guidance_scale=1.0, classifier_scale=scale)
        jobs = [
            ClassJob(seed=seed, settings=dataclasses.replace(settings, classifier_class=label))
            for seed, label in enumerate(labels.tolist())
        ]
        found[scale] = judge.accuracy(images_of(model, jobs), labels)
    assert found[0.0] < 0.3
    assert found[6.0] > 0.7
