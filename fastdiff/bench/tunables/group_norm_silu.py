"""Tunables of the Triton kernels of `group_norm_silu` and `add_group_norm_silu`: candidates, and
calls to time and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from fastdiff.bench.tunables.tunable import Tunable, define_tunable
from fastdiff.kernels.group_norm_silu.triton_backward import backward
from fastdiff.kernels.group_norm_silu.triton_forward import forward
from fastdiff.kernels.tuning import Config


def _small_candidates(most: int) -> Iterator[Config]:
    """most: the boundary between the regimes, which a search within one of them cannot move."""
    for segment in (32, 64, 128):
        for per_thread in (8, 16, 32, 64):
            limits = {"SEGMENT": segment, "LEAST": 1024, "MOST": most}
            yield limits | {"PER_THREAD": per_thread}


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    """Of the forward pass."""
    if shape_class.endswith("small"):
        for candidate in _small_candidates(32768):
            yield candidate | {"FILL": 128}
        return
    for columns in (64, 128):
        for tile, warps in ((1024, 4), (2048, 4), (2048, 8)):
            for unroll in (4, 8):
                for programs in (320, 640):
                    cut = {"COLUMNS": columns, "TILE": tile, "UNROLL": unroll, "FILL": 128}
                    rest = {"MERGE": 2048, "L2_MIB": 32, "num_warps": warps}
                    yield cut | rest | {"PROGRAMS": programs}


def _backward_candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    if shape_class.endswith("small"):
        yield from _small_candidates(8192)
        return
    for columns in (64, 128):
        for tile in (1024, 2048, 4096):
            for warps in (4, 8):
                for programs in (256, 512):
                    cut = {"COLUMNS": columns, "TILE": tile, "APPLY_TILE": 2 * tile}
                    rest = {"CHUNK": 128, "FINALIZE": 1024, "L2_MIB": 32, "num_warps": warps}
                    yield cut | rest | {"PROGRAMS": programs}


def _arguments(
    shape_class: str,
    dtype: torch.dtype,
    device: str,
    size: Sequence[int],
    *,
    film: bool = False,
    adds: bool = False,
) -> dict[str, Any]:
    """Arguments of `forward` by name."""
    nhwc = shape_class.startswith("nhwc")
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    draw = lambda *shape: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    n, c = size[:2]
    x = draw(*size).contiguous(memory_format=memory_format)
    return {
        "x": x,
        "num_groups": 32,
        "weight": draw(c),
        "bias": draw(c),
        "channel_add": draw(n, c) if adds else None,
        "residual": x if adds else None,
        "scale_shift": draw(n, 2 * c) if film else None,
        "eps": 1e-5,
        "activation": "silu",
    }


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    """SD 1.5's sizes at 64 x 64 latents, and ADM's with FiLM."""
    given = partial(_arguments, shape_class, dtype, device)
    if shape_class.endswith("large"):
        made = [given((2, 320, 64, 64)), given((2, 640, 64, 64), film=True, adds=True)]
    else:
        made = [
            given((2, 1280, 16, 16)),
            given((2, 512, 32, 32)),
            given((2, 128, 32, 32), film=True),
            given((2, 320, 16, 16), adds=True),
        ]
    return [partial(forward, **arguments) for arguments in made]


def _backward_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    def call(size: Sequence[int], **options: bool) -> Callable[[], Any]:
        given = _arguments(shape_class, dtype, device, size, **options)
        x = given["x"]
        return partial(
            backward,
            dy=x,
            dtotal=given["residual"],
            total=x,
            residual=None,
            statistics=torch.empty(size[0], 32, 3, dtype=torch.float32, device=device),
            needs=[True] * 5,
            **{name: given[name] for name in ("num_groups", "weight", "bias")},
            **{name: given[name] for name in ("channel_add", "scale_shift", "eps", "activation")},
        )

    if shape_class.endswith("large"):
        return [call((2, 320, 64, 64)), call((2, 640, 64, 64), film=True, adds=True)]
    return [call((2, 2560, 8, 8)), call((2, 320, 8, 8), film=True, adds=True)]


for _name, _tried, _made in (
    ("group_norm_silu", _candidates, _calls),
    ("group_norm_silu_backward", _backward_candidates, _backward_calls),
):
    define_tunable(
        Tunable(
            name=_name,
            shape_classes=("nhwc/small", "nhwc/large", "nchw/small", "nchw/large"),
            candidates=_tried,
            calls=_made,
        )
    )
