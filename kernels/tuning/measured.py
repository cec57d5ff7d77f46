"""The backend that measured fastest on a GPU, which `auto` tries first there.

`python -m benchmarks.device` times Triton against CUDA on the shapes of real networks and writes
the winner of each (op, dtype, shape class) into the GPU's file of configs, ``tuned/<gpu>.json``, as
"backends". Without measurements the order is `choose.ORDER`, unless the op has a preference of its
own (`Op.unmeasured`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..tracing import constant_in_graphs
from ..views import memory_format_of
from .configs import Gpu, gpu_of, on_new_configs, tuned_files

LAUNCH_BYTES, CACHE_BYTES = 2**20, 2**25
"""Below the first a launch takes longer than the work; from the second on x and y exceed the L2."""
ANY = "any"
"""The class of all shapes together, for graphs, which must not depend on the batch size."""


def regime(x: Tensor, *_: Any) -> str:
    """The shape class of a memory-bound op: which limit decides its time."""
    size = x.numel() * x.element_size()
    return "launch" if size < LAUNCH_BYTES else "cache" if size < CACHE_BYTES else "memory"


def layout_and_regime(x: Tensor, *_: Any) -> str:
    """The shape class of a memory-bound op whose time also depends on the memory format."""
    layout = "nchw" if memory_format_of(x) is torch.contiguous_format else "nhwc"
    return f"{layout}/{regime(x)}"


@constant_in_graphs
def fastest(op: str, device: torch.device, dtype: torch.dtype, shape_class: str) -> str | None:
    """The backend that measured fastest on a device's GPU; None without measurements."""
    return _fastest(op, gpu_of(device), f"{str(dtype).removeprefix('torch.')}/{shape_class}")


@cache
def _fastest(op: str, gpu: Gpu, key: str) -> str | None:
    found = (tuned.backends.get(op, {}).get(key) for tuned in tuned_files(gpu))
    return next((name for name in found if name is not None), None)


on_new_configs(_fastest.cache_clear)
