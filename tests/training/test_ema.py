"""Averaged weights against their weighted sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastdiff.training import EMA


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_weighted_sum_it_stands_for(warmup: bool) -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    start = layer.weight.detach().clone()
    ema = EMA(layer, decay=0.8, warmup=warmup)
    history, weights = [start], [1.0]
    for update in range(1, 41):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3, dtype=torch.float64))
        ema.update()
        # (1 + n) / (10 + n) passes 0.8 at n = 35
        decay = min(0.8, (1 + update) / (10 + update)) if warmup else 0.8
        weights = [weight * decay for weight in weights] + [1 - decay]
        history.append(layer.weight.detach().clone())
    expected = sum(weight * value for weight, value in zip(weights, history, strict=True))
    assert math.isclose(sum(weights), 1)
    torch.testing.assert_close(ema.network.weight, expected, rtol=1e-12, atol=1e-12)
    assert not ema.network.weight.requires_grad


def test_ema_copies_buffers() -> None:
    norm = nn.BatchNorm1d(2)
    ema = EMA(norm, decay=0.99, warmup=False)
    norm(torch.randn(8, 2) + 5)
    ema.update()
    torch.testing.assert_close(ema.network.running_mean, norm.running_mean)
    assert not ema.network.training
