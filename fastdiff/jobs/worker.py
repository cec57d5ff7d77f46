"""A worker: takes shards one after another and makes their images.

rows -> jobs -> engine -> image -> encoder threads -> spool of the shard -> shard, once it is whole

The engine never waits for a shard to be finished: while the last images of one are being made, rows
of the next one join. Encoding and writing happen in threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoint.model import Model
from fastdiff.files import message_line, names_full_disk
from fastdiff.generate.job import Job
from fastdiff.generate.run import Result, stream
from fastdiff.generate.session import Session
from fastdiff.generate.webui import to_parameters
from fastdiff.images import encoded
from fastdiff.jobs.fields import Builder, Columns
from fastdiff.jobs.pictures import CHANGED, Pictures
from fastdiff.jobs.rows import Reader, Row, Rows
from fastdiff.jobs.shards import AnyClaims, Claims, Item, Shards
from fastdiff.jobs.spec import JobSpec
from fastdiff.memory import NotEnoughMemory

ENCODERS = 4
SPOOL = 2**26
"""Bytes of encoded images of a shard that are kept in memory; more go to an unnamed file."""
AHEAD = 16
"""Rows that may be read before the oldest unfinished one is made, in units of the slots: results
come in any order, and each unfinished shard takes a spool."""
WAIT = 0.5
"""Seconds between two looks at shards that another process holds."""
TELL = 0.5
SHOWN = 300
"""Letters of a row's input that its error record repeats."""


@dataclass(frozen=True)
class Counts:
    """What a worker has done so far."""

    made: int = 0
    """Images."""
    failed: int = 0
    """Rows that have an error record instead."""
    shards: int = 0
    busy: int = 0
    """Slots in use."""
    slots: int = 0
    settled: int = 0
    """Rows of the shards that it has finished."""
    waiting: int = 0
    """Shards that another process holds."""
    memory: int = 0
    """Bytes in use, of the GPU if there is one."""


@dataclass(frozen=True)
class Begun:
    """What a job settled when it began: equal for all its workers, on every machine."""

    model: str
    """Name of the model in the recipes."""
    weights: str
    """Hash of its weights."""
    pictures: str | None
    """Hash of the file of hashes of pictures; None if rows name no pictures."""

    @classmethod
    def of(cls, fingerprint: Mapping[str, Any]) -> Begun:
        return cls(fingerprint["model"], fingerprint["weights"], fingerprint["pictures"])

    def check_weights(self, model: Model) -> None:
        """
        Raises:
            ValueError: the model has other weights.
        """
        if model.weights_hash != self.weights:
            raise ValueError(
                f"the weights of {model.path} have changed since the job began (hash "
                f"{self.weights[:12]}, now {model.weights_hash[:12]}); put the old ones back to "
                "resume, or give another --out"
            )


class _Open:
    """A shard that is being made."""

    def __init__(self, number: int, rows: range, folder: str | None) -> None:
        self.number, self.left = number, len(rows)
        self._spool = tempfile.SpooledTemporaryFile(SPOOL, dir=folder)  # noqa: SIM115
        self._places: dict[int, tuple[int, int, int]] = {}  # row -> start, bytes of image, recipe
        self.errors: dict[int, dict[str, Any]] = {}
        self._guard = threading.Lock()

    def add(self, item: Item) -> bool:
        """Keep an image. Returns whether it was the last."""
        with self._guard:
            start = self._spool.seek(0, os.SEEK_END)
            self._spool.write(item.image)
            self._spool.write(item.recipe)
            self._places[item.row] = start, len(item.image), len(item.recipe)
            return self._one_less()

    def fail(self, row: int, record: dict[str, Any]) -> bool:
        with self._guard:
            self.errors[row] = record
            return self._one_less()

    def _one_less(self) -> bool:
        self.left -= 1
        return not self.left

    def items(self) -> Iterator[Item]:
        """The images, in the order of their rows."""
        for row, (start, image, recipe) in sorted(self._places.items()):
            self._spool.seek(start)
            yield Item(row, self._spool.read(image), self._spool.read(recipe))

    def records(self) -> list[dict[str, Any]]:
        return [record for _, record in sorted(self.errors.items())]

    def close(self) -> None:
        self._spool.close()


ALONE = "the image does not fit in memory, even alone; use a smaller height and width"
_Task = tuple[_Open, Row, Job]


