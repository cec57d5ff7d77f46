"""Several workers on one machine, each a process of its own; one that dies or hangs is replaced.

The parent writes one line of JSON to a worker's stdin and keeps the pipe open. However the parent
dies, that closes the pipe, and the worker ends. The worker writes its counts to stdout, a line at a
time. They share nothing else: claims on shards are locks on files.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from fastdiff.checkpoint.open import load
from fastdiff.files import REFUSALS
from fastdiff.generate.session import Session
from fastdiff.jobs.rows import RowFile, Rows
from fastdiff.jobs.spec import JobSpec
from fastdiff.jobs.worker import Begun, Counts, Worker, cpu_threads
from fastdiff.kernels import backend
from fastdiff.kernels.choose import selected_backend

DEATHS = 3
"""Deaths of a worker, without a shard finished in between, after which the job stops."""
START = 600.0
"""Seconds that a worker has at least to load the model."""
COMMAND = (
    "import sys; sys.path[:] = {path!r}; from fastdiff.jobs.processes import main; sys.exit(main())"
)
"""A worker's program; it imports what its parent would."""
FAILED = 2
"""Exit code of a worker that has told its error."""


@dataclass(frozen=True)
class Task:
    """What all workers of a job share."""

    spec: JobSpec
    rows: Rows
    begun: Begun
    slots: int
    threads: int | None
    share: tuple[int, int]
    """(first shard, step)."""
    retry: Sequence[int]
    workers: int
    locks: bool = True
    """Whether they share the shards by locks; else each has a share of its own."""

    def line(self, index: int, slots: int) -> str:
        """The line for a worker."""
        device = self.spec.device
        if device == "cuda":
            device = f"cuda:{index % torch.cuda.device_count()}"
        files = [
            [str(f.path), f.rows, f.size, f.sha256, f.modified, f.source] for f in self.rows.files
        ]
        first, step = self.share
        share = self.share if self.locks else (first + index * step, step * self.workers)
        return json.dumps(
            {
                "spec": replace(self.spec, device=device).recorded,
                "rows": files,
                "begun": asdict(self.begun),
                "slots": slots,
                "threads": self.threads,
                "share": share,
                "retry": list(self.retry[index :: self.workers] if self.locks else self.retry),
            }
        )


@dataclass(eq=False)
class _Member:
    """A worker's process, and those that it replaced."""

    index: int
    slots: int
    process: subprocess.Popen[str]
    last: float
    counts: Counts = field(default_factory=Counts)
    earlier: Counts = field(default_factory=Counts)
    deaths: int = 0
    started: bool = False
    """Whether it has told anything: until then it loads the model."""
    done: bool = False
    hung: bool = False

    @property
    def total(self) -> Counts:
        """Counts of this process, and what the earlier ones had finished."""
        made, failed = self.earlier.made + self.counts.made, self.earlier.failed
        return replace(self.counts, made=made, failed=failed + self.counts.failed)


class Crew:
    """The workers of a job on this machine."""

    def __init__(
        self, task: Task, *, timeout: float, tell: Callable[[Sequence[Counts]], None]
    ) -> None:
        """timeout: seconds without progress after which a worker is replaced."""
        self.task, self.timeout, self.tell = task, timeout, tell
        self._messages: queue.Queue[tuple[int, int, str | None]] = queue.Queue()

    def run(self) -> None:
        """Until all shards are finished.

        Raises:
            ValueError: a worker died again and again, or refuses the job.
            OSError: a worker cannot write.
        """
        members = [self._start(index, self.task.slots) for index in range(self.task.workers)]
        try:
            while not all(member.done for member in members):
                with contextlib.suppress(queue.Empty):
                    index, pid, line = self._messages.get(timeout=0.2)
                    member = members[index]
                    if pid != member.process.pid:
                        pass  # of a process that was replaced
                    elif line is None:
                        members[index] = self._ended(member)
                    else:
                        self._heard(member, json.loads(line))
                    self.tell([member.total for member in members])
                for member in members:
                    limit = self.timeout if member.started else max(self.timeout, START)
                    if not member.done and time.monotonic() > member.last + limit:
                        member.hung, member.last = True, time.monotonic()
                        member.process.kill()
        finally:
            for member in members:
                _stop(member.process)

    def _start(self, index: int, slots: int) -> _Member:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its stdout tells
            process.stdin.write(self.task.line(index, slots) + "\n")
            process.stdin.flush()
        listener = threading.Thread(target=self._listen, args=(index, process), daemon=True)
        listener.start()
        return _Member(index, slots, process, time.monotonic())

    def _listen(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._messages.put((index, process.pid, line))
        process.wait()
        self._messages.put((index, process.pid, None))

    def _heard(self, member: _Member, message: dict[str, Any]) -> None:
        member.last, member.started = time.monotonic(), True
        if "error" in message:
            kinds = {cls.__name__: cls for cls in (ValueError, OSError, ImportError)}
            raise kinds.get(message["kind"], ValueError)(message["error"])
        counts = Counts(**message)
        if counts.shards > member.counts.shards:
            member.deaths = 0
        member.counts = counts

    def _ended(self, member: _Member) -> _Member:
        """What takes a member's place."""
        _stop(member.process)
        code = member.process.returncode
        if code == 0:
            member.done = True
            return member
        if member.deaths + 1 >= DEATHS:
            how = f"hung for {self.timeout:g} s" if member.hung else _how(code)
            raise ValueError(
                f"a worker {how}, {DEATHS} times without finishing a shard; use a smaller --batch "
                "or fewer --workers, or run with --workers 1 to see its error"
            )
        killed = code == -signal.SIGKILL and not member.hung  # as systems without memory do
        new = self._start(member.index, max(member.slots // 2, 1) if killed else member.slots)
        new.deaths = member.deaths + 1
        earlier, settled = member.earlier, member.counts.settled
        failed = min(member.counts.failed, settled)
        new.earlier = replace(
            earlier, made=earlier.made + settled - failed, failed=earlier.failed + failed
        )
        return new


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # what it has not read
        process.stdin.close()


def _how(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def main() -> int:
    """A worker: reads its task from stdin, makes shards, and writes its counts to stdout."""
    messages, sys.stdout = sys.stdout, sys.stderr
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True).start()
    try:
        _work(task, messages)
    except REFUSALS as error:
        kind = next(cls.__name__ for cls in REFUSALS if isinstance(error, cls))
        _say(messages, {"error": _text(error), "kind": kind})
        return FAILED
    return 0


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename is not None else "")
    return str(error)


def _work(task: dict[str, Any], messages: IO[str]) -> None:
    spec = JobSpec.of_recorded(task["spec"])
    rows = Rows(tuple(RowFile(Path(path), *rest) for path, *rest in task["rows"]))
    chosen = backend(selected_backend() if spec.backend == "auto" else spec.backend)
    with cpu_threads(task["threads"]), chosen:
        dtype = getattr(torch, spec.dtype)
        model = load(spec.model, device=spec.device, dtype=dtype, options=spec.load)
        begun = Begun(**task["begun"])
        begun.check_weights(model)
        Worker(
            spec,
            rows,
            Session.of(model),
            begun,
            task["slots"],
            tell=lambda counts: _say(messages, asdict(counts)),
            share=tuple(task["share"]),
            retry=frozenset(task["retry"]),
        ).run()


def _say(messages: IO[str], data: dict[str, Any]) -> None:
    messages.write(json.dumps(data) + "\n")
    messages.flush()


def _end_with_parent(pipe: IO[str]) -> None:
    pipe.read()
    os._exit(FAILED)
