"""Which backend measured fastest on a GPU: what `auto` tries first there.

`python -m benchmarks.device` times Triton beside CUDA on the shapes of real networks and writes the
winner of each (op, dtype, shape class) into the GPU's file of configs, ``tuned/<gpu>.json``, as
"backends". Where nothing was measured, the order of `dispatch.ORDER` holds; but for attention on a
GPU of `WARP_GROUPS` it is Triton's turn first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels._group_norm import memory_format_of
from fastdiff.kernels._triton import Gpu, gpu_of, on_new_configs, tuned_files
from fastdiff.kernels.dispatch import OPS, first_tensor

LAUNCH_BYTES, CACHE_BYTES = 2**20, 2**25
"""Below the first a launch takes longer than the work; from the second on x and y leave the L2."""
CONTEXT = 336
"""Keys that a text has at most (the longest class of the Triton kernel for contexts)."""
WARP_GROUPS = ("sm_90", "sm_100", "sm_103")
"""Where Triton's attention has the matrix instructions of a warp group and the CUDA kernel those of
a warp (mma.sync), with which FlashAttention-2 reached a third of an H100's rate (Shah et al.
2024)."""
ANY = "any"
"""The class of all shapes together, for graphs: they may not depend on the batch."""


def regime(x: Tensor, *_: Any, **__: Any) -> str:
    """The class of an op that memory bounds: what decides its time."""
    size = x.numel() * x.element_size()
    return "launch" if size < LAUNCH_BYTES else "cache" if size < CACHE_BYTES else "memory"


def of_norm(x: Tensor, *_: Any, **__: Any) -> str:
    """The class of a GroupNorm: its layout and `regime`."""
    layout = "nchw" if memory_format_of(x) is torch.contiguous_format else "nhwc"
    return f"{layout}/{regime(x)}"


def of_attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> str:
    """The class of an attention: to a text or to an image, and its head dimension."""
    return f"{'context' if k.shape[1] <= CONTEXT else 'self'}/{q.shape[3]}"


CLASSES: dict[str, Callable[..., str]] = {
    "group_norm_silu": of_norm,
    "add_group_norm_silu": of_norm,
    "attention": of_attention,
    "geglu": regime,
    "layer_norm": regime,
    "add_layer_norm": regime,
    "sampler_step": regime,
}
"""Op -> the shape class of its arguments."""


def prefer_measured() -> None:
    """Let `auto` try first what measured fastest, for the ops of `CLASSES`."""
    for op in CLASSES:
        OPS[op].first, OPS[op].first_devices = partial(_first, op), ("cuda",)


def _first(op: str, *args: Any, **kwargs: Any) -> str | None:
    x = first_tensor(args, kwargs)
    if not x.is_cuda:
        return None
    graph = torch.compiler.is_compiling()
    return fastest(op, x.device, x.dtype, ANY if graph else CLASSES[op](*args, **kwargs))


@torch.compiler.assume_constant_result
def fastest(op: str, device: torch.device, dtype: torch.dtype, shape_class: str) -> str | None:
    """The backend that comes first on a device's GPU; None where `dispatch.ORDER` decides."""
    return _fastest(op, gpu_of(device), f"{str(dtype).removeprefix('torch.')}/{shape_class}")


@cache
def _fastest(op: str, gpu: Gpu, key: str) -> str | None:
    found = (tuned.backends.get(op, {}).get(key) for tuned in tuned_files(gpu))
    measured = next((name for name in found if name is not None), None)
    if measured is None and op == "attention" and gpu.architecture in WARP_GROUPS:
        return "triton"
    return measured


on_new_configs(_fastest.cache_clear)
