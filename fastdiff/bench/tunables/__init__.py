"""What `fastdiff tune` searches and `benchmarks.resources` compiles: a file per op, found by its
place here. The kernels themselves only look configs up (fastdiff.kernels.tuning)."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from fastdiff.bench.tunables.tunable import TUNABLES, Tunable

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["TUNABLES", "Tunable"]
