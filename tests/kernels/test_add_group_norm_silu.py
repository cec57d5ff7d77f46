"""add_group_norm_silu: parity, the rounded total, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiff.kernels import add_group_norm_silu, group_norm_silu
from tests.kernels import cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.ADD_GROUP_NORM_SILU, ids=str)
def test_parity(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check("add_group_norm_silu", case, dtype, "reference")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_at_drawn_shapes(data: st.DataObject) -> None:
    n, groups, size, h, w = (data.draw(st.integers(1, top)) for top in (3, 9, 5, 7, 7))
    assume(n * groups * size * h * w >= 100)  # the largest error of a handful is luck
    case = cases.norm_case(
        "drawn",
        "any shape",
        (n, groups * size, h, w),
        groups,
        layout=data.draw(st.sampled_from([lambda x: x, cases.channels_last])),
        add=data.draw(st.sampled_from(["", "channel", "vector residual", "residual"])),
    )
    cases.check("add_group_norm_silu", case, data.draw(st.sampled_from(cases.DTYPES)), "reference")


def test_y_is_the_norm_of_the_rounded_total() -> None:
    x, residual = torch.randn(2, 2, 8, 5, 5).bfloat16()
    channel_add = torch.randn(2, 8)
    y, total = add_group_norm_silu(x, 4, channel_add=channel_add, residual=residual)
    exact = x.double() + channel_add.double()[:, :, None, None] + residual.double()
    assert torch.equal(total, exact.bfloat16())  # the sum is rounded once
    assert torch.equal(y, group_norm_silu(total, 4))


def test_channels_last_stays() -> None:
    x = cases.channels_last(torch.randn(2, 8, 5, 6))
    for result in add_group_norm_silu(x, 4, channel_add=torch.ones(8), residual=x):
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert not result.is_contiguous()


def test_bad_input() -> None:
    x = torch.zeros(2, 6, 4)
    with pytest.raises(
        ValueError, match=r"channel_add must have shape \(2, 6\) or \(6,\), got \(2,\)"
    ):
        add_group_norm_silu(x, 2, channel_add=torch.zeros(2))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 6, 4\), got \(1, 6, 4\)"):
        add_group_norm_silu(x, 2, residual=x[:1])
    with pytest.raises(ValueError, match="add_group_norm_silu: num_groups must divide"):
        add_group_norm_silu(x, 4)
