"""``python -m fastdiff.bench.report``: write tables and figures of docs/performance.md.

The text between ``<!-- tables -->`` and ``<!-- end of tables -->`` is generated from the records in
benchmarks/results/<device>/, using the newest record of each case and naming its commit. The text
between ``<!-- predictions -->`` and its end comes from predict.py. Everything else is written by
hand and kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastdiff.bench import cpu_report, gpu_report, predict
from fastdiff.bench.plot import draw_shares
from fastdiff.bench.record import (
    END_TO_END,
    IN_TURNS,
    LIMITS,
    RESULTS,
    Peak,
    Record,
    Share,
    amdahl,
    duration,
)
from fastdiff.files import write_text

DOCUMENT = RESULTS.parent.parent / "docs" / "performance.md"
IMAGES = DOCUMENT.parent / "images"
MEASURED = "<!-- tables -->", "<!-- end of tables -->"
PREDICTED = "<!-- predictions -->", "<!-- end of predictions -->"
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One file of results, from one commit on one device."""

    environment: dict[str, Any]
    records: list[Record]
    shares: list[Share]
    peaks: list[Peak]

    @classmethod
    def load(cls, path: Path) -> Run:
        content = json.loads(path.read_text())
        return cls(
            content["environment"],
            [Record(**record) for record in content["records"]],
            [Share(**share) for share in content["shares"]],
            [Peak(**peak) for peak in content.get("peaks", [])],
        )

    @property
    def commit(self) -> str:
        """The first seven digits of the commit hash."""
        return str(self.environment["commit"][:7])

    def describe(self) -> str:
        facts = self.environment
        if "gpu" in facts:
            return self._describe_gpu()
        threads = {r.threads for r in self.records} | {p.threads for p in self.peaks}
        dtypes = sorted({record.dtype for record in self.records})
        work = ["/".join(map(str, sorted(threads))) + " threads", *dtypes]
        changed = "" if facts["clean"] else " with uncommitted changes"
        return (
            f"- {self.commit}{changed}, {facts['date'][:10]}: fastdiff {facts['fastdiff']}, torch "
            f"{facts['torch']}, Python {facts['python']}; {facts['cores']} cores, "
            f"{', '.join(work)}"
        )

    def _describe_gpu(self) -> str:
        facts, gpu = self.environment, self.environment["gpu"]
        changed = "" if facts["clean"] else " with uncommitted changes"
        dtypes = sorted({record.dtype for record in self.records})
        return (
            f"- {self.commit}{changed}, {facts['date'][:10]}: fastdiff {facts['fastdiff']}, torch "
            f"{facts['torch']}, triton {facts['triton']}, Python {facts['python']}; driver "
            f"{gpu['driver']}, {gpu['multiprocessors']} multiprocessors, {', '.join(dtypes)}"
        )


@dataclass(frozen=True)
class Device:
    """All runs of one device, oldest first; for each case the newest run counts."""

    folder: str
    runs: list[Run]

    @property
    def name(self) -> str:
        return str(self.runs[-1].environment["device"])

    @property
    def is_gpu(self) -> bool:
        return "gpu" in self.runs[-1].environment

    def records(self) -> list[tuple[Run, Record]]:
        return newest(
            ((run, record) for run in self.runs for record in run.records),
            lambda record: (
                record.benchmark,
                record.job,
                record.shape,
                record.dtype,
                record.provider,
            ),
        )

    def peaks(self) -> list[tuple[Run, Peak]]:
        return newest(
            ((run, peak) for run in self.runs for peak in run.peaks),
            lambda peak: (peak.benchmark, peak.shape),
        )

    def shares(self) -> list[tuple[Run, Share]]:
        """All ops of a job come from the same run, which timed one evaluation."""
        last = {share.job: run for run in self.runs for share in run.shares}
        return [(run, s) for job, run in last.items() for s in run.shares if s.job == job]

    def rows(self) -> list[tuple[Run, Row]]:
        """Providers against the reference of the same run, never of another run."""
        shares = [share for _, share in self.shares()]
        return newest(
            ((run, row) for run in self.runs for row in compared(run.records, shares)),
            lambda row: (
                row.record.benchmark,
                row.record.job,
                row.record.shape,
                row.record.dtype,
                row.record.provider,
            ),
        )


def newest(pairs: Iterable[tuple[Run, T]], key: Callable[[T], Hashable]) -> list[tuple[Run, T]]:
    """The last of the items with the same key, in the order in which keys first appeared."""
    return list({key(item): (run, item) for run, item in pairs}.values())


