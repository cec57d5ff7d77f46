"""What must hold of a mutated file, and processes that try one after the other.

It opens, or raises ValueError, OSError or ImportError with one printable line of at most
`MAX_MESSAGE` characters. Never another exception, a crash, a hang, more memory than the files are
worth, or code: starting a program, unpickling, or writing outside the folder is seen by an audit
hook. A case is made from its number alone, so a finding can be made again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fastdiff.files import MAX_MESSAGE
from tests.fuzz.mutate import mutant
from tests.fuzz.targets import TARGETS, Target

SECONDS = 5.0  # of processor time for a case
HANGS_AFTER = 60.0  # seconds by the clock; the machine may be busy
EXTRA_BYTES = 2**30
CHUNK = 100  # cases that a process is given at once
PROGRAMS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen")
FORBIDDEN = (*PROGRAMS, "pickle.find_class", "socket.connect", "socket.getaddrinfo", "pty.spawn")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
REFUSALS = (ValueError, OSError, ImportError)


@dataclass(frozen=True)
class Case:
    """One mutated file of a target."""

    target: str
    number: int

    @property
    def rng(self) -> random.Random:
        return random.Random(f"{self.target} {self.number}")


@dataclass(frozen=True)
class Finding:
    """A case of which the property does not hold."""

    case: Case
    what: str


class CodeRanError(BaseException):
    """Not an Exception: no reader may catch it."""


class Watch:
    """An audit hook, which cannot be taken away again, that is on while a file is opened."""

    def __init__(self) -> None:
        self.folder: str | None = None
        sys.addaudithook(self._see)

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Writing is allowed in `folder` and where Python puts temporary files."""
        self.folder = str(folder)
        try:
            yield
        finally:
            self.folder = None

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self._stop(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else ""
            allowed = (self.folder, tempfile.gettempdir(), os.devnull)
            if path and not os.fsdecode(path).startswith(allowed):
                self._stop(f"{path!r} was opened to be written")

    def _stop(self, what: str) -> None:
        self.folder = None
        raise CodeRanError(what)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """No more than a gigabyte of addresses beyond what the process has already."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def broken(
    opens: Callable[[], object], watch: contextlib.AbstractContextManager[None], named: str = ""
) -> str:
    """Why the property does not hold of what `opens` opens; empty if it does.

    named: what a refusal has to name.
    """
    start, message = time.process_time(), None
    try:
        with watch:
            opens()
    except REFUSALS as error:
        message = str(error)
    except MemoryError:
        return f"more than {EXTRA_BYTES:,} bytes"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__} at {where}: {error!s:.200}"
    if (used := time.process_time() - start) > SECONDS:
        return f"took {used:.1f} s of processor time"
    return "" if message is None else _poor(message, named)


def _poor(message: str, named: str) -> str:
    """What is wrong with a refusal's message; empty if it is as it should be."""
    if not message or not message.isprintable():
        return f"not one printable line: {message!r:.200}"
    if named not in message:
        return f"does not say which file: {message[:200]!r}"
    if len(message) > MAX_MESSAGE:
        return f"a message of {len(message)} characters: {message[:200]!r}"
    return ""


class Bench:
    """A folder with a target's valid files, of which one at a time is changed."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.target: Target = TARGETS[name]
        self.originals = self.target.originals(folder)
        self.names = list(self.originals)

    @classmethod
    def make(cls, name: str, root: Path) -> Bench:
        folder = root / name.replace(" ", "-")
        folder.mkdir()
        TARGETS[name].make(folder)
        return cls(name, folder)

    def open(self) -> object:
        return self.target.open(self.folder)

    def try_(self, case: Case, watch: Watch) -> tuple[str, bool]:
        """(why the property does not hold, whether the case could be opened)."""
        rng, opened = case.rng, [False]
        name = rng.choice(self.names)
        path = self.folder / name
        path.write_bytes(mutant(name, self.originals[name], rng))

        def opens() -> None:
            self.open()
            opened[0] = True

        named = str(self.folder) if self.target.names_file else ""
        try:
            return broken(opens, watch.over(self.folder), named), opened[0]
        finally:
            path.write_bytes(self.originals[name])


def cases(count: int, names: Sequence[str] = tuple(TARGETS)) -> list[Case]:
    """`count` cases in all, the same for the same count and names."""
    total = sum(TARGETS[name].share for name in names)
    shares = {name: count * TARGETS[name].share // total for name in names}
    shares[names[0]] += count - sum(shares.values())
    return [Case(name, number) for name in names for number in range(shares[name])]


def _work(
    benches: dict[str, Bench], todo: Sequence[Case], at: Any, out: Connection, home: Path
) -> None:
    """Try cases in a process of its own; `at` holds the number of the one at work."""
    import torch

    torch.set_num_threads(1)
    watch = Watch()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, libraries may speak
    with bounded_memory():
        for index, case in enumerate(todo):
            at.value = index
            bench = benches[case.target]
            mine = home / bench.folder.name
            if not mine.exists():  # files are changed: each process has its own
                import shutil

                shutil.copytree(bench.folder, mine)
                benches[case.target] = bench = Bench(bench.name, mine)
            what, opened = bench.try_(case, watch)
            if what:
                out.send(("finding", Finding(case, what)))
            if opened:
                out.send(("opened", case))
    at.value = len(todo)
    out.send(("done", len(todo)))


@dataclass
class _Worker:
    process: Any
    todo: Sequence[Case]
    at: Any
    out: Connection
    seen: int = -1
    since: float = 0.0


class Campaign:
    """Cases shared out to processes; those that crash or hang are replaced.

    Attributes:
        findings: in the order in which they were met.
        opened: how many cases of each target could be opened in spite of the change.
        tried: how many cases of each target were tried.
    """

    def __init__(self, todo: Sequence[Case], *, processes: int, root: Path) -> None:
        names = dict.fromkeys(case.target for case in todo)
        self.root = root
        self.benches = {name: Bench.make(name, root) for name in names}
        for bench in self.benches.values():
            bench.open()  # unchanged, it opens
        self.waiting = [todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK)][::-1]
        self.processes = processes
        self.findings: list[Finding] = []
        self.opened = dict.fromkeys(names, 0)
        self.tried = dict.fromkeys(names, 0)

    def run(self, tell: Callable[[int], None] = lambda done: None) -> None:
        """Try all; `tell` is called with the number of cases that are done."""
        context = multiprocessing.get_context("fork")
        workers: list[_Worker] = []
        started = done = 0
        while self.waiting or workers:
            while self.waiting and len(workers) < self.processes:
                todo, (receive, send) = self.waiting.pop(), context.Pipe(duplex=False)
                at, home = context.Value("q", -1, lock=False), self.root / f"process-{started}"
                home.mkdir()
                started += 1
                process = context.Process(target=_work, args=(self.benches, todo, at, send, home))
                process.start()
                send.close()
                workers.append(_Worker(process, todo, at, receive, since=time.monotonic()))
            wait([worker.out for worker in workers], timeout=0.2)
            for worker in list(workers):
                finished = self._look(worker)
                if finished is not None:
                    workers.remove(worker)
                    done += finished
            tell(done + sum(max(worker.at.value, 0) for worker in workers))

    def _look(self, worker: _Worker) -> int | None:
        """Take what a process says; how many cases it has tried if it is at its end, else None."""
        ended = False
        with contextlib.suppress(EOFError):
            while worker.out.poll():
                kind, what = worker.out.recv()
                if kind == "finding":
                    self.findings.append(what)
                elif kind == "opened":
                    self.opened[what.target] += 1
                else:
                    ended = True
        if not ended and worker.process.is_alive():
            if worker.at.value != worker.seen:
                worker.seen, worker.since = worker.at.value, time.monotonic()
            if time.monotonic() - worker.since < HANGS_AFTER:
                return None
            worker.process.kill()
            worker.process.join()
            return self._replace(worker, f"hung for {HANGS_AFTER:.0f} s")
        worker.process.join()
        if not ended:
            return self._replace(worker, f"the process died ({worker.process.exitcode})")
        return self._count(worker, len(worker.todo))

    def _replace(self, worker: _Worker, what: str) -> int:
        index = max(worker.at.value, 0)
        self.findings.append(Finding(worker.todo[index], what))
        if rest := worker.todo[index + 1 :]:
            self.waiting.append(rest)
        return self._count(worker, index + 1)

    def _count(self, worker: _Worker, tried: int) -> int:
        worker.out.close()
        for case in worker.todo[:tried]:
            self.tried[case.target] += 1
        return tried
