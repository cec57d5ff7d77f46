"""End to end: 64 digits at 50 steps with guidance; one U-Net evaluation; decoding; peak memory.

The digits model has its real size but random weights, because the time does not depend on them.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import PEAKS, measure
from fastdiff.bench.record import Peak
from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.generate.facts import resolved
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.run import generate
from fastdiff.generate.session import Session
from fastdiff.kernels import Work
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.presets import AUTOENCODERS, UNETS
from fastdiff.models.unet import UNet

DIGITS = 64
SETTINGS = SampleSettings(steps=50, guidance_scale=2.0)
SAMPLE = f"{DIGITS} digits, {SETTINGS.steps} steps, guided"
MEMORY_LIMIT = 2 * 2**30
"""Most bytes that a process sampling 64 digits may have resident."""


def digits_model() -> Model:
    """A model with the shapes of the shipped one, and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, autoencoder = UNet(UNETS["digits"]), Autoencoder(AUTOENCODERS["digits"])
    return Model(
        layout="bundle",
        image_size=32,
        image_channels=1,
        autoencoder=autoencoder,
        denoiser=unet,
        schedule=ScheduleConfig(),
    )


def sample_digits(model: Model, settings: SampleSettings = SETTINGS) -> torch.Tensor:
    jobs = [ClassJob(label=i % 10, seed=i, settings=settings) for i in range(DIGITS)]
    return torch.stack([result.image for result in generate(model, jobs)])


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def test_sample_64_digits(benchmark: Any) -> None:
    model = digits_model()
    session = Session.of(model)
    decoding = flops(lambda: session.latents.decode(torch.zeros(DIGITS, 4, 8, 8)))
    short = replace(SETTINGS, steps=1)
    one_step = flops(lambda: sample_digits(model, short)) - decoding
    rows = len(session.table(resolved(SETTINGS, session.facts)))
    measure(
        benchmark,
        lambda: sample_digits(model),
        name="sample",
        shape=SAMPLE,
        provider="auto",
        work=Work(bytes=rows * weight_bytes(session.network), flops=rows * one_step),
        rounds=2,
    )


def test_unet_step(benchmark: Any) -> None:
    session = Session.of(digits_model())
    x = torch.randn(16, *session.facts.x_shape(32, 32)).contiguous(
        memory_format=torch.channels_last
    )
    emb = torch.randn(16, UNETS["digits"].emb_dim)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return session.network.body(x, emb)

    work = Work(bytes=weight_bytes(session.network) + 2 * x.numel() * 4, flops=flops(step))
    measure(benchmark, step, name="unet", shape="16 x 4 x 8 x 8", provider="auto", work=work)


def test_decode(benchmark: Any) -> None:
    model = digits_model()
    session = Session.of(model)
    assert model.autoencoder is not None
    z = torch.randn(DIGITS, *session.facts.x_shape(32, 32))
    work = Work(
        bytes=weight_bytes(model.autoencoder.decoder) + (z.numel() + DIGITS * 32 * 32) * 4,
        flops=flops(lambda: session.latents.decode(z)),
    )
    measure(
        benchmark,
        lambda: session.latents.decode(z),
        name="decode",
        shape=f"{DIGITS} x 4 x 8 x 8",
        provider="auto",
        work=work,
        rounds=3,
    )


def test_peak_memory(benchmark: Any) -> None:
    """Peak memory of a fresh process, including interpreter and libraries; times all of it."""
    code = (
        "from benchmarks.networks import bench_image\n"
        "from fastdiff.bench import memory\n"
        "bench_image.sample_digits(bench_image.digits_model())\n"
        "print(memory.peak_bytes())\n"
    )

    def run() -> int:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    peak = benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info["peak_bytes"] = peak
    PEAKS.append(
        Peak(benchmark="sample", shape=SAMPLE, threads=torch.get_num_threads(), bytes=peak)
    )
    assert peak < MEMORY_LIMIT
