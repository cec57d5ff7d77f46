"""Counter-based noise: Philox4x32-10 words and the normal numbers made of them.

    round    (c0, c1) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2))
             (c2, c3) <- (hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
             (k0, k1) <- (k0 + W0, k1 + W1)         ten times; Salmon et al. 2011, section 3.3
    normals  u = ((w >> 9) + 1/2) / 2^23,  r = sqrt(-2 ln u_0)
             (z_0, z_1) = (r cos 2 pi u_1, r sin 2 pi u_1)                   Box & Muller 1958

The counter is (block_lo, block_hi, step, stream) and the key is the image's seed, where element e
of the image is number e % 4 of block e // 4. So every number depends on (seed, stream, step,
element) only: one image gets the same noise alone or in any batch, and a longer image begins with
the numbers of a shorter one of the same seed.

Words are equal bit for bit everywhere. The reference takes the normals in fp64 and rounds once to
fp32, so two libraries whose fp64 log, sin and cos differ in the last place give the same fp32 (up
to a tie, about 1 in 10^8). u keeps 23 bits and is exact in fp32, so that fp32 implementations start
from the same numbers; |z| <= 5.77. The GPU kernels take no fp64: they compute r, cos and sin as
sums of two fp32 numbers, good to 2^-25, and round their product once. A test enumerates all 2^23
values of u and finds that this is at most 1.4 ulp from the reference.

Bytes that must move: N * elements * 4 out, nothing in; inside `sampler_step`, none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels import _cuda, _philox_cuda, extension
from fastdiff.kernels._triton import (
    Config,
    Tunable,
    cdiv,
    config,
    define_tunable,
    jit,
    launch,
    register,
    tl,
)
from fastdiff.kernels.dispatch import define_op

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
ROUNDS = 10


class Stream(IntEnum):
    """What the noise is for: the last word of the counter, so that no two uses share a number."""

    INITIAL_NOISE = 0
    SAMPLER_NOISE = 1
    POSTERIOR_NOISE = 2


INITIAL_NOISE, SAMPLER_NOISE, POSTERIOR_NOISE = Stream


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: (..., 4) int64 that hold uint32 words, word 0 first.
        key: (..., 2) int64 that hold uint32 words; its leading dimensions broadcast with the
            counter's.

    Returns:
        (..., 4) int64 that hold uint32 words.

    Raises:
        ValueError: another dtype or last dimension.

    Salmon, Moraes, Dror, Shaw 2011 (Parallel Random Numbers: As Easy as 1, 2, 3), section 3.3.
    """
    for name, words, size in (("counter", counter, 4), ("key", key, 2)):
        if words.dtype != torch.int64 or words.ndim < 1 or words.shape[-1] != size:
            raise ValueError(
                f"philox4x32: {name} must be int64 of shape (..., {size}), "
                f"got {words.dtype} of shape {tuple(words.shape)}"
            )
    out = _rounds(counter.unbind(-1), key.unbind(-1))
    return torch.stack(torch.broadcast_tensors(*out), dim=-1)


