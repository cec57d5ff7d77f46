"""What the server accepts; the options of `fastdiff serve`. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """What the holder of an API key may ask for."""

    priority: str = "high"
    """The highest priority of its requests."""
    images: int | None = None
    """Most images that it may wait for at a time; None: as many as the server takes."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for, and how many requests are taken at a time."""

    queue: int = 256
    """Most images that wait for a slot; requests beyond that are answered with 429."""
    requests: int = 512
    """Most requests that are open at a time, including those whose answers are being sent."""
    images: int = 10
    """Most images per request (n)."""
    pixels: int = 1024 * 1024
    """Most pixels per image, generated or uploaded."""
    steps: int = 200
    """Most steps per image."""
    prompt: int = 4000
    """Most characters of a prompt."""
    upload_mib: int = 16
    """Most MiB of an uploaded file."""
    uploads_mib: int = 256
    """Most MiB of all uploads that are in memory at a time; uploads beyond that get 429."""
    decoder_mib: int = 512
    """Memory, in MiB, of the process that decodes an upload."""
    deadline: float = 300.0
    """Seconds from a request to its images; after that it is dropped and answered with 504."""
    step: float = 120.0
    """Seconds that a step, or the decoding of a piece, may take, the first one and its compilation
    included, before /health fails; with --workers, its process is then replaced."""
    idle: float = 30.0
    """Seconds that a client may take to send a request, or the next part of it, and seconds without
    reading a part of the answer, before its connection is closed."""
    drain: float = 300.0
    """Seconds that running requests are given to finish after SIGTERM."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                flag = f"--limits.{field.name.replace('_', '-')}"
                raise ValueError(f"{flag} must be positive, got {value}")
