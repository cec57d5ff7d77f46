"""Atomic writes: a path holds either the old content or the new content, never a part of it.

The content is written to a temporary sibling (in the same folder, so that the rename stays on one
filesystem), flushed to disk and renamed. After an error, a full disk or Ctrl-C the sibling is
removed and the old content is still there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

if sys.platform != "win32":
    import fcntl

# names made by _temporary_sibling and _replace_folder, with tempfile's eight random characters
_LEFTOVER = re.compile(r"\.(?:.+\.[a-z0-9_]{8}\.tmp(?:\..+)?|(?P<aside>.+)\.old-[a-z0-9_]{8})")
LOCK = ".lock"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSALS = (ValueError, OSError, ImportError)
"""Errors raised when a file or an option cannot be used."""
MAX_MESSAGE = 1000  # characters of an error; our own longest list of choices has 600


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to ``path`` if the block succeeds.

    The parent folder is created if it is missing.

    Args:
        new: never replace an existing file, even one that another process wrote in the meantime.

    Raises:
        FileExistsError: with `new`, the file exists at the end of the block.
        OSError: the file cannot be written. If the disk is full, a one-line message says so.
    """
    path = Path(path)
    with names_full_disk(path), _temporary_sibling(path) as temporary:
        try:
            yield temporary
            _sync(temporary)
            (_rename_to_new if new else os.replace)(temporary, path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces ``path`` if the block succeeds.

    On Linux the two folders change places in one step, so there is a whole folder under the name at
    every instant. Elsewhere the old one is moved aside first and moved back if the second rename
    fails; a kill between the two renames leaves it under its ``.<name>.old-`` name, from where
    :func:`remove_leftovers` moves it back. What earlier writers of ``path`` left behind is removed.

    Raises:
        OSError: as for :func:`atomic_file`; also if ``path`` is a file.
    """
    path = Path(path)
    with names_full_disk(path):
        remove_leftovers(path.parent, path.name)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, f"expected a folder, got a file: {path}; choose another name"
            )
        with _temporary_sibling(path, folder=True) as temporary:
            try:
                yield temporary
                for entry in sorted(temporary.rglob("*")):
                    _sync(entry)
                _sync(temporary)
                _replace_folder(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write ``data`` to ``path`` as indented JSON, atomically."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    # half a surrogate, as in a name that is not UTF-8, has no other form than JSON's own escape
    write_bytes(path, text.encode(errors="backslashreplace"))


def numbered(path: Path) -> Iterator[Path]:
    """Yield ``cat.png``, ``cat-2.png``, ``cat-3.png`` and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def printable(text: str, limit: int = 80) -> str:
    """Make text from a file safe to show in a message.

    It is cut to `limit` characters; newlines, terminal escapes and other unprintable characters are
    written as escape sequences.
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in cut
    )


def message_line(text: object, limit: int = MAX_MESSAGE) -> str:
    """`text` as one line of printable characters, at most `limit` of them.

    A longer text loses its middle: the beginning says what is wrong, the end what to do about it.
    """
    joined = " ".join(str(text).split())
    line = joined if len(joined) > limit else printable(joined, limit)
    if len(line) <= limit:
        return line
    end = limit // 3
    head, tail = joined[:limit], joined[-limit:]
    return f"{printable(head, limit)[: limit - end - 3]} … {printable(tail, limit)[-end:]}"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Give errors that are raised in the block a message as :func:`message_line` makes it.

    Every function that opens what a user was given goes through it, so no reader has to think of
    terminal escapes or of names of 200,000 letters. Kinds of errors and tracebacks stay.
    """
    try:
        yield
    except REFUSALS as error:
        put_in_one_line(error)
        raise


def put_in_one_line(error: Exception) -> None:
    """Give an error of `REFUSALS` a message as :func:`message_line` makes it.

    Raises:
        ValueError: instead of an error that makes its text of its fields (UnicodeDecodeError).
    """
    line = message_line(error)
    if line == str(error):
        return
    if isinstance(error, OSError) and error.strerror:
        error.strerror = message_line(error.strerror)
    elif isinstance(error, ImportError):
        error.msg = line
    elif isinstance(error, UnicodeError):
        raise ValueError(line) from error
    else:
        error.args = (line,)


@contextlib.contextmanager
def locked_folder(folder: Path, *, what: str) -> Iterator[None]:
    """Lock ``folder`` against other processes during the block; create it if it is missing.

    The operating system releases the lock however the process ends.

    Args:
        what: what another process that holds the lock is doing, as in "is training".

    Raises:
        ValueError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"another process {what} in {folder}; wait for it to end, or choose another folder"
        ) from None


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Clean up ``folder`` after a process was killed (kill -9, power cut) while it was writing.

    Unfinished temporaries are deleted, except those that a live process is still writing. A folder
    that had been moved aside is moved back.

    name: only what was left by writers of this name.
    """
    pattern = ".*" if name is None else f".{glob.escape(name)}.*"
    for entry in sorted(folder.glob(pattern)):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None:
            continue
        with _locked(entry) as mine:
            if not mine:
                continue
            if match["aside"] and not (folder / match["aside"]).exists():
                os.replace(entry, folder / match["aside"])
            elif entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary_sibling(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Create an empty file or folder next to ``path``, locked during the block.

    The lock shows that the process is alive; it is released when the process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix, suffix = f".{path.name}.", f".tmp{path.suffix}"
    while True:
        if folder:
            temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent))
        else:
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
            os.close(handle)
            temporary = Path(name)
        with _locked(temporary) as mine:
            if not mine:  # taken for a leftover by another process before it was locked
                continue
            # mkstemp and mkdtemp create private files; the result should have the usual permissions
            temporary.chmod((0o777 if folder else 0o666) & ~_umask())
            yield temporary
            return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder; False if another process does, or it is gone."""
    if sys.platform == "win32":
        yield True
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        except OSError:  # this file system has no locks
            mine = True
        yield mine and os.path.lexists(path)
    finally:
        os.close(handle)


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Rename; raise FileExistsError instead of replacing a file."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # this file system has no hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _umask() -> int:
    mask = os.umask(0)  # setting it is the only portable way to read it
    os.umask(mask)
    return mask


def _replace_folder(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.replace(temporary, path)
        _sync(path.parent)
        return
    if _exchange(temporary, path):
        _sync(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    with _locked(path):  # the lock moves with the folder
        try:
            os.replace(path, aside)  # a rename may replace an empty folder
            os.replace(temporary, path)
        except BaseException:
            if not path.exists():
                os.replace(aside, path)
            else:
                aside.rmdir()
            raise
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or its file system cannot."""
    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux 3.15, glibc 2.28
    if swap is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def names_full_disk(path: Path) -> Iterator[None]:
    """Report a full disk in one line that names the file and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(
            error.errno,
            f"no space left to write {path} (the unfinished file was removed); "
            "free some space or choose another folder",
        ) from error
