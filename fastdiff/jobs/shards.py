"""Shards on the disk: the unit of work, written whole or not at all.

    OUT/000003.tar               the images of rows 3 * size, ..., 4 * size - 1, with their recipes
    OUT/000003.errors.jsonl      why rows of the shard have no image, if any
    OUT/.claims/000003.lock      held by the process that makes it

A shard that has its name is finished; there is no other list. Its bytes depend on its rows, the
model and the settings only: members are in the order of the rows, times and owners are zero.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from fastdiff.extras import import_extra
from fastdiff.files import atomic_folder
from fastdiff.jobs.spec import JobSpec
from fastdiff.jobs.store import Store, has_locks, open_store

DIGITS, ROW_DIGITS = 6, 9
"""Digits in the names of shards and of images."""
PARQUET_ROWS = 64
"""Rows of a row group in Parquet."""
CLAIMS = ".claims"


class Item(NamedTuple):
    """An image of a shard."""

    row: int
    image: bytes
    """The bytes of its file."""
    recipe: bytes
    """Its recipe as JSON."""


@dataclass(frozen=True)
class Shards:
    """The shards of a job."""

    store: Store
    format: str
    suffix: str
    """Of the images, such as png."""
    rows: int
    size: int

    @classmethod
    def of(cls, spec: JobSpec, rows: int) -> Shards:
        """
        Raises:
            ValueError: the format cannot be written to the store.
        """
        store = open_store(spec.out)
        if spec.format == "folder" and store.folder is None:
            raise ValueError(
                f"a folder cannot be written to {store.place} as a whole; use --format webdataset "
                "or --format parquet"
            )
        return cls(store, spec.format, spec.image, rows, spec.shard_size)

    def __len__(self) -> int:
        return (self.rows + self.size - 1) // self.size

    def range(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * self.size, min((number + 1) * self.size, self.rows))

    def name(self, number: int) -> str:
        ending = {"folder": "", "webdataset": ".tar", "parquet": ".parquet"}[self.format]
        return f"{number:0{DIGITS}d}{ending}"

    def errors_name(self, number: int) -> str:
        return f"{number:0{DIGITS}d}.errors.jsonl"

    def is_finished(self, number: int) -> bool:
        return self.store.exists(self.name(number))

    def finished(self) -> Iterator[int]:
        """The numbers of the finished shards, in order."""
        return (number for number in range(len(self)) if self.is_finished(number))

    def write(
        self, number: int, items: Iterable[Item], errors: Iterable[Mapping[str, Any]]
    ) -> None:
        """Write a shard and its errors, replacing those that are there.

        items: in the order of their rows. errors: one record per row without an image.

        Raises:
            OSError: the disk is full, or cannot be written to; nothing is half-written.
        """
        lines = [json.dumps(record, ensure_ascii=False) for record in errors]
        if self.is_finished(number):  # an error may be listed for an image that exists, but never
            self._write(number, items)  # the other way round
            self._write_errors(number, lines)
        else:
            self._write_errors(number, lines)
            self._write(number, items)

    def _write_errors(self, number: int, lines: list[str]) -> None:
        name = self.errors_name(number)
        if lines:
            self.store.write(name, "".join(f"{line}\n" for line in lines).encode())
        else:
            self.store.remove(name)

    def _write(self, number: int, items: Iterable[Item]) -> None:
        name = self.name(number)
        if self.format == "folder":
            assert self.store.folder is not None, "checked in `of`"
            with atomic_folder(self.store.folder / name) as temporary:
                for item in items:
                    for member, data in self._members(item):
                        (temporary / member).write_bytes(data)
        elif self.format == "webdataset":
            with self.store.writing(name) as temporary, tarfile.open(temporary, "w") as archive:
                for item in items:
                    for member, data in self._members(item):
                        add_member(archive, member, data)
        else:
            with self.store.writing(name) as temporary:
                self._write_parquet(temporary, items)

    def _members(self, item: Item) -> list[tuple[str, bytes]]:
        """The files of an image. In a folder, the recipe of a PNG is in the PNG alone."""
        stem = f"{item.row:0{ROW_DIGITS}d}"
        image = (f"{stem}.{self.suffix}", item.image)
        if self.format == "folder" and self.suffix == "png":
            return [image]
        return [image, (f"{stem}.json", item.recipe)]

    def _write_parquet(self, path: Path, items: Iterable[Item]) -> None:
        arrow, parquet = (
            import_extra(name, extra="jobs") for name in ("pyarrow", "pyarrow.parquet")
        )
        picture = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        schema = arrow.schema(
            [("row", arrow.int64()), ("image", picture), ("recipe", arrow.string())]
        )
        with parquet.ParquetWriter(path, schema, compression="none") as writer:
            held: list[dict[str, Any]] = []
            for item in items:
                name = f"{item.row:0{ROW_DIGITS}d}.{self.suffix}"
                image = {"bytes": item.image, "path": name}
                held.append({"row": item.row, "image": image, "recipe": item.recipe.decode()})
                if len(held) == PARQUET_ROWS:
                    writer.write_table(arrow.Table.from_pylist(held, schema))
                    held = []
            if held:
                writer.write_table(arrow.Table.from_pylist(held, schema))

    def read(self, number: int) -> Iterator[Item]:
        """The images of a finished shard, in the order of their rows.

        Raises:
            ValueError: the shard is damaged.
        """
        with self.store.reading(self.name(number)) as path:
            yield from self._read_parquet(path) if self.format == "parquet" else self._items(path)

    def _read_parquet(self, path: Path) -> Iterator[Item]:
        parquet = import_extra("pyarrow.parquet", extra="jobs")
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    image, recipe = row["image"]["bytes"], row["recipe"].encode()
                    yield Item(row["row"], image, recipe)

    def _items(self, path: Path) -> Iterator[Item]:
        """The images of a folder or a tar."""
        recipe, image = b"", b""
        for name, data in _files(path):
            stem, _, ending = name.partition(".")
            if ending == "json":
                recipe = data
            else:
                image = data
            if recipe and image:
                yield Item(int(stem), image, recipe)
                recipe, image = b"", b""
            elif image and self.format == "folder" and self.suffix == "png":
                yield Item(int(stem), image, b"")
                image = b""

    def errors(self, number: int) -> list[dict[str, Any]]:
        """The records of the rows of a shard that have no image."""
        data = self.store.read(self.errors_name(number)) or b""
        return [json.loads(line) for line in data.decode().splitlines()]


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file without time or owner, so that equal content makes equal archives."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), 0, 0o644
    archive.addfile(member, io.BytesIO(data))


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of a folder or a tar."""
    if path.is_dir():
        for file in sorted(path.iterdir()):
            yield file.name, file.read_bytes()
        return
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None, "only files are added"
            yield member.name, content.read()


