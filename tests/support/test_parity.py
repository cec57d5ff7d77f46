"""The gate itself: what must not pass does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels import cases
from tests.support.parity import assert_gradient_parity, assert_parity, measure_parity

DTYPES = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
Inputs = tuple[Tensor, Tensor, Tensor]


def norm_inputs(dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 32, 8, 8, generator=generator) + 0.3).to(dtype)
    weight, bias = ((torch.randn(32, generator=generator) + 1).to(dtype) for _ in range(2))
    return x, weight, bias


def swap_channels(y: Tensor) -> Tensor:
    return y[:, [1, 0, *range(2, y.shape[1])]]


WRONG_NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "zeros": lambda x, w, b: torch.zeros_like(x),
    "swapped channel": lambda x, w, b: swap_channels(cases.group_norm_silu_eager(x, 8, w, b)),
    "no affine": lambda x, w, b: cases.group_norm_silu_eager(x, 8),
    "no bias": lambda x, w, b: cases.group_norm_silu_eager(x, 8, w),
    "no silu": lambda x, w, b: cases.group_norm_silu_eager(x, 8, w, b, activation="none"),
    "other groups": lambda x, w, b: cases.group_norm_silu_eager(x, 16, w, b),
    "not a number": lambda x, w, b: x * float("nan"),
}


@DTYPES
@pytest.mark.parametrize("wrong", WRONG_NORMS)
def test_wrong_norms_fail(wrong: str, dtype: torch.dtype) -> None:
    x, weight, bias = norm_inputs(dtype)
    reference = cases.group_norm_silu_formula(x.double(), 8, weight.double(), bias.double())
    eager = cases.group_norm_silu_eager(x, 8, weight, bias)
    assert_parity(eager, reference, eager)
    with pytest.raises(AssertionError, match="error"):
        assert_parity(WRONG_NORMS[wrong](x, weight, bias), reference, eager)


@DTYPES
def test_wrong_attention_fails(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 16, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = cases.attention_formula(q.double(), k.double(), v.double())
    eager = cases.attention_eager(q, k, v)
    assert_parity(eager, reference, eager)
    heads = [1, 0, 2, 3]
    wrong = {
        "swapped heads": eager[:, :, heads],
        "swapped heads of k": cases.attention_eager(q, k[:, :, heads], v),
        "no scale": cases.attention_eager(q, k, v, scale=1.0),
        "last key missed": cases.attention_eager(q, k[:, :-1], v[:, :-1]),
    }
    for name, result in wrong.items():
        with pytest.raises(AssertionError, match=name):
            assert_parity(result, reference, eager, name=name)


@DTYPES
def test_wrong_gradients_fail(dtype: torch.dtype) -> None:
    x, weight, bias = norm_inputs(dtype)
    inputs = ((x, 8, weight, bias), {})
    exact = cases.with_gradients(inputs, torch.float64)
    _, expected = cases.run(cases.group_norm_silu_formula, exact)
    _, eager = cases.run(cases.group_norm_silu_eager, cases.with_gradients(inputs))
    for reference, gradient in zip(expected, eager, strict=True):
        assert_gradient_parity(gradient, reference, gradient)
        for wrong in (torch.zeros_like(gradient), -gradient, gradient.flip(0), gradient * 1.05):
            with pytest.raises(AssertionError, match="gradient"):
                assert_gradient_parity(wrong, reference, gradient)


def test_one_wrong_element_of_a_million_fails() -> None:
    reference = torch.randn(1_000_000, dtype=torch.float64)
    reference[123_456] = 0  # so that adding to it does not round
    eager = reference.float()
    actual = eager.clone()
    actual[123_456] += 1e-5
    with pytest.raises(AssertionError, match="error 1e-05"):
        assert_parity(actual, reference, eager)


def test_the_bound_is_the_rule() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    eager = torch.tensor([3.0, 4.5])
    parity = measure_parity(torch.tensor([2.0, 4.0]), reference, eager)
    rms = (25 / 2) ** 0.5
    assert parity.error == 1.0
    assert parity.eager_error == 0.5
    assert parity.bound == pytest.approx(2 * 0.5 + 2**-23 * rms, rel=1e-12)
    assert parity.holds
    assert not measure_parity(torch.tensor([1.9, 4.0]), reference, eager).holds
    half = measure_parity(reference, reference, eager, torch.float16, factor=3)
    assert half.bound == pytest.approx(3 * 0.5 + 2**-10 * rms, rel=1e-12)


def test_overflow_must_be_the_same_overflow() -> None:
    reference = torch.tensor([1e5, -1e5, 1.0], dtype=torch.float64)
    good = reference.half()
    assert_parity(good, reference, good)
    for wrong in (
        [65504, float("-inf"), 1],
        [float("inf"), float("inf"), 1],
        [float("nan"), float("-inf"), 1],
    ):
        with pytest.raises(AssertionError):
            assert_parity(torch.tensor(wrong).half(), reference, good)


def test_a_useless_eager_result_does_not_open_the_gate() -> None:
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = torch.tensor([float("nan"), 2.0])
    assert_parity(torch.tensor([1.0, 2.0]), reference, eager)
    with pytest.raises(AssertionError):
        assert_parity(torch.tensor([1.1, 2.0]), reference, eager)


def test_shapes_must_agree() -> None:
    reference = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_parity(torch.ones(4), reference, torch.ones(3, 4))
    with pytest.raises(AssertionError, match="fp64"):
        assert_parity(torch.ones(3, 4), reference.float(), torch.ones(3, 4))
