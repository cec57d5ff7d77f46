"""Clients of the server: a server in this process, a request without a socket, a picture."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from starlette.types import ASGIApp, Message
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.images import to_uint8
from fastdiff.serve.app import Service
from fastdiff.serve.http import Server, bind, serve
from fastdiff.serve.limits import Limits
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.worker import Worker

LIMITS = Limits(idle=5, deadline=60)


def service_of(model: Model, *, slots: int | None = None, **changes: Any) -> Service:
    """A service of a model; `changes` override fields of `Service` and of `Limits`."""
    own = {name: changes.pop(name) for name in [*changes] if hasattr(LIMITS, name)}
    limits, metrics = replace(LIMITS, **own), Metrics()
    worker = Worker(model, metrics, queue=limits.queue, slots=slots)
    fields = {"name": "digits", **changes}
    return Service(worker=worker, limits=limits, metrics=metrics, **fields)


@dataclass(frozen=True)
class Running:
    """A server that runs in a thread."""

    url: str
    port: int
    service: Service
    server: Server


@contextlib.contextmanager
def running(service: Service) -> Iterator[Running]:
    """A server on a free port, drained at the end."""
    started, servers = threading.Event(), list[Server]()

    def ready(server: Server) -> None:
        servers.append(server)
        started.set()

    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        thread = threading.Thread(target=serve, args=(service, listener), kwargs={"ready": ready})
        thread.start()
        try:
            assert started.wait(30)
            yield Running(f"http://127.0.0.1:{port}", port, service, servers[0])
        finally:
            service.draining = True
            thread.join(60)
            assert not thread.is_alive()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def ask(
    app: ASGIApp, path: str, body: bytes, headers: Mapping[str, str], method: str = "POST"
) -> Answer:
    """Send a request to the application itself; the client stays until it is answered."""
    length = str(len(body))
    given = {
        "host": "localhost",
        "content-length": length,
        **{name.lower(): value for name, value in headers.items()},
    }
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    sent, read = list[Message](), False

    async def receive() -> Message:
        nonlocal read
        if read:
            await asyncio.Event().wait()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(each.get("body", b"") for each in sent))


def pixels(b64: str) -> np.ndarray[Any, Any]:
    """The pixels of an image in an answer."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def as_pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """The pixels that a PNG of (1 or 3, H, W) has."""
    rows = to_uint8(image).permute(1, 2, 0).numpy()
    return rows[:, :, 0] if rows.shape[2] == 1 else rows


def file_of(array: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    """An image file of pixels (H, W), (H, W, 3) or (H, W, 4), uint8."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def form_of(parts: Mapping[str, str | bytes], boundary: str = "x7") -> tuple[bytes, dict[str, str]]:
    """A multipart body of fields (text) and files (bytes), and its headers."""
    lines = list[bytes]()
    for name, value in parts.items():
        file = '; filename="../../etc/a"' if isinstance(value, bytes) else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        lines += [head.encode(), value if isinstance(value, bytes) else value.encode(), b"\r\n"]
    body = b"".join([*lines, f"--{boundary}--\r\n".encode()])
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}
