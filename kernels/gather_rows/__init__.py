"""The input of a network for one step: rows of the samples and of the embeddings, in one launch.

    inputs[r] = [x[samples[r]] | extra[samples[r]]]     rounded to the dtype of the network
    emb[r]    = embeddings[places[r]]

A sample that is guided has two rows (Ho & Salimans 2022, eq. 6), each with an embedding of its own.
A convolution reads its input in channels_last, so that is how a 4-D result is stored, whatever the
layout of x.

Bytes that must move: every row of x, extra and embeddings in, once each, and both results out. As
PyTorch operators these are four kernels: two gathers, a cast, and the concatenation of extra
channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_shape
from ..op import Op, Work
from . import cpu, cuda, triton
from .layout import inputs_like


def gather_rows_reference(
    x: Tensor, samples: Tensor, embeddings: Tensor, places: Tensor, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; see `gather_rows`."""
    whole = x if extra is None else torch.cat([x, extra], dim=1)
    inputs = inputs_like(x, samples, embeddings, extra)
    inputs.copy_(whole.index_select(0, samples))
    return inputs, embeddings.index_select(0, places)


def _fake(
    x: Tensor, samples: Tensor, embeddings: Tensor, places: Tensor, extra: Tensor | None
) -> tuple[tuple[Tensor, Tensor], None]:
    emb = embeddings.new_empty(places.shape[0], embeddings.shape[1])
    return (inputs_like(x, samples, embeddings, extra), emb), None


def _work(
    x: Tensor,
    samples: Tensor,
    embeddings: Tensor,
    places: Tensor,
    extra: Tensor | None = None,
    *_: Any,
) -> Work:
    row = x[0].numel() + (0 if extra is None else extra[0].numel())
    size = embeddings.element_size()
    moved = row * (x.element_size() + size) + 2 * embeddings.shape[1] * size
    return Work(bytes=len(samples) * moved)


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    x = draw(2, 4, 8, 8)
    index = torch.tensor([1, 1, 0, 0], device=x.device)
    return {
        "x": x, "samples": index, "embeddings": draw(6, 32), "places": index + 2,
        "extra": draw(2, 3, 8, 8),
    }  # fmt: skip


def _check(
    x: Tensor, samples: Tensor, embeddings: Tensor, places: Tensor, extra: Tensor | None
) -> None:
    op = "gather_rows"
    check_floating(op, "embeddings", embeddings)
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: x must be (S, C, *spatial) fp32, got {x.dtype} of shape {tuple(x.shape)}"
        )
    if embeddings.ndim != 2:
        raise ValueError(f"{op}: embeddings must be (K, E), got {tuple(embeddings.shape)}")
    for name, index in (("samples", samples), ("places", places)):
        if index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(
                f"{op}: {name} must be (R,) int64, got {index.dtype} of shape {tuple(index.shape)}"
            )
    check_shape(op, "places", places, tuple(samples.shape))
    if extra is not None:
        if extra.dtype != x.dtype:
            raise ValueError(
                f"{op}: extra must have the dtype of x, {x.dtype}, got {extra.dtype}; "
                "use extra.to(x)"
            )
        check_shape(op, "extra", extra, (x.shape[0], *extra.shape[1:2], *x.shape[2:]))


_op = Op(
    name="gather_rows",
    schema="(Tensor x, Tensor samples, Tensor embeddings, Tensor places, Tensor? extra) -> "
    "(Tensor, Tensor)",
    check=_check,
    reference=gather_rows_reference,
    fake=_fake,
    work=_work,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
    differentiable=False,
)


@_op.exposes
def gather_rows(
    x: Tensor,
    samples: Tensor,
    embeddings: Tensor,
    places: Tensor,
    *,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather a network's input: rows of x with extra channels, and rows of the embeddings.

    Args:
        x: (S, C, *spatial) fp32 (fp64 on the reference backend).
        samples: (R,) int64, indices into x and extra.
        embeddings: (K, E), the dtype of the results.
        places: (R,) int64, indices into embeddings.
        extra: (S, C', *spatial) in the dtype of x, channels appended to those of x.

    Returns:
        (R, C + C', *spatial), channels_last if 4-D, else contiguous, and (R, E), both in the dtype
        of embeddings. Not differentiable.

    Raises:
        ValueError: unsupported shape or dtype.
        IndexError: on a CPU, an index out of range; the Triton and CUDA kernels fill the row with
            NaN.

    Ho & Salimans 2022 (Classifier-Free Diffusion Guidance), eq. 6.
    """
    result: tuple[Tensor, Tensor] = _op(x, samples, embeddings, places, extra)
    return result
