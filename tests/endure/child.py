"""Run work in a separate process, and kill that process."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdiff import files

FILE_CALLS = (
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod"),
    *("os.truncate", "os.utime", "shutil.rmtree", "os.listdir", "os.scandir"),
)
"""Audit events of Python's that are system calls on files."""


@dataclass(frozen=True)
class Blow:
    """When a process is killed.

    Attributes:
        how: "time": after `at` seconds; "call": just before its `at`th system call on a file of
            its folder; "write": in the middle of the write that takes a file beyond `at` bytes.
    """

    how: Literal["time", "call", "write"]
    at: float


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus a signal; what it said; its calls on files."""

    code: int
    said: str
    calls: int = 0

    @property
    def killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


class Child:
    """`work` in a fork of this process, which must have one thread."""

    def __init__(self, work: Callable[[], int | None], folder: Path, blow: Blow | None = None):
        self.blow = blow
        self.since = time.monotonic()
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            _child(work, folder, blow, writer)
        os.close(writer)
        self._reader = reader

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Until it ends; it is killed if that is due."""
        if self.blow is not None and self.blow.how == "time":
            while time.monotonic() < self.since + self.blow.at:
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.001)
            else:
                self.kill()
        _, status = os.waitpid(self.pid, 0)
        with os.fdopen(self._reader) as pipe:
            calls, _, said = pipe.read().partition("\n")
        return Ended(os.waitstatus_to_exitcode(status), said, int(calls or 0))


def attempt(work: Callable[[], int | None], folder: Path, blow: Blow | None = None) -> Ended:
    """Do `work` in a separate process until it ends or is killed."""
    return Child(work, folder, blow).wait()


def import_what(work: Callable[[], object], listed: Path) -> None:
    """Import here what a work imports, so that each fork need not: that takes two seconds."""

    def noting() -> None:
        work()
        listed.write_text("\n".join(sys.modules))

    ended = attempt(noting, listed)
    assert ended.code == 0, ended.said
    for name in listed.read_text().splitlines():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _child(work: Callable[[], int | None], folder: Path, blow: Blow | None, writer: int) -> None:
    """Never returns."""
    said, calls, code = io.StringIO(), _Calls(folder, blow), 1
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if blow is not None and blow.how == "write":
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(blow.at), resource.RLIM_INFINITY))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            calls.watch()
            code = work() or 0
            calls.on = False
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001, it is reported
        calls.on = False
        said.write(traceback.format_exc())
    finally:
        os.write(writer, f"{calls.count}\n{said.getvalue()}"[:60_000].encode(errors="replace"))
        os._exit(code)


class _Calls:
    """Counts the system calls on files in a folder, and kills the process before one of them."""

    def __init__(self, folder: Path, blow: Blow | None) -> None:
        self.folder = str(folder)
        self.last = int(blow.at) if blow is not None and blow.how == "call" else None
        self.count = 0
        self.on = False

    def watch(self) -> None:
        fsync, exchange = os.fsync, files._exchange

        def synced(handle: int) -> None:
            self.one()
            fsync(handle)

        def exchanged(one: Path, other: Path) -> bool:
            self.one()
            return exchange(one, other)

        os.fsync, files._exchange = synced, exchanged
        sys.addaudithook(self.see)
        self.on = True

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in FILE_CALLS or not arguments:
            return
        path = arguments[0]
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
            self.one()

    def one(self) -> None:
        if self.on:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def blows(*, calls: int, seconds: float, largest: int, seed: int = 0) -> Iterator[Blow]:
    """Endless kills: half of them at system calls, a third at times, the rest during writes.

    calls, seconds, largest: of undisturbed work; `largest` is the bytes of its largest file.
    """
    rng = random.Random(seed)
    for number in itertools.count():
        if number % 6 in (0, 2, 4):
            yield Blow("call", rng.randint(1, calls))
        elif number % 6 in (1, 3):
            yield Blow("time", rng.uniform(0, seconds))
        else:
            yield Blow("write", rng.randint(1, largest - 1))
