"""Triton's interpreter, made to round as GPUs do and to count the bytes that kernels move.

Imported by tests/kernels/cases.py; without triton, or on a GPU, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiff.kernels import _triton


@dataclass
class Traffic:
    """Bytes of the lanes whose mask is set, summed over all programs and kernels."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


_counting: list[Traffic] = []


@contextmanager
def counting_traffic() -> Iterator[Traffic]:
    """Count what every kernel inside the block loads and stores. Needs the interpreter."""
    assert _triton.INTERPRETED, "only the interpreter counts"
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def round_as_gpus_do(data: np.ndarray) -> np.ndarray:
    """fp32 as the bits of bf16, to nearest and ties to even (PTX: cvt.rn.bf16.f32)."""
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def sum_as_lanes_do(data: np.ndarray, axis: int | None, keepdims: bool) -> np.ndarray:
    """The sum of powers of two of numbers by halves, as the lanes and warps of a GPU add them up.

    numpy adds the rows of a tile one after the other, which loses digits that a GPU keeps.
    """
    shape = data.shape
    data = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
    while len(data) > 1:
        half = len(data) // 2
        data = data[:half] + data[half:]
    if keepdims:
        return data[0].reshape([1 if axis in (None, i) else n for i, n in enumerate(shape)])
    return data[0]


def _patch() -> None:
    import triton.language as tl
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter
    from triton.runtime.interpreter import (
        GridExecutor,
        InterpretedFunction,
        InterpreterBuilder,
        ReduceOps,
        TensorHandle,
    )

    execute = GridExecutor.__call__
    cast = InterpreterBuilder.cast_impl
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        """Triton 3.7's own drops the low bits, and takes a loop over bits to do so."""
        have, want = source.dtype.scalar, target.scalar
        if have == float32 and want == bfloat16:
            return TensorHandle(round_as_gpus_do(source.data), want)
        if have == bfloat16 and want == float32:
            wide = source.data.astype(np.uint32) << 16
            return TensorHandle(wide.view(np.float32), want)
        return cast(self, source, target)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        for traffic in _counting:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            traffic.loaded += int(np.count_nonzero(mask.data)) * size
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for traffic in _counting:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            traffic.stored += int(np.count_nonzero(mask.data)) * size
        return store(self, pointers, value, mask, *rest)

    patched: set[tuple[bool, ...]] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        """A device function; Triton's own patches the language anew at every call, for 1 ms."""
        seen = self.fn.__globals__.values()
        languages = tuple(any(v is module for v in seen) for module in (tl, tl.core))
        if languages not in patched:
            patched.add(languages)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    def quiet(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        with np.errstate(all="ignore"):  # a GPU goes on with inf and nan
            execute(self, *arguments, **options)

    def sum_(self: Any, source: Any) -> Any:
        data = sum_as_lanes_do(source.handle.data, self.axis, self.keep_dims)
        return self.to_tensor(data, source.dtype)

    InterpretedFunction.__call__ = call
    ReduceOps.sum = sum_
    GridExecutor.__call__ = quiet
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


if _triton.INTERPRETED:
    _patch()
