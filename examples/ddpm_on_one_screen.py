"""All of DDPM (Ho et al. 2020) on one screen: train on 8x8 digits, then sample 64 of them.

python examples/ddpm_on_one_screen.py digits.png
"""

from __future__ import annotations

import sys

import torch

from fastdiff.data import digits_split
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.images import save_png
from fastdiff.models.unet import UNet, UNetConfig

T, BATCH, PICTURES = 200, 128, 64


def main(picture: str, steps: int = 2000) -> tuple[float, float]:
    """Returns the loss of the first and of the last tenth of the training."""
    torch.manual_seed(0)
    data, _ = digits_split("train", image_size=8)  # (1437, 1, 8, 8) in [-1, 1]
    schedule = NoiseSchedule(ScheduleConfig(kind="cosine", num_timesteps=T))
    network = UNet(
        UNetConfig(in_channels=1, out_channels=1, model_channels=32, channel_mult=(1, 2),
                   num_res_blocks=1, attention_depth=(0, 1), num_heads=2, norm_groups=8)
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []

    for _ in range(steps):  # algorithm 1
        x0 = data[torch.randint(len(data), (BATCH,))]
        t, noise = torch.randint(T, (BATCH,)), torch.randn_like(x0)
        x = schedule.add_noise(x0, noise, t)  # q(x_t | x_0), equation 4
        loss = (network(x, t) - noise).square().mean()  # L_simple, equation 14
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    network.eval()  # algorithm 2: a row per step, with mean and variance of equation 7
    table = build_table("ddpm", schedule, T, spacing="leading", variance="fixed_small", clamp=1.0)
    seeds = torch.arange(PICTURES)
    x = sample(lambda x, row: network(x, table.timesteps[row].long()), table, (1, 8, 8), seeds)

    sheet = x.reshape(8, 8, 8, 8).permute(0, 2, 1, 3).reshape(1, 64, 64)
    save_png(picture, sheet.clamp(-1, 1))
    tenth = max(steps // 10, 1)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


if __name__ == "__main__":
    before, after = main(sys.argv[1])
    print(f"loss {before:.3f} to {after:.3f}; {sys.argv[1]}")
