"""Fine-tuning: what a run reads from a trained model, and what it rejects."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.cli import main
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.unet import UNet
from fastdiff.training import train_autoencoder, train_diffusion
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.task import DiffusionTask
from fastdiff.training.trainer import Trainer
from tests.support.tiny import randomize, tiny_model
from tests.training import runs


def trained(images: Path, folder: Path, **changes: Any) -> Path:
    """A bundle of the runs' denoiser and autoencoder with random weights."""
    fitting = runs.diffusion_run(images, folder)
    config = dataclasses.replace(fitting.model, **changes)
    model = tiny_model(
        denoiser=randomize(UNet(config), 1),
        autoencoder=None,
        schedule=fitting.schedule,
        prediction="v",
        scale_factor=1.0,
        image_size=8,
        class_names=tuple("abcde"[: config.num_classes]),
    )
    save_bundle(model, folder, provenance={})
    return folder


def test_a_run_starts_from_trained_weights(images: Path, tmp_path: Path) -> None:
    start = trained(images, tmp_path / "start")
    run = runs.diffusion_run(images, tmp_path / "run", init_from=str(start))
    task = DiffusionTask(run)
    task.start_from(run.init_from)
    trainer = Trainer(task, run)
    weights = load_bundle(start).denoiser
    assert weights is not None
    for network in (task.denoiser, trainer.ema.network):
        found = network.state_dict()
        for name, value in weights.state_dict().items():
            assert torch.equal(found[name], value), name
    assert trainer.ema.updates == 0
    assert not trainer.optimizers[task.averaged].state


def test_it_says_where_it_began_also_after_a_resume(images: Path, tmp_path: Path) -> None:
    start = trained(images, tmp_path / "start")
    began = {"model": "start", "weights": load_bundle(start).weights_hash}
    run = runs.diffusion_run(
        images, tmp_path / "run", init_from=str(start), optimization=runs.optimization(steps=2)
    )
    train_diffusion(run)
    facts = load_bundle(tmp_path / "run").provenance["facts"]
    assert facts["init_from"] == began
    assert facts["run"]["init_from"] == "start"
    first = runs.final_tensors(tmp_path / "run")
    plain = runs.diffusion_run(images, tmp_path / "plain", optimization=runs.optimization(steps=2))
    train_diffusion(plain)
    other = runs.final_tensors(tmp_path / "plain")
    assert any(not torch.equal(first[name], other[name]) for name in first)
    shutil.rmtree(start)  # resuming takes the weights of the checkpoint
    longer = runs.with_optimization(run, steps=3, decay="cosine")
    train_diffusion(longer, resume=True)
    assert load_bundle(tmp_path / "run").provenance["facts"]["init_from"] == began


def test_an_autoencoder_starts_too(images: Path, tmp_path: Path) -> None:
    run = runs.autoencoder_run(images, tmp_path / "run")
    source = randomize(Autoencoder(run.model), 3)
    save_bundle(
        tiny_model(denoiser=None, schedule=None, autoencoder=source, class_names=()),
        tmp_path / "start",
        provenance={},
    )
    run = dataclasses.replace(
        run, init_from=str(tmp_path / "start"), optimization=runs.optimization(steps=1)
    )
    task = AutoencoderTask(run)
    task.start_from(run.init_from)
    for name, value in source.state_dict().items():
        assert torch.equal(task.autoencoder.state_dict()[name], value), name
    train_autoencoder(run)
    assert load_bundle(tmp_path / "run").provenance["facts"]["init_from"]["model"] == "start"
    with pytest.raises(ValueError, match="contains no denoiser to start from"):
        train_diffusion(
            runs.diffusion_run(images, tmp_path / "other", init_from=str(tmp_path / "start"))
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_channels": 16}, r"time_embed\.0\.weight: \(64, 16\) there, \(32, 8\) here"),
        ({"attention_depth": (1, 1)}, r": \([\d, ]+\) there, absent here"),
        ({"num_classes": 5}, r"\(6, 32\) there, \(3, 32\) here"),
        ({"norm_groups": 2}, "norm_groups is 2 there, 4 here; set the run's model to match"),
    ],
)
def test_what_does_not_fit_is_named(
    images: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    start = trained(images, tmp_path / "start", **change)
    run = runs.diffusion_run(images, tmp_path / "run", init_from=str(start))
    with pytest.raises(ValueError, match=message):
        train_diffusion(run)
    assert not (tmp_path / "run").exists()


def test_another_dropout_is_no_difference_and_another_prediction_is_said(
    images: Path, tmp_path: Path
) -> None:
    start = trained(images, tmp_path / "start", dropout=0.3)
    run = runs.diffusion_run(images, tmp_path / "run", init_from=str(start), prediction="eps")
    with pytest.warns(UserWarning, match="prediction was v there and is eps here"):
        DiffusionTask(run).start_from(run.init_from)


def test_latents_keep_the_scale_that_the_weights_know(images: Path, tmp_path: Path) -> None:
    first = runs.autoencoder_run(
        images, tmp_path / "first", optimization=runs.optimization(steps=1)
    )
    train_autoencoder(first)
    changes: dict[str, Any] = {"data": first.data, "autoencoder": first.output.folder}
    changes["model"] = runs.denoiser_model(2)
    bundle = load_bundle(tmp_path / "first")
    save_bundle(
        tiny_model(
            denoiser=randomize(UNet(changes["model"]), 1),
            autoencoder=bundle.autoencoder,
            scale_factor=0.123,
            class_names=("a", "b"),
        ),
        tmp_path / "start",
        provenance={},
    )
    run = runs.diffusion_run(images, tmp_path / "run", init_from=str(tmp_path / "start"), **changes)
    task = DiffusionTask(run)
    assert task.latents.scale_factor != 0.123
    with pytest.warns(UserWarning, match="prediction was eps there and is v here"):
        task.start_from(run.init_from)
    assert task.latents.scale_factor == 0.123


def test_the_command_takes_the_architecture_of_the_model(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    start = trained(images, tmp_path / "start", channel_mult=(1, 1))
    line = "train diffusion --init-from start --data.source folder --data.path images --dry-run"
    shutil.copytree(images, tmp_path / "images")
    assert main(line.split()) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    config = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert config["model"]["channel_mult"] == [1, 1]
    assert (config["init_from"], config["prediction"]) == ("start", "v")
    assert config["data"]["image_size"] == 8
    assert start.exists()
    assert main(["train", "autoencoder", "--init-from", "start"]) == 2
    assert "contains no autoencoder to start from" in capsys.readouterr().err
