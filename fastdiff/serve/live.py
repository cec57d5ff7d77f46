"""The worker from an event loop: calls without waiting, and for a page a form's values in, images
out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastdiff.generate.facts import Facts
from fastdiff.serve.limits import Limits
from fastdiff.serve.pool import Pool
from fastdiff.serve.schema import (
    MOST_PARTIALS,
    Edit,
    Generation,
    Wanted,
    read_body,
    read_edit,
    read_generation,
)
from fastdiff.serve.worker import Call, Done, Event, Failed, Partial, Worker, cost_of


def read_form(
    values: Mapping[str, Any],
    facts: Facts,
    limits: Limits,
    *,
    served: str,
    image: Tensor | None = None,
    mask: Tensor | None = None,
) -> Wanted:
    """The values of a form as one checked job with previews; empty fields mean the default.

    Args:
        values: fields of `Generation`, with an image of `Edit`.
        served: the name of the model.
        image: to change, (C, H, W) in [-1, 1]; None: a new one is made.
        mask: (1, H, W), 1 where the image is to be replaced; None: all of it is changed.

    Raises:
        ApiError: as for a request to the server.
    """
    given = {name: value for name, value in values.items() if value not in (None, "")}
    if facts.reads_text:
        given.setdefault("prompt", "")
    given |= {"stream": True, "partial_images": MOST_PARTIALS}
    if image is None:
        return read_generation(read_body(given, Generation, served=served), facts, limits)
    return read_edit(read_body(given, Edit, served=served), facts, limits, image, mask)


def relay(events: asyncio.Queue[Event]) -> Callable[[Event], None]:
    """For `Call.on_event`: puts events of the worker's thread into a queue of the running loop."""
    loop = asyncio.get_running_loop()

    def on_event(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    return on_event


async def submit(worker: Worker | Pool, call: Call) -> None:
    """Queue a call without holding up the loop: what reused features cost is counted on a network
    of meta tensors, which takes seconds the first time.

    Raises:
        ApiError: as for `Worker.submit`.
    """
    if any(job.settings.caching is not None for job in call.jobs):
        await asyncio.to_thread(lambda: [cost_of(job, worker.facts) for job in call.jobs])
    worker.submit(call)


async def live(worker: Worker, wanted: Wanted, limits: Limits) -> AsyncIterator[Partial | Done]:
    """The previews and the image of a request, as the worker makes them.

    Closing the iterator cancels the request, which frees its slot before the next step.

    Raises:
        ApiError: the queue is full, or the image has failed.
    """
    events = asyncio.Queue[Event]()
    call = Call(
        jobs=wanted.jobs,
        on_event=relay(events),
        flow=object(),
        deadline=time.monotonic() + limits.deadline,
        partials=wanted.partials,
    )
    await submit(worker, call)
    try:
        for _ in wanted.jobs:
            while isinstance(event := await events.get(), Partial):
                yield event
            if isinstance(event, Failed):
                raise replace(event.error)
            yield event
    finally:
        worker.cancel(call)
