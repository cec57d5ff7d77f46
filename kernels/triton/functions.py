"""Device functions shared by the Triton kernels of several ops."""

from __future__ import annotations

from .launches import INTERPRETED, jit, tl

try:
    from triton.language.extra import libdevice
except ImportError:
    libdevice = None

if INTERPRETED:  # which has no functions of libdevice

    @jit
    def _quotient(a: tl.tensor, b: tl.tensor) -> tl.tensor:
        return a / b

else:

    @jit
    def _quotient(a: tl.tensor, b: tl.tensor) -> tl.tensor:
        """a / b by the hardware's approximate reciprocal, to 2 ulp; 0 from b = 2^126 on."""
        return libdevice.fast_dividef(a, b)


@jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)) in fp32: accurate to the last places, and safe if exp is inf or 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def silu(x: tl.tensor) -> tl.tensor:
    """x / (1 + exp(-x)) in fp32, to the last places.

    exp2 is one instruction of a GPU; that it rounds denormal results to 0 is lost in the sum.
    """
    return _quotient(x, 1.0 + tl.exp2(x * -1.4426950408889634))


@jit
def two_sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a + b rounded, and the rounding error (Knuth 1969, TAOCP 4.2.2, theorem B)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


# Moments are a count, the mean of that many numbers, and the sum of squared differences from it.
# They are merged with Chan, Golub, LeVeque 1979, eq. 2.1; E[x^2] - E[x]^2 would lose all precision
# when the mean is large.


@jit
def with_tile(
    values: tl.tensor,
    inside: tl.tensor,
    more: tl.tensor,
    count: tl.tensor,
    mean: tl.tensor,
    squares: tl.tensor,
) -> tl.tensor:
    """Mean and squares of `count` numbers combined with the `more` numbers of a tile."""
    values = tl.where(inside, values, 0.0)
    tile_mean = tl.sum(values) / more
    apart = tl.where(inside, values - tile_mean, 0.0)
    delta = tile_mean - mean
    share = more / (count + more)
    return mean + delta * share, squares + tl.sum(apart * apart) + delta * delta * count * share


@jit
def merged(counts: tl.tensor, means: tl.tensor, squares: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Mean and squares of `count` numbers, merged from parts along axis 0, which may be empty.
    The mean is computed twice, the second time relative to the first."""
    mean = tl.sum(means * counts, 0) / count
    mean += tl.sum((means - tl.expand_dims(mean, 0)) * counts, 0) / count
    apart = means - tl.expand_dims(mean, 0)
    return mean, tl.sum(squares + counts * apart * apart, 0)
