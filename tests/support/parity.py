"""Assertions of the repository's only tolerance rule, which fastdiff/bench/parity.py states.

`assert_parity` takes functions of a seed, because eager's error is random;
`assert_parity_in_one_draw` is for yardsticks whose error is not, such as the exact result rounded
once.
"""

from __future__ import annotations

from torch import Tensor

from fastdiff.bench.parity import (
    DRAWS,
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    Draw,
    Parity,
    measure_expected_parity,
    measure_parity,
)


def assert_parity(
    actual: Draw,
    reference_fp64: Draw,
    eager_same_dtype: Draw,
    *,
    factor: float = FORWARD_FACTOR,
    draws: int = DRAWS,
    name: str = "result",
) -> None:
    """Fail unless the expected error is within `factor` times eager's plus one ulp.

    Each argument computes its result for the inputs of a seed, from 0 to `draws - 1`. Most verdicts
    need only seed 0.
    """
    functions = actual, reference_fp64, eager_same_dtype
    assert all(map(callable, functions)), (
        "assert_parity takes functions of a seed; for one draw use assert_parity_in_one_draw"
    )
    parity = measure_expected_parity(*functions, factor=factor, draws=draws)
    _assert_holds(parity, factor, name)


def assert_gradient_parity(
    actual: Draw,
    reference_fp64: Draw,
    eager_same_dtype: Draw,
    *,
    draws: int = DRAWS,
    name: str = "gradient",
) -> None:
    """`assert_parity` with the factor for gradients, 3."""
    assert_parity(
        actual, reference_fp64, eager_same_dtype, factor=GRADIENT_FACTOR, draws=draws, name=name
    )


def assert_parity_in_one_draw(
    actual: Tensor,
    reference_fp64: Tensor,
    eager_same_dtype: Tensor,
    *,
    factor: float = FORWARD_FACTOR,
    name: str = "result",
) -> None:
    """`assert_parity` for a yardstick without random error, such as the exact result rounded."""
    _assert_holds(
        measure_parity(actual, reference_fp64, eager_same_dtype, factor=factor), factor, name
    )


def _assert_holds(parity: Parity, factor: float, name: str) -> None:
    assert parity.holds, (
        f"{name}: error {parity.error:.3g} > {parity.bound:.3g} "
        f"= {factor:g} x eager's {parity.eager_error:.3g} + 1 ulp x rms"
    )
