"""What `accelerate` did to each module, and how to undo it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One module: swapped by `by`, or left for `reason`; exactly one of the two is set."""

    name: str
    """Dotted name inside the object that was accelerated."""
    type: str
    op: str
    """What it computes: "group norm", "residual block", "attention", ..."""
    by: str | None = None
    reason: str | None = None
    pairs: int = 0
    """How many GroupNorms followed by SiLU it does as one op each (0 where it was left)."""
    new: bool = True
    """False where an earlier call had swapped it."""


@dataclass(frozen=True, kw_only=True)
class Swap:
    """A module's change of class, with the attributes that the new class wants."""

    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]
    attributes: dict[str, Any] = field(default_factory=dict)

    def do(self) -> Callable[[], None]:
        """Change the class; returns what undoes it and does not keep the module alive."""
        change_class(self.module, self.after)
        self.module.__dict__.update(self.attributes)
        there = weakref.ref(self.module)
        before, after, names = self.before, self.after, tuple(self.attributes)

        def undo() -> None:
            module = there()
            if type(module) is after:  # a module whose class somebody else has changed is left
                change_class(module, before)
                for name in names:
                    module.__dict__.pop(name, None)

        return undo


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Give a module another class, and its hooks the forward of that class.

    Hugging Face's accelerate keeps the bound forward that it wrapped in `_old_forward`, and leaves
    it as the object's `forward` when its hooks are removed.
    """
    bound = [
        key
        for key in ("_old_forward", "forward")
        if getattr(module.__dict__.get(key), "__func__", None) is type(module).forward
    ]
    module.__class__ = to
    for key in bound:
        module.__dict__[key] = to.forward.__get__(module)


class Report:
    """What became of each module that fastdiff has an op for."""

    def __init__(
        self, entries: list[Entry], undo: list[Callable[[], None]], *, scheduler: Any = None
    ) -> None:
        self.entries = entries
        self._undo = undo
        self._scheduler = (lambda: None) if scheduler is None else weakref.ref(scheduler)

    @property
    def swapped(self) -> list[Entry]:
        """Modules that compute with our ops now, those of an earlier call too."""
        return [entry for entry in self.entries if entry.by is not None]

    @property
    def left(self) -> list[Entry]:
        """Modules that stay as they are, each with its reason."""
        return [entry for entry in self.entries if entry.by is None]

    @property
    def changed(self) -> int:
        """Modules that this call has swapped; 0 where everything had been done before."""
        return sum(entry.new for entry in self.swapped)

    def count(self, op: str) -> tuple[int, int]:
        """(swapped, left) of an op."""
        return tuple(sum(e.op == op for e in es) for es in (self.swapped, self.left))  # type: ignore[return-value]

    @property
    def pairs(self) -> int:
        """GroupNorms followed by SiLU that are one op now."""
        return sum(entry.pairs for entry in self.swapped)

    @property
    def scheduler_steps_left(self) -> dict[str, int]:
        """Steps of the fused scheduler that diffusers' own code has run so far: reason -> how
        many."""
        fused = getattr(self._scheduler(), "fused", None)
        return {} if fused is None else dict(fused.left)

    @property
    def data(self) -> dict[str, Any]:
        """The report as plain data: counts per op and one row per module."""
        ops = dict.fromkeys(entry.op for entry in self.entries)
        return {
            "changed": self.changed,
            "group_norm_silu_pairs": self.pairs,
            "counts": {
                op: dict(zip(("swapped", "left"), self.count(op), strict=True)) for op in ops
            },
            "modules": [asdict(entry) for entry in self.entries],
            "scheduler_steps_left": self.scheduler_steps_left,
        }

    @property
    def json(self) -> str:
        """`data` as JSON."""
        return json.dumps(self.data, indent=1)

    def __str__(self) -> str:
        if not self.entries:
            return "nothing here that fastdiff has an op for"
        if self.changed == 0 and self.swapped:
            return f"nothing to do: accelerated already ({len(self.swapped)} modules)"
        return f"{self.changed} modules swapped, {len(self.left)} left"

    def print(self) -> None:
        """A table on the standard output: a row per op, class and outcome; where it does not fit
        the width, a paragraph for each.

        Below it, the steps of a fused scheduler that diffusers' own code has run so far.
        """
        from rich.console import Console
        from rich.padding import Padding
        from rich.table import Table

        headings = ("op", "class", "modules", "becomes", "first of them")
        groups: dict[tuple[str, str, str], list[str]] = {}
        for e in self.entries:
            groups.setdefault((e.op, e.type, e.by or f"left: {e.reason}"), []).append(e.name)
        table = Table(*headings, title=str(self))
        for (op, kind, outcome), names in groups.items():
            table.add_row(op, kind, str(len(names)), outcome, names[0])
        console = Console(highlight=False, markup=False)
        unbounded = console.options.update(max_width=10_000)
        if console.measure(table, options=unbounded).maximum <= console.width:
            console.print(table)
        else:
            console.print(str(self))
            for (op, kind, outcome), names in groups.items():
                console.print(f"{op}: {len(names)} {kind}", overflow="fold")
                for line in (outcome, f"first: {names[0]}"):
                    console.print(Padding(line, (0, 0, 0, 2)), overflow="fold")
        for reason, steps in self.scheduler_steps_left.items():
            console.print(f"{steps} scheduler steps ran as diffusers wrote them: {reason}")

    def restore(self) -> None:
        """Undo what this call did: classes, attributes, memory formats, the scheduler.

        Modules, parameters and hooks are the same objects throughout. A second call does nothing.
        Where sequential offload keeps the weights, remove its hooks first: their memory format
        stays. A report does not keep a model alive: what has been deleted since is skipped.
        """
        while self._undo:
            self._undo.pop()()


class AccelerateError(ValueError):
    """`strict=True` and something would have been left; `report` says what, nothing was changed."""

    def __init__(self, report: Report) -> None:
        lines = [f"  {e.name} ({e.type}): {e.reason}" for e in report.left]
        super().__init__(
            f"{len(lines)} modules would be left as they are:\n"
            + "\n".join(lines)
            + "\nNothing was changed; use strict=False to swap the others"
        )
        self.report = report
