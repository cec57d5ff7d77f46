"""The record of `python -m benchmarks.resources --every`: docs/resources.json.

One line per (GPU, dtype, tunable, shape class): a digest of everything that its kernels are
compiled from, and the largest resources of any of them. Digests take seconds but compiling
everything takes most of an hour, so a test only compares digests, and whoever changes a kernel or
a config compiles what has become outdated. The header has Triton's version, since another compiler
gives other results.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import textwrap
import time
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.resources.ahead_of_time import (
    CHIPS,
    KIB,
    Resources,
    Task,
    compile_all,
    identity,
    launches,
    pairs,
    tasks,
)
from fastdiff.bench.compile import DTYPES
from fastdiff.bench.tunables import TUNABLES
from fastdiff.files import write_text
from fastdiff.kernels.triton import triton

RECORD = Path(__file__).resolve().parents[2] / "docs" / "resources.json"
COMMAND = "python -m benchmarks.resources --every --docs"


@dataclass(frozen=True, order=True)
class Key:
    """Identifies the kernels that share a config, on one GPU and in one dtype."""

    architecture: str
    dtype: str
    tunable: str
    shape_class: str

    def __str__(self) -> str:
        return f"{self.architecture}/{self.dtype}/{self.tunable}/{self.shape_class}"


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The resources of the kernels under one key."""

    source: str
    """Digest of what they are compiled from."""
    kernels: int
    """Number of distinct kernels."""
    registers: int
    """Most registers per thread of any kernel."""
    shared: int
    """Most bytes of shared memory per block of any kernel."""
    spilling: int
    """Number of kernels that spill."""
    spills: int
    """Most bytes spilled by any kernel."""
    off_matrix: int
    """Number of kernels with half-precision products but no matrix instruction."""


@dataclass(frozen=True, kw_only=True)
class Record:
    triton: str
    taken: dict[str, Taken]
    """By `str(Key)`."""


def read_record(path: Path = RECORD) -> Record:
    """Read a record; a missing file is an empty record. Raises ValueError if it is not valid."""
    if not path.exists():
        return Record(triton="", taken={})
    try:
        content = json.loads(path.read_text())
        taken = {key: Taken(**row) for key, row in content["kernels"].items()}
        return Record(triton=content["triton"], taken=taken)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a valid record of resources ({error}); run {COMMAND}"
        ) from error


def write_record(record: Record, path: Path = RECORD) -> None:
    """Write a record with one key per line, so that diffs show which keys changed."""
    rows = [f"  {json.dumps(key)}: {json.dumps(vars(row))}" for key, row in record.taken.items()]
    text = f'{{\n "triton": {json.dumps(record.triton)},\n "kernels": {{\n'
    write_text(path, text + ",\n".join(rows) + "\n }\n}\n")


def triton_version() -> str:
    return str(triton.__version__)


def all_keys(
    tunables: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    architectures: Iterable[str] = (),
    shape_classes: Sequence[str] = (),
) -> list[Key]:
    """Every key, or those of some tunables, dtypes, GPUs or classes."""
    return [
        Key(architecture, dtype, name, shape_class)
        for architecture in architectures or CHIPS
        for dtype in dtypes or DTYPES
        for name in tunables or TUNABLES
        for shape_class, _ in pairs(name, [dtype])
        if not shape_classes or shape_class in shape_classes
    ]


# What a kernel is compiled from


def plain(source: str) -> str:
    """Python source without comments, docstrings and line breaks: only what affects the code."""
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None
    }
    words = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.INDENT:
            words.append("{")
        elif token.type == tokenize.DEDENT:
            words.append("}")
        elif token.type == tokenize.NEWLINE:
            words.append(";")
        elif token.type == tokenize.STRING and token.start[0] in docstrings:
            words.append("''")
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            words.append(token.string)
    return " ".join(words)


def functions_of(function: Any, found: set[str] | None = None) -> set[str]:
    """The source of a function under `jit` and of our functions that it calls, and constants.

    Module names are left out, so that moving a kernel does not change it.
    """
    found = set() if found is None else found
    inner = getattr(function, "fn", function)
    source = f"{inner.__qualname__}: {plain(textwrap.dedent(inspect.getsource(inner)))}"
    if source in found:
        return found
    found.add(source)
    for word in sorted({w for code in codes_of(inner.__code__) for w in code.co_names}):
        value = inner.__globals__.get(word)
        if isinstance(value, (int, float, str, tuple)):
            found.add(f"{word} = {value!r}")
        called = getattr(value, "fn", value)
        if inspect.isfunction(called) and called.__module__.startswith("fastdiff."):
            functions_of(called, found)
    return found


def codes_of(code: Any) -> list[Any]:
    """A function's code objects, including those of comprehensions and lambdas in it."""
    return [
        code,
        *(c for each in code.co_consts if hasattr(each, "co_names") for c in codes_of(each)),
    ]


@cache
def source_of(kernel: Any) -> str:
    return json.dumps(sorted(functions_of(kernel)))


def digest(key: Key) -> str:
    """A hash of the source, signature, constants and options of every kernel under a key."""
    known = launches(key.tunable, key.shape_class, key.dtype, key.architecture, every=True)
    parts = sorted(f"{identity(launch)}{source_of(launch.kernel)}" for launch in known)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# The record


