"""Tunables of the Triton kernels of `attention`: candidates, and calls to time and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.tunables.tunable import Tunable, define_tunable
from fastdiff.kernels.attention.triton_backward import keys_gradient, queries_gradient, row_sums
from fastdiff.kernels.attention.triton_forward import (
    CONTEXT_DIMS,
    CONTEXTS,
    STREAMS,
    attention_forward,
    streaming,
)
from fastdiff.kernels.attention.triton_tiles import (
    BACKWARD_DIMS,
    FULL_PRECISION_DIMS,
    HEAD_DIMS,
    SINGLE_HEAD,
    class_dim,
    masks_of,
    next_of,
    room_for_sums,
    split_sums,
)
from fastdiff.kernels.tuning import Config

REAL_SHAPES = {
    24: (2, 1024, 8),
    32: (2, 4096, 14),
    40: (2, 4096, 8),
    48: (2, 1024, 8),
    64: (2, 4096, 10),
    72: (2, 256, 16),
    80: (2, 1024, 8),
    96: (2, 1024, 8),
    128: (2, 1024, 8),
    144: (2, 256, 8),
    160: (2, 256, 8),
    192: (2, 256, 4),
    256: (8, 256, 1),
    512: (1, 4096, 1),
}
"""Head dim -> (N, L, H) of a model that has it: SD 1.5, SDXL, LDM, DiT, IDDPM, DDPM, the VAE."""


def packed(d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k, v with the sizes of a model that has this head dim, or the next larger one."""
    n, length, heads = REAL_SHAPES[next(each for each in REAL_SHAPES if each >= d)]
    return torch.empty(n, length, 3, heads, d, dtype=dtype, device=device).unbind(2)


def borrowers(shape_class: str, known: tuple[int, ...]) -> list[int]:
    """The smaller head dims that use the config of a class."""
    last = class_dim(shape_class)
    known = FULL_PRECISION_DIMS if shape_class.startswith("fp32") else known
    return [d for d in range(8, last, 8) if next_of(d, known) == last and last != SINGLE_HEAD]


def with_hungriest(shape_class: str, known: tuple[int, ...]) -> list[int]:
    """The head dim of a class and, if it borrows the config, `HUNGRIEST`.

    That one is split into the most pieces, in a class already close to 255 registers per thread.
    """
    return [class_dim(shape_class), *({HUNGRIEST} & {*borrowers(shape_class, known)})]


def candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    kept: list[Config] = [{}] if dtype != torch.float32 else []
    streamed = [{"CHUNK": 32, "SPLIT": split} for split in (1, 2, 4, 8)]
    d = class_dim(shape_class)
    for m, n in ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128), (32, 64), (32, 32)):
        for warps in (4, 8):
            for stages in (1, 2, 3):
                for option in streamed if d == SINGLE_HEAD or not kept else kept:
                    tile = {"BLOCK_M": m, "BLOCK_N": n, **option}
                    yield {**tile, "num_warps": warps, "num_stages": stages}


def has_dtype(shape_class: str, dtype: torch.dtype) -> bool:
    return shape_class.startswith("fp32") == (dtype == torch.float32)


HALF = (torch.float16, torch.bfloat16)
CUTS = (16, 64, 112, 144, 160, 240, 288)
"""Numbers of keys that split into one to three pieces and one to three groups."""
HUNGRIEST = 152
FULL_PRECISION = tuple(f"fp32/{d}" for d in FULL_PRECISION_DIMS)


def _call(
    d: int,
    dtype: torch.dtype,
    device: str,
    mask_dtype: torch.dtype | None = None,
    *,
    text: int = 0,
) -> Callable[[], Any]:
    q, k, v = packed(d, dtype, device)
    n, length, heads, _ = q.shape
    extra, mask = torch.empty(2, n, text, heads, d, dtype=dtype, device=device), None
    if mask_dtype is not None:
        mask = torch.empty(length + text, dtype=mask_dtype, device=device)
    out, lse = torch.empty(q.shape, dtype=dtype, device=device), room_for_sums(q, mask)
    extra_k, extra_v = extra.unbind() if text else (None, None)
    return lambda: streaming(q, k, v, extra_k, extra_v, mask, out, lse, 0.1)


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    d = class_dim(shape_class)
    calls = [_call(each, dtype, device) for each in with_hungriest(shape_class, HEAD_DIMS)]
    if d in (64, 160):
        calls.append(_call(d, dtype, device, torch.bool))
    if d == 64:
        calls.append(_call(d, dtype, device, text=80))
    return calls


def _all_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    d = class_dim(shape_class)
    return [
        *(_call(each, dtype, device) for each in (d, *borrowers(shape_class, HEAD_DIMS))),
        _call(d, dtype, device, torch.bool),
        _call(d, dtype, device, dtype, text=80),
    ]


def _context_candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    yield STREAMS
    for m in (64, 128):
        for warps in (4, 8):
            for stages in (1, 2):
                yield {"BLOCK_M": m, "num_warps": warps, "num_stages": stages}


def _context_call(
    keys: int, d: int, dtype: torch.dtype, device: str, mask_dtype: torch.dtype | None = None
) -> Callable[[], Any]:
    q = packed(d, dtype, device)[0].contiguous()
    n, _, heads, _ = q.shape
    k, v = torch.empty(2, n, keys, heads, d, dtype=dtype, device=device)
    mask = None
    if mask_dtype is not None:
        mask = torch.empty(n, 1, 1, keys, dtype=mask_dtype, device=device)
    return lambda: attention_forward(q, k, v, None, None, mask, 0.1)


def _context_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    keys, d = (int(number) for number in shape_class.split("/"))
    calls = [_context_call(keys - 3, d, dtype, device)]
    if shape_class == "80/64":
        calls.append(_context_call(keys - 3, d, dtype, device, torch.bool))
    return calls


