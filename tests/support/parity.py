"""The only tolerance rule of the repository: no worse than eager PyTorch, measured against fp64.

    err(actual) <= factor * err(eager PyTorch in the same dtype) + 1 ulp * rms(reference)

`err` is the largest absolute difference from an fp64 reference, and `factor` is 2 (3 for
gradients). The largest and not the rms, because one wrong element among a million (a swapped
channel, a missed tail of a row) moves the rms by a thousandth and would pass; the scatter of a
maximum between two correct implementations is what the factor is for. The bound grows with what the
dtype can do and not with the size of a hand-set tolerance: zeros never pass.

Where the reference rounds to infinity in the dtype, both must be that infinity. Where eager is not
finite though the reference is, eager tells nothing and those elements are left out of its error,
which tightens the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


@dataclass(frozen=True)
class Parity:
    """The error of a result, the error of eager PyTorch, and the bound the first must keep."""

    error: float
    eager_error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # False for NaN


def measure_parity(
    actual: Tensor,
    reference_fp64: Tensor,
    eager_same_dtype: Tensor,
    ulp_dtype: torch.dtype | None = None,
    *,
    factor: float = FORWARD_FACTOR,
) -> Parity:
    """The three numbers of the rule.

    Args:
        actual: the result under test.
        reference_fp64: the formula in fp64 on the same (rounded) inputs, the same shape.
        eager_same_dtype: ordinary PyTorch in the dtype of `actual`, the same shape.
        ulp_dtype: the dtype whose spacing at 1 is the ulp; by default that of `actual`.
        factor: what multiplies eager's error.
    """
    assert reference_fp64.dtype == torch.float64, "the reference must be computed in fp64"
    assert actual.shape == reference_fp64.shape == eager_same_dtype.shape, (
        f"shapes differ: {actual.shape}, {reference_fp64.shape}, {eager_same_dtype.shape}"
    )
    dtype = ulp_dtype or actual.dtype
    rounded = reference_fp64.to(dtype)
    finite = rounded.isfinite()
    if not torch.equal(actual.to(dtype)[~finite], rounded[~finite]):
        return Parity(float("nan"), float("nan"), 0.0)
    expected = reference_fp64[finite]
    if expected.numel() == 0:
        return Parity(0.0, 0.0, 0.0)
    eager_differences = (eager_same_dtype.double()[finite] - expected).abs()
    eager_differences = eager_differences[eager_differences.isfinite()]
    eager_error = eager_differences.max().item() if eager_differences.numel() else 0.0
    ulp = torch.finfo(dtype).eps * expected.square().mean().sqrt().item()
    error = (actual.double()[finite] - expected).abs().max().item()
    return Parity(error, eager_error, factor * eager_error + ulp)


def assert_parity(
    actual: Tensor,
    reference_fp64: Tensor,
    eager_same_dtype: Tensor,
    ulp_dtype: torch.dtype | None = None,
    *,
    factor: float = FORWARD_FACTOR,
    name: str = "result",
) -> None:
    """Fail unless `actual` is within twice eager's error plus one ulp; see `measure_parity`."""
    parity = measure_parity(actual, reference_fp64, eager_same_dtype, ulp_dtype, factor=factor)
    assert parity.holds, (
        f"{name}: error {parity.error:.3g} > {parity.bound:.3g} "
        f"= {factor:g} x eager's {parity.eager_error:.3g} + 1 ulp x rms"
    )


def assert_gradient_parity(
    actual: Tensor, reference_fp64: Tensor, eager_same_dtype: Tensor, *, name: str = "gradient"
) -> None:
    """`assert_parity` with the factor 3 of gradients."""
    assert_parity(actual, reference_fp64, eager_same_dtype, factor=GRADIENT_FACTOR, name=name)
