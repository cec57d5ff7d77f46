"""Write a model in any layout that supports it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import layouts
from fastdiff.checkpoint.weights import Progress


def save(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    layout: str = "bundle",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model atomically; an existing folder is replaced.

    Args:
        layout: "bundle", "diffusers", or another layout that can be written.
        dtype: dtype to store floating-point weights in; None keeps each tensor's own.
        progress: called as progress(tensor, bytes) after each tensor.

    Raises:
        ValueError: there is no such layout, or it cannot store a part of the model.
        OSError: the folder cannot be written.
    """
    writers = {known.name: known.save for known in layouts() if known.save is not None}
    write = writers.get(layout)
    if write is None:
        raise ValueError(f"layout must be one of {', '.join(writers)}, got {layout!r:.60}")
    write(model, Path(folder), dtype, progress)