def _rounds(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox on separate words that broadcast with each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 wraps around, so the 64 bits of the product are right; the mask drops the copies of
        # its sign
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (product1 >> 32) & MASK32 ^ c1 ^ k0, product1 & MASK32
        c2, c3 = (product0 >> 32) & MASK32 ^ c3 ^ k1, product0 & MASK32
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def philox_normal_reference(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor = 0, stream: int = INITIAL_NOISE
) -> Tensor:
    """The op in plain PyTorch; see `philox_normal`."""
    elements = math.prod(shape)
    block = torch.arange((elements + 3) // 4, device=seeds.device)  # (blocks,)
    flat = _normals_of_blocks(seeds, block, step, stream)[:, :elements]
    return flat.reshape(len(seeds), *shape).contiguous()


def _normals_of_blocks(seeds: Tensor, block: Tensor, step: int | Tensor, stream: int) -> Tensor:
    """seeds: (N,); block: (blocks,), int64 both; step: a number, () or (N,) -> the normals
    (N, 4 * blocks) fp32."""
    key = (seeds[:, None] & MASK32, (seeds[:, None] >> 32) & MASK32)  # (N, 1) each
    step = torch.as_tensor(step, dtype=torch.int64, device=seeds.device).reshape(-1, 1) & MASK32
    counter = (block & MASK32, block >> 32, step, torch.full_like(step, int(stream)))
    words = _rounds(counter, key)  # 4 of (N, blocks)
    uniform = [((w >> 9).double() + 0.5) * 2.0**-23 for w in words]
    normals = []
    for u0, u1 in (uniform[:2], uniform[2:]):
        radius, angle = torch.sqrt(-2 * torch.log(u0)), 2 * math.pi * u1
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).float().flatten(1)


# Device functions: fp32 and uint32 only. Every product that is added to something is an explicit
# fma or exact, so that no compiler has a choice and all GPUs (and the interpreter) get the same
# bits.


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
    x + x^2 / 2 - x^3 p(x), where all but the small last term is summed in two parts; p is the
    minimax polynomial of relative error 2^-30 of the sum.
    """
    n = (2 * k + 1).to(tl.float32)
    bits = n.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # less the bits of sqrt(1/2)
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

    Integers take off the nearest quarter turn; what is left is t eighths of a turn, -1 < t < 1
    exact, sin = t (pi/4 + s S(s)) and cos = 1 + s (-pi^2/32 + s C(s)), s = t^2.
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
    """The normals of BLOCK consecutive counters from `block` on: (4 * BLOCK,) fp32, in the order of
    the elements."""
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


# Launcher

LARGEST = 2**33
"""Elements of an image whose blocks a kernel can count in 31 bits."""


def _philox_normal(
    seeds: Tensor, shape: Sequence[int], step: Tensor | None, number: int, stream: int
) -> Tensor:
    """The step is the tensor `step`, or `number` where that is None."""
    z = torch.empty(len(seeds), *shape, dtype=torch.float32, device=seeds.device)
    elements = math.prod(shape)
    chosen = config("philox_normal", z, "any")
    grid = (len(seeds) * cdiv(elements, 4 * chosen["BLOCK"]),)
    launch(
        _philox_normal_kernel, grid, seeds.contiguous(), step, number, stream, z, elements, **chosen
    )
    return z


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for block in (64, 128, 256, 512):
        for warps in (1, 2, 4, 8):
            if 1 <= block // (32 * warps) <= 4:
                yield {"BLOCK": block, "num_warps": warps}


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    """SDXL's latents at 1024 x 1024, four images; the step given as a tensor."""
    seeds = torch.empty(4, dtype=torch.int64, device=device)
    step = torch.empty((), dtype=torch.int64, device=device)
    return [
        lambda: _philox_normal(seeds, (4, 128, 128), None, 0, INITIAL_NOISE),
        lambda: _philox_normal(seeds, (4, 128, 128), step, 0, SAMPLER_NOISE),
    ]


define_tunable(
    Tunable(
        name="philox_normal",
        shape_classes=("any",),
        candidates=_candidates,
        calls=_calls,
        dtypes=(torch.float32,),
    )
)

# Registration

philox_normal_triton = torch.library.custom_op(
    "fastdiff::philox_normal_triton", _philox_normal, mutates_args=()
)


@philox_normal_triton.register_fake
def _philox_normal_fake(
    seeds: Tensor, shape: Sequence[int], step: Tensor | None, number: int, stream: int
) -> Tensor:
    return torch.empty(seeds.shape[0], *shape, dtype=torch.float32, device=seeds.device)


def _run(seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor, stream: int) -> Tensor:
    tensor, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    result: Tensor = philox_normal_triton(seeds, shape, tensor, number, int(stream))
    return result


def _objection(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor, stream: int
) -> str | None:
    if math.prod(shape) > LARGEST:
        return f"an image may have 2^33 elements, got {math.prod(shape)}"
    if isinstance(step, Tensor) and step.device != seeds.device:
        return f"step must be on the device of the seeds, {seeds.device}, got {step.device}"
    return None


_op = define_op("philox_normal", philox_normal_reference)
register(_op, _run, _objection)


# CPU


def _native(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor = 0, stream: int = INITIAL_NOISE
) -> Tensor:
    out = extension.room(len(seeds), *shape)
    if out.numel():
        seeds = seeds.contiguous()
        sizes = len(seeds), out.numel() // len(seeds)
        words = int(step) & MASK32, int(stream)
        extension.native.philox_normal(seeds.data_ptr(), out.data_ptr(), *sizes, *words)
    return out


@torch.library.custom_op("fastdiff::philox_normal_cpu", mutates_args=(), device_types="cpu")
def philox_normal_cpu(seeds: Tensor, shape: list[int], step: Tensor, stream: int) -> Tensor:
    return _native(seeds, tuple(shape), step=step, stream=stream)


@philox_normal_cpu.register_fake
def _(seeds: Tensor, shape: list[int], step: Tensor, stream: int) -> Tensor:
    return torch.empty((len(seeds), *shape), dtype=torch.float32, device=seeds.device)


def _registered(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor = 0, stream: int = INITIAL_NOISE
) -> Tensor:
    step = torch.as_tensor(step, dtype=torch.int64)
    result: Tensor = philox_normal_cpu(seeds, list(shape), step, int(stream))
    return result


extension.register(_op, _native, _registered, dtypes=(torch.int64,))


# The CUDA kernel, which is in _philox_cuda.py

_philox_cuda.philox_normal_cuda.register_fake(_philox_normal_fake)
_cuda.register(
    _op,
    _philox_cuda.plain_normal,
    _philox_cuda.registered_normal,
    _philox_cuda.objection,
    dtypes=(torch.int64,),
)


def philox_normal(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor = 0, stream: int = INITIAL_NOISE
) -> Tensor:
    """Standard normal noise, one image per seed: a function of (seed, stream, step, element).

    Args:
        seeds: (N,) int64, on the device where the noise is wanted. Seeds are meant to be >= 0; a
            negative one is taken by its 64 bits, as 2^64 + seed, and so is a stream of its own.
        shape: the shape of one image, without N.
        step: which noise of the image, such as the row of the sampler table; an int or a () int64
            tensor on the device of the seeds (no host synchronisation), 0 <= step < 2^32.
        stream: what it is for, a `Stream` (0 <= stream < 2^32).

    Returns:
        (N, *shape) fp32, contiguous.

    Raises:
        ValueError: seeds that are not a vector of int64, a negative size, a step or stream out of
            range.

    Box & Muller 1958 on the words of Salmon et al. 2011.
    """
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(
            f"philox_normal: seeds must be (N,) int64, got {seeds.dtype} of shape "
            f"{tuple(seeds.shape)}; use torch.tensor([seed])"
        )
    if any(size < 0 for size in shape):
        raise ValueError(f"philox_normal: sizes must be >= 0, got shape {tuple(shape)}")
    for name, value in (("step", step), ("stream", stream)):
        if not isinstance(value, Tensor) and not 0 <= value <= MASK32:
            raise ValueError(f"philox_normal: {name} must be in [0, 2^32), got {value}")
    result: Tensor = _op.run((seeds, tuple(shape)), {"step": step, "stream": stream})
    return result
