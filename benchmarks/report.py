"""``python -m benchmarks.report``: docs/performance.md's tables and picture from the records.

Each text between ``<!-- tables -->`` and ``<!-- end of tables -->`` is rewritten from the newest
record of every device in benchmarks/results/; what stands outside is written by hand and kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import LIMITS, RESULTS, Record, Share, amdahl
from fastdiff.checkpoint.files import write_text

DOCUMENT = RESULTS.parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Run:
    """One file of results."""

    folder: str
    environment: dict[str, Any]
    records: list[Record]
    shares: list[Share]

    @classmethod
    def load(cls, path: Path) -> Run:
        content = json.loads(path.read_text())
        return cls(
            path.parent.name,
            content["environment"],
            [Record(**record) for record in content["records"]],
            [Share(**share) for share in content["shares"]],
        )

    def share(self, record: Record) -> Share | None:
        """What the record's op takes of the job it belongs to."""
        found = [s for s in self.shares if (s.job, s.op) == (record.job, record.benchmark)]
        return found[0] if found else None


@dataclass(frozen=True)
class Row:
    """One provider beside the reference at one shape."""

    record: Record
    ratio: float
    """How many times as fast as the reference."""
    of_limit: float | None
    """Share of what a copy, or sgemm, reaches."""
    job_ratio: float | None
    """How many times as fast the whole job would be with this provider in the reference's place."""


def newest(results: Path = RESULTS) -> list[Run]:
    """The newest run of each device."""
    runs: dict[str, Run] = {}
    for path in sorted(results.glob("*/*.json")):
        run = Run.load(path)
        known = runs.get(run.folder)
        if known is None or run.environment["date"] > known.environment["date"]:
            runs[run.folder] = run
    return list(runs.values())


def compared(run: Run) -> list[Row]:
    """Every record that has a reference beside it, limits left out."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in run.records:
        groups.setdefault((record.benchmark, record.job, record.shape), []).append(record)
    rows = []
    for group in groups.values():
        by_provider = {record.provider: record for record in group}
        if "reference" not in by_provider or len(group) < 2:
            continue
        reference = by_provider["reference"]
        limits = [by_provider[name] for name in LIMITS if name in by_provider]
        share = run.share(reference)
        for record in group:
            if record.provider in LIMITS:
                continue
            ratio = reference.median_s / record.median_s
            of_limit = record.share_of(limits[0]) if limits else None
            job_ratio = amdahl(share.share, ratio) if share else None
            rows.append(Row(record, ratio, of_limit, job_ratio))
    return rows


def section(run: Run) -> str:
    """The tables of one device."""
    facts = run.environment
    threads = sorted({record.threads for record in run.records})
    rows = compared(run)
    alone = [r for r in run.records if not any(r.benchmark == row.record.benchmark for row in rows)]
    changed = "" if facts["clean"] else ", with uncommitted changes"
    return "\n\n".join(
        [
            f"### {facts['device']}",
            f"Commit {facts['commit'][:12]}{changed}, {facts['date'][:10]}; fastdiff "
            f"{facts['fastdiff']}, torch {facts['torch']}, Python {facts['python']}; "
            f"{facts['cores']} cores, {'/'.join(map(str, threads))} threads, "
            f"{'/'.join(sorted({r.dtype for r in run.records}))}.",
            "#### Whole jobs",
            table(("job", "shape", "median", "quartiles", "rounds", "GFLOP/s"), map(whole, alone)),
            "#### Share of each op",
            table(
                ("job", "op", "calls", "time", "share", "job, if the op were free"),
                [
                    (
                        s.job,
                        s.op,
                        str(s.calls),
                        duration(s.seconds),
                        f"{s.share:.1%}",
                        f"{1 / (1 - s.share):.2f} x",
                    )
                    for s in run.shares
                ],
            ),
            "#### Ops",
            table(
                (
                    "op",
                    "job",
                    "shape",
                    "provider",
                    "median",
                    "speed",
                    "GB/s",
                    "of the limit",
                    "whole job",
                ),
                map(op_row, rows),
            ),
        ]
    )


def whole(record: Record) -> tuple[str, ...]:
    quartiles = f"{duration(record.q1_s)} to {duration(record.q3_s)}"
    rate = f"{record.flops_per_second / 1e9:.1f}" if record.flops else ""
    name = record.job or record.benchmark
    return name, record.shape, duration(record.median_s), quartiles, str(record.rounds), rate


def op_row(row: Row) -> tuple[str, ...]:
    record = row.record
    return (
        record.benchmark,
        record.job,
        record.shape,
        record.provider,
        duration(record.median_s),
        f"{row.ratio:.2f} x",
        f"{record.bytes_per_second / 1e9:.2f}",
        "" if row.of_limit is None else f"{row.of_limit:.0%}",
        "" if row.job_ratio is None else f"{row.job_ratio:.2f} x",
    )


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def duration(seconds: float) -> str:
    """Three digits and a unit: 0.001234 -> 1.23 ms."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 0.9995 or unit == "µs":
            value = seconds * factor
            return (
                f"{value:#.3g}".rstrip(".") + f" {unit}" if value < 999.5 else f"{value:.0f} {unit}"
            )
    raise AssertionError(seconds)


def fill(document: str, tables: str) -> str:
    """The document with the text between the markers replaced. Raises ValueError without them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document must contain {BEGIN} and {END}; put them in by hand")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    runs = newest()
    tables = "\n\n".join(map(section, runs))
    write_text(DOCUMENT, fill(DOCUMENT.read_text(), tables))
    print(DOCUMENT)


if __name__ == "__main__":
    main()
