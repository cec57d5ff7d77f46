"""The Triton kernels of `sampler_step`, and their launcher.

The maths and the bytes are in __init__.py, the columns of the table in table.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox_normal.triton import normals
from ..triton import cdiv, jit, launch, merged, next_power_of_2, tl, triton_backend, with_tile
from ..tuning import config
from ..views import all_contiguous
from .layout import by_memory, strides_of, why_not


@jit
def _place(
    e: tl.tensor, space: tl.tensor, c_stride: tl.tensor, s_stride: tl.tensor, DENSE: tl.constexpr
) -> tl.tensor:
    """The offset of element e = c * space + s of an image."""
    if DENSE:
        return e.to(tl.int64)
    return (e // space).to(tl.int64) * c_stride + (e % space).to(tl.int64) * s_stride


@jit
def _places(
    image: tl.tensor,
    rows: tl.tensor,
    cond: tl.tensor,
    uncond: tl.tensor,
    table_rows: tl.tensor,
    images: tl.tensor,
) -> tl.tensor:
    """A sample's row, its two indices into the prediction (uncond -1: not guided), whether all are
    in range, and whether it is idle. cond, uncond: pointers or None."""
    index = tl.load(rows + image)
    own, other = image, tl.full([], -1, tl.int64)
    if cond is not None:
        own = tl.load(cond + image)
    if uncond is not None:
        other = tl.load(uncond + image)
    valid = (index >= 0) & (index < table_rows) & (own >= 0) & (own < images)
    valid = valid & (other >= -1) & (other < images)
    return index, own, other, valid, index == -1


@jit
def _sampler_step_kernel(  # noqa: PLR0915 - one pass: its parts share all they load
    x: tl.tensor,
    prediction: tl.tensor,
    history: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    seeds: tl.tensor,
    cond: tl.tensor,
    uncond: tl.tensor,
    denoised: tl.tensor,
    finite: tl.tensor,
    moments: tl.tensor,
    sums: tl.tensor,
    table_rows: tl.tensor,
    images: tl.tensor,
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
    d_n: tl.tensor,
    d_c: tl.tensor,
    d_s: tl.tensor,
    parts: tl.tensor,
    LEARNED: tl.constexpr,
    X_DENSE: tl.constexpr,
    F_DENSE: tl.constexpr,
    H_DENSE: tl.constexpr,
    D_DENSE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update one image's elements for BLOCK Philox counters, 4 each; notation as in __init__.py.

    moments: None, or the (n, parts, 5) of `_moments_kernel`. sums: None, or (n, tiles), for each
    tile's sum of noise^2 + 2 log |factor|. A row out of range reads as NaN. An idle sample is
    neither read nor written.
    """
    tiles = (elements - 1) // (4 * BLOCK) + 1  # tl.cdiv would pass 2^31 below it
    image = (tl.program_id(0) // tiles).to(tl.int64)
    block = (tl.program_id(0) % tiles) * BLOCK
    e = block * 4 + tl.arange(0, 4 * BLOCK)
    index, own, other, valid, idle = _places(image, rows, cond, uncond, table_rows, images)
    row = table + index * 20
    if moments is None:  # then the row of a guided sample must not rescale
        valid = valid & ((other < 0) | (tl.load(row + 16, valid, other=0.0) == 0))
    written = (e < elements) & (idle == 0)
    inside = written & valid
    x += image * x_n + _place(e, space, x_c, x_s, X_DENSE)
    f_place = _place(e, space, f_c, f_s, F_DENSE)
    history += image * h_n + _place(e, space, h_c, h_s, H_DENSE)
    value = tl.load(x, inside, other=0.0)
    f = tl.load(prediction + own * f_n + f_place, inside, other=0.0).to(tl.float32)
    broken = (tl.abs(f) < float("inf")) == 0  # the comparison is false for NaN

    if uncond is not None:
        guided = other >= 0
        base = tl.load(prediction + other * f_n + f_place, inside & guided, other=0.0)
        base = base.to(tl.float32)
        broken = broken | ((tl.abs(base) < float("inf")) == 0)
        weight = tl.load(row + 11, valid, other=float("nan"))
        f = tl.where(guided, base + weight * (f - base), f)
        if moments is not None:
            phi = tl.load(row + 16, valid & guided, other=0.0)
            if phi != 0:
                ratio = _ratio_of_deviations(moments + image * parts * 5, parts, elements, PARTS)
                f = phi * f * ratio + (1.0 - phi) * f
    d = tl.load(row, valid, other=float("nan")) * value
    d += tl.load(row + 1, valid, other=float("nan")) * f
    bound = tl.load(row + 12, valid, other=float("nan"))
    d = tl.where(d > bound, bound, tl.where(d < -bound, -bound, d))  # keeps NaN

    out = tl.load(row + 2, valid, other=float("nan")) * value
    out += tl.load(row + 3, valid, other=float("nan")) * d
    for slot in tl.static_range(3):
        c = tl.load(row + 4 + slot, valid, other=0.0)
        read = inside & (c != 0)
        out += c * tl.load(history + slot * tl.cast(slot_stride, tl.int64), read, other=0.0)
    s = tl.load(row + 7, valid, other=0.0)
    density = tl.full([], 0.0, tl.float32)
    if s != 0:
        factor = tl.full([4 * BLOCK], 0.0, tl.float32) + s
        if LEARNED:
            learned = prediction + own * f_n + tl.cast(elements // space, tl.int64) * f_c
            v = tl.load(learned + f_place, inside, other=0.0).to(tl.float32)
            broken = broken | ((tl.abs(v) < float("inf")) == 0)
            fraction = (v + 1.0) * 0.5
            low, high = tl.load(row + 13), tl.load(row + 14)
            factor = tl.exp(0.5 * (fraction * high + (1.0 - fraction) * low))
        number = tl.load(row + 15).to(tl.int64)
        noise = normals(block, number, 1, tl.load(seeds + image), BLOCK)
        out += factor * noise
        if sums is not None:
            terms = noise * noise + 2.0 * tl.log(tl.abs(factor))
            density = tl.sum(tl.where(inside, terms, 0.0), 0)
    if sums is not None:
        tl.store(sums + tl.program_id(0), tl.where(valid, density, float("nan")))
    slot = tl.load(row + 10, valid, other=-1.0).to(tl.int32)
    kept = tl.load(row + 8, valid, other=0.0) * value + tl.load(row + 9, valid, other=0.0) * d
    writes = inside & (slot >= 0) & (slot < 3)
    tl.store(history + slot * tl.cast(slot_stride, tl.int64), kept, writes)
    tl.store(x, out, written)
    if denoised is not None:
        denoised += image * d_n + _place(e, space, d_c, d_s, D_DENSE)
        tl.store(denoised, d, written)
    if finite is not None:  # bytes; several programs may store the same 0
        wrong = (tl.max(broken.to(tl.int32), 0) > 0) | (valid == 0)
        tl.store(finite + image, 0, wrong & (idle == 0))


@jit
def _log_prob_kernel(
    sums: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    log_prob: tl.tensor,
    table_rows: tl.tensor,
    elements: tl.tensor,
    tiles: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """-(the sum of an image's tiles + elements log(2 pi)) / 2. Without noise the sum, 0, is left as
    it is; a sample that is out of range has a sum of NaN."""
    image = tl.program_id(0).to(tl.int64)
    index = tl.load(rows + image)
    valid = (index >= 0) & (index < table_rows)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, tiles, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(sums + image * tiles + place, place < tiles, other=0.0).to(tl.float64)
    whole = tl.sum(total, 0)
    s = tl.load(table + index * 20 + 7, valid, other=0.0)
    density = -0.5 * (whole + elements.to(tl.float64) * 1.8378770664093453)
    tl.store(log_prob + image, tl.where(s != 0, density, whole).to(tl.float32), index != -1)


@jit
def _moments_kernel(
    prediction: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    cond: tl.tensor,
    uncond: tl.tensor,
    moments: tl.tensor,
    table_rows: tl.tensor,
    images: tl.tensor,
    elements: tl.tensor,
    inner: tl.tensor,
    f_n: tl.tensor,
    f_outer: tl.tensor,
    f_inner: tl.tensor,
    parts: tl.tensor,
    DENSE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Over every parts-th tile of one image: the count, and the mean and sum of squared differences
    from it, for F and F_cond. Means are relative to the image's first element, so that a constant
    image has squares of exactly 0. A sample that is not rescaled is neither read nor written."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    index, own, other, valid, _ = _places(image, rows, cond, uncond, table_rows, images)
    row = table + index * 20
    wanted = valid & (other >= 0)
    wanted = wanted & (tl.load(row + 16, wanted, other=0.0) != 0)
    weight = tl.load(row + 11, wanted, other=0.0)
    pair = (own - other) * f_n
    prediction += other * f_n
    first = tl.load(prediction, wanted, other=0.0).to(tl.float32)
    first_cond = tl.load(prediction + pair, wanted, other=0.0).to(tl.float32)
    first += weight * (first_cond - first)
    count, mean, squares, mean_cond, squares_cond = 0.0, 0.0, 0.0, 0.0, 0.0
    tiles = tl.where(wanted, (elements - 1) // TILE + 1, 0)
    for tile in range(part, tiles, parts):
        e = tile * TILE + tl.arange(0, TILE)
        inside = e < elements
        source = prediction + _place(e, inner, f_outer, f_inner, DENSE)
        base = tl.load(source, inside, other=0.0).to(tl.float32)
        f_cond = tl.load(source + pair, inside, other=0.0).to(tl.float32)
        f = base + weight * (f_cond - base)
        more = tl.minimum(elements - tile * TILE, TILE).to(tl.float32)
        mean, squares = with_tile(f - first, inside, more, count, mean, squares)
        mean_cond, squares_cond = with_tile(
            f_cond - first_cond, inside, more, count, mean_cond, squares_cond
        )
        count += more
    moments += tl.program_id(0).to(tl.int64) * 5
    tl.store(moments, count, wanted)
    tl.store(moments + 1, mean, wanted)
    tl.store(moments + 2, squares, wanted)
    tl.store(moments + 3, mean_cond, wanted)
    tl.store(moments + 4, squares_cond, wanted)


@jit
def _ratio_of_deviations(
    moments: tl.tensor, parts: tl.tensor, elements: tl.tensor, PARTS: tl.constexpr
) -> tl.tensor:
    """std(F_cond) / std(F) of an image, from the moments of its parts; 1 if F is constant."""
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
"""Most programs that share the moments of one image."""
SUMS = 128
"""Tiles whose sums are added up at a time."""


def forward(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    denoised: Tensor | None = None,
    finite: Tensor | None = None,
    log_prob: Tensor | None = None,
    rescale: bool = True,
    keep: bool = False,
) -> tuple[None, None]:
    """Update x, history, denoised, finite and log_prob in place."""
    if x.numel() == 0:
        return None, None
    n, c = x.shape[:2]
    elements, space = x[0].numel(), x[0, 0].numel()
    prediction, (f_c, f_s), f_dense = strides_of(prediction, 1)
    written, x_strides, x_dense = strides_of(x, 1)
    slots, h_strides, h_dense = strides_of(history, 2)
    estimate, d_strides, d_dense = (None, (0, 0), True)
    if denoised is not None:
        estimate, d_strides, d_dense = strides_of(denoised, 1)
    indices = table.contiguous(), rows.contiguous()
    pair = all_contiguous(cond, uncond)
    flags = None if finite is None else finite.contiguous().view(torch.uint8)
    chosen = config("sampler_step", x, "any")
    tile = 4 * chosen["BLOCK"]
    tiles = cdiv(elements, tile)
    moments, parts = None, 0
    if uncond is not None and rescale:
        parts = min(PARTS, cdiv(elements, 2 * tile))
        moments = x.new_empty(n, parts, 5)
        launch(
            _moments_kernel,
            (n * parts,),
            *(prediction, *indices, *pair, moments, len(table), len(prediction), elements),
            *by_memory(prediction, c, space, f_c, f_s),
            parts,
            DENSE=f_dense or (f_s == c and f_c == 1),
            TILE=2 * tile,
            num_warps=chosen["num_warps"],
        )
    sums = None if log_prob is None else x.new_empty(n, tiles)
    launch(
        _sampler_step_kernel,
        (n * tiles,),
        *(
            written,
            prediction,
            slots,
            *indices,
            seeds.contiguous(),
            *pair,
            estimate,
            flags,
            moments,
            sums,
        ),
        *(len(table), len(prediction), elements, space, written.stride(0), *x_strides),
        *(prediction.stride(0), f_c, f_s, *slots.stride()[:2], *h_strides),
        *(0 if estimate is None else estimate.stride(0), *d_strides, parts),
        LEARNED=prediction.shape[1] == 2 * c,
        X_DENSE=x_dense,
        F_DENSE=f_dense,
        H_DENSE=h_dense,
        D_DENSE=d_dense,
        PARTS=next_power_of_2(parts),
        **chosen,
    )
    if log_prob is not None:
        found = log_prob.contiguous()
        launch(
            _log_prob_kernel,
            (n,),
            *(sums, *indices, found, len(table), elements, tiles),
            BLOCK=SUMS,
            num_warps=4,
        )
        if found is not log_prob:
            log_prob.copy_(found)
    if written is not x:
        x.copy_(written)
    if slots is not history:
        history.copy_(slots)
    if denoised is not None and estimate is not None and estimate is not denoised:
        denoised.copy_(estimate)
    if finite is not None and flags is not None and not finite.is_contiguous():
        finite.copy_(flags)
    return None, None


BACKEND = triton_backend(forward=forward, why_not=why_not, one_device=True, settings=lambda: PARTS)
