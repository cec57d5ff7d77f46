"""A denoiser other than a U-Net, end to end: trained, saved, loaded, sampled, on points.

The mixture's best denoiser and its samples are known in closed form.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import load
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.kernels import INITIAL_NOISE, philox_normal
from fastdiff.models.mlp import MLP, MLPConfig
from fastdiff.models.network import kind_of, network_family
from fastdiff.models.presets import MLPS
from fastdiff.runtime.conditions import Condition
from fastdiff.runtime.engine import Request
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import run
from fastdiff.training.objective import DenoiserLossConfig, Objective
from tests.diffusion.mixture import (
    MEAN,
    MEANS,
    STDS,
    VARIANCE,
    WEIGHTS,
    along,
    exact_network,
    responsibilities,
)
from tests.support.tiny import randomize

NOISE = ScheduleConfig()
SCHEDULE = NoiseSchedule(NOISE)
STEPS, BATCH = 600, 512
POINTS = 1024


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Points of the mixture: (count, 2), fp32."""
    part = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return (MEANS[part] + STDS[part][:, None] * noise).float()


@pytest.fixture(scope="module")
def trained() -> MLP:
    """Trained for a few seconds by the training's own objective."""
    torch.manual_seed(0)
    network, generator = MLP(MLPS["points2d"]), torch.Generator().manual_seed(0)
    config = DenoiserLossConfig(timesteps="stratified")
    objective = Objective(config=config, schedule=SCHEDULE, prediction="eps")
    optimizer = torch.optim.Adam(network.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        x0, t = draw(BATCH, generator), objective.timesteps(BATCH, generator)
        noise = torch.randn(BATCH, 2, generator=generator)
        alpha, sigma = SCHEDULE.alpha(t).float()[:, None], SCHEDULE.sigma(t).float()[:, None]
        x = alpha * x0 + sigma * noise
        optimizer.zero_grad()
        objective.loss(network(x, t), x, x0, noise, t).backward()
        optimizer.step()
        rate.step()
    return prepare(network)


def test_it_learns_the_mixture(trained: MLP) -> None:
    """Its distance from the best denoiser, squared, is a small part of the noise's variance, 1."""
    generator, best = torch.Generator().manual_seed(1), exact_network(SCHEDULE)
    for t in (50, 200, 500, 900):
        x0, noise = draw(4096, generator), torch.randn(4096, 2, generator=generator)
        x = float(SCHEDULE.alpha(t)) * x0 + float(SCHEDULE.sigma(t)) * noise
        expected = best(x, t).float()
        assert (trained(x, torch.tensor(t)) - expected).square().mean() < 0.03, t
        assert expected.square().mean() > 0.15, "zeros, which it starts from, would pass"


def test_samples_have_the_moments_of_the_mixture(trained: MLP) -> None:
    table = build_table("dpmpp-2m", SCHEDULE, 20)
    points = sample(
        along(table, lambda x, t: trained(x, torch.tensor(t))), table, (2,), range(POINTS)
    ).double()
    best = sample(along(table, exact_network(SCHEDULE)), table, (2,), range(POINTS)).double()
    assert (points - best).square().mean().sqrt() < 0.15, "the same noise leads to the same points"
    shares = responsibilities(points).mean(0)
    assert (shares - WEIGHTS).abs().max() < 4 * (0.5 * 0.5 / POINTS) ** 0.5
    assert (points.mean(0) - MEAN).abs().max() < 4 * float(VARIANCE.max() / POINTS) ** 0.5
    assert (points.var(0) / VARIANCE - 1).abs().max() < 0.15


def test_the_engine_samples_points(trained: MLP) -> None:
    """Two samplers side by side: each request has the bits it has alone, and `sample`'s points."""
    tables = [build_table("dpmpp-2m", SCHEDULE, 20), build_table("ddim", SCHEDULE, 7)]
    noise = philox_normal(torch.arange(12), (2,), stream=INITIAL_NOISE)
    requests = [
        Request(table=tables[i % 2], x=noise[i], seed=i, condition=Condition(), tag=i)
        for i in range(12)
    ]
    together = {r.request.tag: r.x for r in run(trained, requests, slots=5)}
    for request in requests:
        [alone] = run(trained, [request], slots=3)
        assert torch.equal(alone.x, together[request.tag])
    predict = along(tables[0], lambda x, t: trained(x, torch.tensor(t)))
    expected = sample(predict, tables[0], noise[::2], range(0, 12, 2))
    ours = torch.stack([together[tag] for tag in range(0, 12, 2)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_bundle_of_it(trained: MLP, tmp_path: Path) -> None:
    """The bundle needs nothing new: the kind says which network the weights belong to."""
    model = Model(layout="bundle", denoiser=trained, schedule=NOISE)
    weights_hash = save_bundle(model, tmp_path / "points")
    data = json.loads((tmp_path / "points" / "config.json").read_text())["model"]
    assert (data["kind"], data["mlp"]["width"], data["image_size"]) == ("mlp", 128, None)
    again = load(tmp_path / "points")
    assert again.weights_hash == weights_hash
    assert isinstance(again.denoiser, MLP)
    assert again.denoiser.config == trained.config
    x, t = torch.randn(5, 2), torch.tensor([0, 10, 100, 500, 999])
    assert torch.equal(again.denoiser(x, t), trained(x, t))
    data["mlp"]["num_blocks"] = 10**9  # refused before it is built
    path = tmp_path / "points" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": data}))
    with pytest.raises(ValueError, match="the config asks for 1000000000 blocks or more"):
        load(tmp_path / "points")


def test_classes_and_what_does_not_fit() -> None:
    network = MLP(MLPConfig(num_classes=3, null_class=True))
    randomize(network, 0)  # it starts from zeros, whatever the class
    x, t = torch.randn(2, 2), torch.tensor(7)
    first, null = (network(x, t, y=torch.tensor(y)) for y in ([0, 1], [3, 3]))
    assert (first - null).abs().min() > 1e-3
    for change, message in (
        ({"x": torch.randn(2, 3)}, r"x must be \(N, 2\), got \(2, 3\)"),
        ({"y": None}, "y must be int64 class labels"),
        ({"context": torch.randn(2, 1, 4)}, "context must be None"),
        ({"t": torch.zeros(3)}, "pass one timestep per sample"),
    ):
        with pytest.raises(ValueError, match=message):
            network(**{"x": x, "t": t, "y": torch.tensor([0, 1]), **change})
    for change, message in (
        ({"width": 3}, "width must be even"),
        ({"num_blocks": 0}, "num_blocks must be positive"),
        ({"null_class": True}, "null_class needs num_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            MLPConfig(**change)
    assert kind_of(network.config) == "mlp"
    assert network_family("mlp") == (MLPConfig, MLP)
    assert sum(p.numel() for p in MLP(MLPS["points2d"]).parameters()) == 182_274
