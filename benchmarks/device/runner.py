"""Run stages in processes of their own, within the time of a call.

A process that hangs is killed at its limit, one that dies or loses its GPU context ends alone, and
the others run. Every line that a process writes goes to the log at once, so what it has said and
saved until then is kept, whatever ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.device import records, table
from benchmarks.device.table import GOOD, ROOT, STATUSES, Plan, Result, Stage
from fastdiff.bench.clocks import Clocks

GRACE_S = 12.0
"""Seconds between the end of a stage's own time and its limit, to write down its results."""
EXIT_S = 5.0
"""Seconds that a process may take to end once its outcome is written."""
KILL_S = 5.0
"""Seconds to wait for a process to end after it was killed."""
LEAST = 0.25
"""The share of its time that a stage must get to be started at all."""
TOLD = 6
"""Last lines of a process that did not end well, for the summary."""
CONTEXT_LOST = re.compile(r"CUDA error|device-side assert|illegal memory access|Xid")


class Log:
    """The log of a call: lines of all processes, each with the time and its stage."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1)
        self._lock, self._start = threading.Lock(), time.monotonic()

    def write(self, label: str, line: str) -> None:
        with self._lock:
            if not self._file.closed:  # a process that was left behind may still speak
                seconds = time.monotonic() - self._start
                self._file.write(f"{seconds:6.1f} {label} | {line.rstrip()}\n")

    def close(self) -> None:
        self._file.close()


class Process:
    """A process of a stage, the leader of its own group; a thread passes its output to the log."""

    def __init__(self, stage: Stage, plan: Plan, log: Log, outcome: Path) -> None:
        self.stage, self.part, self.outcome = stage, plan.part, outcome
        self.label = f"{stage.name} {plan.part}".strip()
        self.start = time.monotonic()
        self.last: deque[str] = deque(maxlen=TOLD)
        self.lost = ""
        """The first line that says that the GPU context is lost."""
        self._log, self._popen = log, _started(stage, plan, outcome)
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                self._log.write(self.label, line)
                if text := line.strip():
                    self.last.append(text[:300])
                    if not self.lost and CONTEXT_LOST.search(text):
                        self.lost = text[:300]

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def hangs_at_its_end(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - self.outcome.stat().st_mtime > EXIT_S
        return False

    def kill(self) -> None:
        """Kill the process and all that it started. One that waits for a hung driver may not end;
        it is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(KILL_S)

    def result(self, limit: float, *, killed: bool = False, interrupted: bool = False) -> Result:
        """Its outcome, once it has ended or was killed."""
        self.kill()  # what it may have left running
        self._thread.join(2.0)
        seconds, code = time.monotonic() - self.start, self._popen.returncode
        status, notes = "failed", [f"exit code {code}", *self.last]
        if interrupted:
            status, notes = "interrupted", ["the command was stopped", *self.last]
        elif self.outcome.exists():
            found = json.loads(self.outcome.read_text())
            status, notes = found["status"], found["notes"]
        elif killed or code is None:
            unkilled = ", but it has not ended" if code is None else ""
            note = f"killed at its limit of {limit:.0f} s{unkilled}"
            status, notes = "timed out", [note, *self.last]
        elif self.lost:
            status, notes = "lost context", [self.lost, *self.last]
        elif code < 0:
            status = "killed"
            notes = [f"killed by {signal.Signals(-code).name}, not by its limit", *self.last]
        return Result(stage=self.stage.name, status=status, seconds=seconds, notes=notes)