def _all_context_calls(
    shape_class: str, dtype: torch.dtype, device: str
) -> list[Callable[[], Any]]:
    """Also other head dims, and numbers of keys that split into more pieces or larger groups."""
    keys, d = (int(number) for number in shape_class.split("/"))
    dims = [each for each in range(8, d, 8) if next_of(each, CONTEXT_DIMS) == d]
    cuts = [each for each in CUTS if next_of(each, CONTEXTS) == keys]
    return [
        *_context_calls(shape_class, dtype, device),
        *(_context_call(keys - 3, each, dtype, device) for each in dims),
        *(_context_call(each, d, dtype, device) for each in cuts),
        _context_call(keys - 3, d, dtype, device, torch.bool),
        _context_call(keys - 3, d, dtype, device, dtype),
    ]


define_tunable(
    Tunable(
        name="attention",
        shape_classes=(*(f"self/{d}" for d in HEAD_DIMS), *FULL_PRECISION),
        candidates=candidates,
        calls=_calls,
        all_calls=_all_calls,
        takes=has_dtype,
    )
)
define_tunable(
    Tunable(
        name="attention_context",
        shape_classes=tuple(f"{keys}/{d}" for keys in CONTEXTS for d in CONTEXT_DIMS),
        candidates=_context_candidates,
        calls=_context_calls,
        all_calls=_all_context_calls,
        dtypes=HALF,
    )
)


def _keys_call(
    d: int,
    dtype: torch.dtype,
    device: str,
    mask_dtype: torch.dtype | None = None,
    *,
    text: int = 0,
) -> Callable[[], Any]:
    """A call over the model's own keys, or over those of a text."""
    q, k, v = packed(d, dtype, device)
    if text:
        k, v = torch.empty(2, len(q), text, *q.shape[2:], dtype=dtype, device=device)
    mask = None
    if mask_dtype is not None:
        mask = torch.empty(k.shape[1], dtype=mask_dtype, device=device)
    lse = room_for_sums(q, mask)
    seen, numbers = masks_of(mask, q, k.shape[1], 0)[0], (*split_sums(lse), lse[0])
    dout = torch.empty(q.shape, dtype=dtype, device=device)
    dk, dv = torch.empty(2, *k.shape, dtype=dtype, device=device)
    return lambda: keys_gradient((dout, q, k, v), seen, numbers, (dk, dv), 0.1)


def _sums_call(d: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    out = packed(d, dtype, device)[0].contiguous()
    dout = torch.empty_like(out)
    return lambda: row_sums(dout, out)


def _queries_call(
    d: int,
    dtype: torch.dtype,
    device: str,
    mask_dtype: torch.dtype | None = None,
    *,
    text: int = 0,
) -> Callable[[], Any]:
    q, k, v = packed(d, dtype, device)
    n, length, heads, _ = q.shape
    extra, mask, dscores = torch.empty(2, n, text, heads, d, dtype=dtype, device=device), None, None
    if mask_dtype is not None:
        mask = torch.empty(length + text, dtype=mask_dtype, device=device)
        if mask_dtype != torch.bool:
            dscores = torch.empty(n, heads, length, length + text, device=device)
    lse, masks = room_for_sums(q, mask), masks_of(mask, q, length, text)
    numbers, both = (*split_sums(lse), lse[0]), extra.unbind() if text else (None, None)
    dout, dq = torch.empty(2, *q.shape, dtype=dtype, device=device)
    tensors = (dout, q, k, v, *both)
    return lambda: queries_gradient(tensors, masks, numbers, dq, dscores, 0.1)


def _keys_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    d = class_dim(shape_class)
    dims = with_hungriest(shape_class, BACKWARD_DIMS)
    calls = [_keys_call(each, dtype, device) for each in dims]
    if d in (64, 160):
        calls.append(_keys_call(d, dtype, device, torch.bool, text=77))
    if d == 64:
        calls.append(_sums_call(d, dtype, device))
    return calls


def _all_keys_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    d = class_dim(shape_class)
    dims = (d, *borrowers(shape_class, BACKWARD_DIMS))
    return [
        *(_keys_call(each, dtype, device) for each in dims),
        _keys_call(d, dtype, device, torch.bool, text=77),
        _keys_call(d, dtype, device, torch.bool),
        _keys_call(d, dtype, device, dtype),
        *(_sums_call(each, dtype, device) for each in dims),
    ]


def _queries_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    d = class_dim(shape_class)
    dims = with_hungriest(shape_class, BACKWARD_DIMS)
    calls = [_queries_call(each, dtype, device) for each in dims]
    if d in (64, 160):
        calls.append(_queries_call(d, dtype, device, dtype, text=80))
    return calls


def _all_queries_calls(
    shape_class: str, dtype: torch.dtype, device: str
) -> list[Callable[[], Any]]:
    d = class_dim(shape_class)
    dims = (d, *borrowers(shape_class, BACKWARD_DIMS))
    return [
        *(_queries_call(each, dtype, device) for each in dims),
        _queries_call(d, dtype, device, torch.bool),
        _queries_call(d, dtype, device, dtype, text=80),
    ]


for _name, _some_calls, _all_calls in (
    ("keys", _keys_calls, _all_keys_calls),
    ("queries", _queries_calls, _all_queries_calls),
):
    define_tunable(
        Tunable(
            name=f"attention_backward_{_name}",
            shape_classes=(*(f"self/{d}" for d in BACKWARD_DIMS), *FULL_PRECISION),
            candidates=candidates,
            calls=_some_calls,
            all_calls=_all_calls,
            takes=has_dtype,
        )
    )
