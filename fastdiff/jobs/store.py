"""Where the files of a job lie: a folder, or an object store through fsspec.

Both create a file as a whole: a folder by a rename, a store by a put. Creating one only if it does
not exist is a hard link in a folder and a conditional put in a store.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastdiff.extras import import_extra
from fastdiff.files import atomic_file, remove_leftovers, write_bytes

OBJECT_STORES = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""fsspec's names of stores whose put is atomic."""
LOCAL = ("file", "local")
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)


def url_of(place: str | os.PathLike[str]) -> str | None:
    """``s3://bucket/job`` of a URL, also of one that `Path` took a slash from; None of a path."""
    match = _URL.fullmatch(Path(place).as_posix() if isinstance(place, Path) else os.fspath(place))
    return None if match is None else f"{match[1]}://{match[2]}"


def local_path(url: str) -> Path | None:
    """The path of a ``file://`` URL; None of other URLs."""
    scheme, _, rest = url.partition("://")
    return Path("/" + rest.lstrip("/")) if scheme in LOCAL else None


class Store(Protocol):
    """The files of a job. Names are relative to it and have no folders in them."""

    @property
    def place(self) -> str:
        """The path or URL, for messages."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder; None if it is an object store."""
        ...

    def prepare(self) -> None:
        """Create it if it is missing, and remove what dead processes left unfinished."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes | None:
        """Content of a file; None if it does not exist."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Write a new file; raise FileExistsError if there is one."""
        ...

    def write(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        ...

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write to; the file has its name after the block."""
        ...

    def reading(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to read a file from, during the block."""
        ...


def open_store(out: str | os.PathLike[str]) -> Store:
    """The store at a path or URL.

    Raises:
        ValueError: the URL is not that of a store that creates files as a whole.
        ImportError: fsspec or what it needs for this store is not installed.
    """
    url = url_of(out)
    if url is None:
        return Folder(Path(out))
    if (path := local_path(url)) is not None:
        return Folder(path)
    scheme = url.partition("://")[0]
    if scheme not in OBJECT_STORES:
        raise ValueError(
            f"{url}: a file in a store {scheme!r} may be seen before it is whole; give a folder or "
            f"one of {', '.join(f'{name}://' for name in OBJECT_STORES)}"
        )
    files, root = filesystem(url)
    return ObjectStore(url, files, root)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    fsspec = import_extra("fsspec", extra="jobs")
    files, root = fsspec.core.url_to_fs(url)
    return files, str(root).rstrip("/")


@dataclass(frozen=True)
class Folder:
    """A folder of a file system."""

    folder: Path

    @property
    def place(self) -> str:
        return str(self.folder)

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> None:
        with atomic_file(self.folder / name, new=True) as temporary:
            temporary.write_bytes(data)

    def write(self, name: str, data: bytes) -> None:
        write_bytes(self.folder / name, data)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        return atomic_file(self.folder / name)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        yield self.folder / name


@dataclass(frozen=True)
class ObjectStore:
    """A store of whole objects, such as S3."""

    place: str
    files: Any
    root: str
    folder: None = None

    def prepare(self) -> None:
        """Nothing: objects need no folder, and a put that was cut off leaves nothing."""

    def exists(self, name: str) -> bool:
        self.files.invalidate_cache()  # others write to it as well
        return bool(self.files.exists(self._path(name)))

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self.files.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> None:
        """
        Raises:
            FileExistsError: there is an object with this name.
            ValueError: the store has no conditional put.
        """
        self._put_new(name, data)
        try:
            self._put_new(name, data)  # a store that ignores the condition would say nothing
        except FileExistsError:
            return
        raise ValueError(self._no_condition())

    def _put_new(self, name: str, data: bytes) -> None:
        try:
            self.files.pipe_file(self._path(name), data, mode="create")
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(self._no_condition()) from error

    def _no_condition(self) -> str:
        return (
            f"{self.place} has no conditional put, so two processes could begin the same job in "
            "different ways; give a folder or another store, or install a newer version of its "
            "fsspec package"
        )

    def write(self, name: str, data: bytes) -> None:
        self.files.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self._path(name))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
            path = Path(folder) / name
            yield path
            self.files.put_file(str(path), self._path(name))

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
            path = Path(folder) / name
            self.files.get_file(self._path(name), str(path))
            yield path

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


def has_locks(folder: Path) -> bool:
    """Whether a lock on a file of this folder keeps other processes out."""
    try:
        import fcntl
    except ImportError:  # Windows, where every file system has them
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
    return True
