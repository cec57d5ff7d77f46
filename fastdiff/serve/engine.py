"""An engine process: a model and its worker, which make the images that the server sends.

The server starts it with one end of a pair of sockets (`fastdiff.serve.frames`). First comes a
`Setup`; then the server sends `make` and `cancel`, and the process answers `ready`, `partial`,
`done` and `failed`, and `beat` several times a second. When the connection ends, so does the
process, however the server died.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint.open import load
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.generate.job import PICTURES, Job
from fastdiff.generate.recipe import to_json, with_pictures
from fastdiff.kernels import backend
from fastdiff.serve.errors import ApiError
from fastdiff.serve.frames import Channel
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.worker import Call, Event, Failed, Partial, Worker

BEAT = 0.2
"""Seconds between two beats."""
MANY = 2**31


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an engine process needs to begin."""

    model: str
    """What `fastdiff.load` takes."""
    load: LoadOptions
    device: str
    dtype: str
    """torch's name, such as float32."""
    backend: str
    slots: int | None
    graphs: bool
    threads: int | None

    @property
    def recorded(self) -> dict[str, Any]:
        """The fields as JSON-compatible values."""
        return {**asdict(self), "load": self.load.recorded}

    @classmethod
    def of_recorded(cls, data: dict[str, Any]) -> Setup:
        """Inverse of `recorded`."""
        return cls(**{**data, "load": LoadOptions.of_recipe(data["load"])})


def job_frame(job: Job) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checked job for a message; its pictures are tensors."""
    assert not getattr(job, "control", ()), "the server takes no control pictures"
    names = {entry.name for entry in fields(job)}.intersection(PICTURES) - {"control"}
    pictures = {name: getattr(job, name) for name in names}
    pictures = {name: picture for name, picture in pictures.items() if picture is not None}
    plain = {name: value for name, value in to_json(job).items() if name not in PICTURES}
    return plain, pictures


class _Tally:
    """Stands for a metric: keeps what it is told until it is sent to the server."""

    def __init__(self) -> None:
        self._values: list[float] = []

    def observe(self, value: float) -> None:
        self._values.append(value)

    inc = observe

    def taken(self) -> list[float]:
        values, self._values = self._values, []
        return values


class Process:
    """The part of an engine process that talks to the server."""

    def __init__(self, channel: Channel, setup: Setup) -> None:
        self.channel = channel
        model = load(
            setup.model,
            options=setup.load,
            device=torch.device(setup.device),
            dtype=getattr(torch, setup.dtype),
        )
        metrics = Metrics()
        self.steps = metrics.steps = _Tally()
        self.rows = metrics.rows = _Tally()
        self.worker = Worker(
            model,
            metrics,
            queue=MANY,
            slots=setup.slots,
            graphs=setup.graphs,
            threads=setup.threads,
        )
        self._calls: dict[int, Call] = {}

    def run(self) -> int:
        """Until the server ends, or the worker crashes."""
        self.worker.start()
        self.channel.send({"is": "ready"})
        threading.Thread(target=self._beat, daemon=True).start()
        while (message := self.channel.receive()) is not None:
            told, tensors = message
            if told["do"] == "make":
                self._make(told, tensors)
            elif (call := self._calls.pop(told["id"], None)) is not None:
                self.worker.cancel(call)
        return 0

    def _make(self, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        number: int = told["id"]
        call = Call(
            jobs=[with_pictures(told["job"], tensors)],
            on_event=lambda event: self._tell(number, event),
            flow=number,
            deadline=float("inf"),
            partials=told["partials"],
        )
        self._calls[number] = call
        try:
            self.worker.submit(call)
        except ApiError as error:
            self._tell(number, Failed(error))

    def _tell(self, number: int, event: Event) -> None:
        if isinstance(event, Partial):
            message = {"is": "partial", "id": number, "number": event.number}
            self._send(message, {"image": event.image})
            return
        self._calls.pop(number, None)
        if isinstance(event, Failed):
            self._send({"is": "failed", "id": number, "error": asdict(event.error)}, {})
        else:
            message = {"is": "done", "id": number, "recipe": event.result.recipe}
            self._send(message, {"image": event.result.image})

    def _send(self, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            self.channel.send(fields, tensors)
        except OSError:
            os._exit(1)  # the server is gone

    def _beat(self) -> None:
        while self.worker.alive:
            told = {"is": "beat", "age": self.worker.step_age}
            self._send({**told, "steps": self.steps.taken(), "rows": sum(self.rows.taken())}, {})
            time.sleep(BEAT)
        os._exit(1)  # the worker has logged why; the server starts another process


def error_of(data: dict[str, Any]) -> ApiError:
    """The error of a `failed` message."""
    return replace(ApiError(500, "", ""), **data)


def main(descriptor: int) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    channel = Channel(socket.socket(fileno=descriptor))
    begun = channel.receive()
    if begun is None:
        return 1
    setup = Setup.of_recorded(begun[0])
    with backend(setup.backend):
        code = Process(channel, setup).run()
    os._exit(code)  # the worker's thread may be in a step
