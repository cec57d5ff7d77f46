"""pytest plugin (``-p tests.kernels.one_row_too_far``) that makes the CPU and CUDA kernels of geglu
process one row more than there is memory for. The tests under sanitizers must then fail; if they
pass, they run nothing or the sanitizers are not active.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fastdiff.kernels import compiled
from fastdiff.kernels import cuda as _cuda


class _Broken(SimpleNamespace):
    """The compiled module with a faulty `geglu`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def geglu(self, dtype: int, x: int, y: int, rows: int, *sizes: int) -> None:
        self.module.geglu(dtype, x, y, rows + 1, *sizes)


def _launch(name: str, x: Any, *arguments: Any) -> None:
    if name == "geglu":
        dtype, source, result, rows, *sizes = arguments
        arguments = (dtype, source, result, rows + 1, *sizes)
    right(name, x, *arguments)


right = _cuda.launch
_cuda.launch = _launch
compiled.native = _Broken(module=compiled.native)
