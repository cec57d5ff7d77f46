"""Tiny runs that train in a second, and what the tests compare of them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdiff.data import AugmentConfig, DataConfig
from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.models.discriminator import DiscriminatorConfig
from fastdiff.models.unet import UNetConfig
from fastdiff.training import (
    AutoencoderLossConfig,
    AutoencoderRun,
    DenoiserLossConfig,
    DiffusionRun,
    OptimizationConfig,
    OutputConfig,
    PreviewConfig,
)
from fastdiff.training.monitor import read_log

AUGMENT = AugmentConfig(shift=1, rotation=10)


def image_folder(path: Path, count: int = 12) -> Path:
    """`count` 16x16 grey images, smooth and different, in two classes."""
    source = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(source.integers(0, 256, (4, 4), dtype=np.uint8))
        file = path / ("a", "b")[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        small.resize((16, 16), Image.Resampling.BICUBIC).save(file)
    return path


def optimization(**changes: Any) -> OptimizationConfig:
    defaults = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "decay": "cosine",
        "clip_norm": 1.0,
        "ema_decay": 0.9,
    }
    return OptimizationConfig(**{**defaults, **changes})


def output(folder: Path, **changes: Any) -> OutputConfig:
    defaults = {"log_every": 1, "preview_every": 3, "save_every": 0, "tensorboard": False}
    return OutputConfig(folder=str(folder), **{**defaults, **changes})


def autoencoder_model(kind: str = "kl") -> AutoencoderConfig:
    return AutoencoderConfig(
        regularization=kind,  # type: ignore[arg-type]
        codebook_size=16 if kind == "vq" else 0,
        image_channels=1,
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        latent_channels=2,
        norm_groups=4,
    )


def autoencoder_run(images: Path, folder: Path, kind: str = "kl", **changes: Any) -> AutoencoderRun:
    defaults: dict[str, Any] = {
        "model": autoencoder_model(kind),
        "data": DataConfig(
            source="folder", path=str(images), image_size=16, channels=1, augment=AUGMENT
        ),
        "discriminator": DiscriminatorConfig(
            image_channels=1, model_channels=8, num_layers=1, norm="group"
        ),
        "loss": AutoencoderLossConfig(adversarial_start=2),
        "optimization": optimization(),
        "output": output(folder),
        "device": "cpu",
    }
    return AutoencoderRun(**{**defaults, **changes})


def denoiser_model(channels: int = 1, **changes: Any) -> UNetConfig:
    defaults: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_depth": (0, 1),
        "num_heads": 1,
        "num_classes": 2,
        "null_class": True,
        "norm_groups": 4,
        "dropout": 0.1,
    }
    return UNetConfig(**{**defaults, **changes})


def diffusion_run(images: Path, folder: Path, **changes: Any) -> DiffusionRun:
    defaults: dict[str, Any] = {
        "model": denoiser_model(),
        "data": DataConfig(
            source="folder", path=str(images), image_size=8, channels=1, augment=AUGMENT
        ),
        "prediction": "v",
        "loss": DenoiserLossConfig(weighting="min-snr"),
        "preview": PreviewConfig(count=4, steps=3, guidance_scale=2.0),
        "optimization": optimization(),
        "output": output(folder),
        "device": "cpu",
    }
    return DiffusionRun(**{**defaults, **changes})


def with_output(run: Any, **changes: Any) -> Any:
    return dataclasses.replace(run, output=dataclasses.replace(run.output, **changes))


def with_optimization(run: Any, **changes: Any) -> Any:
    return dataclasses.replace(run, optimization=dataclasses.replace(run.optimization, **changes))


def losses(folder: Path) -> list[dict[str, float]]:
    """The log without timings."""
    return [
        {name: value for name, value in record.items() if name != "steps_per_second"}
        for record in read_log(folder)
    ]


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint and of the exported bundle."""
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    files = sorted(newest.glob("*.safetensors")) + sorted((folder / "model").glob("*.safetensors"))
    return {f"{file.name}:{name}": t for file in files for name, t in load_file(file).items()}


def sheets(folder: Path) -> dict[str, bytes]:
    """Name -> pixels of every preview."""
    return {
        file.name: Image.open(file).tobytes() for file in sorted((folder / "samples").glob("*.png"))
    }


def signal_at(monkeypatch: pytest.MonkeyPatch, task: type, step: int, number: int) -> None:
    """Send this process a signal while `task` makes the batch of `step`."""
    batch = task.batch

    def interrupted(self: Any, at: int) -> Any:
        if at == step:
            os.kill(os.getpid(), number)
        return batch(self, at)

    monkeypatch.setattr(task, "batch", interrupted)


def assert_same_run(first: Path, second: Path) -> None:
    """Losses, weights, moments, averages and samples are equal bit for bit."""
    assert losses(first) == losses(second)
    ours, theirs = final_tensors(first), final_tensors(second)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizers") for name in ours)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert len(sheets(first)) == 2
    assert sheets(first) == sheets(second)
