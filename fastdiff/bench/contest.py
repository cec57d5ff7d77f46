"""One call of a network, by all who can do it, in turns: the rows of `fastdiff bench`.

    cpu, triton, cuda, library, reference    our op on each of its backends
    eager                  what people write in PyTorch; a norm gets contiguous images
    eager channels_last    the same in the layout of our networks
    compile                that through torch.compile
    sdpa ...               on a GPU: each of PyTorch's attention kernels
    copy, product          the limit: the bytes of the call copied, or its FLOPs as one product
    a name with a colon    the user's kernel

Each of ours, and the user's, is checked before and after it is timed (integrity.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdiff import kernels
from fastdiff.bench.clock import TurnTimer
from fastdiff.bench.integrity import Checked, RefusedError, renew
from fastdiff.bench.parity import Parity
from fastdiff.bench.providers import CHOICES, SDPA, Arguments, Make
from fastdiff.bench.result import Entry, Row
from fastdiff.bench.run import BACKENDS, Case, copied, function_of, lost_context, said, settings
from fastdiff.bench.turns import (
    AGAIN,
    LEAST_ROUNDS,
    MOST_ROUNDS,
    Ratio,
    in_turns,
    noise_floor,
)

MEAN = 0.5
"""Of the operands: with a mean of zero, a norm that forgets to subtract it would pass."""
POSSIBLE = 1.02
"""A share of the limit above this is refused, with its whole interval."""
PRODUCT = 384
"""Smallest side of the product whose rate is the limit: smaller ones do not reach it."""
LIMITS = ("copy", "product")


@dataclass(frozen=True)
class Shifted(Make):
    """Operands whose mean is not zero."""

    def __call__(self, *shape: int) -> torch.Tensor:
        return super().__call__(*shape) + MEAN


@dataclass(frozen=True, kw_only=True)
class UserKernel:
    """A function to put beside an op, with the signature of its `eager` (fastdiff/bench/ops)."""

    name: str
    """``module:function``."""
    op: str
    function: Callable[..., Any]
    place: str = ""
    """From where another process can import it: as --kernel was given; "" from nowhere."""

    def on(self, arguments: Arguments) -> Callable[[], Any]:
        """The function with its operands."""
        args, kwargs = arguments
        return lambda: self.function(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How rows are timed."""

    timer: TurnTimer
    device: torch.device
    budget_s: float = 1.0
    """For all providers of a row together."""
    inductor: str = "inductor"


def checkable(op: str) -> bool:
    """Whether results of an op can be compared with a formula, as a user's kernel must be."""
    return op in kernels.OPS and kernels.OPS[op].formula is not None


def baselines(case: Case, device: torch.device, *, compile_too: bool) -> list[str]:
    """The providers that are not ours."""
    names = ["eager"]
    names += ["eager channels_last"] if case.subject.norm else []
    names += [*SDPA] if case.subject.sdpa and device.type == "cuda" else []
    return names + (["compile"] if compile_too else [])


def backends(case: Case, device: torch.device) -> dict[str, str | None]:
    """Our backends for a device -> why one is not available, or None."""
    wanted = ("cpu",) if device.type == "cpu" else CHOICES
    known = kernels.available()[case.subject.op]
    return {name: known[name] for name in wanted if name in kernels.OPS[case.subject.op].backends}


