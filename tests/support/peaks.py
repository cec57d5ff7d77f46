"""Measured peaks of memory beside their estimates, as lines of JSON: what, measured, estimated.

    python -m tests.support.peaks FOLDER

A process of its own: what it takes at most is asked of the kernel, which forgets it when told to.
Every way is gone once in small first, so that imports and first calls do not count. FOLDER is for
a tokenizer.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.bench.memory import peak_bytes
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import load
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.generate import memory
from fastdiff.generate.job import ClassJob, Job, SampleSettings, TextJob
from fastdiff.generate.latents import Latents
from fastdiff.generate.run import generate
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.text import TextEncoder
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.task import DiffusionTask
from fastdiff.training.trainer import Trainer
from tests.support.diffusers_models import text_encoder, tokenizer
from tests.training import runs

CPU = torch.device("cpu")


def call(count: int = 1, **options: Any) -> memory.Call:
    return memory.Call(device=CPU, dtype=torch.float32, count=count, **options)


def measured(work: Callable[[], Any]) -> int:
    """Bytes by which the process grew at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is the present one
    before = peak_bytes()
    work()
    return peak_bytes() - before


def report(what: str, estimate: int, work: Callable[[], Any]) -> None:
    print(json.dumps([what, measured(work), estimate]), flush=True)


def sample(model: Model, jobs: list[Job]) -> None:
    for _ in generate(model, iter(jobs)):
        pass


def digits(count: int, size: int, steps: int = 2, batch: int | None = None) -> list[Job]:
    settings = SampleSettings(steps=steps, batch=batch)
    return [
        ClassJob(label=seed % 10, seed=seed, height=size, width=size, settings=settings)
        for seed in range(count)
    ]


def text_model(width: int, words: Any) -> Model:
    encoder = text_encoder(words)
    denoiser = UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=width,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(1, 1),
        context_dim=encoder.config.hidden_size,
        head_dim=16,
        norm_groups=16,
    )
    return Model(
        layout="bundle",
        denoiser=UNet(denoiser),
        autoencoder=first_stage(width // 2),
        schedule=ScheduleConfig(),
        text_encoders=[TextEncoder(model=encoder, tokenizer=words)],
        image_size=64,
        image_channels=3,
        stored_hash="ab" * 32,
    )


def first_stage(width: int) -> Autoencoder:
    config = AutoencoderConfig(
        image_channels=3,
        model_channels=width,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        latent_channels=4,
        norm_groups=8,
    )
    return Autoencoder(config).eval()


def main(folder: str) -> None:
    torch.set_num_threads(1)
    shipped, words = load("digits"), tokenizer(Path(folder))
    sample(shipped, digits(1, 32))
    sample(text_model(16, words), [TextJob(prompt="a", settings=SampleSettings(steps=1))])
    for count, size, batch in ((4, 384, None), (16, 192, 16)):
        jobs = digits(count, size, 1, batch)
        need = memory.need_of(
            [shipped], jobs[0], call(count, batch=batch, conditions=10), loaded=True
        )
        report(f"digits {count} of {size}", need.total, lambda jobs=jobs: sample(shipped, jobs))
    for size in (128, 192):
        job = TextJob(prompt="a cat", height=size, width=size, settings=SampleSettings(steps=1))
        model = text_model(96, words)
        need = memory.need_of([model], job, call(), loaded=False)
        del model

        def make(job: Job = job) -> None:
            sample(text_model(96, words), [job])

        report(f"text {size}", need.total, make)
    decoder = Latents(first_stage(32), 1.0, device=CPU, dtype=torch.float32)
    whole = text_model(64, words)
    for size, tile in ((256, 0), (384, 64)):
        need = memory._decoding(whole, (size, size), tile, call())
        z = torch.randn(1, 4, size // 4, size // 4)
        report(
            f"decode {size} in tiles of {tile}",
            round(memory.SLACK * need.most) + need.copies,
            lambda z=z, tile=tile: decoder.decode(z, tile=tile),
        )
    trainings(Path(folder))


def trainings(folder: Path) -> None:
    """Denoisers and an autoencoder, with and without gradient checkpointing."""
    images = runs.image_folder(folder / "images")

    def denoiser(width: int, size: int, batch: int, **options: Any) -> DiffusionTask:
        model = runs.denoiser_model(model_channels=width, norm_groups=8)
        run = runs.diffusion_run(images, folder / "run", model=model)
        run = replace(run, data=replace(run.data, image_size=size))
        return DiffusionTask(runs.with_optimization(run, batch_size=batch, **options))

    def first_stage(width: int, size: int, batch: int) -> AutoencoderTask:
        model = replace(runs.autoencoder_model(), model_channels=width, norm_groups=8)
        run = runs.autoencoder_run(images, folder / "run", model=model)
        run = replace(run, data=replace(run.data, image_size=size))
        return AutoencoderTask(runs.with_optimization(run, batch_size=batch))

    def train(make: Callable[[], DiffusionTask | AutoencoderTask], need: list[int]) -> None:
        task = make()
        need.append(task.needed_bytes())
        trainer = Trainer(task, task.run)
        for _ in range(3):
            trainer.step()

    train(lambda: denoiser(8, 8, 4), [])
    train(lambda: first_stage(8, 8, 4), [])
    cases: dict[str, Callable[[], DiffusionTask | AutoencoderTask]] = {
        "denoiser": lambda: denoiser(64, 32, 32),
        "denoiser, accumulated": lambda: denoiser(64, 32, 32, accumulate=4),
        "denoiser, checkpointed": lambda: denoiser(64, 32, 32, gradient_checkpointing=True),
        "autoencoder": lambda: first_stage(32, 64, 8),
    }
    for name, make in cases.items():
        need: list[int] = []
        peak = measured(lambda make=make, need=need: train(make, need))
        print(json.dumps([f"training {name}", peak, need[0]]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
