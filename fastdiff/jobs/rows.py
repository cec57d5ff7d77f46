"""Read the rows of a job from text, CSV, JSONL, Parquet or webdataset files, as a stream.

A file is read twice: once from end to end to count its rows and hash its bytes, then as the shards
need it. Neither keeps more than a row, a line or a batch of Parquet in memory.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastdiff.extras import import_extra
from fastdiff.files import one_line_errors
from fastdiff.images import UNREADABLE, reason
from fastdiff.jobs.store import filesystem, local_path, url_of

MAX_LINE = 2**20
"""Bytes of a line of text or JSONL."""
MAX_SHOWN = 300
"""Bytes of a line that cannot be read which its error record repeats."""
MAX_MEMBER = 2**28
"""Bytes of a member of a webdataset."""
PARQUET_BATCH = 256
"""Rows of a Parquet file that are decoded at a time."""
TEXT_COLUMN = "line"
"""Name of the only column of a text file."""
CHUNK = 2**20


class Row(NamedTuple):
    """A row of the input."""

    number: int
    """Position among all rows of all files, from 0."""
    values: dict[str, Any]
    """Column -> value; of a line that cannot be read its text."""
    error: str | None = None
    """Why the row cannot be read."""
    words: bool = False
    """Whether all values are text that still has to be converted, as in CSV."""


Unit = Any
"""A row as it stands in the file: a line, a list of cells, members of a tar."""


@dataclass(frozen=True)
class Kind:
    """A file format."""

    units: Callable[[Path, int], Iterator[Unit]]
    """(path, start) -> the rows from `start` on, not yet parsed; a ValueError stands for a row that
    cannot be read."""
    parse: Callable[[Path, Unit], dict[str, Any]]
    """Raises ValueError if the row cannot be read."""
    count: Callable[[Path], int]
    columns: Callable[[Path], tuple[str, ...] | None] = lambda path: None
    """The columns of all rows; None if each row names its own."""
    words: bool = False
    """Whether all values are text."""


@dataclass(frozen=True)
class RowFile:
    """One file of the input, after it was counted and hashed."""

    path: Path
    rows: int
    size: int
    sha256: str
    modified: int
    """Time of the last change, in nanoseconds."""
    source: str | None = None
    """URL that it was copied from."""

    @property
    def kind(self) -> Kind:
        return KINDS[self.path.suffix.lower()]

    @property
    def name(self) -> str:
        return (self.source or self.path.as_posix()).rpartition("/")[2]

    def check_unchanged(self) -> None:
        """
        Raises:
            ValueError: the file was changed after it had been hashed.
            FileNotFoundError: it was removed.
        """
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified):
            raise ValueError(
                f"{self.path} was changed while the job read it; put the old file back to resume, "
                "or give another --out"
            )


@dataclass(frozen=True)
class Rows:
    """The rows of one or several files, in the order of the files' names."""

    files: tuple[RowFile, ...]

    @property
    def count(self) -> int:
        """Number of rows, those included that cannot be read."""
        return sum(file.rows for file in self.files)

    @property
    def folder(self) -> Path | str:
        """The folder that paths of pictures in the rows are relative to: a path, or a URL."""
        first = self.files[0]
        return first.path.parent if first.source is None else first.source.rpartition("/")[0]

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns of all rows; None if each row names its own.

        Raises:
            ValueError: a header cannot be read, or the files have different ones.
        """
        first = self.files[0].kind.columns(self.files[0].path)
        for file in self.files[1:]:
            if (other := file.kind.columns(file.path)) != first:
                raise ValueError(
                    f"all files must have the same columns, got {first} in {self.files[0].path} "
                    f"and {other} in {file.path}; make a job of each"
                )
        return first

    def read(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from `start` on."""
        first = 0
        for file in self.files:
            if start < first + file.rows:
                yield from _read(file, max(start - first, 0), first)
            first += file.rows


