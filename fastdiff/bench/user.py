"""A user's kernel: found by its name, or marked in its file.

# mine.py
from fastdiff.bench.user import benchmark

@benchmark(op="geglu")
def my_geglu(x):
    ...

fastdiff bench --kernel mine:my_geglu
my_geglu.bench()                            # the same in Python: a fastdiff.bench.result.Run
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fastdiff.bench.contest import UserKernel, checkable
from fastdiff.bench.subjects import SUBJECTS

F = TypeVar("F", bound=Callable[..., Any])
MARK = "fastdiff_op"


def checkable_ops() -> list[str]:
    """The ops that a user's kernel can be put beside."""
    return [op for op in SUBJECTS if checkable(op)]


def benchmark(*, op: str) -> Callable[[F], F]:
    """Mark a function as a kernel for an op, and give it a method ``bench``.

    Args:
        op: one of `checkable_ops`. The function is called like ``eager`` of
            fastdiff/bench/ops/<op>.py.

    The function itself is returned. ``function.bench(quick=True, **options)`` takes the options of
    `fastdiff.bench.plan.Plan` and returns a `fastdiff.bench.result.Run`.

    Raises:
        ValueError: there is no such op.
    """
    _known(op)

    def mark(function: F) -> F:
        def bench(**options: Any) -> Any:
            from fastdiff.bench.plan import Plan, measure

            name = f"{function.__module__}:{function.__name__}"
            kernel = UserKernel(name=name, op=op, function=function)
            return measure(Plan(ops=(op,), **options), kernel=kernel)

        setattr(function, MARK, op)
        function.bench = bench  # type: ignore[attr-defined]
        return function

    return mark


def user_kernel(name: str, op: str | None) -> UserKernel:
    """Import a kernel.

    Args:
        name: ``module:function``, importable from the current folder, or ``path/file.py:function``.
        op: which op it computes; None: what its decorator says.

    Raises:
        ValueError: the name cannot be split, the module has no such function, or no op is known.
        ImportError: the module does not exist, or fails when it is imported.
    """
    given = name
    place, colon, function_name = name.rpartition(":")
    if not colon or not place or not function_name:
        raise ValueError(f"--kernel must be module:function or file.py:function, got {name!r}")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    name = f"{Path(place).stem if place.endswith('.py') else place}:{function_name}"
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"unknown function {function_name!r} in {place}; expected one of {', '.join(names)}"
        )
    op = op or getattr(function, MARK, None)
    if op is None:
        raise ValueError(
            f"--op says which op {name} computes: {', '.join(checkable_ops())}; or mark it with "
            "@fastdiff.bench.user.benchmark(op=...)"
        )
    return UserKernel(name=name, op=_known(op), function=function, place=given)


def _known(op: str) -> str:
    names = checkable_ops()
    if op not in names:
        raise ValueError(f"unknown op {op!r} for a kernel; expected one of {', '.join(names)}")
    return op


def _from_name(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"{path} does not exist")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module
