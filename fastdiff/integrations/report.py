"""What `accelerate` did to each module, and how to undo it."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One module: replaced by `by`, or left for `reason`; exactly one of the two is set."""

    name: str
    """Dotted name within the accelerated object."""
    type: str
    op: str
    """What the module computes: "group norm", "residual block", "attention", ..."""
    by: str | None = None
    reason: str | None = None
    pairs: int = 0
    """Number of GroupNorm + SiLU pairs in it that now run as one op each (0 if it was left)."""
    new: bool = True
    """False if an earlier call had already swapped it."""


@dataclass(frozen=True, kw_only=True)
class Swap:
    """A change of a module's class, with the attributes that the new class needs."""

    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]
    attributes: dict[str, Any] = field(default_factory=dict)
    entry: Entry | None = None
    """Its line in the report; None if another module's line covers it."""

    def do(self) -> Callable[[], None]:
        """Change the class. Returns a function that undoes this, holding only a weak reference."""
        change_class(self.module, self.after)
        self.module.__dict__.update(self.attributes)
        there = weakref.ref(self.module)
        before, after, names = self.before, self.after, tuple(self.attributes)

        def undo() -> None:
            module = there()
            if type(module) is after:  # leave modules whose class was changed again since
                change_class(module, before)
                for name in names:
                    module.__dict__.pop(name, None)

        return undo


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Change the class of a module, and rebind the forward that its hooks keep.

    Hugging Face's accelerate stores the bound forward that it wraps in `_old_forward`, and leaves
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
    """What `accelerate` did with each module that fastdiff has an op for."""

    def __init__(
        self,
        entries: list[Entry],
        undo: list[Callable[[], None]],
        *,
        scheduler: Any = None,
        checks: dict[int, Any] | None = None,
        graphs: Sequence[Any] = (),
        networks: Sequence[Any] = (),
    ) -> None:
        self._entries = entries
        self._checks = checks or {}  # id of an entry -> its Verification
        self._undo = undo
        self._graphs = [weakref.ref(calls) for calls in graphs]
        self._networks = [weakref.ref(calls) for calls in networks]
        self._scheduler = (lambda: None) if scheduler is None else weakref.ref(scheduler)

    @property
    def entries(self) -> list[Entry]:
        """One entry per module; those that `verify` has restored are left, with the reason."""
        found = []
        for entry in self._entries:
            miss = getattr(self._checks.get(id(entry)), "miss", None)
            left = None if miss is None else replace(entry, by=None, reason=f"restored: {miss}")
            found.append(left or entry)
        return found

    @property
    def verified(self) -> dict[str, int]:
        """With `verify`: name of a module -> input signatures for which it matched its original."""
        checked = ((e.name, self._checks.get(id(e))) for e in self._entries)
        return {name: check.compared for name, check in checked if check and check.compared}

    @property
    def unverified(self) -> dict[str, str]:
        """With `verify`: name of a swapped module that was not compared yet -> why."""
        checked = ((e.name, self._checks.get(id(e))) for e in self._entries)
        return {name: check.unverified for name, check in checked if check and check.unverified}

    @property
    def swapped(self) -> list[Entry]:
        """Modules that now use our ops, including those swapped by an earlier call."""
        return [entry for entry in self.entries if entry.by is not None]

    @property
    def left(self) -> list[Entry]:
        """Modules that were left unchanged, each with its reason."""
        return [entry for entry in self.entries if entry.by is None]

    @property
    def changed(self) -> int:
        """Number of modules that this call swapped; 0 if earlier calls had swapped everything."""
        return sum(entry.new for entry in self.swapped)

    def count(self, op: str) -> tuple[int, int]:
        """How many modules of an op were (swapped, left)."""
        return tuple(sum(e.op == op for e in es) for es in (self.swapped, self.left))  # type: ignore[return-value]

    @property
    def pairs(self) -> int:
        """Number of GroupNorm + SiLU pairs that now run as one op."""
        return sum(entry.pairs for entry in self.swapped)

    @property
    def scheduler_steps_left(self) -> dict[str, int]:
        """Number of steps that the fused scheduler has left to diffusers' own code, by reason."""
        fused = getattr(self._scheduler(), "fused", None)
        return {} if fused is None else dict(fused.left)

    @property
    def graph_calls_left(self) -> dict[str, int]:
        """With `graphs`: number of a U-Net's calls that ran without a graph, by reason."""
        return _counted(self._graphs)

    @property
    def network_calls_left(self) -> dict[str, int]:
        """Number of a U-Net's calls on a GPU that ran block by block, by reason."""
        return _counted(self._networks)

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
            "graph_calls_left": self.graph_calls_left,
            "network_calls_left": self.network_calls_left,
            "verified": self.verified,
            "unverified": self.unverified,
        }

    @property
    def json(self) -> str:
        """`data` as JSON."""
        return json.dumps(self.data, indent=1)

    def __str__(self) -> str:
        if not self.entries:
            return "found no module that fastdiff has an op for"
        if self.changed == 0 and self.swapped:
            return f"nothing to do: already accelerated ({len(self.swapped)} modules)"
        return f"{self.changed} modules swapped, {len(self.left)} left"

    def print(self) -> None:
        """Print a table with one row per op, class and outcome.

        If the table is wider than the terminal, print a paragraph for each row instead. The steps
        that a fused scheduler has left to diffusers' own code, and the calls that ran without a
        graph, follow below.
        """
        from rich.console import Console
        from rich.padding import Padding
        from rich.table import Table

        headings = ("op", "class", "modules", "becomes", "first module")
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
        if self._checks:
            matched, open_ = len(self.verified), len(self.unverified)
            console.print(f"{matched} modules matched their originals, {open_} were not compared")
        for reason, steps in self.scheduler_steps_left.items():
            console.print(f"{steps} scheduler steps ran in diffusers' own code: {reason}")
        for reason, calls in self.graph_calls_left.items():
            console.print(f"{calls} calls ran without a graph: {reason}")
        for reason, calls in self.network_calls_left.items():
            console.print(f"{calls} calls ran block by block: {reason}")

    def restore(self) -> None:
        """Undo what this call changed: classes, attributes, memory formats, the scheduler.

        Modules, parameters and hooks remain the same objects. Calling it again does nothing. With
        sequential offload, remove its hooks first; otherwise the weights keep their memory format.
        A report does not keep a model alive: modules that have been deleted are skipped.
        """
        while self._undo:
            self._undo.pop()()


def _counted(where: Sequence[Any]) -> dict[str, int]:
    """Calls by reason, of all the objects that still exist."""
    counted: Counter[str] = Counter()
    for there in where:
        calls = there()
        counted.update({} if calls is None else calls.left)
    return dict(counted)


class AccelerateError(ValueError):
    """`strict=True`, but some modules would have been left: see `report`. Nothing was changed."""

    def __init__(self, report: Report) -> None:
        lines = [f"  {e.name} ({e.type}): {e.reason}" for e in report.left]
        super().__init__(
            f"{len(lines)} modules would be left unchanged:\n"
            + "\n".join(lines)
            + "\nNothing was changed; use strict=False to swap the others"
        )
        self.report = report