def devices(results: Path = RESULTS) -> list[Device]:
    """Load all records. Raises FileNotFoundError if there are none."""
    runs: dict[str, list[Run]] = {}
    for path in sorted(results.glob("*/*.json")):
        runs.setdefault(path.parent.name, []).append(Run.load(path))
    if not runs:
        raise FileNotFoundError(
            f"no records in {results}/<device>/; run 'pytest benchmarks --save-records' first"
        )
    return [
        Device(folder, sorted(found, key=lambda run: run.environment["date"]))
        for folder, found in runs.items()
    ]


@dataclass(frozen=True)
class Row:
    """One provider compared to the reference at one shape."""

    record: Record
    ratio: float
    """Speedup over the reference."""
    of_limit: float | None
    """Share of the rate of a copy, or of sgemm."""
    job_ratio: float | None
    """Speedup of the whole job if this provider replaced the reference."""


def compared(records: Sequence[Record], shares: Sequence[Share]) -> list[Row]:
    """Compare every record of one run with its reference, if there is one; limits are left out."""
    of_job = {(share.job, share.op): share.share for share in shares}
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = record.benchmark, record.job, record.shape, record.dtype
        groups.setdefault(key, []).append(record)
    rows = []
    for group in groups.values():
        by_provider = {record.provider: record for record in group}
        if "reference" not in by_provider or len(group) < 2:
            continue
        reference = by_provider["reference"]
        limits = [by_provider[name] for name in LIMITS if name in by_provider]
        share = of_job.get((reference.job, reference.benchmark))
        for record in group:
            if record.provider in LIMITS:
                continue
            ratio = reference.median_s / record.median_s
            of_limit = record.share_of(limits[0]) if limits else None
            job_ratio = None if share is None else amdahl(share, ratio)
            rows.append(Row(record, ratio, of_limit, job_ratio))
    return rows


def gpu_section(device: Device) -> str:
    """The tables of one GPU, from its newest run: ratios are only meaningful within one run."""
    run = device.runs[-1]
    found = gpu_report.groups(run.records)
    ops, networks = gpu_report.op_rows(found), gpu_report.network_rows(found)
    shares = [(s.backend, *share_row(run, s)) for s in run.shares]
    head = ("backend", *SHARE_HEAD)
    return "\n\n".join(
        [
            f"### {device.name}",
            run.describe(),
            "#### Aims",
            table(*headed(gpu_report.targets(found))),
            "#### Whole evaluations",
            table(*headed(networks)),
            "#### Share of each op",
            table(head, shares),
            "#### Ops",
            table(*headed(ops)),
        ]
    )


