"""The two toys of the first diffusion paper (Sohl-Dickstein et al. 2015): trained in seconds, and
drawn with the forward process above the learned reverse process.

    python examples/dpm.py swiss-roll roll.png
    python examples/dpm.py heartbeat heartbeat.png

The swiss roll is a cloud of points under Gaussian diffusion. The heartbeat is 20 bits with a 1 in
every fifth under binomial diffusion; its entropy is log2(5) = 2.32 bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastdiff.diffusion.binomial import BinomialProcess
from fastdiff.diffusion.bound import bound
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.mlp import MLP, MLPConfig
from fastdiff.training import DenoiserLossConfig
from fastdiff.training.objective import Objective

BATCH, SHOWN = 512, 2000


def roll(count: int, source: torch.Generator) -> Tensor:
    """Points (count, 2) along a spiral, within [-1, 1]."""
    turn = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=source))
    points = torch.stack([turn * turn.cos(), turn * turn.sin()], 1) / 16
    return points + 0.02 * torch.randn(count, 2, generator=source)


def heartbeat(count: int, source: torch.Generator) -> Tensor:
    """Bits (count, 20), 1 in every fifth, at a random phase."""
    phase = torch.randint(5, (count, 1), generator=source)
    return (torch.arange(20) % 5 == phase).float()


def fit(network: nn.Module, steps: int, loss: Callable[[], Tensor]) -> None:
    """Minimise a loss with Adam and one cycle of the learning rate."""
    optimizer = torch.optim.Adam(network.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        rate.step()


def swiss_roll(picture: Path, steps: int = 3000) -> float:
    """Train, draw; returns the bound on -log2 p(x0) in bits per point (a density's: any sign)."""
    source = torch.Generator().manual_seed(0)
    schedule = NoiseSchedule(ScheduleConfig(kind="cosine", num_timesteps=100))
    network = MLP(MLPConfig(in_channels=2))
    config = DenoiserLossConfig(timesteps="stratified")
    objective = Objective(config=config, schedule=schedule, prediction="eps")

    def loss() -> Tensor:
        x0, noise = roll(BATCH, source), torch.randn(BATCH, 2, generator=source)
        t = objective.timesteps(BATCH, source)
        x = schedule.add_noise(x0, noise, t)
        return objective.loss(network(x, t), x, x0, noise, t)

    fit(network, steps, loss)
    x0, noise = roll(SHOWN, source), torch.randn(SHOWN, 2, generator=source)
    table = build_table("ddpm", schedule, 100, spacing="leading")
    reverse = [noise]
    made = sample(
        lambda x, row: network(x, table.timesteps[row].long()),
        table,
        noise,
        range(SHOWN),
        on_step=lambda step: reverse.append(step.x.clone()),
    )
    times = 10, 40, 99
    forward = [schedule.add_noise(x0, noise, torch.tensor(t)) for t in times]
    draw(
        [[x0, *forward], [made, *(reverse[99 - t] for t in times)]],
        lambda panel, x: panel.scatter(x[:, 0], x[:, 1], s=2, linewidths=0, rasterized=True),
        picture,
    )
    width = 1e-3
    terms = bound(
        network,
        schedule,
        x0,
        lambda index: torch.randn(SHOWN, 2, generator=source),
        prediction="eps",
        variance="fixed_small",
        bin_width=width,
    )
    return float(terms.total.mean() + math.log2(width)) * 2


def beats(picture: Path, steps: int = 3000) -> float:
    """Train, draw; returns the bound on -log2 p(x0) in bits per sequence."""
    source = torch.Generator().manual_seed(0)
    process = BinomialProcess(200)
    network = MLP(MLPConfig(in_channels=20))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.sigmoid(network(2 * x - 1, t))

    def loss() -> Tensor:
        x0 = heartbeat(BATCH, source)
        t = torch.randint(process.num_timesteps, (BATCH,), generator=source)
        x = process.noised(x0, t, source)
        return process.num_timesteps * process.term(x0, x, predict(x, t), t).mean()

    fit(network, steps, loss)
    x0, reverse = heartbeat(SHOWN, source), {}
    made = process.sample(predict, (SHOWN, 20), source, on_step=reverse.__setitem__)
    times = 60, 120, 198
    forward = [process.noised(x0, torch.full((SHOWN,), t), source) for t in times]
    draw(
        [[x0, *forward], [made, *(reverse[t + 1] for t in times)]],  # after the step from t + 1
        lambda panel, x: panel.imshow(x[:30], cmap="Greys", aspect="auto", interpolation="nearest"),
        picture,
    )
    return float(process.bound(predict, x0, source).sum(1).mean())


def draw(rows: list[list[Tensor]], show: Callable[..., object], picture: Path) -> None:
    """Forward process above, reverse process below, from data on the left to noise on the right."""
    figure = Figure(figsize=(10, 5.2), layout="constrained", dpi=130)
    panels = figure.subplots(2, len(rows[0]), sharex=True, sharey=True)
    for line, (row, name) in enumerate(zip(rows, ("forward", "reverse"), strict=True)):
        for panel, x in zip(panels[line], row, strict=True):
            show(panel, x.detach().numpy())
            panel.set_xticks([])
            panel.set_yticks([])
        panels[line][0].set_ylabel(name)
    panels[0][0].set_title("data and samples")
    panels[0][-1].set_title("noise")
    figure.savefig(picture)


def main(which: str, picture: str, steps: int = 3000) -> float:
    torch.manual_seed(0)
    train = {"swiss-roll": swiss_roll, "heartbeat": beats}[which]
    bits = train(Path(picture), steps)
    print(f"{which}: at most {bits:.2f} bits per sample; {picture}")
    return bits


if __name__ == "__main__":
    main(*sys.argv[1:3])
