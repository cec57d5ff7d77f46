"""What every Triton kernel takes of a GPU: registers, spills, shared memory, occupancy.

    python -m benchmarks.resources                     a table for all architectures
    python -m benchmarks.resources --architecture sm_90 --op geglu
    python -m benchmarks.resources --json > resources.json
    python -m benchmarks.resources --every --docs      everything; docs/resources.json and .md
    python -m benchmarks.resources --check             whether these are up to date

No GPU is needed, see `ahead_of_time.py`; the record of --every: `resources_record.py`.
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
    DTYPES,
    KIB,
    Resources,
    compile_all,
    on_one_gpu_each,
    tasks,
)
from fastdiff.bench.tunables import TUNABLES
from fastdiff.cli.parsing import UsageError, parse
from fastdiff.files import write_text
from fastdiff.kernels.triton import INTERPRETED, triton

DOCS = Path(__file__).resolve().parents[2] / "docs" / "resources.md"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile Triton kernels ahead of time and list what they take of each GPU.

    Without --every, the sizes of real models; some minutes, as long as triton's cache is empty.
    With it, every head dim that takes a config, and every option at the head dims the classes are
    named after, in every dtype, as far as docs/resources.json does not know the result yet: from
    nothing about an hour on one core. Exit code 1 if a kernel spills, needs more shared memory than
    there is, or, with --check, if a file in docs is not of these kernels and configs; 2 for wrong
    options.

    Examples:
      python -m benchmarks.resources --architecture sm_90 --op geglu --dtype bfloat16
      python -m benchmarks.resources --op attention --shape-class self/40 self/64
      python -m benchmarks.resources --every --docs      after a change of kernels or configs
      python -m benchmarks.resources --check             whether that is needed; seconds
    """

    architecture: tuple[str, ...] = tuple(CHIPS)
    """Which GPUs."""
    op: tuple[str, ...] = ()
    """Which tunables of `kernels`; none: all."""
    dtype: tuple[str, ...] = ()
    """Which dtypes; none: bfloat16 and float32, with --every all three."""
    shape_class: tuple[str, ...] = ()
    """Which classes of the files of configs, such as self/64; none: all."""
    every: tyro.conf.FlagCreatePairsOff[bool] = False
    """Every size and option; bring docs/resources.json up to date."""
    once: tyro.conf.FlagCreatePairsOff[bool] = False
    """A kernel that is the same for several GPUs for one of them only, for each in turn."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile nothing; say whether docs/resources.json is of these kernels and configs."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a JSON list of all that was compiled (with --every: of all, known or not)."""
    docs: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write docs/resources.md: the record's summary and a table of all real sizes."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes that compile."""


def wrong_options(options: Options) -> str | None:
    if triton is None or INTERPRETED:
        return "needs triton, without TRITON_INTERPRET"
    classes = {c for tunable in TUNABLES.values() for c in tunable.shape_classes}
    for kind, chosen, known in (
        ("architecture", options.architecture, CHIPS),
        ("op", options.op, TUNABLES),
        ("dtype", options.dtype, DTYPES),
        ("shape class", options.shape_class, sorted(classes)),
    ):
        if unknown := set(chosen) - set(known):
            return f"{kind} must be of {', '.join(known)}, got {', '.join(sorted(unknown))}"
    some = bool(options.op or options.dtype or options.shape_class or options.once)
    if options.docs and (some or options.architecture != Options().architecture):
        return "docs/resources.md is of all kernels: --docs takes no --op, --dtype and so on"
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
    """--every: compile what is not in the record, print its summary; what is wrong."""
    known = record.bring_up_to_date(keys, Console(stderr=True).print, workers=workers)
    print("\n".join([*record.summary(known), *(wrong := record.faults(known))]))
    return wrong


@dataclass(frozen=True)
class Row:
    """Variants of a kernel (options, layouts) of one class, the most that any of them takes."""

    kernel: str
    classes: str
    dtypes: str
    cells: dict[str, tuple[str, str]]
    """Architecture -> config; registers / KiB of shared memory / occupancy."""


def kernel_name(kernel: str) -> str:
    """Without the underscore and the word that all of them have."""
    return kernel.strip("_").removesuffix("_kernel")


def config_text(row: Resources) -> str:
    """``ROWS 4, COLUMNS 256, 4 warps``; stages where the config chooses them."""
    own = [f"{name} {value}" for name, value in row.config.items() if not name.startswith("num_")]
    stages = [f"{row.num_stages} stages"] if "num_stages" in row.config else []
    return ", ".join([*own, f"{row.num_warps} warps", *stages])


def cell(rows: Sequence[Resources]) -> str:
    """What the hungriest variant takes; spills, which a test forbids, are not kept quiet."""
    spills = max(row.spills for row in rows)
    told = (
        f"{max(row.registers for row in rows)} / {max(row.shared for row in rows) / KIB:.0f} / "
        f"{min(row.occupancy for row in rows):.0%}"
    )
    return told + (f" / {spills} B spilled" if spills else "")


def condensed(found: Sequence[Resources]) -> list[Row]:
    """The rows of one tunable; classes and dtypes about which the same is to be said share one."""
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
    """For the terminal: one per tunable, a line per GPU, 80 columns wide or more."""
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
    """The head of docs/resources.md, which the record alone gives."""
    return [
        "# What the Triton kernels take of a GPU",
        "",
        "Made by `python -m benchmarks.resources --every --docs`, which compiles every config of",
        "`kernels/tuning/tuned/<architecture>.json` ahead of time; no GPU was used. Tests hold",
        "that nothing spills, that shared memory fits and that this page is of the kernels and",
        "configs as they are.",
        "",
        "## All kernels",
        "",
        "Every head dim that takes a config, and every option at the head dim that its class is",
        "named after (masks, extra keys, numbers of keys), from the record",
        f"[resources.json](resources.json); triton {known.triton}. A pair of GPU and dtype without"
        " a",
        "row is not in the record yet.",
        "",
        *record.summary(known),
        "",
        "## Sizes of real models",
        "",
        "A cell is registers of a thread / KiB of shared memory of a block / occupancy, which is",
        "resident warps as a share of the most possible. A row takes all variants of a kernel",
        "together (options, layouts) and shows the most that any of them takes.",
        f"Kernels and configs: {record.fingerprint(known)}.",
    ]


def document(found: Sequence[Resources], known: record.Record) -> str:
    """docs/resources.md."""
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
