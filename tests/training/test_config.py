"""The shared parts of a run reject invalid values."""

from __future__ import annotations

import pytest

from fastdiff.training import OptimizationConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"accumulate": 3},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"final_learning_rate": 1.0},
        {"ema_decay": 1.0},
        {"clip_norm": -1.0},
        {"warmup_steps": -1},
        {"decay": "linear"},
        {"precision": "fp8"},
    ],
)
def test_impossible_optimization_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        OptimizationConfig(**{"steps": 4, "batch_size": 4, **changes})  # type: ignore[arg-type]
