"""Several workers; one that dies or hangs is replaced. Here: processes of one machine.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from fastdiff.checkpoint.open import load
from fastdiff.files import REFUSALS
from fastdiff.generate.session import Session
from fastdiff.jobs.rows import RowFile, Rows, open_rows
from fastdiff.jobs.shards import AnyClaims
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
    """Whether they share the shards by claims; else each has a share of its own."""
    share_devices: bool = True
    """Whether all see all GPUs and take them in turns; else each sees its own."""

    def line(self, index: int, slots: int) -> str:
        """The line for a worker."""
        device = self.spec.device
        if device == "cuda" and self.share_devices:
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


class Member(Protocol):
    """A worker that runs elsewhere."""

    number: int
    """Differs from that of any other, also of those that it replaces."""

    def lines(self) -> Iterator[str]:
        """What it tells, a line of JSON at a time, until it has ended."""
        ...

    def kill(self) -> None:
        """End it at once, however it is; wait until it has ended."""
        ...

    @property
    def end(self) -> str | None:
        """How it ended, such as ``was killed by signal 9``; None if its work is done."""
        ...

    @property
    def lacked_memory(self) -> bool:
        """Whether it may have been killed because the machine had no more memory."""
        ...


@dataclass(eq=False)
class _Place:
    """The place of a worker in a crew: the one that is there, and what those before it did."""

    index: int
    slots: int
    member: Member
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
        """Counts of this worker, and what the earlier ones had finished."""
        made, failed = self.earlier.made + self.counts.made, self.earlier.failed
        return replace(self.counts, made=made, failed=failed + self.counts.failed)


class Crew:
    """The workers of a job."""

    def __init__(
        self,
        task: Task,
        start: Callable[[str], Member],
        *,
        timeout: float,
        tell: Callable[[Sequence[Counts]], None],
    ) -> None:
        """
        start: starts a worker with its line of JSON. timeout: seconds without progress after which
        a worker is replaced.
        """
        self.task, self.start, self.timeout, self.tell = task, start, timeout, tell
        self._messages: queue.Queue[tuple[int, int, str | None]] = queue.Queue()

    def run(self) -> None:
        """Until all shards are finished.

        Raises:
            ValueError: a worker died again and again, or refuses the job.
            OSError: a worker cannot write.
        """
        places = [self._begin(index, self.task.slots) for index in range(self.task.workers)]
        try:
            while not all(place.done for place in places):
                with contextlib.suppress(queue.Empty):
                    index, number, line = self._messages.get(timeout=0.2)
                    place = places[index]
                    if number != place.member.number:
                        pass  # of a worker that was replaced
                    elif line is None:
                        places[index] = self._ended(place)
                    else:
                        self._heard(place, json.loads(line))
                    self.tell([place.total for place in places])
                for place in places:
                    limit = self.timeout if place.started else max(self.timeout, START)
                    if not place.done and time.monotonic() > place.last + limit:
                        place.hung, place.last = True, time.monotonic()
                        place.member.kill()
        finally:
            for place in places:
                place.member.kill()

    def _begin(self, index: int, slots: int) -> _Place:
        member = self.start(self.task.line(index, slots))
        threading.Thread(target=self._listen, args=(index, member), daemon=True).start()
        return _Place(index, slots, member, time.monotonic())

    def _listen(self, index: int, member: Member) -> None:
        for line in member.lines():
            self._messages.put((index, member.number, line))
        self._messages.put((index, member.number, None))

    def _heard(self, place: _Place, message: dict[str, Any]) -> None:
        place.last, place.started = time.monotonic(), True
        if "error" in message:
            kinds = {cls.__name__: cls for cls in (ValueError, OSError, ImportError)}
            raise kinds.get(message["kind"], ValueError)(message["error"])
        counts = Counts(**message)
        if counts.shards > place.counts.shards:
            place.deaths = 0
        place.counts = counts

    def _ended(self, place: _Place) -> _Place:
        """What takes a worker's place."""
        place.member.kill()
        if place.member.end is None:
            place.done = True
            return place
        if place.deaths + 1 >= DEATHS:
            how = f"hung for {self.timeout:g} s" if place.hung else place.member.end
            raise ValueError(
                f"a worker {how}, {DEATHS} times without finishing a shard; use a smaller --batch "
                "or fewer --workers, or run with --workers 1 to see its error"
            )
        halve = place.member.lacked_memory and not place.hung
        new = self._begin(place.index, max(place.slots // 2, 1) if halve else place.slots)
        new.deaths = place.deaths + 1
        earlier, settled = place.earlier, place.counts.settled
        failed = min(place.counts.failed, settled)
        new.earlier = replace(
            earlier, made=earlier.made + settled - failed, failed=earlier.failed + failed
        )
        return new


class Process:
    """A worker that is a process of this machine."""

    def __init__(self, line: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.number = self._process.pid
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its stdout tells
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def lines(self) -> Iterator[str]:
        assert self._process.stdout is not None
        with self._process.stdout:
            yield from self._process.stdout
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it has not read
            self._process.stdin.close()

    @property
    def end(self) -> str | None:
        code = self._process.returncode
        if code == 0:
            return None
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    @property
    def lacked_memory(self) -> bool:
        return self._process.returncode == -signal.SIGKILL  # as systems without memory do


def main() -> int:
    """A worker: reads its task from stdin, makes shards, and writes its counts to stdout."""
    messages, sys.stdout = sys.stdout, sys.stderr
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True).start()
    if (refusal := work(task, lambda counts: _say(messages, asdict(counts)))) is None:
        return 0
    _say(messages, refusal)
    return FAILED


def work(
    task: dict[str, Any], tell: Callable[[Counts], None], claims: AnyClaims | None = None
) -> dict[str, str] | None:
    """Make the shards of a task. Returns its refusal as ``{"error", "kind"}``, or None.

    claims: in place of locks on files.
    """
    try:
        _work(task, tell, claims)
    except REFUSALS as error:
        kind = next(cls.__name__ for cls in REFUSALS if isinstance(error, cls))
        return {"error": _text(error), "kind": kind}
    return None


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename is not None else "")
    return str(error)


def _work(task: dict[str, Any], tell: Callable[[Counts], None], claims: AnyClaims | None) -> None:
    spec = JobSpec.of_recorded(task["spec"])
    rows = _rows(spec, tuple(RowFile(Path(path), *rest) for path, *rest in task["rows"]))
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
            tell=tell,
            share=tuple(task["share"]),
            retry=frozenset(task["retry"]),
            claims=claims,
        ).run()


def _rows(spec: JobSpec, files: tuple[RowFile, ...]) -> Rows:
    """The rows of a task: the files that its parent read, or copies of the same URLs.

    Raises:
        ValueError: the URLs have other content now.
        FileNotFoundError: a file does not exist on this machine.
    """
    if all(file.source is None or file.path.exists() for file in files):
        return Rows(files)
    rows = open_rows(spec.rows)
    if [file.sha256 for file in rows.files] != [file.sha256 for file in files]:
        raise ValueError(
            f"{spec.rows} was changed while the job read it; put the old files back to resume, or "
            "give another --out"
        )
    return rows


def _say(messages: IO[str], data: dict[str, Any]) -> None:
    messages.write(json.dumps(data) + "\n")
    messages.flush()


def _end_with_parent(pipe: IO[str]) -> None:
    pipe.read()
    os._exit(FAILED)
