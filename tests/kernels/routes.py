"""Routes through the GPU kernels: every op on every GPU backend, and each of its kernels where a
plan or a threshold chooses among several.

`EVERY` and `DIFFERENTIABLE` are for ``parametrize(("backend", "route"), ...)``, under which
conftest.py emulates CUDA if there is no GPU. `benchmarks.device` runs `CUDA` under
compute-sanitizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fastdiff import kernels
from fastdiff.kernels.attention import cuda as attention_cuda
from fastdiff.kernels.group_norm_silu import cuda as group_norm_cuda
from fastdiff.kernels.layer_norm import cuda as layer_norm_cuda
from tests import cuda_host
from tests.kernels import cases

WITHOUT_GRADIENTS = [name for name, op in kernels.OPS.items() if not op.differentiable]


@dataclass(frozen=True, kw_only=True)
class Route:
    """An op on a backend, with its arguments and the settings that select the kernel."""

    op: str
    backend: str
    name: str = ""
    case: str = ""
    """Name of one of the op's cases; if empty, its ordinary arguments are used."""
    set: dict[Any, dict[str, Any]] = field(default_factory=dict, hash=False)
    """Module of `kernels/` -> attributes to set in it."""
    kernel: str = ""
    """A substring of at least one kernel name in the forward pass."""
    cluster: int = 1
    """Blocks per cluster in the forward pass."""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op, self.name)))

    @property
    def dtype(self) -> torch.dtype:
        """fp32, or fp16 if the backend does not support fp32."""
        served = kernels.OPS[self.op].backends[self.backend].dtypes
        return torch.float32 if not served or torch.float32 in served else torch.float16

    def inputs(self, device: str, seed: int = 0) -> cases.Inputs:
        if not self.case:
            return cases.ordinary_inputs(self.op, device, self.dtype, seed)
        rows = {case.name: case for case in getattr(cases, self.op.upper())}
        return rows[self.case].inputs(self.dtype, device, seed)

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Inside the block, calls with these arguments take this route or raise."""
        with ExitStack() as stack:
            for module, values in self.set.items():
                stack.enter_context(patch.multiple(module, **values))
            stack.enter_context(kernels.backend(self.backend))
            yield


def _norm(op: str, case: str, layout: str, **more: Any) -> Iterator[Route]:
    """A group in one block, in a cluster, and in parts; NHWC by columns, NCHW by rows."""
    columns = "columns" if layout == "NHWC" else "rows"
    for name, values, kernel, cluster in (
        ("one block", {"CLUSTER": 1}, f"norm_on_chip_{columns}", 1),
        ("cluster", {"CLUSTER": 4}, f"norm_on_chip_{columns}", 4),
        ("parts", {"ON_CHIP": 0}, f"norm_moments_{columns}", 1),
    ):
        yield Route(
            op=op, backend="cuda", name=f"{layout} {name}", case=case,
            set={group_norm_cuda: values}, kernel=kernel, cluster=cluster, **more,
        )  # fmt: skip


WIDE = {layer_norm_cuda: {"WIDEST": 0, "PROGRAMS": 3}}
CUDA = [
    *_norm("group_norm_silu", "adm-film-channels-last", "NHWC"),
    *_norm("group_norm_silu", "adm-film", "NCHW"),
    *_norm("add_group_norm_silu", "residual", "NHWC"),
    *_norm("add_group_norm_silu", "block", "NCHW"),
    *(
        Route(op=op, backend="cuda", name=name, case=case, set=values, kernel=kernel)
        for op in ("layer_norm", "add_layer_norm")
        for name, case, values, kernel in (
            ("a warp a row", "odd", {}, "layer_norm_rows"),
            ("wide rows", "sd-320", WIDE, "layer_norm_wide"),
        )
    ),
    Route(op="attention", backend="cuda", name="keys on chip", case="sd-40-text",
          kernel="attention_context"),
    Route(op="attention", backend="cuda", name="streamed", case="sd-40-text",
          set={attention_cuda: {"ON_CHIP": 0}}, kernel="attention_streaming"),
    Route(op="attention", backend="cuda", name="of sm_90a", case="sd-40-text",
          set={attention_cuda: {"ON_CHIP": 0, "HOPPER_FROM": 1}}, kernel="attention_hopper"),
    Route(op="attention", backend="cuda", name="hidden keys", case="extra-padding",
          kernel="attention_streaming"),
    Route(op="attention", backend="cuda", name="added mask", case="extra-mask",
          kernel="attention_streaming"),
]  # fmt: skip


def cuda_kernels() -> set[str]:
    """The names of all kernels defined in csrc/cuda."""
    text = "".join(path.read_text() for path in (cuda_host.ROOT / "csrc" / "cuda").glob("*.cu*"))
    text = re.sub(r"//.*", "", text)
    bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?"
    return set(re.findall(rf"__global__\s+void\s+{bounds}(\w+)\s*\(", text))


def _parameters() -> Iterator[Any]:
    for backend in cases.KERNELS:
        name = str(backend.values[0])
        # the others are PyTorch's products
        own = [op for op in kernels.OPS if kernels.OPS[op].backends[name].planned]
        ordinary = [Route(op=op, backend=name) for op in own]
        for route in [*ordinary, *(CUDA if name == "cuda" else [])]:
            marks = list(backend.marks)
            if route.cluster > 1:
                marks.append(cases.needs_clusters)
            yield pytest.param(name, route, id=f"{name}-{route}", marks=marks)


EVERY = list(_parameters())
DIFFERENTIABLE = [p for p in EVERY if p.values[1].op not in WITHOUT_GRADIENTS]
