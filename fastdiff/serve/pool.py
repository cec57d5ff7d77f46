"""Several engine processes behind one queue: one per GPU, or on a CPU some that share the cores.

    queue -> the process with the most room -> (engine.py: slots, steps, decoding) -> events

A process that dies, or whose step takes too long, is replaced, and its images are made by another
one; on a CPU they have the same bytes. An image whose processes have died twice is answered with
503, since it may be what kills them. Nothing that the server has accepted is left without an
answer.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import Job
from fastdiff.serve.engine import Setup, error_of, job_frame
from fastdiff.serve.errors import ApiError
from fastdiff.serve.frames import Channel
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.queue import FairQueue
from fastdiff.serve.worker import (
    CLOSING,
    FORGETTING,
    LATE,
    Call,
    Done,
    Failed,
    Made,
    Partial,
    check_served,
    cost_of,
    queue_full,
    share_of,
    wait_for,
)

LOG = logging.getLogger("fastdiff.serve")
COMMAND = (
    "import sys; sys.path[:] = {path!r}; from fastdiff.serve.engine import main; "
    "sys.exit(main({descriptor}))"
)
"""The program of an engine process; it imports what the server would."""
ATTEMPTS = 2
"""Processes that may die with an image before it is given up."""
DEATHS = 3
"""Processes in a row that end before they are ready, after which their place is given up."""
START = 600.0
"""Seconds that a process has at least to load the model."""
TICK = 0.1
"""Seconds between two looks at deadlines and processes."""
GIVEN_UP = ApiError(
    503,
    "the processes that made this image have ended unexpectedly; try again later",
    "unavailable",
    retry_after=5,
)
NO_PROCESSES = ApiError(503, "no engine process can be started", "unavailable", retry_after=30)


@dataclass(eq=False)
class _Image:
    call: Call
    index: int
    cost: float
    share: float
    since: float
    shown: int = 0
    """Number of partial images that its call has had."""
    deaths: int = 0

    @property
    def job(self) -> Job:
        return self.call.jobs[self.index]


@dataclass(eq=False)
class _Process:
    """A place for an engine process, and the one that has it."""

    setup: Setup
    popen: subprocess.Popen[bytes] | None = None
    channel: Channel | None = None
    images: dict[int, _Image] = field(default_factory=dict)
    ready: bool = False
    heard: float = 0.0
    """When it last sent something, or was started."""
    age: float = 0.0
    """Seconds that its step had taken then."""
    deaths: int = 0
    """Number of processes in a row that ended before they were ready."""

    @property
    def given_up(self) -> bool:
        return self.deaths >= DEATHS

    @property
    def room(self) -> float:
        return 1 - sum(image.share for image in self.images.values())

    @property
    def silence(self) -> float:
        """Seconds that its step takes, or that nothing has been heard of it."""
        if self.popen is None or not self.ready:
            return 0.0
        return self.age + time.monotonic() - self.heard


class Pool:
    """Engine processes with their queue; to callers the same as `worker.Worker`.

    Attributes:
        facts: what requests are checked against.
        crashed: whether no process can be started any more.
    """

    def __init__(
        self, model: Model, setups: Sequence[Setup], metrics: Metrics, *, queue: int, step: float
    ) -> None:
        """
        model: for its facts only.
        setups: one per process.
        queue: most images that wait for a slot.
        step: seconds that a step may take before its process is replaced.
        """
        check_served(model)
        self.facts, self.metrics, self.crashed = Facts.of(model), metrics, False
        self._most, self._step = queue, step
        self._members = [_Process(setup) for setup in setups]
        self._changed = threading.Condition(threading.RLock())
        self._queue: FairQueue[_Image] = FairQueue()
        self._again: deque[_Image] = deque()
        self._cancelled: set[Call] = set()
        self._closing = self._stopped = False
        self._numbers = 0
        self._served, self._spent, self._last = 0.0, 0.0, time.monotonic()
        self._thread = threading.Thread(target=self._main, name="fastdiff-pool", daemon=True)

    def start(self) -> None:
        """Start the processes and wait until all have loaded the model.

        Raises:
            ChildProcessError: one cannot.
        """
        with self._changed:
            for member in self._members:
                self._begin(member)
            self._thread.start()
            self._changed.wait_for(
                lambda: (
                    self.crashed
                    or any(member.deaths for member in self._members)
                    or all(member.ready for member in self._members)
                ),
                START,
            )
            if all(member.ready for member in self._members):
                return
        self.stop()
        raise ChildProcessError("an engine process could not start; its error is above")

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.crashed

    @property
    def step_age(self) -> float:
        """Seconds that the longest step takes, or that a process has been silent."""
        return max(member.silence for member in self._members)

    @property
    def processes(self) -> list[dict[str, Any]]:
        """Per process whether it is ready, its images, and its pid."""
        with self._changed:
            return [
                {
                    "ready": member.ready,
                    "images": len(member.images),
                    "pid": None if member.popen is None else member.popen.pid,
                }
                for member in self._members
            ]

    def submit(self, call: Call) -> None:
        """Queue the images of a call.

        Raises:
            ApiError: they do not fit in the queue, or the pool is closing.
        """
        costs = [cost_of(job, self.facts) for job in call.jobs]
        with self._changed:
            if self._closing or self.crashed:
                raise replace(CLOSING)
            waiting = len(self._queue) + len(self._again)
            if waiting + len(costs) > self._most:
                retry_after = wait_for(self._queue.cost, self._served, self._spent)
                raise queue_full(waiting, self._most, len(costs), retry_after)
            now = time.monotonic()
            for index, cost in enumerate(costs):
                slots = self._members[0].setup.slots
                share = share_of(call.jobs[index], self.facts, slots)
                image = _Image(call, index, cost, share, now)
                self._queue.add(image, flow=call.flow, cost=cost, weight=call.weight)
            self._changed.notify_all()

    def cancel(self, call: Call) -> None:
        """Drop a call; it gets no more events."""
        with self._changed:
            if call.left:
                self._cancelled.add(call)
                self._changed.notify_all()

    def close(self) -> None:
        """Take no more calls, and end when all are finished."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def stop(self) -> None:
        """End now; calls that are not finished fail."""
        with self._changed:
            self._closing = self._stopped = True
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of the processes; whether they have ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            LOG.exception("the pool has crashed")
            self.crashed = True
        finally:
            with self._changed:
                self._closing = True
                for image in self._all():
                    self._fail(image.call, replace(CLOSING))
                for member in self._members:
                    self._end(member)
                self._changed.notify_all()

    def _turn(self) -> bool:
        """Look after calls and processes, and send waiting images; whether to go on."""
        with self._changed:
            self._changed.wait(TICK)
            if self._stopped or (self._closing and not self._all()):
                return False
            self._drop()
            self._watch()
            if all(member.given_up for member in self._members):
                self.crashed = True
                for image in self._all():
                    self._fail(image.call, replace(NO_PROCESSES))
                return False
            sent = self._assigned()
            self.metrics.waiting.set(len(self._queue) + len(self._again))
            self.metrics.running.set(sum(len(member.images) for member in self._members))
        for channel, number, image in sent:
            plain, pictures = job_frame(image.job)
            told = {"do": "make", "id": number, "job": plain, "partials": image.call.partials}
            self._send(channel, told, pictures)
        return True

    def _all(self) -> list[_Image]:
        """All images that are not finished."""
        running = [image for member in self._members for image in member.images.values()]
        return [*self._queue, *self._again, *running]

    def _drop(self) -> None:
        """Free what cancelled and late calls hold."""
        gone, self._cancelled = self._cancelled, set()
        for call in gone:
            self.metrics.dropped.labels("cancelled").inc(call.left > 0)
            call.left = 0
        now = time.monotonic()
        for call in {image.call for image in self._all() if image.call.deadline <= now} - gone:
            if call.left:
                self._fail(call, replace(LATE))
                self.metrics.dropped.labels("deadline").inc()
        self._queue.remove(lambda image: not image.call.left)
        self._again = deque(image for image in self._again if image.call.left)
        for member in self._members:
            for number, image in list(member.images.items()):
                if not image.call.left:
                    del member.images[number]
                    if member.channel is not None:
                        self._send(member.channel, {"do": "cancel", "id": number}, {})

    def _watch(self) -> None:
        """Replace processes that have ended, and end those that hang."""
        for member in self._members:
            if member.popen is None:
                if not member.given_up:
                    self._begin(member)
                continue
            silent = time.monotonic() - member.heard
            if member.silence > self._step or (not member.ready and silent > START):
                LOG.error("an engine process hangs and is replaced")
                member.popen.kill()
                self._ended(member)

    def _assigned(self) -> list[tuple[Channel, int, _Image]]:
        """Give waiting images to processes that have room. One image more than fits may wait in a
        process, so that a slot that becomes free is taken at once."""
        sent = []
        while (image := self._again[0] if self._again else self._queue.first()) is not None:
            ready = [each for each in self._members if each.ready and each.channel is not None]
            member = max(ready, key=lambda each: each.room, default=None)
            if member is None or (member.images and member.room < -1e-9):
                break
            if self._again:
                self._again.popleft()
            else:
                self._queue.pop()
                self.metrics.queued.observe(time.monotonic() - image.since)
            self._numbers += 1
            member.images[self._numbers] = image
            assert member.channel is not None
            sent.append((member.channel, self._numbers, image))
        return sent

    def _send(self, channel: Channel, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            channel.send(told, tensors)
        except OSError:
            LOG.warning("an engine process does not read")  # its end, or its silence, is noticed

    def _begin(self, member: _Process) -> None:
        """Start a process for a place."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = COMMAND.format(path=sys.path, descriptor=theirs.fileno())
            member.popen = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the server, which drains
            )
        member.channel, member.ready = Channel(ours), False
        member.heard, member.age = time.monotonic(), 0.0
        self._send(member.channel, member.setup.recorded, {})
        arguments = member, member.channel
        threading.Thread(target=self._listen, args=arguments, daemon=True).start()

    def _end(self, member: _Process) -> None:
        """End a process and take its place."""
        if member.popen is not None:
            member.popen.kill()
            member.popen.wait()
        if member.channel is not None:
            member.channel.close()
        member.popen = member.channel = None
        member.ready = False

    def _listen(self, member: _Process, channel: Channel) -> None:
        """Take what a process sends until it ends."""
        while (message := channel.receive()) is not None:
            with self._changed:
                if member.channel is not channel:
                    return  # it has been replaced
                self._hear(member, *message)
        with self._changed:
            if member.channel is channel and not self._stopped:
                self._ended(member)

    def _hear(self, member: _Process, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        member.heard, kind = time.monotonic(), told["is"]
        if kind == "beat":
            member.age = told["age"]
            for seconds in told["steps"]:
                self.metrics.steps.observe(seconds)
            self.metrics.rows.inc(told["rows"])
            return
        if kind == "ready":
            member.ready, member.deaths = True, 0
            self._changed.notify_all()
            return
        image = member.images.get(told["id"])
        if image is None or not image.call.left:
            return  # cancelled meanwhile
        call = image.call
        if kind == "partial":
            if told["number"] == image.shown:  # not again after a process has died
                image.shown += 1
                call.on_event(Partial(image.index, told["number"], tensors["image"]))
            return
        del member.images[told["id"]]
        if kind == "failed":
            self._fail(call, error_of(told["error"]))
            return
        now = time.monotonic()
        self._served = FORGETTING * self._served + image.cost
        self._spent = FORGETTING * self._spent + min(now - self._last, 10.0)
        self._last = now
        call.left -= 1
        self.metrics.images.inc()
        made = Made(image.job, tensors["image"], told["recipe"])
        call.on_event(Done(image.index, made))
        self._changed.notify_all()

    def _ended(self, member: _Process) -> None:
        """Take back the images of a process that has ended; the next turn replaces it."""
        LOG.error("an engine process has ended; %d images are made again", len(member.images))
        member.deaths += not member.ready
        self._end(member)
        for image in member.images.values():
            image.deaths += 1
            if image.deaths >= ATTEMPTS:
                self._fail(image.call, replace(GIVEN_UP))
            elif image.call.left:
                self._again.append(image)
        member.images.clear()
        self.metrics.dropped.labels("process").inc()
        self._changed.notify_all()

    def _fail(self, call: Call, error: ApiError) -> None:
        if call.left:
            call.left = 0
            call.on_event(Failed(error))
