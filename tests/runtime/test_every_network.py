"""A U-Net, a DiT and a U-ViT on the paths that take any `Network`: jobs, graphs, compile and
`accelerate`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.generate.job import SampleSettings
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.models.network import Network
from fastdiff.models.uvit import UViT, UViTConfig
from fastdiff.runtime.engine import Engine, Result
from fastdiff.runtime.graphs import StepGraphs
from fastdiff.runtime.prepare import prepare
from tests.runtime.test_graphs import all_of, plain_engine
from tests.support.drawing import class_jobs, images
from tests.support.engine_requests import requests_of
from tests.support.imports import graph, package_files
from tests.support.tape import Tape
from tests.support.tiny import randomize, tiny_pixel_model, tiny_unet

SHAPE = (3, 4, 4)
TOKENS: dict[str, Any] = {
    "in_channels": 3,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "sample_size": 4,
    "num_classes": 4,
    "null_class": True,
}
NETWORKS = {
    "unet": tiny_unet,
    "dit": lambda: DiT(DiTConfig(**TOKENS, out_channels=6, learned_sigma=True)),
    "uvit": lambda: UViT(UViTConfig(**TOKENS, out_channels=3)),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    made = NETWORKS[request.param]()
    randomize(made, 3)
    return made.eval()


def call(network: Network, **changes: Any) -> Tensor:
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    given = {"x": x, "t": torch.tensor([3, 900]), "y": torch.tensor([1, 4]), **changes}
    with torch.no_grad():
        y: Tensor = network(**given)
    return y


def test_jobs(network: Network) -> None:
    """Jobs of other classes, seeds and guidance have the bits that they have alone."""
    settings = [
        SampleSettings(sampler="ddpm", steps=4, guidance_scale=2.0),
        SampleSettings(sampler="dpmpp-2m", steps=3, guidance_scale=1.0),
    ]
    model = tiny_pixel_model(denoiser=network, image_size=4)
    jobs = [job for each in settings for job in class_jobs([0, 3, 1], [5, 6, 7], each)]
    together = images(model, jobs)
    assert together.isfinite().all()
    for place, job in enumerate(jobs):
        assert torch.equal(images(model, [job])[0], together[place])
        assert not torch.equal(together[place], together[place - 1])


def test_graphs(network: Network) -> None:
    """On a substitute that records operations: replays have the bits of steps that are run."""
    schedule = NoiseSchedule(ScheduleConfig())
    learned = {"variance": "learned"} if network.config.learned_sigma else {}
    tables = [
        build_table("ddpm", schedule, 6, prediction="eps", guidance_scale=2.0, **learned),
        build_table("heun", schedule, 4, prediction="eps"),
    ]
    prepared = prepare(network)
    requests = requests_of(prepared.config, tables, SHAPE, count=8)

    def found(engine: Engine) -> dict[int, Result]:
        return all_of(engine, requests)

    tape = Tape()
    recorded = found(Engine(prepared, shape=SHAPE, slots=5, graphs=StepGraphs(tape)))
    run = found(plain_engine(prepared, shape=SHAPE))
    assert recorded.keys() == run.keys() == set(range(8))
    assert all(torch.equal(recorded[place].x, run[place].x) for place in run)
    assert tape.replays > len(tape.lengths) > 0


def test_compile(network: Network) -> None:
    """Whole, without a graph break."""
    compiled: Any = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(compiled), call(network))
    torch._dynamo.reset()


def test_accelerate(network: Network) -> None:
    """Nothing is left, because they run on our ops already; restored, they are as they were."""
    expected = call(network)
    served = copy.deepcopy(network)
    report = fastdiff.accelerate(served, strict=True)
    torch.testing.assert_close(call(served), expected, rtol=1e-5, atol=1e-5)
    assert report.left == []
    report.restore()
    assert torch.equal(call(served), expected)


def test_a_family_is_a_model_file_a_layout_and_presets() -> None:
    """Nothing else imports it: sampling, training, graphs and commands take any `Network`. DiT's
    second layout is diffusers' `DiTPipeline`."""
    edges = graph(package_files())

    def users(module: str) -> set[str]:
        return {user.removeprefix("fastdiff.") for user, used in edges.items() if module in used}

    pipeline = "checkpoint.layouts.diffusers"
    assert users("fastdiff.models.uvit") == {"checkpoint.layouts.uvit", "models.presets"}
    assert users("fastdiff.models.dit") == {
        *("checkpoint.layouts.dit", "models.presets"),
        *(pipeline, f"{pipeline}.dit", f"{pipeline}.write"),
    }