def stale(record: Record, keys: Iterable[Key]) -> list[Key]:
    """Keys whose kernels differ from those of the record."""
    if record.triton != triton_version():
        return list(keys)
    return [
        k for k in keys if str(k) not in record.taken or record.taken[str(k)].source != digest(k)
    ]


def most_of(source: str, rows: Sequence[Resources]) -> Taken:
    return Taken(
        source=source,
        kernels=len(rows),
        registers=max(row.registers for row in rows),
        shared=max(row.shared for row in rows),
        spilling=sum(row.spills > 0 for row in rows),
        spills=max(row.spills for row in rows),
        off_matrix=sum(row.dots > 0 and row.dtype != "float32" and not row.matrix for row in rows),
    )


def compile_keys(keys: Sequence[Key], workers: int | None) -> dict[str, Taken]:
    """Compile every kernel under some keys."""
    todo = [task for key in keys for task in tasks_of(key)]
    rows: dict[Key, list[Resources]] = {key: [] for key in keys}
    for row in compile_all(todo, workers=workers):
        rows[Key(row.architecture, row.dtype, row.tunable, row.shape_class)].append(row)
    return {str(key): most_of(digest(key), found) for key, found in rows.items()}


def tasks_of(key: Key) -> list[Task]:
    return tasks(
        [key.tunable], [key.dtype], [key.architecture], shape_classes=[key.shape_class], every=True
    )


def bring_up_to_date(
    keys: Sequence[Key],
    tell: Callable[[str], None],
    *,
    workers: int | None = None,
    path: Path = RECORD,
) -> Record:
    """Compile everything that is missing from the record, GPU by GPU and dtype by dtype.

    The record is written after each, so that an interrupted run continues where it stopped. `tell`
    is called with lines that report progress.
    """
    record = read_record(path)
    todo = stale(record, keys)
    parts = {
        part: list(group) for part, group in groupby(todo, lambda k: (k.architecture, k.dtype))
    }
    counts = {part: sum(len(tasks_of(key)) for key in group) for part, group in parts.items()}
    total, done, started = sum(counts.values()), 0, time.monotonic()
    tell(f"{total} kernels under {len(todo)} keys are not in {path.name}")
    for part, group in parts.items():
        new = compile_keys(group, workers)
        record = merged(read_record(path), new)
        write_record(record, path)
        done, seconds = done + counts[part], time.monotonic() - started
        bad = sum(row.spilling for row in new.values())
        left = seconds / done * (total - done)
        tell(
            f"{part[0]} {DTYPES[part[1]]}: {counts[part]} kernels, {bad} spill; "
            f"{done} of {total} in {seconds:.0f} s, about {left:.0f} s left"
        )
    return record


def merged(record: Record, new: dict[str, Taken]) -> Record:
    """The record with new lines added in key order, without those of another compiler."""
    taken = {**(record.taken if record.triton == triton_version() else {}), **new}
    order = [str(key) for key in all_keys()]
    return Record(triton=triton_version(), taken={k: taken[k] for k in order if k in taken})


def faults(record: Record) -> list[str]:
    """Violations of what every shipped kernel must satisfy, by key."""
    found = []
    for key, row in record.taken.items():
        limit = CHIPS[key.partition("/")[0]].shared_per_block
        if row.spills:
            found.append(f"{key}: {row.spills} bytes spilled")
        if row.shared > limit:
            found.append(f"{key}: {row.shared} bytes of shared memory, the limit is {limit}")
        if row.off_matrix:
            found.append(f"{key}: {row.off_matrix} kernels without matrix instructions")
    return found


def summary(record: Record) -> list[str]:
    """A Markdown table: one row per GPU and dtype."""
    lines = [
        "| GPU | dtype | kernels | of them spill | most registers | most shared memory, KiB |",
        "|---|---|---|---|---|---|",
    ]
    for chip in CHIPS:
        for dtype, short in DTYPES.items():
            rows = [r for k, r in record.taken.items() if k.startswith(f"{chip}/{dtype}/")]
            if rows:
                cells = (
                    chip,
                    short,
                    sum(row.kernels for row in rows),
                    sum(row.spilling for row in rows),
                    max(row.registers for row in rows),
                    f"{max(row.shared for row in rows) / KIB:.0f} of "
                    f"{CHIPS[chip].shared_per_block // KIB}",
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def fingerprint(record: Record) -> str:
    """A hash of all kernels in a record; docs/resources.md states which its tables are for."""
    text = json.dumps([[key, row.source] for key, row in sorted(record.taken.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def complaints(keys: Sequence[Key], path: Path = RECORD) -> list[str]:
    """Why the record does not match the current kernels and configs; compiles nothing."""
    record = read_record(path)
    if record.triton != triton_version():
        return [f"{path.name} is for triton {record.triton}, installed is {triton_version()}"]
    known = {str(key): record.taken[str(key)] for key in keys if str(key) in record.taken}
    found = faults(Record(triton=record.triton, taken=known))
    found += [f"{key}: not in {path.name}" for key in keys if str(key) not in known]
    found += [
        f"{key}: kernels or configs changed" for key in stale(record, keys) if str(key) in known
    ]
    unknown = set(record.taken) - {str(key) for key in all_keys()}
    return [*found, *(f"{key}: no such kernels exist" for key in sorted(unknown))]
