"""Your own module with GroupNorm and SiLU, accelerated and trained; nothing else changes.

python examples/accelerate_your_own_module.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastdiff


def denoiser(channels: int = 32) -> nn.Sequential:
    def block(width: int) -> list[nn.Module]:
        conv = nn.Conv2d(width, channels, 3, padding=1)
        return [conv, nn.GroupNorm(8, channels), nn.SiLU()]

    return nn.Sequential(*block(1), *block(channels), nn.Conv2d(channels, 1, 3, padding=1))


def main(steps: int = 200) -> list[float]:
    torch.manual_seed(0)
    model = denoiser()
    report = fastdiff.accelerate(model, strict=True)
    report.print()

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses: list[float] = []
    for step in range(steps):
        clean = bars(16)
        loss = (model(clean + 0.5 * torch.randn_like(clean)) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    report.restore()  # an ordinary nn.Sequential again, with what it has learned
    return losses


def bars(count: int, size: int = 16) -> Tensor:
    """(count, 1, size, size): a bright bar at a random place."""
    rows = torch.arange(size)[None, :] - torch.randint(size, (count, 1))
    return ((rows % size) < 4).float()[:, None, :, None].expand(-1, -1, -1, size).contiguous()


if __name__ == "__main__":
    main()
