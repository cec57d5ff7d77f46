"""What Dynamo is told about our functions, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_graphs(function: Function) -> Function:
    """Have Dynamo run a function that it cannot trace, once, and keep the answer in the graph.

    `torch.compiler.assume_constant_result` does the same, but imports Dynamo to set its mark: 1.7 s
    of CPU time (Xeon with AMX, 2026-11-29) in every process that imports the ops.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
