"""The thread that owns the model: it plans images, steps engines and decodes, in turns.

    queue -> plan -> slot of an engine, one step at a time -> latents -> decoded, a piece at a time

Between two steps: requests whose client has left or whose time is over lose their slots, waiting
images take free ones for at most as long as a step takes, and one piece of latents is decoded: a
single image, or on a CPU as many small ones as one call of the decoder takes anyway. So neither a
long request nor decoding stalls the others for longer than that.

Everything that touches the model runs in this thread. Other threads call `submit`, `cancel` and
`close`; answers are calls of `Call.on_event`, in this thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.generate.cost import evaluations
from fastdiff.generate.facts import Facts, default_batch, is_small
from fastdiff.generate.job import ClassJob, Job, TextJob
from fastdiff.generate.run import Result, engine_request, pasted, plan
from fastdiff.generate.session import Pass, Session
from fastdiff.kernels import backend
from fastdiff.kernels.choose import record_backends, selected_backend
from fastdiff.memory import NotEnoughMemory
from fastdiff.runtime.blocks import block_size
from fastdiff.runtime.engine import Engine, ShapeClass
from fastdiff.runtime.graphs import no_graphs
from fastdiff.runtime.run import KEPT, Engines
from fastdiff.serve.errors import ApiError, in_our_words, wrong
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.queue import FairQueue

LOG = logging.getLogger("fastdiff.serve")
LONGEST_WAIT = 60
"""Most seconds that a client is asked to wait before it tries again."""
FORGETTING = 0.98
"""Weight of the past in running means, per step."""
NOT_FINITE = (
    "the network returned NaN or infinity with these settings; use a smaller guidance_scale or "
    "another sampler"
)
LATE = ApiError(
    504,
    "the deadline of this server has passed; ask for fewer images or steps",
    "deadline_exceeded",
)
CLOSING = ApiError(503, "the server is shutting down", "unavailable", retry_after=5)
BROKEN = ApiError(500, "the server failed to make this image", "server_error", retry_after=1)


@dataclass(frozen=True, eq=False)
class Partial:
    """An estimate of an unfinished image."""

    index: int
    """Position of the image in its call."""
    number: int
    """Position among the partial images, from 0."""
    image: Tensor
    """(C, H, W) in [-1, 1]."""


@dataclass(frozen=True, eq=False)
class Made:
    """An image of another process."""

    job: Job
    image: Tensor
    """(C, H, W) in [-1, 1]."""
    recipe: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Done:
    """A finished image."""

    index: int
    result: Result | Made


@dataclass(frozen=True, eq=False)
class Failed:
    """The call has failed; no other event follows."""

    error: ApiError


Event = Partial | Done | Failed


@dataclass(eq=False, kw_only=True)
class Call:
    """The images of one request."""

    jobs: Sequence[Job]
    """Checked jobs."""
    on_event: Callable[[Event], None]
    """Called in the worker's thread; must return at once."""
    flow: Hashable
    """Who shares a fair part of the queue: a client, or this request."""
    deadline: float
    """`time.monotonic()` at which the call is dropped."""
    partials: int = 0
    """Number of partial images per image."""
    weight: float = 1.0
    """Of its flow in the queue."""
    left: int = field(init=False)
    """Number of images that are not finished; 0 once it has failed or was cancelled."""

    def __post_init__(self) -> None:
        self.left = len(self.jobs)


@dataclass(eq=False)
class _Image:
    """An image of a call on its way through the worker."""

    call: Call
    index: int
    cost: float
    since: float
    now: Pass | None = None
    engine: ShapeClass | None = None
    ticket: int = -1
    share: float = 0.0
    """Part of the worker's room that it takes."""
    asked: list[int] = field(default_factory=list)
    """Rows after which a partial image is made, the next one last."""
    shown: int = 0

    @property
    def job(self) -> Job:
        return self.call.jobs[self.index]