def drawn(case: Case, device: torch.device, seed: int) -> Arguments:
    """The operands of a case, the same for the same seed."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        return case.subject.arguments(case.call, case.job, Shifted(case.dtype, device))


def op_row(
    case: Case,
    conditions: Conditions,
    *,
    ours: Sequence[str],
    others: Sequence[str],
    kernel: UserKernel | None = None,
    calls: int = 1,
) -> Row:
    """Time a case by our backends, the baselines and the user's kernel, in turns.

    Args:
        ours: backends; others: baselines, "eager" among them.
        kernel: takes part beside ours.
        calls: how often one evaluation of the network makes this call.
    """
    contest = _Contest(case, conditions, kernel)
    for provider in [*others, *ours, *([kernel.name] if kernel else [])]:
        contest.enter(provider)
    return contest.row(replace(bare_row(case, conditions.device), calls=calls))


def bare_row(case: Case, device: torch.device) -> Row:
    """The row of a case without entries."""
    work = case.work
    return Row(
        kind="op" if case.direction == "forward" else "backward",
        name=case.subject.op,
        job=case.job_name,
        shape=str(case.call),
        dtype=str(case.dtype).removeprefix("torch."),
        method=case.method if device.type == "cuda" else "host",
        bytes=work.bytes,
        flops=work.flops,
    )


class _Contest:
    """The functions of one row, and what is known of each."""

    def __init__(self, case: Case, conditions: Conditions, kernel: UserKernel | None) -> None:
        self.case, self.conditions, self.kernel = case, conditions, kernel
        self.arguments = drawn(case, conditions.device, 0)
        self.others = drawn(case, conditions.device, 1) if kernel else self.arguments
        self.functions: dict[str, Callable[[], Any]] = {}
        self.entries: dict[str, Entry] = {}
        self.checks: dict[str, Checked] = {}
        self.ours = {*BACKENDS, *([kernel.name] if kernel else [])}

    def enter(self, provider: str) -> None:
        """Check a provider and prepare its function; if that fails, its entry says why."""
        self.entries[provider] = Entry(provider=provider)
        try:
            with self._settings(provider):
                self._prepare(provider)
        except RefusedError as error:
            self._note(provider, f"refused: {error}")
        except kernels.BackendError as error:
            self._note(provider, f"not available: {error.reasons.get(provider) or said(error)}")
        except Exception as error:
            if lost_context(error):
                raise
            self._note(provider, f"failed: {said(error)}")

    def _prepare(self, provider: str) -> None:
        start = time.perf_counter()
        call = self._function(provider)
        call()
        if self.conditions.device.type == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        self.entries[provider] = replace(self.entries[provider], first_s=first)
        checked = self.case.direction == "forward" and checkable(self.case.subject.op)
        if checked and provider in self.ours:
            self.checks[provider] = self._checked(provider)
            self._passed(provider, self.checks[provider].check())
        self.functions[provider] = call

    def _function(self, provider: str) -> Callable[[], Any]:
        if self.kernel is None or provider != self.kernel.name:
            return function_of(self.case, provider, self.arguments, self.conditions.inductor)
        return self.kernel.on(self.arguments)

    def _checked(self, provider: str) -> Checked:
        theirs = self.kernel
        mine = theirs is None or provider != theirs.name
        return Checked(
            self.case.subject.ours if mine or theirs is None else theirs.function,
            eager=self.case.subject.eager,
            draw=lambda seed: drawn(self.case, self.conditions.device, seed),
        )

    def _passed(self, provider: str, parity: Parity) -> None:
        relative = parity.error / parity.eager_error if parity.eager_error else None
        self.entries[provider] = replace(self.entries[provider], error=relative)

    def _note(self, provider: str, note: str) -> None:
        self.entries[provider] = Entry(provider=provider, note=note)
        self.functions.pop(provider, None)

    def _settings(self, provider: str) -> contextlib.AbstractContextManager[None]:
        return settings(self.case, provider.removesuffix(AGAIN))

    def row(self, row: Row) -> Row:
        """Time all functions in turns, check ours once more, and fill in the row."""
        if "eager" not in self.functions:
            return replace(row, entries=tuple(self.entries.values()))
        limit, limit_work, function = self._limit(row)
        timed = {**self.functions, f"eager{AGAIN}": self.functions["eager"], limit: function}
        seconds = in_turns(
            timed,
            self.conditions.timer,
            method=self.case.method,
            budget_s=self.conditions.budget_s,
            within=self._settings,
            before=self._renew if self.kernel else None,
            most=MOST_ROUNDS * (5 if self.kernel else 1),
        )
        self.entries[limit] = Entry(provider=limit)
        for provider, check in self.checks.items():
            if provider in self.functions:
                try:
                    with self._settings(provider):
                        check.check()
                except RefusedError as error:
                    self._note(provider, f"refused: after it was timed, {error}")
        again = seconds.pop(f"eager{AGAIN}")
        noise = noise_floor(seconds["eager"], again)
        row = replace(row, limit=limit, noise=noise)
        return filled(row, self.entries, seconds, limit_work, self.ours)

    def _renew(self, number: int) -> None:
        renew(self.arguments, self.others, number)

    def _limit(self, row: Row) -> tuple[str, float, Callable[[], Any]]:
        """The limit's name, its work as a multiple of the row's, and its function."""
        if self.case.subject.limit == "copy":
            source, target = copied(self.case.work, self.conditions.device)
            return "copy", 1.0, lambda: target.copy_(source)
        side = max(PRODUCT, round((row.flops / 2) ** (1 / 3)))
        make = Make(self.case.dtype, self.conditions.device)
        a, b, out = make(side, side), make(side, side), make(side, side)
        return "product", 2 * side**3 / row.flops, lambda: torch.mm(a, b, out=out)


def filled(
    row: Row,
    entries: dict[str, Entry],
    seconds: dict[str, list[float]],
    limit_work: float,
    ours: set[str],
) -> Row:
    """A row with its times, ratios, verdicts and shares.

    Args:
        seconds: provider -> seconds per call in each round.
        limit_work: the limit's work as a multiple of the row's.
        ours: the providers that get a ratio.
    """
    timed = {name: times for name, times in seconds.items() if not entries[name].note}
    medians = {name: _quartiles(times)[1] for name, times in timed.items()}
    rivals = [name for name in timed if name not in ours and name != row.limit]
    best = min(rivals, key=medians.__getitem__)
    found = []
    for name, entry in entries.items():
        if name not in timed:
            found.append(entry)
            continue
        q1, median, q3 = _quartiles(timed[name])
        one = replace(entry, q1_s=q1, median_s=median, q3_s=q3, rounds=len(timed[name]))
        if row.limit in timed:
            share = Ratio.of(timed[name], [s / limit_work for s in timed[row.limit]])
            one = replace(one, share=share.value)
            impossible = row.limit in LIMITS and share.low > POSSIBLE
            if name in ours and impossible and share.rounds >= LEAST_ROUNDS:
                found.append(Entry(provider=name, note=_impossible(row.limit, share)))
                continue
        if name in ours:
            ratio = Ratio.of(timed[name], timed[best])
            one = replace(one, ratio=ratio, verdict=ratio.verdict(row.noise))
        found.append(one)
    return replace(row, baseline=best, entries=tuple(found))


def _impossible(limit: str, share: Ratio) -> str:
    what = {"copy": "memory", "product": "arithmetic"}[limit]
    return (
        f"refused: it is faster than the {what} allows, {share.value:.2f} times a {limit} of the "
        "same work; it does less than the op must"
    )


def _quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(seconds)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75)]
    return at[0], at[1], at[2]


def with_savings(row: Row, evaluation_s: float) -> Row:
    """A row whose entries say what share of an evaluation they save in place of our fastest one."""
    running = [e.median_s for e in row.ours if e.provider in BACKENDS and e.median_s]
    if not running:
        return row
    now = min(running)
    entries = [
        replace(e, saves=row.calls * (now - e.median_s) / evaluation_s)
        if e.median_s and e.ratio is not None
        else e
        for e in row.entries
    ]
    return replace(row, entries=tuple(entries))
