"""The only tolerance rule of the repository: no worse than eager PyTorch, measured against fp64.

    E[err(actual)] <= factor * E[err(eager PyTorch in the same dtype)] + 1 ulp * rms(reference)

`err` is the largest absolute difference from an fp64 reference, and `factor` is 2 (3 for
gradients). It is the largest difference rather than the rms because one wrong element among a
million (a swapped channel, a missed tail of a row) changes the rms by a thousandth and would pass.
The factor allows for the scatter of a maximum between two correct implementations. The bound
depends on the precision of the dtype and not on a tolerance set by hand, so zeros never pass.

`E` is the mean over `DRAWS` inputs. In one draw, eager's error can be a fifth of its mean or
several times its mean. A bound based on that single error would fail correct results by bad luck
and pass wrong ones by good luck, differently on each CPU.

The tests assert it (tests/support/parity.py), and `fastdiff bench` holds users' kernels to it.

Where the reference rounds to infinity in the dtype, the result must be the same infinity. Where
eager is not finite although the reference is, those elements do not count for eager's error, which
tightens the bound. If eager's error in fp32 exceeds a twentieth of the rms, eager computes
something else (other weights, another formula), and the test itself fails as invalid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
DRAWS = 16
USELESS = 0.05  # relative to the rms; eager reaches 0.013 at worst (mean 100, deviation 0.01)

Draw = Callable[[int], Tensor]
"""A result as a function of the seed of its inputs."""


@dataclass(frozen=True)
class Parity:
    """The error of a result, the error of eager PyTorch, and the bound on the first."""

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
    *,
    factor: float = FORWARD_FACTOR,
) -> Parity:
    """The three numbers of the rule in one draw.

    Args:
        actual: the result under test.
        reference_fp64: the formula in fp64 on the same (rounded) inputs, the same shape.
        eager_same_dtype: ordinary PyTorch in the dtype of `actual`, the same shape.
        factor: multiplies eager's error.
    """
    assert reference_fp64.dtype == torch.float64, "the reference must be computed in fp64"
    assert actual.dtype == eager_same_dtype.dtype, (
        f"dtypes differ: {actual.dtype}, {eager_same_dtype.dtype}"
    )
    assert actual.shape == reference_fp64.shape == eager_same_dtype.shape, (
        f"shapes differ: {actual.shape}, {reference_fp64.shape}, {eager_same_dtype.shape}"
    )
    rounded = reference_fp64.to(actual.dtype)
    finite = rounded.isfinite()
    if not torch.equal(actual[~finite], rounded[~finite]):
        return Parity(math.nan, math.nan, 0.0)
    expected = reference_fp64[finite]
    if expected.numel() == 0:
        return Parity(0.0, 0.0, 0.0)
    eager_differences = (eager_same_dtype.double()[finite] - expected).abs()
    eager_differences = eager_differences[eager_differences.isfinite()]
    eager_error = eager_differences.max().item() if eager_differences.numel() else 0.0
    rms = expected.square().mean().sqrt().item()
    is_zero = rms < 1e-9  # as in the gradient of a single key: only rounding errors are compared
    assert actual.dtype != torch.float32 or is_zero or eager_error <= USELESS * rms, (
        f"eager's error is {eager_error:.3g} at rms {rms:.3g}: it does not compute the reference"
    )
    ulp = torch.finfo(actual.dtype).eps * rms
    error = (actual.double()[finite] - expected).abs().max().item()
    return Parity(error, eager_error, factor * eager_error + ulp)


def measure_expected_parity(
    actual: Draw,
    reference_fp64: Draw,
    eager_same_dtype: Draw,
    *,
    factor: float = FORWARD_FACTOR,
    draws: int = DRAWS,
) -> Parity:
    """The three numbers of the rule as means over `draws` seeds, or over fewer if that suffices.

    If the first error is within half of its bound, the result passes, since it is about as good as
    eager on the same numbers. Otherwise eager's error is averaged over all draws, which is cheap
    compared with an interpreted kernel. The result itself is computed for all draws only if its
    first error exceeds that bound.
    """
    first = measure_parity(actual(0), reference_fp64(0), eager_same_dtype(0), factor=factor)
    if first.error <= first.bound / 2 or math.isnan(first.error):
        return first

    def error_and_bound(seed: int) -> Parity:
        reference, eager = reference_fp64(seed), eager_same_dtype(seed)
        return measure_parity(reference.to(eager.dtype), reference, eager, factor=factor)

    pool = [first, *map(error_and_bound, range(1, draws))]
    eager_error, bound = fmean(p.eager_error for p in pool), fmean(p.bound for p in pool)
    if first.error <= bound:
        return Parity(first.error, eager_error, bound)

    def error(seed: int) -> float:
        y, reference = actual(seed), reference_fp64(seed)
        return measure_parity(y, reference, reference.to(y.dtype)).error

    errors = [first.error, *map(error, range(1, draws))]
    return Parity(fmean(errors), eager_error, bound)