def _started(stage: Stage, plan: Plan, outcome: Path) -> subprocess.Popen[str]:
    words = [
        *(sys.executable, "-m", "benchmarks.device", "--inside", stage.function),
        *("--out", str(plan.out), "--seconds", str(plan.seconds), "--outcome", str(outcome)),
        *(["--part", plan.part] if plan.part else []),
        *(["--dry-run"] if plan.dry_run else []),
        *(["--commit", plan.commit] if plan.commit else []),
        *(["--wheels", str(plan.wheels)] if plan.wheels else []),
        *(["--site", str(plan.site)] if plan.site else []),
    ]
    path = os.pathsep.join(filter(None, (str(plan.site or ""), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "FASTDIFF_CACHE": str(plan.out), "PYTHONUNBUFFERED": "1"}
    # other versions of Python, torch and triton than ours warn of other things
    environment |= {"PYTHONWARNINGS": "default", "PYTHONPATH": path}
    if plan.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", env=environment,
        start_new_session=True,
    )  # fmt: skip


def share_of(seconds: float, rest: float, left: float) -> float:
    """The seconds that the next stages get of those that are left.

    Args:
        seconds: what they are allowed.
        rest: what they and all later stages are allowed.

    Time to spare is divided in proportion. Too little shortens the last stages, not the next one.
    """
    return left * seconds / rest if left >= rest else min(seconds, left)


class Runner:
    """Runs the stages of one call and writes down what came of them after each.

    Attributes:
        results: those of the stages so far.
    """

    def __init__(self, names: Sequence[str], plan: Plan, seconds: float, name: str) -> None:
        """name: of the call, for its log and its summary."""
        self.results: list[Result] = []
        self._names, self._plan, self._seconds, self._name = list(names), plan, seconds, name
        self._log = Log(plan.out / f"{name}.log")
        self._start = time.monotonic()

    def run(self) -> None:
        """Run everything; a signal to stop kills what runs, and is raised again at the end."""
        with (
            tempfile.TemporaryDirectory() as work,
            stopped_by_signals(),
            Clocks(dry_run=self._plan.dry_run) as clocks,
        ):
            plan = dataclasses.replace(self._plan, site=Path(work) / "site")
            (Path(work) / "site").mkdir()
            groups = table.groups_of(self._names)
            for place, group in enumerate(groups):
                stages = [table.STAGES[name] for name in group]
                rest = sum(_longest(later) for later in groups[place:])
                left = self._start + self._seconds - time.monotonic()
                limit = share_of(_longest(group), rest, left)
                if limit < LEAST * _longest(group):
                    self._skip(stages, left)
                    continue
                print(f"{' and '.join(group)}: up to {limit:.0f} s", flush=True)
                clocks.begin()
                try:
                    found = self._group(stages, plan, limit, Path(work))
                finally:
                    seen = clocks.end()
                for result in found:
                    self._note(dataclasses.replace(result, clocks=seen))
                records.add_clocks(self._plan.out, "+".join(group), seen)
        self._log.close()

    def _skip(self, stages: Sequence[Stage], left: float) -> None:
        for stage in stages:
            note = f"{max(left, 0):.0f} s left, it needs {LEAST * stage.seconds:.0f}; "
            note += "use a larger --minutes, or --only"
            self._note(Result(stage=stage.name, status="skipped", seconds=0.0, notes=[note]))

    def _note(self, result: Result) -> None:
        self.results.append(result)
        print(f"{result.stage}: {result.status}, {result.seconds:.0f} s", flush=True)
        for note in result.notes[: 12 if result.status == "ok" else 40]:
            print(f"  {note}", flush=True)
        self.save()

    def save(self) -> None:
        """Write the summary of the call so far."""
        left = [name for name in self._names if name not in {r.stage for r in self.results}]
        content = {
            "call": self._name,
            "dry_run": self._plan.dry_run,
            "commit": self._plan.commit,
            "seconds": round(time.monotonic() - self._start, 1),
            "allowed": self._seconds,
            "stages": [dataclasses.asdict(result) for result in self.results],
            "not_run_yet": left,
        }
        records.write(self._plan.out / f"{self._name}.json", json.dumps(content, indent=1) + "\n")

    def _group(self, stages: Sequence[Stage], plan: Plan, limit: float, work: Path) -> list[Result]:
        """Run stages at the same time, each with up to `at_once` of its parts."""
        start = time.monotonic()
        own = limit - min(limit / 2, GRACE_S)
        todo = {stage.name: deque(stage.parts) for stage in stages}
        found: dict[str, list[tuple[str, Result]]] = {stage.name: [] for stage in stages}
        mine: list[Process] = []
        try:
            while mine or any(todo.values()):
                late = time.monotonic() - start > limit
                for process in [p for p in mine if late or not p.running or p.hangs_at_its_end]:
                    result = process.result(limit, killed=process.running)
                    found[process.stage.name].append((process.part, result))
                    mine.remove(process)
                for stage in () if late else stages:
                    while todo[stage.name] and _of(mine, stage) < stage.at_once:
                        part = todo[stage.name].popleft()
                        seconds = max(1.0, own - (time.monotonic() - start))
                        given = dataclasses.replace(plan, part=part, seconds=seconds)
                        outcome = work / f"{stage.name}-{part.replace('/', '-')}.json"
                        mine.append(Process(stage, given, self._log, outcome))
                if late:
                    break
                time.sleep(0.05)
        except BaseException:
            for process in mine:
                result = process.result(limit, interrupted=True)
                found[process.stage.name].append((process.part, result))
            for stage in stages:
                if found[stage.name]:
                    self._note(self._merged(stage, found, todo, limit))
            raise
        return [self._merged(stage, found, todo, limit) for stage in stages]

    def _merged(
        self,
        stage: Stage,
        found: Mapping[str, Sequence[tuple[str, Result]]],
        todo: Mapping[str, Iterable[str]],
        limit: float,
    ) -> Result:
        return merged(stage, found[stage.name], list(todo[stage.name]), limit, self._plan.out)


def _longest(group: Iterable[str]) -> float:
    return max(table.STAGES[name].seconds for name in group)


def _of(processes: Sequence[Process], stage: Stage) -> int:
    return sum(process.stage is stage for process in processes)


def merged(
    stage: Stage,
    found: Sequence[tuple[str, Result]],
    not_started: Sequence[str],
    limit: float,
    out: Path,
) -> Result:
    """The result of a stage from those of its parts: the worst status, and who had which."""
    if stage.parts == ("",):
        result = found[0][1]
        return dataclasses.replace(result, allowed=limit)
    bad = [(part, result) for part, result in found if result.status not in GOOD]
    notes = [f"{part}: {r.status}: {'; '.join(r.notes[:4])}" for part, r in bad]
    notes += [f"not started: {', '.join(not_started)}"] * bool(not_started)
    notes += [f"{part}: {'; '.join(r.notes)}" for part, r in found if r.status == "ok"]
    out_of: dict[str, list[str]] = {}
    for part, result in found:
        if result.status == "left out":
            out_of.setdefault("; ".join(result.notes), []).append(part)
    notes += [f"left out: {', '.join(parts)}: {why}" for why, parts in out_of.items()]
    statuses = [result.status for _, result in bad] + ["timed out"] * bool(not_started)
    if not statuses:
        statuses = ["ok" if any(r.status == "ok" for _, r in found) else "left out"]
    return Result(
        stage=stage.name,
        status=max(statuses, key=STATUSES.index),
        seconds=max((result.seconds for _, result in found), default=0.0),
        allowed=limit,
        notes=[*records.parity_counts(out, stage.name), *notes],
    )


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside the block, SIGTERM is raised as KeyboardInterrupt, like Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_call(names: Sequence[str], plan: Plan, seconds: float, name: str) -> int:
    """Run the stages of a call and print a summary. Returns 1 if a stage is not good."""
    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / f"{name}.log").unlink(missing_ok=True)
    if "parity" in names:
        (plan.out / "parity.jsonl").unlink(missing_ok=True)
    runner = Runner(names, plan, seconds, name)
    start = time.monotonic()
    try:
        runner.run()
    finally:
        runner.save()
        _summarize(runner.results, list(names), time.monotonic() - start, plan.out, print)
    return int(any(result.status not in GOOD for result in runner.results))


def _summarize(
    results: Sequence[Result],
    names: Sequence[str],
    seconds: float,
    out: Path,
    say: Callable[[str], None],
) -> None:
    bad = [result for result in results if result.status not in GOOD]
    say(f"\n{len(results)} of {len(names)} stages, {len(bad)} not good; {seconds:.0f} s")
    for result in results:
        throttled = result.clocks.get("throttled")
        slow = f"  throttled: {throttled}" if throttled else ""
        took = f"{result.seconds:4.0f} of {result.allowed:3.0f} s"
        say(f"  {result.stage:12} {result.status:12} {took}{slow}")
    for path in records.written(out):
        say(f"written: {path}")
