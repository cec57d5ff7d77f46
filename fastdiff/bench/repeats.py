"""Rows once more in fresh processes, so that two runs can be compared (`fastdiff.bench.changes`).

A process has its own addresses, pages and moment: what it measures is one observation. Each one
measures our providers and eager PyTorch in turns, in an order of rows of its own, and tells

    CPU    the time on the clock and the CPU time of all threads
    GPU    the time between device events

of each. It checks nothing: the run that starts it has done so (`fastdiff.bench.contest`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastdiff.bench import contest, whole
from fastdiff.bench.clock import Method, timer_for
from fastdiff.bench.contest import Conditions, UserKernel
from fastdiff.bench.plan import Plan, op_cases
from fastdiff.bench.result import CPU_TIME, DEVICE_TIME, TIME, Repeated, Row, Run
from fastdiff.bench.run import Case, function_of, settings
from fastdiff.bench.shapes import Job
from fastdiff.bench.user import user_kernel
from fastdiff.files import write_text

PROCESSES = 10
"""Fresh processes per run."""
ROW_S = {True: 0.15, False: 0.5}
PROCESS_S = {True: 10.0, False: 60.0}
"""Quick or not -> seconds for the rounds of a row, and for all rows of a process, on a CPU in CPU
time; a row that finds no time in one process may find it in the next, whose order is another."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 200
ROUND_S = 5e-4

Clocks = Mapping[str, float]
"""Name of a clock -> seconds."""


@dataclass(frozen=True)
class Todo:
    """A row to measure: its functions, made when it is its turn, and the contexts they need."""

    row: Row
    method: Method
    """How a GPU times it."""
    functions: Callable[[], Mapping[str, Callable[[], Any]]]
    within: Callable[[str], AbstractContextManager[Any]]


def to_repeat(plan: Plan, kernel: UserKernel | None) -> Iterator[Todo]:
    """The rows of a plan with what is ours in them, the user's kernel, and eager PyTorch."""
    device = torch.device(plan.device)
    if plan.wants("ops"):
        for case, _ in op_cases(plan, kernel):
            yield _op(plan, case, kernel, device)
    if kernel is not None:
        return
    if plan.wants("networks"):
        for preset, job in plan.measured_networks().items():
            yield _network(plan, preset, job, device)
    if plan.wants("images") and "digits" in plan.jobs():
        yield _whole(whole.bare_image_row(), lambda: whole.image_contestants(device))


def _op(plan: Plan, case: Case, kernel: UserKernel | None, device: torch.device) -> Todo:
    only = plan.providers
    known = contest.backends(case, device).items()
    ours = [name for name, why_not in known if not why_not and (not only or name in only)]

    def functions() -> dict[str, Callable[[], Any]]:
        arguments = contest.drawn(case, device, 0)
        found = {}
        for name in ("eager", *ours):
            with settings(case, name):
                found[name] = function_of(case, name, arguments, "inductor")
        return found if kernel is None else {**found, kernel.name: kernel.on(arguments)}

    row = contest.bare_row(case, device)
    return Todo(row, case.method, functions, lambda name: settings(case, name))


def _network(plan: Plan, preset: str, job: Job, device: torch.device) -> Todo:
    dtype = plan.torch_dtype

    def made() -> dict[str, whole.Contestant]:
        conditions = Conditions(timer=timer_for(device), device=device)
        return dict(whole.contestants(job, conditions, dtype, ablation=False, compile_too=False))

    return _whole(whole.bare_row(preset, job, device, dtype), made)


def _whole(row: Row, made: Callable[[], Mapping[str, whole.Contestant]]) -> Todo:
    found: dict[str, whole.Contestant] = {}

    def functions() -> dict[str, Callable[[], Any]]:
        found.update(made())
        return {name: found[name].step for name in (whole.OURS, "eager")}

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        with torch.inference_mode(), found[name].within():
            yield

    return Todo(row, "events", functions, within)


# The processes


