"""The contact sheet, the summary, and previews while images are being made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.cli.console import about_files, print_pairs
from fastdiff.generate.job import first_step
from fastdiff.generate.run import Result
from fastdiff.generate.session import Session
from fastdiff.images import add_png, contact_sheet, save_png

if TYPE_CHECKING:
    from fastdiff.cli.pictures import Wanted
    from fastdiff.diffusion.sampling import OnStep

SHEET_ROWS, SHEET_COLUMNS = 64, 32
"""Largest size of a contact sheet; there may be more images."""
PREVIEW_SIDE = 256
SHORT_NAME = 10
"""Letters of a name that fit above an image of a sheet."""
OF_A_COLUMN = ("seed", "label", "at")
"""Fields of a job that differ between the images of a sheet."""


def summary(
    path: Path, wanted: Wanted, last: Result, kept: int, more: Sequence[tuple[str, str]]
) -> None:
    """Print the path of the last file, and a summary of the images and the model.

    kept: number of images that already existed. more: lines to add at the end.
    """
    model = last.session.model
    print(path)
    print_pairs(
        [
            ("images", f"{wanted.total:,} of {_made_by(last)}"),
            *([("kept", f"{kept:,} that already exist with the same recipe")] if kept else []),
            ("weights", model.weights_hash[:12]),
            *about_files(model),
            *more,
        ]
    )


def preview_writer(model: Model, path: Path) -> OnStep:
    """A callback that writes a cheap preview of each step's estimate to a file."""

    def write(step: Any) -> None:
        small = Session.of(model).latents.preview(step.denoised).float().cpu()
        caption = f"{step.done}/{step.total}"
        save_png(path, contact_sheet(small, cell=PREVIEW_SIDE, caption=caption))

    return write


def save_sheet(
    path: Path, images: Sequence[Tensor], wanted: Wanted, recipe: dict[str, Any], last: Result
) -> Path:
    """Write a sheet with a row per name and a column per seed or frame.

    If there is only one name or one column, the images are wrapped over several rows, with long
    names below them. recipe: that of the last image. Returns the path of the sheet: `path`, or a
    numbered name in its folder.
    """
    names, columns = wanted.names[:SHEET_ROWS], wanted.columns[:SHEET_COLUMNS]
    labels = [f"{wanted.column} {at}" for at in columns]
    grid = len(columns) > 1 and len(names) > 1
    if not grid:
        labels = [name[:80] for name in names] if len(columns) == 1 else labels
    below = not grid and len(columns) == 1 and any(len(name) > SHORT_NAME for name in names)
    small = images[0].shape[-1] <= 64
    wide = min(len(labels), 4 if not small else 8 if below else SHEET_COLUMNS)
    named = grid or (wide == len(labels) and not below)
    sheet = contact_sheet(
        torch.stack(list(images)),
        row_labels=names if grid else None,
        columns=None if grid else wide,
        column_labels=labels if named else None,
        captions=names if below else None,
        title=last.session.facts.name if grid or len(columns) == 1 else wanted.names[0][:80],
        caption=f"{_made_by(last)}, weights {last.session.model.weights_hash[:12]}",
    )
    job = {key: value for key, value in recipe["job"].items() if key not in OF_A_COLUMN}
    rest = {key: value for key, value in recipe.items() if key != "job"}
    kept = {"names": list(wanted.names[:SHEET_ROWS]), f"{wanted.column}s": list(columns)}
    return add_png(path, sheet, {**rest, "of": job, **kept})


def _made_by(result: Result) -> str:
    """The size, the sampler, the number of steps taken, and the guidance, as text."""
    settings, session = result.job.settings, result.session
    asked, strength = settings.total, getattr(result.job, "strength", 1.0)
    done = asked - first_step(asked, strength)
    of = "" if done == asked else f"{done} of "
    guidance = f", guidance {settings.weight:g}" if settings.weight != 1 else ""
    height, width = result.image.shape[1:]
    return f"{width} x {height}, {session.sampling(settings)[0]}, {of}{asked} steps{guidance}"