@dataclass
class Reader:
    """Reads ranges of rows, without going back to the start of a file for one that lies ahead."""

    rows: Rows
    _at: int = 0
    _stream: Iterator[Row] | None = field(default=None, repr=False)

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Yield rows start, ..., stop - 1."""
        if self._stream is None or start < self._at:
            self._stream, self._at = self.rows.read(start), start
        for row in self._stream:
            self._at = row.number + 1
            if row.number >= start:
                yield row
            if self._at >= stop:
                return


@one_line_errors()
def open_rows(pattern: str) -> Rows:
    """Count and hash the files that a path or a pattern such as ``rows-*.jsonl`` names.

    Raises:
        FileNotFoundError: no file has this name.
        ValueError: the format is unknown, the files have different formats, or a file is damaged.
        ImportError: a Parquet file is given, and pyarrow is not installed.
    """
    sources, scratch = dict[Path, str](), None
    url = url_of(pattern)
    if url is not None and (local := local_path(url)) is not None:
        url, pattern = None, str(local)
    if url is not None:
        scratch = tempfile.mkdtemp(prefix="fastdiff-")
        sources = _copied(url, Path(scratch))
        paths = [*sources]
    else:
        paths = [Path(pattern)] if Path(pattern).exists() else [*map(Path, glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no file of rows at {pattern}; give a file or a pattern of names")
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1:
        raise ValueError(
            f"all files must have one format, got {', '.join(sorted(kinds))}; make a job of each"
        )
    if (suffix := kinds.pop()) not in KINDS:
        raise ValueError(
            f"unknown format of rows {suffix!r} ({paths[0]}); expected one of {', '.join(KINDS)}"
        )
    rows = Rows(tuple(_scanned(path, sources.get(path)) for path in sorted(paths)))
    if scratch is not None:  # the copies go when nobody can read them any more
        weakref.finalize(rows, shutil.rmtree, scratch, ignore_errors=True)
    if not rows.count:
        raise ValueError(f"{pattern} has no rows; write one row per image")
    return rows


def _copied(url: str, folder: Path) -> dict[Path, str]:
    """Copy the files that a URL or a pattern names into a folder; returns copy -> URL."""
    files, path = filesystem(url)
    scheme = url.partition("://")[0]
    found = [path] if files.exists(path) else sorted(files.glob(path))
    copies = {}
    for number, name in enumerate(found):  # the number keeps the order, and equal names apart
        place = folder / f"{number:06d}"
        place.mkdir()
        copy = place / str(name).rpartition("/")[2]
        files.get_file(name, str(copy))
        copies[copy] = f"{scheme}://{str(name).lstrip('/')}"
    return copies


def _scanned(path: Path, source: str | None) -> RowFile:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a file of rows or a pattern of names")
    digest, size = hashlib.sha256(), 0
    modified = path.stat().st_mtime_ns  # before it is read: later changes are noticed
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    rows = KINDS[path.suffix.lower()].count(path)
    return RowFile(path, rows, size, digest.hexdigest(), modified, source)


def _read(file: RowFile, start: int, first: int) -> Iterator[Row]:
    """Rows of one file, numbered from `first`."""
    kind = file.kind
    for number, unit in enumerate(kind.units(file.path, start), first + start):
        row = _row(file, kind, number, unit)
        file.check_unchanged()
        yield row


def _row(file: RowFile, kind: Kind, number: int, unit: Unit) -> Row:
    if isinstance(unit, ValueError):
        return Row(number, {}, str(unit))
    try:
        return Row(number, kind.parse(file.path, unit), None, kind.words)
    except (ValueError, RecursionError) as error:
        said = str(error) or type(error).__name__
        shown = unit[:MAX_SHOWN].decode(errors="replace") if isinstance(unit, bytes) else None
        return Row(number, {} if shown is None else {TEXT_COLUMN: shown.strip()}, said)


# --- text and JSONL -------------------------------------------------------------------------------


def _lines(path: Path, start: int = 0) -> Iterator[bytes | ValueError]:
    """The lines that are not blank."""

    def all_() -> Iterator[bytes | ValueError]:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE)
                    yield ValueError(f"the line is longer than {MAX_LINE:,} bytes")
                elif line.strip():
                    yield line

    return itertools.islice(all_(), start, None)


def _count_lines(path: Path) -> int:
    return sum(1 for _ in _lines(path))


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 (byte {error.start})") from None


def _text(_: Path, line: bytes) -> dict[str, Any]:
    return {TEXT_COLUMN: _decoded(line)}


def _json(_: Path, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(_decoded(line), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected an object with the columns of the row, got {line[:40]!r}")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


# --- CSV ------------------------------------------------------------------------------------------


def _cells(path: Path, delimiter: str) -> Iterator[list[str] | ValueError]:
    """The header and the rows of a CSV file; blank lines are no rows."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)  # a quote must be closed
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield ValueError(f"not valid CSV: {error}")
                continue
            if cells:
                yield cells


