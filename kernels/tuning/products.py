"""Whether a Triton matrix product that also does the elementwise passes around it is faster than
cuBLAS's product and the passes by themselves: counted, until a GPU has been measured.

A kernel takes as long as the slowest of its products, its bytes and its launch, at the rates that
fastdiff.bench.predict has for an H200. The table of what follows for Stable Diffusion 1.5 and XL
is in docs/decisions/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

SHARE = 0.85
"""Speed of Triton's product relative to cuBLAS's. Assumed, not measured."""
FLOPS, BYTES, LAUNCH = 790e12, 4.3e12, 2e-6
"""bf16 FLOPs and bytes per second, and seconds per launch, of an H200."""


def product_seconds(flops: int, moved: int, share: float = 1.0) -> float:
    """Time of one product that reads and writes `moved` bytes."""
    return max(flops / (share * FLOPS), moved / BYTES, LAUNCH)


def fused_seconds(flops: int, moved: int) -> float:
    """Time of a Triton product with the passes in it, which moves `moved` bytes."""
    return product_seconds(flops, moved, SHARE)


def apart_seconds(flops: int, moved: int, passes: Sequence[int]) -> float:
    """Time of cuBLAS's product, and of elementwise kernels that move `passes` bytes each."""
    return product_seconds(flops, moved) + sum(max(p / BYTES, LAUNCH) for p in passes)


def triton_where(faster: Callable[..., bool], x: Tensor, *args: Any) -> str | None:
    """`Op.unmeasured` of a product: "triton" where ``faster(x, *args)``, in half precision. Graphs
    follow `choose.ORDER`: what is traced must not depend on the batch size."""
    if is_compiling() or x.element_size() != 2:
        return None
    return "triton" if faster(x, *args) else None


def tiles(rows: int, columns: int) -> str:
    """The shape class of a product's launch config: "large" if tiles of 128 x 64 numbers of the
    result keep a GPU busy, else "small"."""
    return "large" if rows * columns >= 128 * 64 * 128 else "small"
