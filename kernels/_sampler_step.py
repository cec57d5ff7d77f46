"""The Triton kernels of `sampler_step`, their launcher, and what is tuned.

The maths, the bytes and the columns of the table are in sampler_step.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .philox_normal.triton import normals
from .triton import cdiv, jit, launch, merged, next_power_of_2, tl, with_tile
from .tuning import Config, Tunable, config, define_tunable


@jit
def _place(
    e: tl.tensor, space: tl.tensor, c_stride: tl.tensor, s_stride: tl.tensor, DENSE: tl.constexpr
) -> tl.tensor:
    """Where element e of an image lies, e = c * space + s."""
    if DENSE:
        return e.to(tl.int64)
    return (e // space).to(tl.int64) * c_stride + (e % space).to(tl.int64) * s_stride


@jit
def _sampler_step_kernel(
    x: tl.tensor,
    prediction: tl.tensor,
    history: tl.tensor,
    table: tl.tensor,
    step: tl.tensor,
    seeds: tl.tensor,
    moments: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    elements: tl.tensor,
    space: tl.tensor,
    x_n: tl.tensor,
    x_c: tl.tensor,
    x_s: tl.tensor,
    f_n: tl.tensor,
    f_c: tl.tensor,
    f_s: tl.tensor,
    slot_stride: tl.tensor,
    h_n: tl.tensor,
    h_c: tl.tensor,
    h_s: tl.tensor,
    rescale: tl.tensor,
    parts: tl.tensor,
    GUIDED: tl.constexpr,
    LEARNED: tl.constexpr,
    X_DENSE: tl.constexpr,
    F_DENSE: tl.constexpr,
    H_DENSE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK Philox counters, 4 elements each, of one image; letters as in the module docstring.

    moments: None, or (n, parts, 5) of `_moments_kernel`. A row outside of the table is read as NaN.
    """
    tiles = (elements - 1) // (4 * BLOCK) + 1  # tl.cdiv would pass 2^31 below it
    image = (tl.program_id(0) // tiles).to(tl.int64)
    block = (tl.program_id(0) % tiles) * BLOCK
    e = block * 4 + tl.arange(0, 4 * BLOCK)
    inside = e < elements
    x += image * x_n + _place(e, space, x_c, x_s, X_DENSE)
    f_place = _place(e, space, f_c, f_s, F_DENSE)
    uncond = prediction + image * f_n + f_place
    cond = uncond
    if GUIDED:
        cond += tl.cast(n, tl.int64) * f_n
    history += image * h_n + _place(e, space, h_c, h_s, H_DENSE)
    value = tl.load(x, inside, other=0.0)
    f = tl.load(cond, inside, other=0.0).to(tl.float32)
    index = tl.load(step)
    there = (index >= 0) & (index < rows)
    row = table + index * 16

    if GUIDED:
        base = tl.load(uncond, inside, other=0.0).to(tl.float32)
        f = base + tl.load(row + 11, there, other=float("nan")) * (f - base)
        if moments is not None:
            ratio = _ratio_of_deviations(moments + image * parts * 5, parts, elements, PARTS)
            f = rescale * f * ratio + (1.0 - rescale) * f
    d = tl.load(row, there, other=float("nan")) * value
    d += tl.load(row + 1, there, other=float("nan")) * f
    bound = tl.load(row + 12, there, other=float("nan"))
    d = tl.where(d > bound, bound, tl.where(d < -bound, -bound, d))  # keeps NaN

    out = tl.load(row + 2, there, other=float("nan")) * value
    out += tl.load(row + 3, there, other=float("nan")) * d
    for slot in tl.static_range(3):
        c = tl.load(row + 4 + slot, there, other=0.0)
        read = inside & (c != 0)
        out += c * tl.load(history + slot * tl.cast(slot_stride, tl.int64), read, other=0.0)
    s = tl.load(row + 7, there, other=0.0)
    if s != 0:
        factor = tl.full([4 * BLOCK], 0.0, tl.float32) + s
        if LEARNED:
            channels = tl.cast(elements // space, tl.int64)
            v = tl.load(cond + channels * f_c, inside, other=0.0).to(tl.float32)
            fraction = (v + 1.0) * 0.5
            low, high = tl.load(row + 13), tl.load(row + 14)
            factor = tl.exp(0.5 * (fraction * high + (1.0 - fraction) * low))
        out += factor * normals(block, index, 1, tl.load(seeds + image), BLOCK)
    slot = tl.load(row + 10, there, other=-1.0).to(tl.int32)
    kept = tl.load(row + 8, there, other=0.0) * value + tl.load(row + 9, there, other=0.0) * d
    writes = inside & (slot >= 0) & (slot < 3)
    tl.store(history + slot * tl.cast(slot_stride, tl.int64), kept, writes)
    tl.store(x, out, inside)


@jit
def _moments_kernel(
    prediction: tl.tensor,
    table: tl.tensor,
    step: tl.tensor,
    moments: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    elements: tl.tensor,
    inner: tl.tensor,
    f_n: tl.tensor,
    f_outer: tl.tensor,
    f_inner: tl.tensor,
    parts: tl.tensor,
    DENSE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Of every parts-th tile of one image: count, mean and sum of squared differences from it, of
    F_cond and of F. Means are above the image's first number, so that a constant has none."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    index = tl.load(step)
    there = (index >= 0) & (index < rows)
    weight = tl.load(table + index * 16 + 11, there, other=0.0)
    prediction += image * f_n
    pair = tl.cast(n, tl.int64) * f_n
    first, first_cond = (
        tl.load(prediction).to(tl.float32),
        tl.load(prediction + pair).to(tl.float32),
    )
    first += weight * (first_cond - first)
    count, mean, squares, mean_cond, squares_cond = 0.0, 0.0, 0.0, 0.0, 0.0
    for tile in range(part, (elements - 1) // TILE + 1, parts):
        e = tile * TILE + tl.arange(0, TILE)
        inside = e < elements
        source = prediction + _place(e, inner, f_outer, f_inner, DENSE)
        base = tl.load(source, inside, other=0.0).to(tl.float32)
        cond = tl.load(source + pair, inside, other=0.0).to(tl.float32)
        f = base + weight * (cond - base)
        more = tl.minimum(elements - tile * TILE, TILE).to(tl.float32)
        mean, squares = with_tile(f - first, inside, more, count, mean, squares)
        mean_cond, squares_cond = with_tile(
            cond - first_cond, inside, more, count, mean_cond, squares_cond
        )
        count += more
    moments += tl.program_id(0).to(tl.int64) * 5
    tl.store(moments, count)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, squares)
    tl.store(moments + 3, mean_cond)
    tl.store(moments + 4, squares_cond)


@jit
def _ratio_of_deviations(
    moments: tl.tensor, parts: tl.tensor, elements: tl.tensor, PARTS: tl.constexpr
) -> tl.tensor:
    """std(F_cond) / std(F) of an image from its parts; 1 where F is constant."""
    part = tl.arange(0, PARTS)
    source = moments + part * 5
    inside = part < parts
    count = tl.load(source, inside, other=0.0)
    _, f = _merged_part(source + 1, inside, count, elements)
    _, cond = _merged_part(source + 3, inside, count, elements)
    return tl.where(f > 0, tl.sqrt_rn(tl.div_rn(cond, tl.where(f > 0, f, 1.0))), 1.0)


@jit
def _merged_part(
    source: tl.tensor, inside: tl.tensor, count: tl.tensor, elements: tl.tensor
) -> tl.tensor:
    means = tl.load(source, inside, other=0.0)
    squares = tl.load(source + 1, inside, other=0.0)
    return merged(count, means, squares, elements)


# Launcher

PARTS = 64
"""The most programs that share the moments of one image."""
LARGEST = 2**31 - 1
"""Elements of an image, counted in 32 bits (images together may have more)."""


def _folded(x: Tensor, lead: int) -> tuple[int, int] | None:
    """Strides of dimension `lead` (channels) and of all that follow as one; None where those have
    no single stride."""
    space, unit = 1, None
    for size, stride in zip(x.shape[:lead:-1], x.stride()[:lead:-1], strict=True):
        if size == 1:
            continue
        if unit is None:
            unit = stride
        elif stride != unit * space:
            return None
        space *= size
    return x.stride(lead), 1 if unit is None else unit


def _strides(x: Tensor, lead: int) -> tuple[Tensor, tuple[int, int], bool]:
    """x, or a dense copy where its space does not fold; (channel, space) strides; whether an image
    is in order, without a gap."""
    folded = _folded(x, lead)
    if folded is None:
        x = x.contiguous()
        folded = _folded(x, lead)
        assert folded is not None
    space = math.prod(x.shape[lead + 1 :])
    dense = (space == 1 or folded[1] == 1) and (x.shape[lead] == 1 or folded[0] == space)
    return x, folded, dense


def run_step(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    guidance_rescale: float,
) -> None:
    if x.numel() == 0:
        return
    n, c = x.shape[:2]
    elements, space = x[0].numel(), x[0, 0].numel()
    guided, learned = prediction.shape[0] == 2 * n, prediction.shape[1] == 2 * c
    prediction, (f_c, f_s), f_dense = _strides(prediction, 1)
    written, x_strides, x_dense = _strides(x, 1)
    slots, h_strides, h_dense = _strides(history, 2)
    table, seeds = table.contiguous(), seeds.contiguous()
    chosen = config("sampler_step", x, "any")
    tile = 4 * chosen["BLOCK"]
    tiles = cdiv(elements, tile)
    moments, parts = None, 0
    if guided and guidance_rescale > 0:
        parts = min(PARTS, cdiv(elements, 2 * tile))
        moments = x.new_empty(n, parts, 5)
        launch(
            _moments_kernel,
            (n * parts,),
            *(prediction, table, step, moments, n, len(table), elements),
            *_by_memory(prediction, c, space, f_c, f_s),
            parts,
            DENSE=f_dense or (f_s == c and f_c == 1),
            TILE=2 * tile,
            num_warps=chosen["num_warps"],
        )
    launch(
        _sampler_step_kernel,
        (n * tiles,),
        *(written, prediction, slots, table, step, seeds, moments),
        *(n, len(table), elements, space, written.stride(0), *x_strides),
        *(prediction.stride(0), f_c, f_s, *slots.stride()[:2], *h_strides),
        guidance_rescale,
        parts,
        GUIDED=guided,
        LEARNED=learned,
        X_DENSE=x_dense,
        F_DENSE=f_dense,
        H_DENSE=h_dense,
        PARTS=next_power_of_2(parts),
        **chosen,
    )
    if written is not x:
        x.copy_(written)
    if slots is not history:
        history.copy_(slots)


def _by_memory(
    prediction: Tensor, c: int, space: int, f_c: int, f_s: int
) -> tuple[int, int, int, int]:
    """How to walk an image along its memory, in any order of its numbers: the size of the inner
    dimension, strides of images, outer and inner dimension."""
    sizes = (c, f_s, f_c) if f_c < f_s else (space, f_c, f_s)
    return sizes[0], prediction.stride(0), sizes[1], sizes[2]


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for block in (64, 128, 256):
        for warps in (2, 4, 8):
            if 1 <= block // (32 * warps) <= 2:
                yield {"BLOCK": block, "num_warps": warps}


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    """SD's latents, which a U-Net in channels_last gives back as they are; x in fp32, NCHW. Then:
    everything dense, learned variance (ADM-256), guidance_rescale."""

    def call(
        shape: tuple[int, ...],
        prediction_dtype: torch.dtype,
        *,
        guided: bool = True,
        learned: bool = False,
        layout: torch.memory_format = torch.contiguous_format,
        rescale: float = 0.0,
    ) -> Callable[[], Any]:
        n, c, *rest = shape
        x = torch.zeros(shape, device=device)
        history, table = torch.zeros(3, *shape, device=device), torch.zeros(20, 16, device=device)
        step = torch.zeros((), dtype=torch.int64, device=device)
        seeds = torch.zeros(n, dtype=torch.int64, device=device)
        prediction = torch.zeros(
            n * (1 + guided), c * (1 + learned), *rest, dtype=prediction_dtype, device=device
        ).contiguous(memory_format=layout)
        return lambda: run_step(x, prediction, history, table, step, seeds, rescale)

    latents, pixels, half = (4, 4, 64, 64), (4, 3, 256, 256), torch.bfloat16
    return [
        call(latents, half, layout=torch.channels_last),
        call(latents, torch.float32, guided=False),
        call(latents, half, rescale=0.7),
        call(pixels, half, learned=True, layout=torch.channels_last),
    ]


define_tunable(
    Tunable(
        name="sampler_step",
        shape_classes=("any",),
        candidates=_candidates,
        calls=_calls,
        dtypes=(torch.float32,),
    )
)
