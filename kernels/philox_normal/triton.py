"""The Triton kernel of `philox_normal`, and device functions for noise inside other kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..triton import cdiv, jit, launch, tl, triton_backend
from ..tuning import config

# Device functions: fp32 and uint32 only. Every product that is added to something is either an
# explicit fma or exact. That leaves the compiler no choice, so all GPUs and the interpreter compute
# the same bits.


@jit
def philox_words(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tl.tensor:
    """`philox4x32` on uint32 words."""
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, c2 * 0xCD9E8D57, high0 ^ c3 ^ k1, c0 * 0xD2511F53
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@jit
def radius(k: tl.tensor) -> tl.tensor:
    """sqrt(-2 ln u), u = (k + 1/2) / 2^23, as a sum of two fp32 numbers.

    u = 2^-halvings (1 + x) with sqrt(1/2) <= 1 + x < sqrt(2), x exact. Then -ln u = halvings ln 2 -
    x + x^2 / 2 - x^3 p(x), where all but the small last term is summed in two parts. p is a minimax
    polynomial; its error relative to the sum is 2^-30.
    """
    n = (2 * k + 1).to(tl.float32)
    bits = n.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # minus the bits of sqrt(1/2)
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    halvings = (24 - exponent).to(tl.float32)
    square = x * x
    square_rest = tl.fma(x, x, -square)
    p = tl.fma(x, 0.06920981844405235, -0.11780652425670435)
    p = tl.fma(x, p, 0.1186513528142905)
    p = tl.fma(x, p, -0.12385560341324574)
    p = tl.fma(x, p, 0.14220022299820936)
    p = tl.fma(x, p, -0.16669215926695688)
    p = tl.fma(x, p, 0.2000214604066092)
    p = tl.fma(x, p, -0.24999986427650803)
    p = tl.fma(x, p, 0.33333311934300913)
    twos = halvings * 0.693145751953125  # ln 2 to 16 bits: exact
    first = twos - x
    second = tl.fma(square, 0.5, first)
    rest = ((twos - first) - x) + tl.fma(square, 0.5, first - second)
    rest = tl.fma(halvings, 1.4286068202862268e-06, rest)
    rest = tl.fma(square_rest, 0.5, rest)
    rest = tl.fma(-x * square, p, rest)
    log = second + rest
    log_rest = (second - log) + rest
    out = tl.sqrt_rn(2.0 * log)
    left = tl.fma(log_rest, 2.0, tl.fma(-out, out, 2.0 * log))  # 2 ln - out^2
    return out, tl.div_rn(0.5 * left, out)


@jit
def circle(k: tl.tensor) -> tl.tensor:
    """cos and sin of 2 pi u, u = (k + 1/2) / 2^23, each as a sum of two fp32 numbers.

    The nearest quarter turn is subtracted in integers. The rest is t eighths of a turn, -1 < t < 1
    exact, with sin = t (pi/4 + s S(s)) and cos = 1 + s (-pi^2/32 + s C(s)), s = t^2.
    """
    n = 2 * k + 1
    quarter = (n + 0x200000) >> 22
    t = (n - (quarter << 22)).to(tl.float32) * 4.76837158203125e-07  # 2^-21
    s = t * t
    s_rest = tl.fma(t, t, -s)
    p = tl.fma(s, 3.0986709576675916e-07, -3.657402448680323e-05)
    p = tl.fma(s, p, 0.002490394134771033)
    p = tl.fma(s, p, -0.08074551217468735)
    p = tl.fma(s, p, -2.1855694143368964e-08)
    slope = 0.78539818525314331 + p
    sine = t * slope
    sine_rest = tl.fma(t, (0.78539818525314331 - slope) + p, tl.fma(t, slope, -sine))
    p = tl.fma(s, 3.541966947430206e-06, -0.00032596140167883125)
    p = tl.fma(s, p, 0.015854338155321383)
    p = tl.fma(s, p, -9.074112017337654e-09)
    slope = p - 0.3084251284599304
    drop = tl.fma(s, slope, 0.0)  # a bare product would be fused into the sums below
    rest = tl.fma(s, (-0.3084251284599304 - slope) + p, tl.fma(s, slope, -drop))
    rest = tl.fma(s_rest, slope, rest)
    cosine = 1.0 + drop
    cosine_rest = ((1.0 - cosine) + drop) + rest
    swap = (quarter & 1) == 1
    across, across_rest = tl.where(swap, sine, cosine), tl.where(swap, sine_rest, cosine_rest)
    up, up_rest = tl.where(swap, cosine, sine), tl.where(swap, cosine_rest, sine_rest)
    left, down = ((quarter + 1) & 2) == 2, (quarter & 2) == 2
    across, across_rest = tl.where(left, -across, across), tl.where(left, -across_rest, across_rest)
    return across, across_rest, tl.where(down, -up, up), tl.where(down, -up_rest, up_rest)


@jit
def _product(a: tl.tensor, a_rest: tl.tensor, b: tl.tensor, b_rest: tl.tensor) -> tl.tensor:
    return tl.fma(a, b, tl.fma(a, b_rest, a_rest * b))


@jit
def normals(
    block: tl.tensor, step: tl.tensor, stream: tl.tensor, seed: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The normals of BLOCK consecutive counters starting at `block`: (4 * BLOCK,) fp32, in element
    order."""
    c0 = (block + tl.arange(0, BLOCK)).to(tl.uint32)
    c2 = (tl.zeros([BLOCK], tl.int64) + step).to(tl.uint32)
    c3 = (tl.zeros([BLOCK], tl.int64) + stream).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(
        c0, tl.zeros([BLOCK], tl.uint32), c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    )
    r, r_rest = radius((w0 >> 9).to(tl.int32))
    x, x_rest, y, y_rest = circle((w1 >> 9).to(tl.int32))
    z0, z1 = _product(r, r_rest, x, x_rest), _product(r, r_rest, y, y_rest)
    r, r_rest = radius((w2 >> 9).to(tl.int32))
    x, x_rest, y, y_rest = circle((w3 >> 9).to(tl.int32))
    z2, z3 = _product(r, r_rest, x, x_rest), _product(r, r_rest, y, y_rest)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@jit
