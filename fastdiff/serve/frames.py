"""Messages between the server and its engine processes: JSON and tensors, never pickles.

A message is two lengths, uint32 and uint64 in little endian, then JSON, then safetensors.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

LENGTHS = struct.Struct("<IQ")
MOST_JSON, MOST_TENSORS = 2**20, 2**32
SEND_SECONDS = 30
"""After so long without a reader, sending fails."""


class Channel:
    """One end of a connection between two processes; any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._lock = connection, threading.Lock()
        timeout = struct.pack("ll", SEND_SECONDS, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def send(self, fields: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """
        Raises:
            OSError: the other end is closed, or does not read.
        """
        text = json.dumps(fields).encode("ascii")
        data = b"" if not tensors else save({k: t.contiguous() for k, t in tensors.items()})
        with self._lock:
            self._socket.sendall(LENGTHS.pack(len(text), len(data)) + text)
            self._socket.sendall(data)

    def receive(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The next message; None if the other end is closed, or sent what is no message."""
        try:
            text_size, data_size = LENGTHS.unpack(self._read(LENGTHS.size))
            if text_size > MOST_JSON or data_size > MOST_TENSORS:
                return None
            text, data = self._read(text_size), self._read(data_size)
        except (EOFError, OSError):
            return None
        return json.loads(text), load(data) if data else {}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that receives
        self._socket.close()

    def _read(self, size: int) -> bytes:
        whole = bytearray(size)
        view = memoryview(whole)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(whole)
