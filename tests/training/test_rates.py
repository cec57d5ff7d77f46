"""The learning rate where its schedule changes."""

from __future__ import annotations

import math

import pytest

from fastdiff.training import OptimizationConfig, learning_rate


def test_learning_rate_at_its_corners() -> None:
    config = OptimizationConfig(
        steps=110,
        batch_size=1,
        learning_rate=1.0,
        final_learning_rate=0.2,
        warmup_steps=10,
        decay="cosine",
    )
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)  # half way down: the mean of both ends
    assert rates[35] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)  # cos(pi / 4)
    assert rates[110] == pytest.approx(0.2)
    constant = OptimizationConfig(steps=10, batch_size=1, learning_rate=0.5)
    assert {learning_rate(step, constant) for step in range(10)} == {0.5}
