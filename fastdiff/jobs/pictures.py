"""Pictures that rows name by path: hashed when a job begins, compared when an image was made.

OUT/pictures.bin has a digest of `BYTES` bytes per row, in their order: zeros if a row names no
picture, or one that was missing when the job began.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from fastdiff.jobs.fields import Builder
from fastdiff.jobs.rows import Row, Rows
from fastdiff.jobs.store import Store

NAME = "pictures.bin"
BYTES = 16
NONE = bytes(BYTES)
THREADS, AT_ONCE = 16, 1024
CHANGED = (
    "a picture of the row has changed since the job began; put the old one back and use "
    "--retry-errors, or give another --out"
)


def digest_of(hashes: Mapping[str, str]) -> bytes:
    """What stands for the pictures of a row: `hashes` is field -> SHA-256 of the file."""
    if not hashes:
        return NONE
    text = "\n".join(f"{name} {value}" for name, value in sorted(hashes.items()))
    return hashlib.blake2b(text.encode(), digest_size=BYTES).digest()


def write_pictures(store: Store, rows: Rows, build: Builder) -> str | None:
    """Hash the pictures of all rows and write `NAME`. Returns its SHA-256; None without pictures.

    Raises:
        OSError: the disk is full.
    """
    if not build.may_name_pictures(rows.columns):
        return None
    digest, some = hashlib.sha256(), False
    with tempfile.TemporaryFile() as file:
        for piece in _digests(rows, build):
            some = some or piece != NONE
            digest.update(piece)
            file.write(piece)
        if not some:
            return None
        file.seek(0)
        with store.writing(NAME) as path, path.open("wb") as target:
            while chunk := file.read(2**20):
                target.write(chunk)
    return digest.hexdigest()


def _digests(rows: Rows, build: Builder) -> Iterator[bytes]:
    def of(row: Row) -> bytes:
        try:
            return digest_of(build.hashes(row))
        except (ValueError, OSError):  # it becomes an error record when it is made
            return NONE

    with ThreadPoolExecutor(THREADS) as threads:
        stream = rows.read()
        while several := [*islice(stream, AT_ONCE)]:
            yield from threads.map(of, several)


class Pictures:
    """The digests of a job that was begun."""

    def __init__(self, store: Store, sha256: str | None) -> None:
        """
        sha256: of the file, as the fingerprint says; None: the rows have no pictures.

        Raises:
            ValueError: the file is missing or damaged.
        """
        self._path: Path | None = None
        self._held = contextlib.ExitStack()
        if sha256 is None:
            return
        self._path = self._held.enter_context(store.reading(NAME))
        digest = hashlib.sha256()
        if self._path.exists():
            with self._path.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        if digest.hexdigest() != sha256:
            self.close()
            raise ValueError(
                f"{store.place}/{NAME} is damaged, so changed pictures would not be noticed; give "
                "another --out"
            )

    def agree(self, row: int, hashes: Mapping[str, str]) -> bool:
        """Whether the pictures of a row are those with which the job began."""
        if self._path is None or not hashes:
            return True
        with self._path.open("rb") as file:
            file.seek(row * BYTES)
            before = file.read(BYTES)
        return before in (NONE, digest_of(hashes))

    def close(self) -> None:
        """Remove the local copy, if there is one."""
        self._held.close()