@dataclass(frozen=True, eq=False)
class _Latents:
    """Latents to decode: of a finished image, or of a partial one."""

    image: _Image
    z: Tensor
    partial: int | None = None


class Worker:
    """A model with its queue and its thread.

    Attributes:
        metrics: what it counts.
        crashed: whether the thread ended with an error; the server is then unhealthy.
        facts: what requests are checked against.
        served: op -> the backends that have run it.
    """

    def __init__(
        self,
        model: Model,
        metrics: Metrics,
        *,
        queue: int,
        slots: int | None = None,
        graphs: bool = True,
        threads: int | None = None,
    ) -> None:
        """
        queue: most images that wait for a slot.
        slots: most images at a time, by default a number for their size, as in `generate`.
        graphs: on a GPU run each step as a CUDA graph.
        threads: of the CPU; None: PyTorch's choice.
        """
        check_served(model)
        self.session, self.metrics, self.crashed = Session.of(model), metrics, False
        self.facts = self.session.facts
        self.served: dict[str, set[str]] = {}
        self._busy_since: float | None = None  # `time.monotonic()` at which a turn began
        self._most, self._slots, self._graphs, self._threads = queue, slots, graphs, threads
        self._changed = threading.Condition()
        self._queue: FairQueue[_Image] = FairQueue()
        self._cancelled: set[Call] = set()
        self._closing = self._stopped = False
        self._engines: dict[ShapeClass, tuple[Engine, ExitStack]] = {}  # the last stepped one last
        self._running: dict[tuple[ShapeClass, int], _Image] = {}
        self._latents: deque[_Latents] = deque()
        self._fits: set[Hashable] = set()
        self._pace = 0.0  # seconds per step
        self._served, self._spent = 0.0, 0.0  # cost of finished images, seconds; fading
        self._thread = threading.Thread(target=self._main, name="fastdiff-worker", daemon=True)

    def start(self) -> None:
        """Prepare the model and start the thread."""
        self.prepare()
        self._thread.start()

    def prepare(self) -> None:
        """Prepare the networks, hash the weights for recipes, and note the backend of the ops that
        the caller has chosen."""
        session = self.session
        _ = session.latents, session.conditions, session.model.weights_hash
        plain = Engines(session.network, graphs=no_graphs)
        self._source = session.engines if self._graphs else plain
        self._backend = selected_backend()

    def turn(self) -> bool:
        """Do what is due until the end of one step; False if there will be no more to do.

        Waits for a call if there is none. Only the worker's own thread calls this, or a caller that
        has not started it.
        """
        if not self._begin_turn():
            return False
        self._busy_since = time.monotonic()
        self._admit()
        self._step()
        self._decode()
        self._busy_since = None
        return True

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.crashed

    @property
    def step_age(self) -> float:
        """Seconds since the turn that is under way began; 0 between turns."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, call: Call) -> None:
        """Queue the images of a call.

        Raises:
            ApiError: they do not fit in the queue, or the worker is closing.
        """
        costs = [cost_of(job, self.facts) for job in call.jobs]
        with self._changed:
            if self._closing or self.crashed:
                raise replace(CLOSING)
            if len(self._queue) + len(costs) > self._most:
                raise queue_full(len(self._queue), self._most, len(costs), self._wait())
            now = time.monotonic()
            for index, cost in enumerate(costs):
                image = _Image(call, index, cost, now)
                self._queue.add(image, flow=call.flow, cost=cost, weight=call.weight)
            self.metrics.waiting.set(len(self._queue))
            self._changed.notify()

    def cancel(self, call: Call) -> None:
        """Drop a call, before the next step; it gets no more events."""
        with self._changed:
            if call.left:
                self._cancelled.add(call)
                self._changed.notify()

    def close(self) -> None:
        """Take no more calls, and end when all are finished."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def stop(self) -> None:
        """End before the next step; calls that are not finished fail."""
        with self._changed:
            self._closing = self._stopped = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of the thread; whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _wait(self) -> int:
        """Seconds in which about half of the queue will be done."""
        return wait_for(self._queue.cost, self._served, self._spent)

    def _main(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # holds for this thread only
        try:
            with backend(self._backend), record_backends() as self.served:
                while self.turn():
                    pass
        except Exception:
            LOG.exception("the worker has crashed")
            self.crashed = True
        finally:
            with self._changed:
                self._closing = True
                error = ApiError(500, "the server failed", "server_error", retry_after=5)
                for call in {image.call for image in self._all()}:
                    self._fail(call, error)
                for _, stack in self._engines.values():
                    stack.close()

    def _all(self) -> list[_Image]:
        """All images that are not finished."""
        decoding = [latents.image for latents in self._latents]
        return [*self._queue, *self._running.values(), *decoding]

    def _begin_turn(self) -> bool:
        """Wait for calls, and drop those that are not wanted any more; whether to go on."""
        with self._changed:
            while not (
                self._stopped or self._cancelled or self._queue or self._running or self._latents
            ):
                if self._closing:
                    return False
                self._changed.wait()
            if self._stopped:
                return False
            gone, self._cancelled = self._cancelled, set()
            for call in gone:
                self.metrics.dropped.labels("cancelled").inc(call.left > 0)
                call.left = 0
            now = time.monotonic()
            late = {image.call for image in self._all() if image.call.deadline <= now} - gone
            for call in late:
                self._fail(call, replace(LATE))
                self.metrics.dropped.labels("deadline").inc()
            if gone or late:
                self._drop()
            return True

    def _drop(self) -> None:
        """Free what calls without images left hold."""
        with self._changed:
            self._queue.remove(lambda image: not image.call.left)
        for (kind, ticket), image in list(self._running.items()):
            if not image.call.left:
                self._engines[kind][0].cancel(ticket)
                del self._running[kind, ticket]
        self._latents = deque(each for each in self._latents if each.image.call.left)
        self.metrics.waiting.set(len(self._queue))
        self.metrics.running.set(len(self._running))

    def _fail(self, call: Call, error: ApiError) -> None:
        if call.left:
            call.left = 0
            call.on_event(Failed(error))

    def _admit(self) -> None:
        """Move waiting images into slots: at least one if there is room, then for as long as a step
        takes."""
        begin = time.perf_counter()
        while True:
            with self._changed:
                image = self._queue.first()
                if image is None or not self._has_room(image):
                    return
                self._queue.pop()
                self.metrics.waiting.set(len(self._queue))
            self.metrics.queued.observe(time.monotonic() - image.since)
            try:
                self._place(image)
            except (ValueError, NotEnoughMemory) as error:
                self._fail(image.call, _refusal(error))
                self._drop()
            except Exception:
                LOG.exception("planning an image has failed")
                self._fail(image.call, BROKEN)
                self._drop()
            if time.perf_counter() - begin > self._pace:
                return

    def _has_room(self, image: _Image) -> bool:
        used = [*self._running.values(), *(latents.image for latents in self._latents)]
        image.share = share_of(image.job, self.facts, self._slots)
        return not used or sum(each.share for each in used) + image.share <= 1 + 1e-9

    def _place(self, image: _Image) -> None:
        """Plan an image and give it a slot.

        Raises:
            ValueError: it does not fit the model.
            NotEnoughMemory: it does not fit in memory.
        """
        self._check_memory(image)
        image.now = plan(self.session, image.job)
        if image.now.request is None:
            assert image.now.x is not None
            self._latents.append(_Latents(image, image.now.x))
            return
        request = engine_request(image.now, tag=image)
        image.engine, rows = request.shape_class, len(request.table)
        count = image.call.partials + 1
        marks = {rows * (number + 1) // count for number in range(image.call.partials)}
        image.asked = sorted(marks - {0, rows}, reverse=True)
        engine = self._engine(image.engine, image.share)
        image.ticket = engine.submit(request)
        self._running[image.engine, image.ticket] = image
        self._ask(engine, image, 0)
        self.metrics.running.set(len(self._running))

    def _check_memory(self, image: _Image) -> None:
        session, job, count = self.session, image.job, round(1 / image.share)
        height, width = _sides(job)
        cache = job.settings.caching
        key = type(job), (height, width), None if cache is None else cache.branch
        # without a size, as in edits, `is_small` leaves it to the estimate, which takes seconds
        given: Any = job
        sized = replace(given, height=height, width=width) if hasattr(job, "height") else given
        on_cpu = session.device.type == "cpu"
        if key in self._fits or is_small(sized, session.facts, count, on_cpu=on_cpu):
            return
        from fastdiff.generate.memory import Call as Need
        from fastdiff.generate.memory import check_fits

        need = Need(device=session.device, dtype=session.dtype, count=count, batch=count)
        check_fits([session.model], job, need, way_out="use a smaller size", loaded=True)
        self._fits.add(key)

    def _engine(self, kind: ShapeClass, share: float) -> Engine:
        if kind not in self._engines:
            if len(self._engines) >= KEPT:
                for other, (engine, stack) in list(self._engines.items()):
                    if not engine.busy:
                        stack.close()
                        del self._engines[other]
            stack = ExitStack()
            engine = stack.enter_context(self._source.borrowed(kind, round(1 / share)))
            self._engines[kind] = engine, stack
        return self._engines[kind][0]

    def _ask(self, engine: Engine, image: _Image, rows: int) -> None:
        """Ask for a partial image if the step that follows is the one to show."""
        if image.asked and image.asked[-1] == rows + 1:
            engine.preview(image.ticket)

    def _step(self) -> None:
        """Advance the engine that has waited longest by one step."""
        kind = next((kind for kind, (engine, _) in self._engines.items() if engine.busy), None)
        if kind is None:
            return
        engine, stack = self._engines.pop(kind)
        self._engines[kind] = engine, stack
        begin, before = time.perf_counter(), engine.rows_taken
        try:
            results = engine.step()
        except Exception:
            LOG.exception("a step has failed")
            self._give_up(kind)
            return
        taken = time.perf_counter() - begin
        fading = FORGETTING if self._pace else 0.0
        self._pace = fading * self._pace + (1 - fading) * taken
        self._served *= FORGETTING
        self._spent = FORGETTING * self._spent + taken
        advanced = engine.rows_taken - before
        self.metrics.steps.observe(taken)
        self.metrics.rows.inc(advanced)
        for ticket, z in list(engine.previews.items()):
            del engine.previews[ticket]
            image = self._running[kind, ticket]
            self._latents.append(_Latents(image, z, image.shown))
            image.shown += 1
            image.asked.pop()
        for result in results:
            image = self._running.pop((kind, result.ticket))
            self._served += image.cost
            if result.error is None:
                self._latents.append(_Latents(image, result.x))
            else:
                self._fail(image.call, wrong(NOT_FINITE, code="not_finite"))
        if any(result.error for result in results):
            self._drop()
        for (other, ticket), image in self._running.items():
            if other == kind and image.asked:
                self._ask(engine, image, engine.rows_of(ticket))
        self.metrics.running.set(len(self._running))

    def _give_up(self, kind: ShapeClass) -> None:
        """Fail what an engine holds after an error that no request should cause."""
        for (other, _), image in list(self._running.items()):
            if other == kind:
                self._fail(image.call, BROKEN)
        self._drop()
        _, stack = self._engines.pop(kind)
        stack.close()

    def _decode(self) -> None:
        """Decode one piece, the oldest first."""
        if not self._latents:
            return
        first = self._latents[0]
        height, width = first.z.shape[1:]
        tile = first.image.job.settings.tile or 0
        most = block_size(height, width, first.z.device) or 1
        piece = list[_Latents]()
        while self._latents and len(piece) < most and _like(self._latents[0]) == _like(first):
            piece.append(self._latents.popleft())
        for latents, image in zip(piece, self._images(piece, tile), strict=True):
            if image is None:
                self._fail(latents.image.call, wrong(NOT_FINITE, code="not_finite"))
                self._drop()
            else:
                self._deliver(latents, image)

    def _images(self, piece: list[_Latents], tile: int) -> list[Tensor | None]:
        """The decoded images; None for one that is not finite."""
        z = torch.stack([latents.z for latents in piece])
        try:
            return [*self.session.latents.decode(z, tile=tile).cpu()]
        except ValueError:
            if len(piece) == 1:
                return [None]
            return [image for each in piece for image in self._images([each], tile)]

    def _deliver(self, latents: _Latents, image: Tensor) -> None:
        made, call = latents.image, latents.image.call
        assert made.now is not None
        image = pasted(image, made.now.paste)
        if not call.left:
            return
        if latents.partial is not None:
            call.on_event(Partial(made.index, latents.partial, image))
            return
        call.left -= 1
        self.metrics.images.inc()
        call.on_event(Done(made.index, Result(job=made.job, image=image, session=self.session)))


def check_served(model: Model) -> None:
    """Raise ValueError if the server cannot run a model: its engines hold one network, and requests
    have no field for control pictures."""
    if model.controlnets:
        raise ValueError(
            "requests to the server have no field for control pictures; leave controlnet "
            "(--controlnet) out, or use fastdiff txt2img, img2img, inpaint or generate"
        )
    if model.upsamplers or model.image_encoder is not None:
        raise ValueError(
            f"{model.name} has further networks (unCLIP), which the server does not run; use "
            "fastdiff txt2img or a file of jobs (fastdiff generate)"
        )


def queue_full(waiting: int, most: int, asked: int, retry_after: int) -> ApiError:
    """The refusal of a request whose images do not fit in the queue."""
    return ApiError(
        429,
        f"the queue is full: {waiting} of {most} images wait, and this request has {asked}; try "
        "again later",
        "queue_full",
        retry_after=retry_after,
    )


def wait_for(cost: float, served: float, spent: float) -> int:
    """Seconds in which about half of a queue of this cost will be done.

    served, spent: the cost of images that were finished, and the seconds it took.
    """
    seconds = cost * spent / served / 2 if served else 1.0
    return max(1, min(math.ceil(seconds), LONGEST_WAIT))


def _sides(job: Job) -> tuple[int, int]:
    """Height and width of a checked job's image; its picture is a tensor."""
    picture: Any = getattr(job, "image", None)
    if picture is not None and not isinstance(job, ClassJob | TextJob):
        return picture.shape[-2], picture.shape[-1]
    height, width = getattr(job, "height", None), getattr(job, "width", None)
    assert height is not None, "the job is checked"
    assert width is not None
    return height, width


def share_of(job: Job, facts: Facts, slots: int | None) -> float:
    """The part of a worker's room that an image takes. slots: see `Worker`."""
    height, width = _sides(job)
    return 1 / (slots or default_batch(*facts.x_shape(height, width)[1:], text=facts.reads_text))


def cost_of(job: Job, facts: Facts) -> float:
    """What a checked job costs: evaluations of the network times pixels."""
    height, width = _sides(job)
    return evaluations(job, facts) * height * width * getattr(job, "strength", 1.0)


def _like(latents: _Latents) -> tuple[Any, ...]:
    """Latents with equal keys can be decoded together."""
    return latents.z.shape, latents.image.job.settings.tile


def _refusal(error: ValueError | NotEnoughMemory) -> ApiError:
    if isinstance(error, NotEnoughMemory):
        message = "an image of this size does not fit in the server's memory; use a smaller size"
        return wrong(message, "size")
    return wrong(in_our_words(str(error)))