def _philox_normal_kernel(
    seeds: tl.tensor,
    step: tl.tensor,
    number: tl.tensor,
    stream: tl.tensor,
    z: tl.tensor,
    elements: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """step: a pointer to an int64, or None for `number`."""
    tiles = (elements - 1) // (4 * BLOCK) + 1  # tl.cdiv would pass 2^31 below it
    image = tl.program_id(0) // tiles
    block = (tl.program_id(0) % tiles) * BLOCK
    if step is not None:
        number = tl.load(step)
    out = normals(block, number, stream, tl.load(seeds + image), BLOCK)
    element = block.to(tl.int64) * 4 + tl.arange(0, 4 * BLOCK)
    tl.store(z + image.to(tl.int64) * elements + element, out, element < elements)


LARGEST = 2**33
"""Most elements of an image: a kernel counts its blocks in 31 bits."""


def forward(
    seeds: Tensor,
    shape: Sequence[int],
    step: Tensor | None,
    number: int,
    stream: int,
    keep: bool = False,
) -> tuple[Tensor, None]:
    """Return the noise; the step is the tensor `step`, or `number` if that is None."""
    z = torch.empty(len(seeds), *shape, dtype=torch.float32, device=seeds.device)
    elements = math.prod(shape)
    chosen = config("philox_normal", z, "any")
    grid = (len(seeds) * cdiv(elements, 4 * chosen["BLOCK"]),)
    launch(
        _philox_normal_kernel, grid, seeds.contiguous(), step, number, stream, z, elements, **chosen
    )
    return z, None


def why_not(
    seeds: Tensor, shape: Sequence[int], step: Tensor | None, number: int, stream: int
) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    if math.prod(shape) > LARGEST:
        return f"an image may have at most 2^33 elements, got {math.prod(shape)}"
    return None


BACKEND = triton_backend(forward=forward, why_not=why_not, one_device=True)
