"""Annotations of our functions for Dynamo, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_graphs(function: Function) -> Function:
    """Let Dynamo run a function that it cannot trace, once, and treat the result as a constant.

    `torch.compiler.assume_constant_result` does the same, but imports Dynamo just to set this
    attribute: 1.7 s of CPU time (Xeon with AMX, 2026-11-29) in every process that imports the ops.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