def headed(rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return rows[0], rows[1:]


def no_gpu() -> str:
    """The section used as long as there is no record of a GPU."""
    aims = table(*headed(gpu_report.targets([])))
    return f"### GPUs\n\n{gpu_report.NOTHING}\n\n{aims}"


def tables(found: Sequence[Device]) -> str:
    """Everything between the markers: GPUs first."""
    gpus = [gpu_section(device) for device in found if device.is_gpu]
    others = [section(device) for device in found if not device.is_gpu]
    return "\n\n".join([*(gpus or [no_gpu()]), *others])


WHOLE_HEAD = ("job", "shape", "median", "quartiles", "rounds", "GFLOP/s", "peak memory", "commit")
SHARE_HEAD = ("job", "op", "calls", "time", "share", "job, if the op were free", "commit")
OP_HEAD = (
    *("op", "job", "shape", "provider", "median", "speed", "GB/s", "of the limit", "whole job"),
    "commit",
)


BEFORE_KERNELS = (
    "Measured before there were CPU kernels, or without them: every op was the reference's. What "
    "an installation with its compiled module does is not in this section."
)


def by_a_kernel(run: Run) -> bool:
    """Whether CPU kernels took part, which is true of everything measured in turns with a rival."""
    return any(record.benchmark in (IN_TURNS, END_TO_END) for record in run.records)


def section(device: Device) -> str:
    """The figure and the tables of one device other than a GPU."""
    rows, shares, peaks = device.rows(), device.shares(), device.peaks()
    ops = {row.record.benchmark for _, row in rows}
    measured = [pair for pair in device.records() if pair[1].benchmark not in ops]
    alone = [pair for pair in measured if pair[1].benchmark not in (END_TO_END, IN_TURNS)]
    peers = [pair for pair in measured if pair[1].benchmark == END_TO_END]
    shown = {run.commit: run for run, _ in (*rows, *shares, *peaks, *measured)}
    used = sorted(shown.values(), key=lambda run: run.environment["date"], reverse=True)
    jobs = [whole(*pair) for pair in alone] + [peak_row(*pair) for pair in peaks]
    parts = [f"### {device.name}", "\n".join(run.describe() for run in used)]
    if not any(by_a_kernel(run) for run in used):
        parts.append(BEFORE_KERNELS)
    if shares:
        parts.append(f"![How much of an evaluation each op takes](images/{picture(device).name})")
    parts += cpu_tables(device)
    if peers:
        parts += ["#### Beside diffusers, on the same weights", peer_table(peers)]
    for title, head, found in (
        ("Whole jobs", WHOLE_HEAD, jobs),
        ("Share of each op", SHARE_HEAD, [share_row(*pair) for pair in shares]),
        ("Ops", OP_HEAD, [op_row(*pair) for pair in rows]),
    ):
        if found:
            parts += [f"#### {title}", table(head, found)]
    return "\n\n".join(parts)


def cpu_tables(device: Device) -> list[str]:
    """Goals, and every call against eager PyTorch, from the newest run that has them."""
    runs = [run for run in device.runs if any(r.benchmark == IN_TURNS for r in run.records)]
    if not runs:
        return []
    records = runs[-1].records
    return [
        f"#### Aims ({runs[-1].commit})",
        table(*headed(cpu_report.aims(records))),
        f"#### Every call compared with eager PyTorch ({runs[-1].commit})",
        table(*headed(cpu_report.op_rows(records))),
    ]


def picture(device: Device) -> Path:
    return IMAGES / f"shares-{device.folder}.png"


def whole(run: Run, record: Record) -> tuple[str, ...]:
    quartiles = f"{duration(record.q1_s)} to {duration(record.q3_s)}"
    rate = f"{record.flops_per_second / 1e9:.1f}" if record.flops else ""
    return (
        record.job or record.benchmark,
        record.shape,
        duration(record.median_s),
        quartiles,
        str(record.rounds),
        rate,
        "",
        run.commit,
    )


def peer_table(pairs: Sequence[tuple[Run, Record]]) -> str:
    """Each provider of a network against stock diffusers of the same run."""
    rows: list[tuple[str, ...]] = []
    for run, record in pairs:
        case = record.job, record.shape, record.dtype
        peers = {(r.job, r.shape, r.dtype): r for r in run.records if r.provider == "diffusers"}
        rows.append(
            (
                *case,
                record.provider,
                duration(record.median_s),
                f"{duration(record.q1_s)} to {duration(record.q3_s)}",
                f"{peers[case].median_s / record.median_s:.2f} x",
                run.commit,
            )
        )
    head = ("job", "shape", "dtype", "by", "median", "quartiles", "as fast as diffusers", "commit")
    return table(head, rows)


def peak_row(run: Run, peak: Peak) -> tuple[str, ...]:
    memory = f"{peak.bytes / 2**20:.0f} MiB"
    return peak.benchmark, peak.shape, "", "", "1", "", memory, run.commit


def share_row(run: Run, share: Share) -> tuple[str, ...]:
    return (
        share.job,
        share.op,
        str(share.calls),
        duration(share.seconds),
        f"{share.share:.1%}",
        f"{1 / (1 - share.share):.2f} x",
        run.commit,
    )


def op_row(run: Run, row: Row) -> tuple[str, ...]:
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
        run.commit,
    )


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(document: str, tables: str, markers: tuple[str, str] = MEASURED) -> str:
    """Replace the text between the markers. Raises ValueError if they are missing."""
    before, begin, rest = document.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"the document must contain {' and '.join(markers)}; add them by hand")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def predicted_tables() -> str:
    """The kernels that were rebuilt, and all predictions."""
    return "\n\n".join(table(*headed(rows)) for rows in (predict.progress(), predict.rows()))


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m fastdiff.bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    found = devices()
    for device in found:
        shares = [share for _, share in device.shares()]
        if shares and not device.is_gpu:
            draw_shares(shares, device.name, picture(device))
            print(picture(device))
    document = fill(DOCUMENT.read_text(), predicted_tables(), PREDICTED)
    write_text(DOCUMENT, fill(document, tables(found)))
    print(DOCUMENT)


if __name__ == "__main__":
    main()
