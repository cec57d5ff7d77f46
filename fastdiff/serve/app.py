"""The routes: keys, bodies, calls of the worker, and answers, whole or as streams."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastdiff.generate.run import Result
from fastdiff.serve import responses
from fastdiff.serve.errors import ApiError, to_json
from fastdiff.serve.limits import MIB, KeyLimits, Limits
from fastdiff.serve.live import relay, submit
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.pool import Pool
from fastdiff.serve.schema import (
    PRIORITIES,
    Edit,
    Generation,
    Wanted,
    read_body,
    read_edit,
    read_fields,
    read_generation,
    read_json,
    read_size,
    unknown_model,
)
from fastdiff.serve.uploads import Lease, Uploads
from fastdiff.serve.worker import Call, Event, Failed, Made, Partial, Worker

LOG = logging.getLogger("fastdiff.serve")
JSON_BYTES = MIB // 4
"""Most bytes of a JSON body."""
LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(eq=False, kw_only=True)
class Service:
    """A model behind the routes.

    Attributes:
        draining: whether new requests are refused, because the server is shutting down.
        open: number of requests that are not answered yet.
    """

    name: str
    """Name of the model."""
    worker: Worker | Pool
    limits: Limits
    metrics: Metrics
    keys: Mapping[bytes, KeyLimits] = field(default_factory=dict)
    """sha256 of the API keys, and what they allow; none: no key is needed."""
    local: bool = True
    """Only requests to localhost are answered: a web page whose name leads here is refused."""
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    open: int = 0

    def __post_init__(self) -> None:
        self.uploads, self._held = Uploads(self.limits), Counter[bytes]()

    def check(self, request: Request) -> bytes | None:
        """Check where a request comes from and its key. Returns the key's hash.

        Raises:
            ApiError: it is not allowed.
        """
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.local and name not in LOCAL:
            raise ApiError(403, "this server answers to localhost only", "wrong_host")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "requests from web pages are not allowed", "wrong_origin")
        if not self.keys:
            return None
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        known = [hmac.compare_digest(digest, each) for each in self.keys]
        if kind.lower() != "bearer" or not any(known):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
        return digest

    def health(self) -> tuple[int, dict[str, Any]]:
        """The status and body of /health: it fails if the model cannot be used any more, or if its
        step has taken longer than `limits.step`."""
        worker, age = self.worker, self.worker.step_age
        hung = age > self.limits.step
        state = "failed" if not worker.alive else "hung" if hung else "ok"
        body: dict[str, Any] = {"status": state, "step_seconds": round(age, 1)}
        if isinstance(worker, Pool):
            body["processes"] = worker.processes
        return 200 if state == "ok" else 503, body

    @contextlib.contextmanager
    def held(self, key: bytes | None, wanted: Wanted) -> Iterator[None]:
        """Count the images of a request for its key until they are answered.

        Raises:
            ApiError: the key does not allow so many at a time, or this priority.
        """
        limits = KeyLimits() if key is None else self.keys[key]
        ranks, count = list(PRIORITIES), len(wanted.jobs)
        if ranks.index(wanted.priority) > ranks.index(limits.priority):  # type: ignore[arg-type]
            message = f"this API key allows priority {limits.priority} at most"
            raise ApiError(403, message, "priority_not_allowed", "priority")
        own = b"" if key is None else key
        most, now = limits.images, self._held[own]
        if most is not None and now + count > most:
            fits = count <= most
            raise ApiError(
                429 if fits else 400,
                f"this API key allows {most} images at a time, and {now} are being made; this "
                f"request has {count}",
                "too_many_images",
                "n",
                retry_after=1 if fits else None,
            )
        self._held[own] += count
        try:
            yield
        finally:
            self._held[own] -= count
            if not self._held[own]:
                del self._held[own]

    @contextlib.contextmanager
    def admitted(self) -> Any:
        """Count a request as open, from before its body is read until it is answered.

        Raises:
            ApiError: the server is shutting down, or too many requests are open.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", "unavailable", retry_after=5)
        if self.open >= self.limits.requests:
            message = f"{self.open} requests are open, which is the limit; try again later"
            raise ApiError(429, message, "too_many_requests", retry_after=1)
        self.open += 1
        self.metrics.open.set(self.open)
        try:
            yield
        finally:
            self.open -= 1
            self.metrics.open.set(self.open)


