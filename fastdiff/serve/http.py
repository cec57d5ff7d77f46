"""Connections and signals: uvicorn with limits on slow clients, and a shutdown that loses nothing.

On SIGTERM or SIGINT new requests are answered with 503 while those that run are finished; only then
are connections closed. A second signal ends the server at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastdiff.serve.app import Service, create_app

HEADER_BYTES = 16 * 1024
MORE_CONNECTIONS = 64
"""Connections beyond the limit of requests, for health checks, metrics and refusals."""
LOG = logging.getLogger("fastdiff.serve")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a host's address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free one.

    Raises:
        OSError: the address is not of this machine, or in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        reason = (error.strerror or str(error)).lower()
        message = f"cannot listen on {host}:{port}: {reason}; give another --host or --port"
        raise OSError(error.errno, message) from None
    return made


def protocol_class(idle: float, most: int) -> type[H11Protocol]:
    """uvicorn's protocol, but a client that neither sends nor reads is closed after `idle` seconds.

    most: connections at a time; more are closed at once.
    """

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._timer is not None:
                self._timer.cancel()

        def _watch(self) -> None:
            """Start the client's time anew."""
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(idle, self._late)

        def _late(self) -> None:
            """Close the connection, unless the client waits for us."""
            cycle = self.cycle
            receiving = cycle is None or (cycle.more_body and not cycle.response_complete)
            if receiving or self.flow.write_paused or self.transport.is_closing():
                self.transport.abort()
            else:
                self._watch()

    return Connection


class Server(uvicorn.Server):
    """Finishes what runs before it closes connections."""

    def __init__(self, service: Service) -> None:
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=protocol_class(limits.idle, limits.requests + MORE_CONNECTIONS),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=round(max(limits.idle, 1)),
                timeout_graceful_shutdown=round(max(limits.idle, 1)),
                h11_max_incomplete_event_size=HEADER_BYTES,
                backlog=1024,
            )
        )
        self.service = service
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.force_exit = self.should_exit = True
            self.service.worker.stop()
        else:
            self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and self._draining is None:
            LOG.info("finishing %d requests", self.service.open)
            self._draining = asyncio.ensure_future(self._drain())
        if not self.service.worker.alive and not self.service.draining:
            self.should_exit = True  # for whoever restarts it
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        """Wait for what runs, then let uvicorn close the connections."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._finished(), self.service.limits.drain)
        self.should_exit = True

    async def _finished(self) -> None:
        while self.service.open:
            await asyncio.sleep(0.02)


def serve(
    service: Service, listener: socket.socket, *, ready: Callable[[Any], None] | None = None
) -> int:
    """Serve until a signal; 1 if the worker has crashed, else 0.

    ready: called with the server before it accepts connections.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it quotes what clients send
    service.worker.start()
    server = Server(service)
    if ready is not None:
        ready(server)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        service.worker.stop()
        service.worker.join(30)
    return 1 if service.worker.crashed else 0
