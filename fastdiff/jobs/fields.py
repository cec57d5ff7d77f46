"""Turn rows into jobs: columns become fields, and `recipe.from_json` checks them.

A row is flat: the fields of a job, of its `settings` and of its `text` lie side by side, under the
names that they have in `fastdiff.generate.job`. A group may also be given whole, so that a line of
JSONL can be the `job` of a recipe.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fastdiff.configs import from_dict
from fastdiff.generate.facts import Facts, check
from fastdiff.generate.job import (
    GROUPS,
    KINDS,
    MAX_SEED,
    PICTURES,
    InpaintJob,
    Job,
    check_seed,
)
from fastdiff.generate.pictures import check_same_size, read_picture
from fastdiff.generate.recipe import from_json
from fastdiff.images import read_mask
from fastdiff.jobs.rows import TEXT_COLUMN, Row
from fastdiff.jobs.store import filesystem, url_of

KIND = "kind"
NOT_OF_A_ROW = ("batch",)
"""Settings that do not change the image."""
BY_ENDING = {"txt": "prompt", "cls": "label"}
"""Members of a webdataset whose meaning is known without a mapping."""


@functools.cache
def field_types() -> dict[str, tuple[type, ...]]:
    """Every field that a column may fill -> the types that it accepts."""
    found: dict[str, tuple[type, ...]] = {KIND: (str,)}
    for cls in (*KINDS.values(), *GROUPS.values()):
        hints = get_type_hints(cls)
        for entry in fields(cls):
            if entry.name not in (*GROUPS, *NOT_OF_A_ROW):
                hint = hints[entry.name]
                found[entry.name] = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return found


def from_words(name: str, text: str) -> Any:
    """Convert text, as in CSV or on the command line, to a value of a field.

    >>> from_words("steps", "20"), from_words("emphasis", "false"), from_words("crop", "0, 64")
    (20, False, [0, 64])

    Raises:
        ValueError: the text is not such a value.
    """
    kinds = [kind for kind in field_types()[name] if kind is not NoneType]
    if str in kinds or name in PICTURES:
        return text
    word = text.strip()
    for kind in kinds:
        if kind is bool and word.lower() in ("true", "false"):
            return word.lower() == "true"
        if kind is int and re.fullmatch(r"[+-]?\d+", word):
            return int(word)
        if kind is float and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word):
            return float(word)
        if get_origin(kind) is tuple and re.fullmatch(r"\d+\s*[,x ]\s*\d+", word):
            return [int(number) for number in re.findall(r"\d+", word)]
    if any(get_origin(kind) not in (tuple, None) for kind in kinds):  # a Literal says what it takes
        return word
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}
    words = " or ".join(wanted.get(kind, "two whole numbers") for kind in kinds)
    raise ValueError(f"{name} must be {words}, got {text!r:.40}")


def from_default(name: str, text: str) -> Any:
    """A default given as text: of any field but those that only a row can have.

    Raises:
        ValueError: the field is unknown, or the text is no value of it.
    """
    if name not in field_types():
        raise ValueError(f"unknown field {name!r}; expected one of {', '.join(field_types())}")
    return from_words(name, text)


class Columns:
    """Which column fills which fields."""

    def __init__(self, given: Mapping[str, str], ignored: Iterable[str]) -> None:
        """
        given: field -> column. ignored: columns that are not used.

        Raises:
            ValueError: a field is unknown, or a column is both used and ignored.
        """
        known = {*field_types(), *GROUPS}
        for name in given:
            if name not in known:
                raise ValueError(f"unknown field {name!r}; expected one of {', '.join(known)}")
        self.given, self.ignored = dict(given), frozenset(ignored)
        if both := self.ignored.intersection(given.values()):
            raise ValueError(f"column {min(both)!r} is both used and ignored; decide for one")

    def of(self, facts: Facts) -> dict[str, str]:
        """field -> column, with what the model adds for files of text."""
        first = "prompt" if facts.reads_text else "label"
        return {first: TEXT_COLUMN, **self.given}

    def fields(self, column: str, facts: Facts) -> list[str]:
        """The fields that a column fills.

        Raises:
            ValueError: none; the message names the column.
        """
        if column in self.ignored:
            return []
        given = self.of(facts)
        if found := [name for name, other in given.items() if other == column]:
            return found
        own = BY_ENDING.get(column, column)
        if own in field_types() or own in GROUPS:
            if own not in given or given[own] == TEXT_COLUMN:
                return [own]
            raise ValueError(
                f"column {column!r} is not used, since {own} is read from {given[own]!r}; ignore "
                f"it (--ignore {column})"
            )
        raise ValueError(
            f"unknown column {column!r}; map it to a field (--column FIELD={column}) or ignore it "
            f"(--ignore {column}). Fields are {', '.join(field_types())}"
        )

    def check(self, columns: Iterable[str], facts: Facts) -> None:
        """Raise ValueError unless these columns, and all that were given, have a meaning."""
        there = list(columns)
        for column in there:
            self.fields(column, facts)
        for name, column in self.given.items():
            if column not in there:
                listed = ", ".join(there)
                raise ValueError(
                    f"there is no column {column!r} for {name}; expected one of {listed}"
                )


class Builder:
    """Makes the job of each row."""

    def __init__(
        self,
        columns: Columns,
        defaults: Mapping[str, Any],
        facts: Facts,
        *,
        seed: int,
        folder: Path | str,
    ) -> None:
        """
        defaults: values of fields that a row leaves out. seed: that of row 0; row i without a seed
        has `seed` + i. folder: path or URL where paths of pictures start.

        Raises:
            ValueError: a default is unknown or wrong.
        """
        check_seed(seed)
        self.columns, self.facts, self.seed, self.folder = columns, facts, seed, folder
        self.defaults = dict(defaults)
        self._fields: dict[str, list[str]] = {}
        self.fetched: dict[int, dict[str, str]] = {}
        """Row -> field -> SHA-256 of a picture read from a URL, until it is taken out."""
        check_defaults(defaults)

    def __call__(self, row: Row) -> Job:
        """The checked job of a row.

        Raises:
            ValueError: the row cannot be read, a column is unknown, or a value is wrong.
            FileNotFoundError: a picture does not exist.
        """
        if row.error is not None:
            raise ValueError(row.error)
        values, pixels = dict(self.defaults), dict[str, bytes]()  # pixels: of pictures in the row
        values.setdefault("seed", (self.seed + row.number) % (MAX_SEED + 1))
        for name, value, is_words in self._given(row):
            values[name] = from_words(name, value) if is_words else value
        for name in PICTURES:
            if name in values:
                is_url = isinstance(path := _bytes_or_path(values[name]), str) and self._url(path)
                values[name], found = self._picture(name, values[name])
                pixels |= found
                if is_url:
                    digest = hashlib.sha256(found[name]).hexdigest()
                    self.fetched.setdefault(row.number, {})[name] = digest
        job: Any = from_json(nested(values, upsampler=self.facts.reads_image))
        if isinstance(job, InpaintJob) and (job.height or job.width):
            check_same_size(*(pixels.get(name, values[name]) for name in ("image", "mask")))
        for name, data in pixels.items():
            job = replace(job, **{name: self._pixels(name, data, job)})
        checked: Job = check(job, self.facts)
        return checked

    def _given(self, row: Row) -> Iterator[tuple[str, Any, bool]]:
        """(field, value, whether the value is text to be converted) of what a row says."""
        for column, value in row.values.items():
            if column not in self._fields:
                self._fields[column] = self.columns.fields(column, self.facts)
            for name in self._fields[column]:
                if value is not None and not (row.words and value == ""):
                    is_words = isinstance(value, str) and (row.words or column in BY_ENDING)
                    yield name, value, is_words and name not in PICTURES

    def may_name_pictures(self, columns: Iterable[str] | None) -> bool:
        """Whether rows with these columns (None: each names its own) may have pictures."""
        if columns is None or not self.defaults.keys().isdisjoint(PICTURES):
            return True
        fields_ = [name for column in columns for name in self.columns.fields(column, self.facts)]
        return not set(fields_).isdisjoint(PICTURES)

    def paths(self, row: Row) -> dict[str, str]:
        """field -> path, as the row says it, of the pictures that a row names.

        Raises:
            ValueError: the row has a column without a meaning.
        """
        found = {name: self.defaults[name] for name in PICTURES if name in self.defaults}
        found |= {name: value for name, value, _ in self._given(row) if name in PICTURES}
        paths = {name: _bytes_or_path(value) for name, value in found.items()}
        return {name: value for name, value in paths.items() if isinstance(value, str)}

    def hashes(self, row: Row) -> dict[str, str]:
        """field -> SHA-256 of the file, of the pictures that a row names.

        Raises:
            ValueError: the row has a column without a meaning.
            OSError: a file cannot be read.
        """
        return {
            name: hashlib.sha256(self._read(path)).hexdigest()
            for name, path in self.paths(row).items()
        }

    def _picture(self, name: str, value: Any) -> tuple[str, dict[str, bytes]]:
        """The path of a picture, or its bytes (and a path that stands for them)."""
        value = _bytes_or_path(value)
        if isinstance(value, bytes):
            return name, {name: value}
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a path or the bytes of a file, got {value!r:.40}")
        if self._url(value) is not None:
            return name, {name: self._read(value)}
        path = self.folder / Path(value)
        if not path.exists():
            raise FileNotFoundError(f"{name}: no image at {path}")
        return str(path), {}

    def _url(self, value: str) -> str | None:
        """The URL of a picture; None if it lies in a file system."""
        if isinstance(self.folder, str) and url_of(value) is None:
            return f"{self.folder}/{value}"
        return url_of(value)

    def _read(self, value: str) -> bytes:
        """The bytes of a picture that a row names by path or URL."""
        if (url := self._url(value)) is None:
            return (self.folder / Path(value)).read_bytes()
        files, path = filesystem(url)
        try:
            return bytes(files.cat_file(path))
        except FileNotFoundError:
            raise FileNotFoundError(f"no image at {url}") from None

    def _pixels(self, name: str, data: bytes, job: Any) -> Any:
        size = self.facts.picture_sides(getattr(job, "height", None), getattr(job, "width", None))
        if name == "control":  # must have the size of the image; a path is not resized either
            size = None, None
        try:
            if name == "depth":  # of any size
                return read_mask(data)
            if name == "mask":
                return read_mask(data, height=size[0], width=size[1])
            return read_picture(data, self.facts.image_channels, *size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _bytes_or_path(value: Any) -> Any:
    if isinstance(value, Mapping):  # {"bytes", "path"}, as Hugging Face's datasets store it
        return value.get("bytes") or value.get("path")
    return value


def nested(values: Mapping[str, Any], *, upsampler: bool = False) -> dict[str, Any]:
    """The fields of a row in the form that `recipe.from_json` reads.

    Without a kind, the fields decide: a mask means inpainting, `to_seed`, `to_prompt` or `to_label`
    an interpolation, an image with `scale` or `via` an enlargement, another image a variation of
    it, and otherwise a prompt decides between text and class. With an `upsampler`, which enlarges
    each image itself, or an image encoder, an image is part of a class or text job.

    Raises:
        ValueError: a field is unknown.
    """
    known = field_types()
    data: dict[str, Any] = {}
    for name, value in values.items():
        if name in GROUPS:
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} must be an object, got {value!r:.40}")
            data[name] = {**data.get(name, {}), **value}
            continue
        if name not in known:
            raise ValueError(f"unknown field {name!r}; expected one of {', '.join(known)}")
        if (group := _group_of(name)) is None:
            data[name] = value
        else:
            data[group] = {**data.get(group, {}), name: value}
    data.setdefault(KIND, _kind(data, upsampler))
    return data


def check_defaults(values: Mapping[str, Any]) -> None:
    """Raise ValueError if a default is no field, or has a value that no job could have."""
    data = nested(values)
    for name, cls in GROUPS.items():
        from_dict(cls, data.pop(name, {}))
    kinds = [data[KIND]] if KIND in values else [*KINDS]
    data.pop(KIND)
    for name in data:
        if not any(name in _names(KINDS[kind]) for kind in kinds if kind in KINDS):
            raise ValueError(f"a {kinds[0]} job has no field {name!r}; leave the default out")


def _kind(data: Mapping[str, Any], upsampler: bool) -> str:
    if "mask" in data:
        return "inpaint"
    if any(name.startswith("to_") for name in data):
        return "interpolation"
    if "image" in data and not upsampler:
        return "upscale" if "scale" in data or "via" in data else "image-to-image"
    return "text" if "prompt" in data else "class"


@functools.cache
def _group_of(name: str) -> str | None:
    """The group of settings that a field belongs to; None: it is one of the job itself."""
    return next((group for group, cls in GROUPS.items() if name in _names(cls)), None)


def _names(cls: type[Any]) -> set[str]:
    return {entry.name for entry in fields(cls)}