class ImageRoute:
    """An endpoint that makes images; an ASGI application."""

    def __init__(
        self,
        service: Service,
        kind: str,
        read: Callable[[Service, Request, Lease], Awaitable[Wanted]],
    ) -> None:
        """kind: of events, such as image_generation. read: a request's body as checked jobs; the
        lease is for memory until the request is answered."""
        self.service, self.kind, self.read = service, kind, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, request = self.service, Request(scope, receive)
        begin = time.monotonic()
        answer = _Answer(send)
        try:
            key = service.check(request)
            with service.admitted(), service.uploads.lease() as lease:
                reading = self.read(service, request, lease)
                wanted = await asyncio.wait_for(reading, service.limits.deadline)
                with service.held(key, wanted):
                    await self._make(wanted, key, begin, receive, answer)
        except (ClientDisconnect, _Left):
            answer.status = 499
        except asyncio.TimeoutError:
            message = "reading the request took too long"
            await answer.error(ApiError(408, message, "timeout"))
        except ApiError as error:
            await answer.error(error)
        finally:
            service.metrics.answers.labels(self.kind, str(answer.status)).inc()
            service.metrics.seconds.labels(self.kind).observe(time.monotonic() - begin)

    async def _make(
        self, wanted: Wanted, key: bytes | None, begin: float, receive: Receive, answer: _Answer
    ) -> None:
        """Make the images and answer, unless the client leaves first.

        Raises:
            _Left: the client has left; its images are dropped.
            ApiError: as for `Worker.submit`, or an image has failed.
        """
        service = self.service
        events: asyncio.Queue[Event] = asyncio.Queue()
        flow = object() if key is None else (key, wanted.priority)
        deadline = begin + service.limits.deadline
        call = Call(
            jobs=wanted.jobs,
            on_event=relay(events),
            flow=flow,
            deadline=deadline,
            partials=wanted.partials,
            weight=PRIORITIES[wanted.priority],
        )
        await submit(service.worker, call)
        made = self._stream if wanted.stream else self._whole
        making = asyncio.ensure_future(made(wanted, events, answer))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                raise _Left
            making.result()
        finally:
            service.worker.cancel(call)
            for task in (making, leaving):
                task.cancel()
            await asyncio.gather(making, leaving, return_exceptions=True)

    async def _whole(self, wanted: Wanted, events: asyncio.Queue[Event], answer: _Answer) -> None:
        images: dict[int, str] = {}
        size = (0, 0)
        while len(images) < len(wanted.jobs):
            event = await events.get()
            if isinstance(event, Failed):
                raise replace(event.error)  # other requests may fail with the same one
            assert not isinstance(event, Partial)
            size = event.result.image.shape[1], event.result.image.shape[2]
            images[event.index] = await self._finished(event.result, wanted)
        body = responses.answer(wanted, [images[index] for index in sorted(images)], size)
        await answer.whole(200, body)

    async def _stream(self, wanted: Wanted, events: asyncio.Queue[Event], answer: _Answer) -> None:
        while True:
            event = await events.get()
            if isinstance(event, Failed):
                if not answer.begun:
                    raise replace(event.error)
                await answer.part(responses.error_event(event.error), last=True)
                return
            last = not isinstance(event, Partial)
            image = event.image if isinstance(event, Partial) else event.result.image
            fields: dict[str, Any] = {
                **responses.about(wanted, image.shape[1], image.shape[2]),
                "quality": "auto",
            }
            if isinstance(event, Partial):
                text = await asyncio.to_thread(responses.encoded, image, wanted)
                fields |= {"b64_json": text, "partial_image_index": event.number}
            else:
                text = await self._finished(event.result, wanted)
                # there are no tokens to count, but clients read the field
                fields |= {"b64_json": text, "usage": None, "seed": event.result.job.seed}
            name = "completed" if last else "partial_image"
            await answer.part(responses.event(f"{self.kind}.{name}", fields), last=last)
            if last:
                return

    async def _finished(self, result: Result | Made, wanted: Wanted) -> str:
        return await asyncio.to_thread(responses.finished, result, wanted, self.service.name)


class _Left(Exception):
    """The client has closed its connection."""


