"""What `fastdiff tune` searches and `benchmarks.resources` compiles, with one file per op, which is
found automatically. The kernels themselves only look configs up (fastdiff.kernels.tuning)."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from fastdiff.bench.tunables.tunable import TUNABLES, Tunable

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["TUNABLES", "Tunable"]
