"""The GPU resources of every Triton kernel: registers, spills, shared memory, occupancy.

    python -m benchmarks.resources                     a table for all architectures
    python -m benchmarks.resources --architecture sm_90 --op geglu
    python -m benchmarks.resources --json > resources.json
    python -m benchmarks.resources --every --docs      update docs/resources.json and .md
    python -m benchmarks.resources --check             check whether these are up to date

No GPU is needed, see `ahead_of_time.py`. `record.py` handles the record of --every.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.resources import record
from benchmarks.resources.ahead_of_time import (
    CHIPS,
    KIB,
    Resources,
    compile_all,
    on_one_gpu_each,
    tasks,
)
from fastdiff.bench.compile import DTYPES
from fastdiff.bench.tunables import TUNABLES
from fastdiff.cli.parsing import UsageError, parse
from fastdiff.files import write_text
from fastdiff.kernels.triton import INTERPRETED, triton

DOCS = Path(__file__).resolve().parents[2] / "docs" / "resources.md"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile Triton kernels ahead of time and list the resources they use on each GPU.

    By default this covers the sizes of real models and takes some minutes if triton's cache is
    empty. --every covers every head dim that uses a config, and every option at the head dims that
    classes are named after, in every dtype, as far as docs/resources.json lacks the result; from
    scratch that takes about an hour on one core. The exit code is 1 if a kernel spills or needs
    more shared memory than there is, or, with --check, if a file in docs does not match the kernels
    and configs; it is 2 for wrong options.

    Examples:
      python -m benchmarks.resources --architecture sm_90 --op geglu --dtype bfloat16
      python -m benchmarks.resources --op attention --shape-class self/40 self/64
      python -m benchmarks.resources --every --docs      after kernels or configs have changed
      python -m benchmarks.resources --check             whether that is needed; takes seconds
    """

    architecture: tuple[str, ...] = tuple(CHIPS)
    """GPUs to compile for."""
    op: tuple[str, ...] = ()
    """Tunables to compile (default: all)."""
    dtype: tuple[str, ...] = ()
    """Dtypes to compile (default: bfloat16 and float32; with --every all three)."""
    shape_class: tuple[str, ...] = ()
    """Shape classes to compile, such as self/64 (default: all)."""
    every: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile every size and option, and bring docs/resources.json up to date."""
    once: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile a kernel that is the same for several GPUs for only one of them, in rotation."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile nothing; report whether docs/resources.json matches the kernels and configs."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a JSON list of everything compiled (with --every: even if it is in the record)."""
    docs: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write docs/resources.md: the summary of the record and a table of all real sizes."""
    workers: int = len(os.sched_getaffinity(0))
    """Number of processes that compile."""


def wrong_options(options: Options) -> str | None:
    if triton is None or INTERPRETED:
        return "this needs triton, with TRITON_INTERPRET unset"
    classes = {c for tunable in TUNABLES.values() for c in tunable.shape_classes}
    for kind, chosen, known in (
        ("architecture", options.architecture, CHIPS),
        ("op", options.op, TUNABLES),
        ("dtype", options.dtype, DTYPES),
        ("shape class", options.shape_class, sorted(classes)),
    ):
        if unknown := set(chosen) - set(known):
            return f"{kind} must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}"
    some = bool(options.op or options.dtype or options.shape_class or options.once)
    if options.docs and (some or options.architecture != Options().architecture):
        return "--docs covers all kernels; omit --op, --dtype and other options that select some"
    return None


def main(options: Options) -> int:
    if wrong := wrong_options(options):
        print(f"benchmarks.resources: {wrong}", file=sys.stderr)
        return 2
    keys = record.all_keys(options.op, options.dtype, options.architecture, options.shape_class)
    if options.check:
        found = record.complaints(keys)
        print("\n".join([*found, f"run {record.COMMAND}"] if found else ["up to date"]))
        return 1 if found else 0
    if options.json:
        print(json.dumps([asdict(row) for row in compiled(options)]))
        return 0
    if options.every or options.docs:
        found = every(keys, options.workers) if options.every else []
        if options.docs:
            rows = compiled(replace(options, every=False))
            write_text(DOCS, document(rows, record.read_record()))
            print(DOCS)
        return 1 if found else 0
    rows = compiled(options)
    console = Console()
    for table in tables(rows):
        console.print(table)
    return 1 if any(row.spills or row.shared > row.shared_limit for row in rows) else 0


def compiled(options: Options) -> list[Resources]:
    todo = tasks(
        options.op or tuple(TUNABLES),
        options.dtype or (tuple(DTYPES) if options.every else ("bfloat16", "float32")),
        options.architecture,
        shape_classes=options.shape_class,
        every=options.every,
    )
    return compile_all(on_one_gpu_each(todo) if options.once else todo, workers=options.workers)


def every(keys: Sequence[record.Key], workers: int) -> list[str]:
    """Run --every: compile what is missing from the record, print its summary, return faults."""
    known = record.bring_up_to_date(keys, Console(stderr=True).print, workers=workers)
    print("\n".join([*record.summary(known), *(wrong := record.faults(known))]))
    return wrong


@dataclass(frozen=True)
class Row:
    """All variants (options, layouts) of a kernel in one class, with the largest of each value."""

    kernel: str
    classes: str
    dtypes: str
    cells: dict[str, tuple[str, str]]
    """Architecture -> config; registers / KiB of shared memory / occupancy."""


def kernel_name(kernel: str) -> str:
    """The name without its leading underscore and the suffix that all kernels have."""
    return kernel.strip("_").removesuffix("_kernel")


def config_text(row: Resources) -> str:
    """A config as text, ``ROWS 4, COLUMNS 256, 4 warps``, with stages if the config sets them."""
    own = [f"{name} {value}" for name, value in row.config.items() if not name.startswith("num_")]
    stages = [f"{row.num_stages} stages"] if "num_stages" in row.config else []
    return ", ".join([*own, f"{row.num_warps} warps", *stages])


def cell(rows: Sequence[Resources]) -> str:
    """The resources of the most demanding variant; shows spills, which a test forbids."""
    spills = max(row.spills for row in rows)
    text = (
        f"{max(row.registers for row in rows)} / {max(row.shared for row in rows) / KIB:.0f} / "
        f"{min(row.occupancy for row in rows):.0%}"
    )
    return text + (f" / {spills} B spilled" if spills else "")


def condensed(found: Sequence[Resources]) -> list[Row]:
    """The rows of one tunable; classes and dtypes with equal values share a row."""
    variants: dict[tuple[str, str, str], dict[str, list[Resources]]] = {}
    for found_row in found:
        key = kernel_name(found_row.kernel), found_row.shape_class, DTYPES[found_row.dtype]
        variants.setdefault(key, {}).setdefault(found_row.architecture, []).append(found_row)
    alike: dict[tuple[str, str], list[Row]] = {}
    for (kernel, shape_class, dtype), by_chip in variants.items():
        cells = {chip: (config_text(rows[0]), cell(rows)) for chip, rows in by_chip.items()}
        same = kernel, str(sorted(cells.items()))
        alike.setdefault(same, []).append(Row(kernel, shape_class, dtype, cells))
    return [
        replace(
            rows[0],
            classes=", ".join(dict.fromkeys(row.classes for row in rows)),
            dtypes=", ".join(dict.fromkeys(row.dtypes for row in rows)),
        )
        for rows in alike.values()
    ]


def by_tunable(found: Sequence[Resources]) -> Iterator[tuple[str, list[Resources]]]:
    for name, rows in groupby(found, key=lambda row: row.tunable):
        yield name, list(rows)


def tables(found: Sequence[Resources]) -> Iterator[Table]:
    """Tables for the terminal: one per tunable with one line per GPU, at least 80 columns wide."""
    for name, rows in by_tunable(found):
        shown = Table(title=name, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for heading in ("kernel", "class", "dtype", "GPU", "config", "reg / KiB / occ."):
            shown.add_column(heading, no_wrap=heading not in ("class", "config"))
        for row in condensed(rows):
            who = (row.kernel, row.classes, row.dtypes)
            for chip in (chip for chip in CHIPS if chip in row.cells):
                shown.add_row(*who, chip, *row.cells[chip])
                who = ("", "", "")
        yield shown


def summary(known: record.Record) -> list[str]:
    """The header of docs/resources.md, which depends only on the record."""
    return [
        "# GPU resources of the Triton kernels",
        "",
        "Generated by `python -m benchmarks.resources --every --docs`, which compiles every config",
        "of `kernels/tuning/tuned/<architecture>.json` ahead of time; no GPU was used. Tests check",
        "that nothing spills, that shared memory fits and that this page matches the current",
        "kernels and configs.",
        "",
        "## All kernels",
        "",
        "Every head dim that uses a config, and every option at the head dim that its class is",
        "named after (masks, extra keys, numbers of keys), from the record",
        f"[resources.json](resources.json), made with triton {known.triton}. A GPU and dtype",
        "without a row are not in the record yet.",
        "",
        *record.summary(known),
        "",
        "## Sizes of real models",
        "",
        "A cell shows registers per thread / KiB of shared memory per block / occupancy (resident",
        "warps as a share of the most possible). A row combines all variants of a kernel (options,",
        "layouts) and shows the largest value of any of them.",
        f"Kernels and configs: {record.fingerprint(known)}.",
    ]


def document(found: Sequence[Resources], known: record.Record) -> str:
    """The text of docs/resources.md."""
    lines = summary(known)
    for name, rows in sorted(by_tunable(found)):
        chips = [chip for chip in CHIPS if chip in {row.architecture for row in rows}]
        lines += ["", f"### {name}", ""]
        lines.append(f"| kernel | class | dtype | {' | '.join(chips)} |")
        lines.append("|" + "---|" * (3 + len(chips)))
        for row in condensed(rows):
            cells = " | ".join(row.cells.get(chip, ("", ""))[1] for chip in chips)
            lines.append(f"| {row.kernel} | {row.classes} | {row.dtypes} | {cells} |")
    return "\n".join(lines) + "\n"


def run(words: Sequence[str]) -> int:
    try:
        options = parse(Options, words, prog="python -m benchmarks.resources")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return main(options) if options else 0