async def _left(receive: Receive) -> None:
    """Return when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer:
    """The answer of an image route.

    Attributes:
        status: 499, as in nginx, if the client left.
        begun: whether a part has been sent.
    """

    def __init__(self, send: Send) -> None:
        self._send, self.status, self.begun = send, 500, False

    async def whole(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        length = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, {**length, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def error(self, error: ApiError) -> None:
        if self.begun:  # of an error after that, the stream itself has told
            raise error
        # what is left of a body uvicorn reads and drops, so that the client sees this answer
        await self.whole(error.status, to_json(error.body), error.headers)

    async def part(self, data: bytes, *, last: bool) -> None:
        if not self.begun:
            await self._start(
                200, {"content-type": "text/event-stream", "cache-control": "no-store"}
            )
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.begun = status, True
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is larger than `most` bytes.
        ClientDisconnect: the client has left.
    """
    length = request.headers.get("content-length", "")
    size, parts = _size(length), list[bytes]()
    if size <= most:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                break
            parts.append(part)
    if size > most:
        message = f"the body has more than {most} bytes, which is the limit of this server"
        raise ApiError(413, message, "too_large")
    return b"".join(parts)


async def read_generation_request(service: Service, request: Request, _: Lease) -> Wanted:
    """The body of a generation as checked jobs.

    Raises:
        ApiError: it is wrong.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a form of a foreign page cannot send
        raise ApiError(415, "the content type must be application/json", "wrong_content_type")
    data = read_json(await body_of(request, JSON_BYTES))
    body = read_body(data, Generation, served=service.name)
    return read_generation(body, service.worker.facts, service.limits)


async def read_edit_request(service: Service, request: Request, lease: Lease) -> Wanted:
    """The form of an edit as checked jobs.

    Raises:
        ApiError: it is wrong.
    """
    uploads, facts = service.uploads, service.worker.facts
    length = request.headers.get("content-length", "")
    most = min(_size(length), uploads.body_bytes) if length else uploads.body_bytes
    lease.resize(most)
    text = await body_of(request, uploads.body_bytes)
    form = await uploads.read(text, request.headers.get("content-type", ""))
    body = read_body(read_fields(form.fields, Edit), Edit, served=service.name)
    height, width = read_size(body, service.limits)
    image, mask = await uploads.pictures(form, facts.image_channels, height, width)
    lease.resize(image.nbytes + (0 if mask is None else mask.nbytes))
    return read_edit(body, facts, service.limits, image, mask)


def create_app(service: Service) -> Starlette:
    """The application."""

    def guarded(answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            service.check(request)
            return answer(request)

        return endpoint

    described = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "fastdiff",
    }

    def models(_: Request) -> Response:
        return _json(200, {"object": "list", "data": [described]})

    def model(request: Request) -> Response:
        if request.path_params["name"] != service.name:
            raise unknown_model(request.path_params["name"], service.name)
        return _json(200, described)

    async def health(_: Request) -> Response:
        return _json(*service.health())

    async def ready(_: Request) -> Response:
        is_ready = service.worker.alive and not service.draining
        return _json(200 if is_ready else 503, {"status": "ready" if is_ready else "unavailable"})

    def metrics(_: Request) -> Response:
        text, kind = service.metrics.text()
        return Response(text, headers={"content-type": kind})

    generation = ImageRoute(service, "image_generation", read_generation_request)
    edit = ImageRoute(service, "image_edit", read_edit_request)
    return Starlette(
        routes=[
            Route("/v1/images/generations", generation, methods=["POST"]),
            Route("/v1/images/edits", edit, methods=["POST"]),
            Route("/v1/models", guarded(models), methods=["GET"]),
            Route("/v1/models/{name:path}", guarded(model), methods=["GET"]),
            Route("/metrics", guarded(metrics), methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _bug},
    )


def _size(length: str) -> int:
    """A content-length; absurd ones count as too large."""
    return int(length[:18]) if length.isdecimal() else 0


def _json(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, media_type="application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.status, error.body, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = {404: "no such route", 405: "wrong method for this route"}
    known = ApiError(error.status_code, found.get(error.status_code, "bad request"), "bad_request")
    return _json(known.status, known.body, {**known.headers, **dict(error.headers or {})})


async def _bug(_: Request, error: Exception) -> Response:
    LOG.error("a request has failed", exc_info=error)
    failed = ApiError(500, "the server failed", "server_error")
    return _json(500, failed.body)