class AnyClaims(Protocol):
    """Who makes which shard."""

    def take(self, number: int) -> bool:
        """Claim a shard; False if another worker makes it."""
        ...

    def release(self, number: int) -> None:
        """Give a shard back that is finished."""
        ...

    def close(self) -> None:
        """Give back whatever is held."""
        ...


class Claims:
    """Locks on shards against other processes, also those of other jobs in the same folder.

    The operating system releases a lock however its process ends, so none is ever stale. Without a
    folder that has locks, every claim succeeds: workers then need a share each, and a shard that is
    made twice all the same has the same bytes.
    """

    def __init__(self, store: Store) -> None:
        self._folder: Path | None = None
        if store.folder is not None:
            store.folder.mkdir(parents=True, exist_ok=True)
        if store.folder is not None and has_locks(store.folder):
            self._folder = store.folder / CLAIMS
            self._folder.mkdir(parents=True, exist_ok=True)
        self._held: dict[int, FileLock] = {}
        self._guard = threading.Lock()

    def take(self, number: int) -> bool:
        """Lock a shard; False if another process holds it."""
        if self._folder is None:
            return True
        with self._guard:
            lock = FileLock(self._path(number), timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                return False
            self._held[number] = lock
            return True

    def release(self, number: int) -> None:
        """Unlock a shard that is finished. Who waits for its lock then sees that it is."""
        with self._guard:
            if lock := self._held.pop(number, None):
                self._path(number).unlink(missing_ok=True)
                lock.release()

    def close(self) -> None:
        """Unlock whatever is held."""
        with self._guard:
            for lock in self._held.values():
                lock.release()
            self._held.clear()

    def clean(self, shards: Shards) -> None:
        """Remove the files of processes that were killed after they had finished a shard."""
        if self._folder is None:
            return
        for path in self._folder.glob("*.lock"):
            number = int(path.stem)
            if shards.is_finished(number) and self.take(number):
                self.release(number)
        with contextlib.suppress(OSError):  # others hold something
            self._folder.rmdir()

    def _path(self, number: int) -> Path:
        assert self._folder is not None, "without locks nothing is held"
        return self._folder / f"{number:0{DIGITS}d}.lock"
