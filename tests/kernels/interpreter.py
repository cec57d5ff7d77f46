"""Patch Triton's interpreter to round as GPUs do, to count the bytes that kernels move, and to
raise on accesses outside a kernel's tensors.

tests/kernels/cases.py imports this module. Without triton, or on a GPU, it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiff.kernels import triton as _triton


@dataclass
class Traffic:
    """Bytes of the unmasked lanes, summed over all programs and kernels."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


_counting: list[Traffic] = []


@contextmanager
def counting_traffic() -> Iterator[Traffic]:
    """Count the bytes every kernel inside the block loads and stores. Needs the interpreter."""
    assert _triton.INTERPRETED, "only the interpreter can count traffic"
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


_bounds: list[tuple[int, int]] = []
"""(first address, end address) of each tensor that was passed to the running kernel."""


def span(x: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor's memory, and the address after its last element."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()


def check_bounds(pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
    """Raise unless all unmasked pointers, each to `size` bytes, lie inside one tensor.

    A GPU would silently read memory of another tensor.
    """
    used = pointers[mask.astype(bool)]
    if used.size:
        first, end = int(used.min()), int(used.max()) + size
        assert any(first >= low and end <= high for low, high in _bounds), (
            f"a kernel accesses bytes {first:#x} to {end:#x}, outside its tensors: "
            + ", ".join(f"{low:#x} to {high:#x}" for low, high in _bounds)
        )


def round_as_gpus_do(data: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, rounded to nearest with ties to even (PTX: cvt.rn.bf16.f32)."""
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def sum_as_lanes_do(data: np.ndarray, axis: int | None, keepdims: bool) -> np.ndarray:
    """Sum by repeated halving, as the lanes and warps of a GPU do; sizes are powers of two.

    numpy adds the rows of a tile one after another, which loses digits that a GPU keeps.
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
    from triton.language import bfloat16, float32, int1
    from triton.runtime.interpreter import (
        GridExecutor,
        InterpretedFunction,
        InterpreterBuilder,
        ReduceOps,
        TensorHandle,
    )

    patched: set[int] = set()
    execute, call = GridExecutor.__call__, InterpretedFunction.__call__
    cast = InterpreterBuilder.cast_impl
    fma = InterpreterBuilder.create_fma
    dot = InterpreterBuilder.create_dot
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        """Triton 3.7's version truncates instead of rounding, and is slow: it loops over bits."""
        have, want = source.dtype.scalar, target.scalar
        if have == float32 and want == bfloat16:
            return TensorHandle(round_as_gpus_do(source.data), want)
        if have == bfloat16 and want == float32:
            wide = source.data.astype(np.uint32) << 16
            return TensorHandle(wide.view(np.float32), want)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        """Triton 3.7's version multiplies the bits of bf16 as integers. Also, the order of
        summation does not depend on the tile size on a GPU but does in BLAS, so fp32 products are
        summed in fp64 and rounded once.
        """
        if a.dtype.scalar == float32:
            product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
            return TensorHandle(product + total.data, float32)
        a, b = (cast_impl(self, x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b))
        return dot(self, a, b, total, *rest)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        for traffic in _counting:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            traffic.loaded += int(np.count_nonzero(mask.data)) * size
        check_bounds(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for traffic in _counting:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            traffic.stored += int(np.count_nonzero(mask.data)) * size
        check_bounds(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        """Rounds once: the product of two fp32 numbers is exact in fp64, and the 53 bits of the sum
        are enough in all but one of about 2^29 cases."""
        if x.dtype.scalar != float32:
            return fma(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), float32)

    def comparing(compare: Any) -> Any:
        """Triton 3.7 types the result of comparing floats as float, which does not support `&`."""

        def compared(self: Any, left: Any, right: Any) -> Any:
            return TensorHandle(compare(self, left, right).data.astype(bool), int1)

        return compared

    def quiet(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        given = (*arguments, *options.values())
        _bounds[:] = [span(x) for x in given if isinstance(x, torch.Tensor)]
        with np.errstate(all="ignore"):  # a GPU does not report inf and nan either
            execute(self, *arguments, **options)

    def sum_(self: Any, source: Any) -> Any:
        data = sum_as_lanes_do(source.handle.data, self.axis, self.keep_dims)
        return self.to_tensor(data, source.dtype)

    def call_device_function(self: Any, *arguments: Any, **options: Any) -> Any:
        """Triton's version patches the language on every call, which takes 5 ms; here each module
        is patched once per launch."""
        module = id(self.fn.__globals__)
        if module not in patched:
            patched.add(module)
            return call(self, *arguments, **options)
        return self.rewrite()(*arguments, **options)

    for name in [name for name in dir(InterpreterBuilder) if name.startswith("create_fcmp")]:
        setattr(InterpreterBuilder, name, comparing(getattr(InterpreterBuilder, name)))
    GridExecutor.__call__ = quiet
    InterpretedFunction.__call__ = call_device_function
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store
    ReduceOps.sum = sum_


if _triton.INTERPRETED:
    _patch()
