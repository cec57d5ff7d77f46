"""Learning rate schedule."""

from __future__ import annotations

import math

from fastdiff.training.config import OptimizationConfig


def learning_rate(step: int, config: OptimizationConfig) -> float:
    """Learning rate of step `step`, counted from 0.

    It is a linear warm-up, lr * (step + 1) / warmup_steps, followed by a constant or by
    final + (lr - final) * (1 + cos(pi * p)) / 2, where p goes from 0 after the warm-up to 1 at
    `steps`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    span = max(config.steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    height = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + height * (1 + math.cos(math.pi * progress)) / 2
