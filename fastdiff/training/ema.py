"""Exponential moving average of the weights, which is sampled from and exported."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def ema_decay(update: int, decay: float, *, warmup: bool) -> float:
    """Decay of the `update`-th update, counted from 1.

    With warm-up it is min(decay, (1 + n) / (10 + n)), as in LDM and diffusers, so that the average
    quickly forgets the random initial weights.
    """
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


class EMA:
    """shadow <- decay * shadow + (1 - decay) * weights, after every optimizer step.

    Attributes:
        network: a copy of the network with the averaged weights (the shadow), in eval mode.
        updates: number of updates so far.
    """

    def __init__(self, network: nn.Module, *, decay: float, warmup: bool) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._shadow: list[Tensor] = [parameter.data for parameter in self.network.parameters()]
        self._weights: list[Tensor] = list(network.parameters())
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the weights, and copy the buffers."""
        self.updates += 1
        weight = 1 - ema_decay(self.updates, self.decay, warmup=self.warmup)
        torch._foreach_lerp_(self._shadow, self._weights, weight)
        for shadow, value in self._buffers:
            shadow.copy_(value)
