"""layer_norm and add_layer_norm: parity, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiff.kernels import add_layer_norm, layer_norm
from tests.kernels import cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.LAYER_NORM, ids=str)
def test_parity(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check("layer_norm", case, dtype, "reference")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.ADD_LAYER_NORM, ids=str)
def test_add_parity(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check("add_layer_norm", case, dtype, "reference")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_at_drawn_shapes(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 9)), data.draw(st.integers(2, 130)))
    assume(shape[0] * shape[1] >= 100)  # the largest error of a handful is luck
    residual = data.draw(st.booleans())
    case = cases.layer_norm_case("drawn", "any shape", shape, residual=residual)
    op = "add_layer_norm" if residual else "layer_norm"
    cases.check(op, case, data.draw(st.sampled_from(cases.DTYPES)), "reference")


def test_y_is_the_norm_of_the_rounded_total() -> None:
    x, residual = torch.randn(2, 4, 32).bfloat16()
    y, total = add_layer_norm(x, residual)
    assert torch.equal(total, (x.double() + residual.double()).bfloat16())
    assert torch.equal(y, layer_norm(total))


def test_a_constant_row_is_the_bias() -> None:
    """Whatever the row's value; the exact gradient is 0, so parity has no scale to measure by."""
    bias = torch.randn(6)
    for value in (0.0, 3.3, 1e4):
        assert torch.equal(layer_norm(torch.full((2, 6), value), None, bias), bias.expand(2, 6))
    assert torch.equal(layer_norm(torch.tensor([[5.5]])), torch.zeros(1, 1))


def test_bad_input() -> None:
    x = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"weight must have shape \(6,\), got \(5,\)"):
        layer_norm(x, torch.zeros(5))
    with pytest.raises(ValueError, match="got a scalar"):
        layer_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match="floating point"):
        layer_norm(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"add_layer_norm: residual must have shape \(2, 6\)"):
        add_layer_norm(x, x[:1])
