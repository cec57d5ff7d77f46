"""Counter-based noise: Philox4x32-10 words, and normal numbers computed from them.

    round    (c0, c1) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2))
             (c2, c3) <- (hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
             (k0, k1) <- (k0 + W0, k1 + W1)         ten times; Salmon et al. 2011, section 3.3
    normals  u = ((w >> 9) + 1/2) / 2^23,  r = sqrt(-2 ln u_0)
             (z_0, z_1) = (r cos 2 pi u_1, r sin 2 pi u_1)                   Box & Muller 1958

The counter is (block_lo, block_hi, step, stream) and the key is the image's seed; element e of the
image is number e % 4 of block e // 4. So every number depends only on (seed, stream, step,
element): an image gets the same noise alone or in any batch, and a longer image begins with the
numbers of a shorter one with the same seed.

Words are bit-identical everywhere. The reference computes the normals in fp64 and rounds once to
fp32, so two libraries whose fp64 log, sin and cos differ in the last place give the same fp32
(except near a tie, about 1 in 10^8). u keeps 23 bits and is exact in fp32, so that fp32
implementations start from the same numbers; |z| <= 5.77. The GPU kernels do not use fp64: they
compute r, cos and sin as sums of two fp32 numbers, accurate to 2^-25, and round their product once.
A test enumerates all 2^23 values of u and confirms at most 1.4 ulp from the reference.

Bytes that must move: N * elements * 4 out, nothing in; inside `sampler_step`, none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import Op, Work
from . import cpu, cuda, triton
from .streams import INITIAL_NOISE, SAMPLER_NOISE

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: (..., 4) int64 holding uint32 words, word 0 first.
        key: (..., 2) int64 holding uint32 words; its leading dimensions broadcast with those of
            the counter.

    Returns:
        (..., 4) int64 holding uint32 words.

    Raises:
        ValueError: wrong dtype or size of the last dimension.

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
    """Philox on separate word tensors, which broadcast with each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 wraps around, so the 64 bits of the product are right; the mask removes the sign
        # extension of the shift
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (product1 >> 32) & MASK32 ^ c1 ^ k0, product1 & MASK32
        c2, c3 = (product0 >> 32) & MASK32 ^ c3 ^ k1, product0 & MASK32
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def philox_normal_reference(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    step: int | Tensor = 0,
    stream: int = INITIAL_NOISE,
) -> Tensor:
    """The op in plain PyTorch; see `philox_normal`."""
    elements = math.prod(shape)
    block = torch.arange((elements + 3) // 4, device=seeds.device)  # (blocks,)
    flat = normals_of_blocks(seeds, block, step, stream)[:, :elements]
    return flat.reshape(len(seeds), *shape).contiguous()


def normals_of_blocks(seeds: Tensor, block: Tensor, step: int | Tensor, stream: int) -> Tensor:
    """The normals of some blocks, (N, 4 * blocks) fp32.

    seeds: (N,) int64; block: (blocks,) int64; step: a number, () or (N,).
    """
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


def _arguments(
    seeds: Tensor, shape: Sequence[int], step: int | Tensor, stream: int
) -> tuple[Any, ...]:
    """The op has separate arguments for a step given as a tensor and as a number."""
    tensor, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    return seeds, tuple(shape), tensor, number, int(stream)


def _reference(
    seeds: Tensor, shape: Sequence[int], step: Tensor | None, number: int, stream: int
) -> Tensor:
    step_ = number if step is None else step
    return philox_normal_reference(seeds, shape, step=step_, stream=stream)


def _fake(seeds: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, None]:
    return torch.empty(seeds.shape[0], *shape, dtype=torch.float32, device=seeds.device), None


def _work(seeds: Tensor, shape: Sequence[int], *_: Any) -> Work:
    return Work(bytes=4 * len(seeds) * math.prod(shape))


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    seeds = torch.arange(2, device=draw(1).device)
    return {"seeds": seeds, "shape": (4, 8, 8), "stream": SAMPLER_NOISE}


def _check(seeds: Tensor, shape: Sequence[int], step: int | Tensor, stream: int) -> None:
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


_op = Op(
    name="philox_normal",
    schema="(Tensor seeds, SymInt[] shape, Tensor? step, SymInt number, int stream) -> Tensor",
    check=_check,
    reference=_reference,
    arguments=_arguments,
    fake=_fake,
    work=_work,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
    differentiable=False,
)


def int64_bits(seed: int) -> int:
    """Convert a signed or unsigned 64-bit seed to the int64 that seed tensors hold.

    >>> int64_bits(2**64 - 1), int64_bits(-1), int64_bits(5)
    (-1, -1, 5)

    Raises:
        ValueError: not an integer from -2^63 to 2^64 - 1.
    """
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise ValueError(f"a seed must be a whole number of at most 64 bits, got {seed!r:.40}")
    return seed - 2**64 if seed >= 2**63 else seed


@_op.exposes
def philox_normal(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor = 0, stream: int = INITIAL_NOISE
) -> Tensor:
    """Standard normal noise, one image per seed: a function of (seed, stream, step, element).

    Args:
        seeds: (N,) int64, on the device where the noise is generated. Seeds are normally >= 0; a
            negative seed is read as the unsigned 64-bit number 2^64 + seed.
        shape: the shape of one image, without N.
        step: which noise of the image, such as the row of the sampler table; an int or a () int64
            tensor on the device of the seeds (no host synchronization), 0 <= step < 2^32.
        stream: the purpose of the noise, a `Stream` (0 <= stream < 2^32).

    Returns:
        (N, *shape) fp32, contiguous.

    Raises:
        ValueError: seeds that are not a vector of int64, a negative size, or a step or stream out
            of range.

    Box & Muller 1958 on the words of Salmon et al. 2011.
    """
    result: Tensor = _op(seeds, tuple(shape), step, int(stream))
    return result
