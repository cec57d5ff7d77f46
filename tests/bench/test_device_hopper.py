"""The check of wgmma's columns sees columns that are swapped."""

from __future__ import annotations

from torch import Tensor

from benchmarks.device.hopper import HEAD_DIMS, wrong_columns
from fastdiff.kernels import attention


def test_columns_that_are_swapped_are_named() -> None:
    def swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attention(q, k, v).clone()
        y[..., [3, 35]] = y[..., [35, 3]]
        return y

    for d in HEAD_DIMS:
        assert wrong_columns(attention, d, 65, "cpu") == []
        assert wrong_columns(swapped, d, 65, "cpu") == [3, 35]
