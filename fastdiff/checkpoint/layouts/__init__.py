"""The layouts of checkpoints: each file or folder of this room is one.

A layout says by marks what it recognises, reads it into a `Model`, and may write a `Model`. It is
the `LAYOUT` of its module; `layouts` finds all of them, in the order of their names, so a new one
is one new file. Files here without a `LAYOUT` help others.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastdiff.checkpoint.build import Progress
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.options import Loading
from fastdiff.checkpoint.weights import Weights

Marks = tuple[str, ...]
"""Keys that a file has together; * stands for any text."""
Source = Path | Weights
"""A folder, or an opened file."""
Save = Callable[[Model, Path, torch.dtype | None, Progress | None], None]
"""save(model, folder, dtype, progress): write all of it or nothing; dtype None keeps each own."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which checkpoints lie on disk."""

    name: str
    files: tuple[Marks, ...] = ()
    """A file with all keys of one of these is of this layout."""
    folder: Callable[[Path], bool] = lambda path: False
    """Whether a folder is of this layout."""
    refused: Mapping[str, Marks] = field(default_factory=dict)
    """What a file is -> its marks, where this layout knows the file but cannot open it alone:
    the name ends the sentence "these are ..."."""
    open: Callable[[Source, Loading], Model]
    save: Save | None = None

    def recognises(self, source: Source) -> bool:
        if isinstance(source, Path):
            return self.folder(source)
        return any(_has(source.places.keys(), marks) for marks in self.files)

    def refusal(self, weights: Weights) -> str | None:
        """What a file is that cannot be opened alone; None where it is not known."""
        keys = weights.places.keys()
        return next((what for what, marks in self.refused.items() if _has(keys, marks)), None)


def _has(keys: Collection[str], marks: Marks) -> bool:
    return all(
        mark in keys if "*" not in mark else any(fnmatch.fnmatchcase(key, mark) for key in keys)
        for mark in marks
    )


def layouts() -> Iterator[Layout]:
    """Every layout; a module is imported when its turn comes."""
    for name in _modules():
        layout = getattr(importlib.import_module(f"{__name__}.{name}"), "LAYOUT", None)
        if layout is not None:
            yield layout


@functools.cache
def _modules() -> tuple[str, ...]:
    return tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))