def _csv(delimiter: str) -> Kind:
    def header(path: Path) -> tuple[str, ...]:
        names = next(_cells(path, delimiter), [])
        if isinstance(names, ValueError):
            names = []
        if not names or "" in names or len(set(names)) != len(names):
            raise ValueError(
                f"the first line of {path} must name each column once, got {names!s:.80}; "
                "write a header such as prompt,seed"
            )
        return tuple(names)

    def units(path: Path, start: int) -> Iterator[Unit]:
        names = header(path)
        for cells in itertools.islice(_cells(path, delimiter), start + 1, None):
            yield cells if isinstance(cells, ValueError) else (names, cells)

    def parse(_: Path, unit: tuple[tuple[str, ...], list[str]]) -> dict[str, Any]:
        names, cells = unit
        if len(cells) != len(names):
            raise ValueError(f"expected {len(names)} values, as in the header, got {len(cells)}")
        if any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
            raise ValueError("the row is not UTF-8")
        return dict(zip(names, cells, strict=True))

    def count(path: Path) -> int:
        header(path)
        return sum(1 for _ in _cells(path, delimiter)) - 1

    return Kind(units, parse, count, header, words=True)


# --- Parquet --------------------------------------------------------------------------------------


def _parquet(path: Path) -> Any:
    parquet = import_extra("pyarrow.parquet", extra="jobs")
    try:
        return parquet.ParquetFile(path)
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a Parquet file: {reason(error)}") from error


def _parquet_units(path: Path, start: int) -> Iterator[Unit]:
    with _parquet(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start >= rows:
                start -= rows
                continue
            for batch in file.iter_batches(PARQUET_BATCH, row_groups=[group]):
                if start >= len(batch):
                    start -= len(batch)
                    continue
                yield from batch.slice(start).to_pylist()
                start = 0


def _parquet_rows(path: Path) -> int:
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


def _parquet_columns(path: Path) -> tuple[str, ...]:
    with _parquet(path) as file:
        return tuple(file.schema_arrow.names)


# --- webdataset -----------------------------------------------------------------------------------


class _Member(NamedTuple):
    ending: str
    offset: int
    size: int


def _samples(path: Path, start: int = 0) -> Iterator[list[_Member]]:
    """The members of each sample: neighbours whose names are equal up to the first dot.

    Only headers are read. The archive must not be compressed, so that members can be skipped.
    """

    def members() -> Iterator[tuple[str, _Member]]:
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps all headers
                    folder, name = os.path.split(member.name)
                    if member.isreg() and not name.startswith(("__", ".")):
                        key, _, ending = name.partition(".")
                        place = _Member(ending.lower(), member.offset_data, member.size)
                        yield f"{folder}/{key}", place
                _check_end(path, archive.offset)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{path} is not a whole tar: {reason(error)}") from error

    groups = itertools.groupby(members(), key=lambda pair: pair[0])
    for _, group in itertools.islice(groups, start, None):
        yield [member for _, member in group]


def _check_end(path: Path, offset: int) -> None:
    """Check that a tar ends at `offset`, where its reader stops without a word at anything that is
    no header: with zeros, and nothing after them.

    Raises:
        ValueError: it does not.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path} is not a whole tar: it has no end, or a damaged header")
        while rest := file.read(MAX_MEMBER):
            if rest.strip(b"\0"):
                raise ValueError(
                    f"{path} goes on after its end; join tars with tar --concatenate, not with cat"
                )


def _sample(path: Path, members: list[_Member]) -> dict[str, Any]:
    """The fields of a ``.json`` member, the text of others that are text, the bytes of the rest."""
    values: dict[str, Any] = {}
    with path.open("rb") as file:
        for ending, offset, size in members:
            if size > MAX_MEMBER:
                raise ValueError(f"member .{ending} is larger than {MAX_MEMBER >> 20} MiB")
            file.seek(offset)
            data = file.read(size)
            found: dict[str, Any] = {ending: data}
            if ending == "json":
                found = _json(path, data)
            elif ending in ("txt", "cls", "caption", "text"):
                found = {ending: _decoded(data)}
            if twice := values.keys() & found.keys():
                raise ValueError(f"the sample has {sorted(twice)[0]!r} twice")
            values |= found
    return values


KINDS: dict[str, Kind] = {
    ".txt": Kind(_lines, _text, _count_lines, lambda path: (TEXT_COLUMN,), words=True),
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
    ".jsonl": Kind(_lines, _json, _count_lines),
    ".parquet": Kind(_parquet_units, lambda path, row: row, _parquet_rows, _parquet_columns),
    ".tar": Kind(_samples, _sample, lambda path: sum(1 for _ in _samples(path))),
}
