"""The parity rule itself: wrong results fail it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import kernels
from tests.kernels import cases
from tests.support.parity import (
    DRAWS,
    assert_gradient_parity,
    assert_parity,
    assert_parity_in_one_draw,
    measure_expected_parity,
    measure_parity,
)

DTYPES = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
Inputs = tuple[Tensor, Tensor, Tensor]


def norm_inputs(dtype: torch.dtype, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
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
    def reference(seed: int) -> Tensor:
        x, weight, bias = (t.double() for t in norm_inputs(dtype, seed))
        return kernels.OPS["group_norm_silu"].formula(x, 8, weight, bias)

    def eager(seed: int) -> Tensor:
        x, weight, bias = norm_inputs(dtype, seed)
        return cases.group_norm_silu_eager(x, 8, weight, bias)

    assert_parity(eager, reference, eager)
    with pytest.raises(AssertionError, match="error"):
        assert_parity(lambda seed: WRONG_NORMS[wrong](*norm_inputs(dtype, seed)), reference, eager)


WRONG_ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "swapped heads": lambda q, k, v: cases.attention_eager(q, k, v)[:, :, [1, 0, 2, 3]],
    "swapped heads of k": lambda q, k, v: cases.attention_eager(q, k[:, :, [1, 0, 2, 3]], v),
    "no scale": lambda q, k, v: cases.attention_eager(q, k, v, scale=1.0),
    "last key missed": lambda q, k, v: cases.attention_eager(q, k[:, :-1], v[:, :-1]),
}


@DTYPES
@pytest.mark.parametrize("wrong", WRONG_ATTENTIONS)
def test_wrong_attention_fails(wrong: str, dtype: torch.dtype) -> None:
    def drawn(seed: int) -> Tensor:
        return torch.randn(3, 2, 16, 4, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def reference(seed: int) -> Tensor:
        return kernels.OPS["attention"].formula(*drawn(seed).double())

    def eager(seed: int) -> Tensor:
        return cases.attention_eager(*drawn(seed))

    assert_parity(eager, reference, eager)
    with pytest.raises(AssertionError, match=wrong):
        assert_parity(
            lambda seed: WRONG_ATTENTIONS[wrong](*drawn(seed)), reference, eager, name=wrong
        )


WRONG_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "negative": lambda gradient: -gradient,
    "other places": lambda gradient: gradient.flip(0),
    "a twentieth too large": lambda gradient: gradient * 1.05,
}


@DTYPES
@pytest.mark.parametrize("leaf", [0, 1, 2], ids=["x", "weight", "bias"])
def test_wrong_gradients_fail(leaf: int, dtype: torch.dtype) -> None:
    def gradient(function: Callable[..., Tensor], wide: torch.dtype | None, seed: int) -> Tensor:
        x, weight, bias = norm_inputs(dtype, seed)
        inputs = cases.with_gradients(((x, 8, weight, bias), {}), wide)
        return cases.run(function, inputs, seed)[1][leaf]

    reference = partial(gradient, kernels.OPS["group_norm_silu"].formula, torch.float64)
    eager = partial(gradient, cases.group_norm_silu_eager, None)
    assert_gradient_parity(eager, reference, eager)
    for wrong in WRONG_GRADIENTS.values():
        with pytest.raises(AssertionError, match="gradient: error"):
            assert_gradient_parity(lambda seed, w=wrong: w(eager(seed)), reference, eager)


@pytest.mark.parametrize("fault", ["tap", "channel", "tail", "nothing"])
def test_a_convolution_with_a_small_fault_fails(fault: str) -> None:
    """The faults: 1e-5 in one of 4,608 taps, two output channels swapped, the last column zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, 3, 3, generator=generator) / 12

    def drawn(seed: int) -> Tensor:
        return torch.randn(1, 16, 9, 11, generator=torch.Generator().manual_seed(seed)) + 0.5

    def actual(seed: int) -> Tensor:
        wrong = weight.clone()
        wrong[3, 5, 1, 2] += 1e-5 if fault == "tap" else 0
        y = F.conv2d(drawn(seed), wrong, padding=1)
        if fault == "tail":
            y[..., -1] = 0
        return swap_channels(y) if fault == "channel" else y

    results = (
        actual,
        lambda seed: F.conv2d(drawn(seed).double(), weight.double(), padding=1),
        lambda seed: F.conv2d(drawn(seed), weight, padding=1),
    )
    if fault == "nothing":
        assert_parity(*results)
        return
    with pytest.raises(AssertionError, match="error"):
        assert_parity(*results)