@dataclass(frozen=True, kw_only=True)
class Program:
    """How a process of one version of fastdiff is started."""

    python: str = sys.executable
    first: str = ""
    """A folder to put first on ``sys.path``: another checkout."""
    module: str = "fastdiff.bench.repeats"

    @classmethod
    def of(cls, place: Path) -> Program:
        """Of a checkout, or of the Python of another environment.

        Raises:
            ValueError: it is neither.
        """
        if (place / "fastdiff" / "bench" / "repeats.py").is_file():
            return cls(first=str(place.resolve()))
        if place.is_file() and os.access(place, os.X_OK):
            return cls(python=str(place.absolute()))
        raise ValueError(
            f"--against must be a checkout of fastdiff with fastdiff/bench/repeats.py, or the "
            f"python of another environment, got {place}"
        )

    def __call__(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Measure in a fresh process; returns what `main` has written.

        Raises:
            RuntimeError: the process failed.
        """
        path = [entry for entry in sys.path if entry] if self.python == sys.executable else []
        path = [self.first, *path] if self.first else path
        code = f"import sys; sys.path[:1] = {path!r}; import runpy; sys.argv = sys.argv[1:]; "
        code += f"runpy.run_module({self.module!r}, run_name='__main__', alter_sys=False)"
        with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
            out = Path(folder) / "out.json"
            words = [self.python, "-c", code, self.module, json.dumps(request), str(out)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode or not out.exists():
                raise RuntimeError(
                    f"a process that measures exited with code {done.returncode}: "
                    f"{done.stderr.strip()[-1000:]}"
                )
            found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


def request_of(plan: Plan, kernel: UserKernel | None, seed: int) -> dict[str, Any]:
    """What a process is asked, as JSON; its order of rows is drawn from the seed."""
    return {
        "plan": asdict(plan),
        "kernel": None if kernel is None else [kernel.place, kernel.op],
        "seed": seed,
    }


def repeat(
    plan: Plan,
    programs: Sequence[Program],
    *,
    kernel: UserKernel | None = None,
    processes: int = PROCESSES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Repeated, ...]]:
    """Measure a plan's rows in fresh processes of each program, the programs in turns.

    Raises:
        RuntimeError: a process failed.
    """
    found: list[list[list[dict[str, Any]]]] = [[] for _ in programs]
    for number in range(processes):
        order = list(range(len(programs)))
        order = order[::-1] if number % 2 else order
        for place, which in enumerate(order):
            progress(number * len(programs) + place, processes * len(programs))
            found[which].append(programs[which](request_of(plan, kernel, number)))
    progress(processes * len(programs), processes * len(programs))
    return [gathered(answers) for answers in found]


def gathered(answers: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[Repeated, ...]:
    """The answers of all processes, by row, provider and clock."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for answer in answers:
        for one in answer:
            name = (tuple(one["key"]), one["provider"], one["clock"])
            row = rows.setdefault(name, {"row": one["row"], "speed": [], "eager": []})
            row["speed"].append(one["speed"])
            row["eager"].append(one["eager"])
    return tuple(
        Repeated(
            key=key,
            row=row["row"],
            provider=provider,
            clock=clock,
            speed=tuple(row["speed"]),
            eager=tuple(row["eager"]),
        )
        for (key, provider, clock), row in rows.items()
    )


def passed(repeats: Sequence[Repeated], run: Run) -> tuple[Repeated, ...]:
    """Those of providers that the run measured, and did not refuse."""
    timed = {(row.key, e.provider) for row in run.rows for e in row.entries if e.median_s}
    return tuple(one for one in repeats if (one.key, one.provider) in timed)


# Inside a process


def measured(
    todo: Sequence[Todo], device: torch.device, *, quick: bool, seed: int
) -> Iterator[dict[str, Any]]:
    """Measure rows in an order drawn from the seed until the time of a process is used up."""
    order = random.Random(seed)
    now = time.perf_counter if device.type == "cuda" else time.process_time
    start = now()
    for one in order.sample(list(todo), len(todo)):
        if now() - start > PROCESS_S[quick]:
            return
        seconds = _in_turns(one, device, ROW_S[quick], order)
        eager = seconds.pop("eager")
        for provider, rounds in seconds.items():
            for clock in rounds[0]:
                pairs = [
                    (math.log(a[clock]), math.log(b[clock]))
                    for a, b in zip(eager, rounds, strict=True)
                ]
                yield {
                    "key": one.row.key,
                    "row": str(one.row),
                    "provider": provider,
                    "clock": clock,
                    "speed": median(a - b for a, b in pairs),
                    "eager": median(a for a, _ in pairs),
                }


def _in_turns(
    one: Todo, device: torch.device, budget_s: float, order: random.Random
) -> dict[str, list[Clocks]]:
    rounds = {}
    for name, function in one.functions().items():
        with one.within(name):
            rounds[name] = _round(function, device, one.method)
    seconds: dict[str, list[Clocks]] = {name: [] for name in rounds}
    names = list(rounds)
    used = 0.0
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and used > budget_s:
            break
        order.shuffle(names)
        for name in names:
            with one.within(name):
                found = rounds[name]()
            seconds[name].append(found)
            used += max(found.values()) if device.type == "cuda" else found[CPU_TIME]
    return seconds


def _round(
    function: Callable[[], Any], device: torch.device, method: Method
) -> Callable[[], Clocks]:
    """A function that times one round by all clocks of the device, after a warm-up."""
    if device.type == "cuda":
        timed = timer_for(device).prepared(function, method=method)
        return lambda: {DEVICE_TIME: timed()}
    function()

    def both(calls: int) -> Clocks:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            function()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {TIME: wall / calls, CPU_TIME: max(cpu, 1e-9) / calls}

    calls = max(1, math.ceil(ROUND_S / both(1)[CPU_TIME]))
    return lambda: both(calls)


def main(argv: Sequence[str]) -> None:
    """Measure what a request asks, and write the result.

    Args:
        argv: the request as JSON, and the file to write.
    """
    text, out = argv
    request = json.loads(text)
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in request["plan"].items()
    }
    plan = Plan(**options)
    kernel = None
    if request["kernel"] is not None:
        place, op = request["kernel"]
        kernel = user_kernel(place, op)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    todo, device = list(to_repeat(plan, kernel)), torch.device(plan.device)
    found = list(measured(todo, device, quick=plan.quick, seed=request["seed"]))
    write_text(Path(out), json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
