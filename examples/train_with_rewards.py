"""Policy gradients on a diffusion model (DDPO, Black et al. 2024): digits that use little ink.

    python examples/train_with_rewards.py thin.png

Each round samples digits, keeps every step and its log-probability, and raises the probability of
the steps that led to rewards above the mean. The picture has a row before and a row after.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import fastdiff
from fastdiff.diffusion.log_prob import step_log_prob
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import Step, sample
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.images import save_png

STEPS, CLIP, RATE = 8, 0.2, 1e-4


def ink(images: Tensor) -> Tensor:
    """The mean brightness of images (N, 1, H, W) in [-1, 1], from 0 to 1: (N,)."""
    return (images.mean((1, 2, 3)) + 1) / 2


def main(picture: str, rounds: int = 8, count: int = 40) -> tuple[float, float]:
    """Returns the mean ink before and after."""
    model = fastdiff.load("digits")
    network, decoder, schedule = model.denoiser, model.autoencoder, model.schedule
    assert network is not None
    assert decoder is not None
    assert schedule is not None
    network.eval().requires_grad_(True)  # dropout would change the log-probabilities
    table = build_table("ddpm", NoiseSchedule(schedule), STEPS, prediction=model.prediction)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    labels = torch.arange(count) % 10

    def predict(x: Tensor, row: int) -> Tensor:
        return network(x, table.timesteps[row].expand(count), y=labels)

    def sampled(round_: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """x before each step and after the last, the steps' log-probabilities, and the images."""
        seeds = torch.arange(count) + count * round_
        path, log_probs = [fastdiff.kernels.philox_normal(seeds, (4, 8, 8), step=0)], []

        def keep(step: Step) -> None:
            path.append(step.x.clone())
            log_probs.append(step.log_prob)

        path[0] *= table.initial_sigma
        sample(predict, table, path[0], seeds, on_step=keep, log_probs=True)
        with torch.no_grad():
            return path, log_probs, decoder.decode(path[-1] / model.scale_factor).clamp(-1, 1)

    *_, first = sampled(0)
    for round_ in range(1, rounds + 1):
        path, log_probs, images = sampled(round_)
        reward = -ink(images)
        advantage = (reward - reward.mean()) / reward.std()
        for row in range(STEPS):
            if not table.column("S")[row]:
                continue  # the last step adds no noise: there is nothing to choose
            now = step_log_prob(path[row], predict(path[row], row), path[row + 1], table, row)
            ratio = (now - log_probs[row]).exp()  # 1 until the first update of the round
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(advantage * ratio, advantage * clipped).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    *_, last = sampled(0)
    rows = [torch.cat(list(images[:10]), dim=2) for images in (first, last)]
    save_png(picture, torch.cat(rows, dim=1))
    return float(ink(first).mean()), float(ink(last).mean())


if __name__ == "__main__":
    before, after = main(sys.argv[1])
    print(f"ink {before:.3f} to {after:.3f}; {sys.argv[1]}")