def test_eagers_luck_in_one_draw_does_not_decide() -> None:
    """A single number is compared: a sum of 16, added backwards, and forwards as "eager".

    For any first draw, the correct sum passes and a sum that is off by 1e-5 fails.
    """

    def numbers(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed % DRAWS)
        return [x[None] for x in torch.randn(16, generator=generator) + 0.3]

    def exact(seed: int) -> Tensor:
        return reduce(torch.add, [x.double() for x in numbers(seed)])

    def eager(seed: int) -> Tensor:
        return reduce(torch.add, numbers(seed))

    def ours(seed: int) -> Tensor:
        return reduce(torch.add, reversed(numbers(seed)))

    alone = [measure_parity(ours(seed), exact(seed), eager(seed)) for seed in range(DRAWS)]
    assert not all(parity.holds for parity in alone)
    for start in range(DRAWS):
        right, wrong, *others = (
            lambda seed, start=start, f=f: f(start + seed)
            for f in (ours, lambda seed: ours(seed) + 1e-5, exact, eager)
        )
        assert_parity(right, *others)
        with pytest.raises(AssertionError, match="error"):
            assert_parity(wrong, *others)


def test_only_as_many_draws_as_the_verdict_needs() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    asked: dict[str, list[int]] = {}

    def off_by(name: str, errors: list[float]) -> Callable[[int], Tensor]:
        def draw(seed: int) -> Tensor:
            asked.setdefault(name, []).append(seed)
            return (exact + errors[seed]).float()

        return draw

    def verdict(ours: list[float], eager: list[float]) -> bool:
        asked.clear()
        results = off_by("ours", ours), lambda seed: exact, off_by("eager", eager)
        return measure_expected_parity(*results, draws=4).holds

    all_four = [0, 1, 2, 3]
    assert verdict([0.01] * 4, [0.01] * 4)
    assert asked == {"ours": [0], "eager": [0]}
    assert verdict([0.02] * 4, [0.0, 0.02, 0.02, 0.02])  # eager was lucky in the first draw
    assert asked == {"ours": [0], "eager": all_four}
    assert verdict([0.05, 0.01, 0.01, 0.01], [0.01] * 4)  # and ours was unlucky
    assert asked == {"ours": all_four, "eager": all_four}
    assert not verdict([0.05] * 4, [0.02] * 4)
    assert asked == {"ours": all_four, "eager": all_four}
    assert not verdict([float("nan")] + [0.0] * 3, [0.01] * 4)


def test_one_wrong_element_of_a_million_fails() -> None:
    reference = torch.randn(1_000_000, dtype=torch.float64)
    reference[123_456] = 0  # so that adding to it does not round
    eager = reference.float()
    actual = eager.clone()
    actual[123_456] += 1e-5
    with pytest.raises(AssertionError, match="error 1e-05"):
        assert_parity_in_one_draw(actual, reference, eager)


def test_the_bound_is_the_rule() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    eager = torch.tensor([3.0, 4.125])
    parity = measure_parity(torch.tensor([2.75, 4.0]), reference, eager)
    rms = (25 / 2) ** 0.5
    assert parity.error == 0.25
    assert parity.eager_error == 0.125
    assert parity.bound == pytest.approx(2 * 0.125 + 2**-23 * rms, rel=1e-12)
    assert parity.holds
    assert not measure_parity(torch.tensor([2.74, 4.0]), reference, eager).holds
    half = measure_parity(reference.half(), reference, eager.half(), factor=3)
    assert half.bound == pytest.approx(3 * 0.125 + 2**-10 * rms, rel=1e-12)


def test_overflow_must_be_the_same_overflow() -> None:
    reference = torch.tensor([1e5, -1e5, 1.0], dtype=torch.float64)
    good = reference.half()
    assert_parity_in_one_draw(good, reference, good)
    for wrong in (
        [65504, float("-inf"), 1],
        [float("inf"), float("inf"), 1],
        [float("nan"), float("-inf"), 1],
    ):
        with pytest.raises(AssertionError):
            assert_parity_in_one_draw(torch.tensor(wrong).half(), reference, good)


def test_a_useless_eager_result_does_not_open_the_gate() -> None:
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = torch.tensor([float("nan"), 2.0])
    assert_parity_in_one_draw(torch.tensor([1.0, 2.0]), reference, eager)
    with pytest.raises(AssertionError):
        assert_parity_in_one_draw(torch.tensor([1.1, 2.0]), reference, eager)


def test_shapes_must_agree() -> None:
    reference = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_parity_in_one_draw(torch.ones(4), reference, torch.ones(3, 4))
    with pytest.raises(AssertionError, match="dtypes differ"):
        assert_parity_in_one_draw(torch.ones(3, 4), reference, torch.ones(3, 4).half())
    with pytest.raises(AssertionError, match="fp64"):
        assert_parity_in_one_draw(torch.ones(3, 4), reference.float(), torch.ones(3, 4))


def test_eager_that_computes_something_else_is_an_error() -> None:
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="does not compute the reference"):
        assert_parity_in_one_draw(reference.float(), reference, torch.tensor([1.0, 2.2]))
    zero = torch.zeros(2, dtype=torch.float64)
    assert_parity_in_one_draw(zero.float(), zero, torch.tensor([1e-7, 0.0]))


def test_tensors_instead_of_functions_of_a_seed_are_an_error() -> None:
    one = torch.ones(3)
    with pytest.raises(AssertionError, match="use assert_parity_in_one_draw"):
        assert_parity(one, one.double(), one)  # type: ignore[arg-type]