@dataclass(eq=False)
class Worker:
    """Makes the shards of a job that nobody else is making."""

    spec: JobSpec
    rows: Rows
    session: Session
    begun: Begun
    slots: int
    tell: Callable[[Counts], None] = lambda counts: None
    """Called while it goes on, at most every `TELL` seconds, and at the end."""
    share: tuple[int, int] = (0, 1)
    """(i, n): only shards i, i + n, i + 2n and so on."""
    retry: frozenset[int] = frozenset()
    """Finished shards whose rows with an error record are made again."""
    claims: AnyClaims | None = None
    """Who makes which shard; None: locks on files, if the store has them."""
    made: int = 0
    failed: int = 0
    finished: int = 0
    settled: int = 0
    _waiting: int = 0
    _told: float = 0.0
    _is_over: bool = False
    _alone: bool = False  # after out of memory with one slot: one row at a time
    _begun: set[int] = field(default_factory=set)
    _running: dict[int, _Task] = field(default_factory=dict)  # by the number of the job in `stream`
    _again: deque[_Task] = field(default_factory=deque)  # to be made again after out of memory
    _open: dict[int, _Open] = field(default_factory=dict)
    _error: BaseException | None = None  # of a thread

    def __post_init__(self) -> None:
        self.shards = Shards.of(self.spec, self.rows.count)
        self._claims = Claims(self.shards.store) if self.claims is None else self.claims
        folder = self.shards.store.folder
        self._spools = None if folder is None else str(folder)
        self._reader = Reader(self.rows)
        self._tasks = self._all_tasks()
        self._guard = threading.Lock()
        self._first_slots = self.slots
        self._most_open = 2 + AHEAD * self.slots // self.spec.shard_size
        self._room = threading.Semaphore(4 * ENCODERS)
        self._build = builder_of(self.spec, self.rows, self.session)
        self._pictures = Pictures(self.shards.store, self.begun.pictures)

    @property
    def counts(self) -> Counts:
        return Counts(
            made=self.made,
            failed=self.failed,
            shards=self.finished,
            settled=self.settled,
            busy=min(len(self._running), self.slots),
            slots=self.slots,
            waiting=self._waiting,
            memory=memory_in_use(self.session.device),
        )

    def run(self) -> None:
        """Make shards until all of this worker's share are finished.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        try:
            with self._writer, encoders:  # encoders end first, because they submit to the writer
                self._encoders = encoders
                while self._sample():
                    self._settle()
            self._raise()
            assert not self._open, "rows were lost"
        finally:
            for shard in self._open.values():
                shard.close()
            self._claims.close()
            self._pictures.close()
        if isinstance(self._claims, Claims):
            self._claims.clean(self.shards)
        self.tell(self.counts)

    def _sample(self) -> bool:
        """Make images until there are no more rows, or too many shards are open.

        Returns whether there is more to do.
        """
        self._running.clear()
        short = False
        try:
            results = stream(
                self.session.model,
                self._jobs(),
                on_failure=self._fail,
                batch=self.slots,
                progress=lambda done, total: self._tick(),
                graphs=self.spec.graphs,
            )
            for number, result in results:
                shard, row, _ = self._running.pop(number)
                self._room.acquire()
                self._encoders.submit(self._encode, shard, row, result)
                self._raise()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not self._running:
                raise
            short = True
        if short:  # the error and what its frames hold is gone
            self._back_off()
        return bool(self._again) or not self._is_over

    def _back_off(self) -> None:
        """After out of memory: halve the slots; with one slot, one row at a time. A row that does
        not fit even so has failed."""
        if self.slots > 1:
            self.slots //= 2
        elif len(self._running) > 1:
            self._alone = True
        else:
            self._fail(next(iter(self._running)), NotEnoughMemory(ALONE))
            self._alone, self.slots = False, self._first_slots
        self._again.extend(self._running.values())
        self._running.clear()
        self.session.forget_engines()
        warnings.warn(f"out of memory; going on with {self.slots} slots", stacklevel=1)

    def _settle(self) -> None:
        """Wait until few enough shards are open; rows to be made again are in those."""
        while not self._again and (
            len(self._open) >= self._most_open or (self._waiting and self._open)
        ):
            self._raise()
            time.sleep(0.01)
        self._raise()

    # --- rows to jobs -----------------------------------------------------------------------------

    def _jobs(self) -> Iterator[Job]:
        number = 0
        self._alone = self._alone and bool(self._again)
        while not (self._alone and number):
            self._raise()
            task = self._again.popleft() if self._again else next(self._tasks, None)
            if task is None:
                self._is_over = True
            if task is None or isinstance(task, _Pause):
                return
            self._running[number] = task
            number += 1
            yield task[2]

    def _all_tasks(self) -> Iterator[_Task | _Pause]:
        """The rows of all shards; `_Pause` asks to finish what was begun."""
        while True:
            held = 0
            for number in range(self.share[0], len(self.shards), self.share[1]):
                if not self._is_wanted(number):
                    continue
                while len(self._open) >= self._most_open:
                    yield _Pause()
                if not self._claims.take(number):
                    held += 1
                    continue
                if self._is_wanted(number):
                    yield from self._begin(number)
                else:  # another process has just finished it
                    self._claims.release(number)
            self._waiting = held
            if not held:
                return
            yield _Pause()
            self._tick()
            time.sleep(WAIT)

    def _is_wanted(self, number: int) -> bool:
        if not self.shards.is_finished(number):
            return number not in self._open
        return number in self.retry and number not in self._begun

    def _begin(self, number: int) -> Iterator[_Task]:
        """The rows of a shard that have no image yet."""
        rows = self.shards.range(number)
        shard = self._open[number] = _Open(number, rows, self._spools)
        self._begun.add(number)
        there = set[int]()
        if self.shards.is_finished(number):
            for item in self.shards.read(number):
                there.add(item.row)
                shard.add(item)
            if not shard.left:  # killed between the shard and its errors
                self._close(shard)
        for row in self._reader.read(rows.start, rows.stop):
            if row.number in there:
                continue
            try:
                job = self._build(row)
            except (ValueError, OSError) as error:
                self._record(shard, row, error)
                continue
            yield shard, row, job

    # --- results to shards ------------------------------------------------------------------------

    def _fail(self, number: int, error: Exception) -> None:
        shard, row, _ = self._running.pop(number)
        self._record(shard, row, error)

    def _record(self, shard: _Open, row: Row, error: Exception) -> None:
        self._build.fetched.pop(row.number, None)
        values = {
            name: f"{len(value):,} bytes" if isinstance(value, bytes) else value
            for name, value in row.values.items()
        }
        shown = json.dumps(values, default=str, ensure_ascii=True)
        record = {"row": row.number, "error": message_line(error), "input": shown[:SHOWN]}
        with self._guard:
            self.failed += 1
        if shard.fail(row.number, record):
            self._close(shard)

    def _encode(self, shard: _Open, row: Row, result: Result) -> None:
        """In a thread: an image to bytes, and into its shard."""
        try:
            if self._error is not None:
                return
            try:
                recipe = self._recipe(row, result)
                image = encoded(
                    result.image,
                    self.spec.image,
                    recipe,
                    parameters=to_parameters(recipe),
                    quality=self.spec.quality,
                )
            except (ValueError, FileNotFoundError) as error:  # NaN, or a picture changed or went
                self._record(shard, row, error)
                return
            text = json.dumps(recipe, sort_keys=True).encode()
            with names_full_disk(Path(self.shards.store.place, self.shards.name(shard.number))):
                last = shard.add(Item(row.number, image, text))
            with self._guard:
                self.made += 1
            if last:
                self._close(shard)
        except BaseException as error:  # noqa: BLE001, raised in the main thread
            self._error = self._error or error
        finally:
            self._room.release()

    def _recipe(self, row: Row, result: Result) -> dict[str, Any]:
        """The recipe, with names in place of paths, so that it is the same on every machine.

        Raises:
            ValueError: a picture has changed.
        """
        job, model = dict(result.recipe["job"]), self.begun.model
        recipe = {**result.recipe, "job": job, "model": model, "load": self.spec.load.recorded}
        if self.session.device.type != "cpu":  # where network rows per evaluation may decide
            recipe["slots"] = self.slots
        paths, fetched = self._build.paths(row), self._build.fetched.pop(row.number, {})
        for name, path in paths.items():
            digest = fetched.get(name, job[name]["sha256"])
            job[name] = {"path": path, "sha256": digest}
        if not self._pictures.agree(row.number, {name: job[name]["sha256"] for name in paths}):
            raise ValueError(CHANGED)
        return recipe

    def _close(self, shard: _Open) -> None:
        self._writer.submit(self._write, shard)

    def _write(self, shard: _Open) -> None:
        """In a thread: give a whole shard its name."""
        try:
            if self._error is None:
                self.shards.write(shard.number, shard.items(), shard.records())
                self.finished += 1
                self.settled += len(self.shards.range(shard.number))
                self._claims.release(shard.number)
                shard.close()
                del self._open[shard.number]
        except BaseException as error:  # noqa: BLE001, raised in the main thread
            self._error = self._error or error

    def _tick(self) -> None:
        if time.monotonic() > self._told + TELL:
            self._told = time.monotonic()
            self.tell(self.counts)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def builder_of(spec: JobSpec, rows: Rows, session: Session) -> Builder:
    """What makes the jobs of the rows.

    Raises:
        ValueError: a column, a mapping or a default is wrong.
    """
    return Builder(
        Columns(spec.columns, spec.ignore),
        spec.defaults,
        session.facts,
        seed=spec.seed,
        folder=rows.folder,
    )


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with this number of CPU threads; None: with those that are set."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Pause:
    """Nothing to begin for now."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no more memory."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return (
        isinstance(error, MemoryError)
        or "OutOfMemoryError" in names
        or any(text in str(error) for text in ("out of memory", "ALLOC_FAILED", "can't allocate"))
    )


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process uses on a device; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
