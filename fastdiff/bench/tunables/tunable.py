"""The unit that `fastdiff tune` searches: kernels of an op that share a launch config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.kernels.triton import DTYPES
from fastdiff.kernels.tuning import Config


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """The kernels of one op that share a config, and how to search for it.

    `fastdiff tune` times ``calls(...)[0]`` with every candidate; `benchmarks.resources` compiles
    everything that the calls launch, for every architecture.
    """

    name: str
    """Key in the JSON files: the op's name, possibly with a suffix such as "_backward"."""
    shape_classes: tuple[str, ...]
    candidates: Callable[[str, torch.dtype], Iterable[Config]]
    """(shape class, dtype) -> the configs to try."""
    calls: Callable[[str, torch.dtype, str], list[Callable[[], Any]]]
    """(shape class, dtype, device) -> calls on tensors of that class: first the one to time, then
    other variants of the kernels (layouts, options)."""
    all_calls: Callable[[str, torch.dtype, str], list[Callable[[], Any]]] | None = None
    """Calls of every size and option that uses the config of the class, if they are too many to
    compile each time; None: `calls` has them all."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    takes: Callable[[str, torch.dtype], bool] = lambda shape_class, dtype: True
    """(shape class, one of `dtypes`) -> whether there is such a config."""

    def pairs(self) -> list[tuple[str, torch.dtype]]:
        """The pairs (shape class, dtype) that have a config."""
        return [(c, d) for c in self.shape_classes for d in self.dtypes if self.takes(c, d)]


TUNABLES: dict[str, Tunable] = {}


def define_tunable(tunable: Tunable) -> None:
    """Register a tunable in TUNABLES."""
    assert tunable.name not in TUNABLES, f"tunable {tunable.name} is defined twice"
    TUNABLES[tunable.name] = tunable
