"""What a call leaves in its folder, written so that a process that is killed cannot spoil it.

results/<device>/<commit>.json   measurements, in the form of benchmarks/results/
tuned/<gpu>.json                 launch configs and the fastest backends
parity.jsonl                     a line per parity case, written when it has run
facts.json                       what the numbers depend on; clocks sampled while timing
cuda-kernels.txt                 registers and occupancy of each CUDA launch
call-1.log, call-1.json          every line of every process, and the summary; likewise call-2
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.device.table import Failed, Plan

PATTERNS = (
    *("results/*/*.json", "tuned/*.json", "parity.jsonl", "cuda-kernels.txt"),
    *("facts.json", "call-*.json", "call-*.log", "only.json", "only.log"),
)


def written(out: Path) -> Iterator[Path]:
    """The files of a call, those to keep first."""
    for pattern in PATTERNS:
        yield from sorted(out.glob(pattern))


def write(path: Path, text: str) -> None:
    """Replace a file at once, so that there is never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """One process at a time; the lock of a process that dies is gone with it."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def facts(out: Path) -> dict[str, Any]:
    """The facts of `prepare.environment`, and the clocks sampled since; empty before."""
    known = out / "facts.json"
    return dict(json.loads(known.read_text())) if known.exists() else {}


def set_facts(out: Path, new: Mapping[str, Any]) -> None:
    """Replace the facts, but keep the clocks of an earlier call of the same commit."""
    with locked(out):
        old = facts(out)
        clocks = old.get("clocks", {}) if old.get("commit") == new.get("commit") else {}
        write(out / "facts.json", json.dumps({**new, "clocks": clocks}, indent=1) + "\n")


def add_clocks(out: Path, stage: str, seen: Mapping[str, Any]) -> None:
    """Add a stage's clocks to the facts, and to the records that have been saved with them."""
    with locked(out):
        for path in (out / "facts.json", *out.glob("results/*/*.json")):
            if not path.exists():
                continue
            content = json.loads(path.read_text())
            place = content if path.name == "facts.json" else content["environment"]
            place.setdefault("clocks", {})[stage] = dict(seen)
            write(path, json.dumps(content, indent=1) + "\n")


def save(plan: Plan, records: Sequence[Any], shares: Sequence[Any] = ()) -> None:
    """Add measurements to <out>/results/<device>/<commit>.json."""
    from fastdiff.bench import record

    if not records and not shares:
        return
    known = facts(plan.out)
    known.pop("date", None)
    if plan.commit:
        known["commit"] = plan.commit
    with locked(plan.out):
        record.save_records(records, shares, results=plan.out / "results", extra=known)


def summarized(outcome: Any, notes: Sequence[str] = ()) -> list[str]:
    """Summarize an outcome as notes. Raises Failed if something failed."""
    late = sum(record.method.endswith("+host") for record in outcome.records)
    counts = [
        f"{len(outcome.records)} timings"
        + (f", {late} of them marked: the host's time may be in them" if late else ""),
        f"{len(outcome.left_out)} cases left out for lack of time"
        + (f", from {outcome.left_out[0]} on" if outcome.left_out else ""),
        f"{len(outcome.unavailable)} not supported by the provider",
    ]
    for line in (*outcome.left_out, *outcome.unavailable):
        print(line)
    lines = [*counts, *notes, *outcome.unavailable[:5]]
    if outcome.failures:
        raise Failed(*outcome.failures, *lines)
    return lines


# Parity cases


def add_parity(out: Path, **fields: Any) -> None:
    """Add a line to parity.jsonl."""
    with (out / "parity.jsonl").open("a") as file:
        file.write(json.dumps(fields) + "\n")


def parity_lines(out: Path) -> list[dict[str, Any]]:
    """The lines of parity.jsonl; a line that its process did not finish is left out."""
    path, found = out / "parity.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def parity_counts(out: Path, stage: str) -> list[str]:
    """How the cases of parity.jsonl went, by pair, and how many of those planned have not run."""
    if stage != "parity":
        return []
    planned: dict[str, int] = {}
    went: dict[str, Counter[str]] = {}
    for line in parity_lines(out):
        if "planned" in line:
            planned[line["pair"]] = line["planned"]
        else:
            went.setdefault(line["pair"], Counter())[line["status"]] += 1
    total: Counter[str] = sum(went.values(), Counter())
    missing = {pair: n - sum(went.get(pair, Counter()).values()) for pair, n in planned.items()}
    total["not run"] = sum(missing.values())
    notes = [f"{sum(planned.values())} cases: {_listed(total)}"]
    for pair in planned:
        one = Counter(went.get(pair, Counter()))
        one["not run"] = missing[pair]
        if set(+one) - {"ok"}:
            notes.append(f"{pair}: {_listed(one)}")
    return notes


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none"


# From several folders to the repository


def collect(folders: Sequence[Path], results: Path | None = None) -> list[Path]:
    """Merge the measurements of calls that wrote to different folders into benchmarks/results/.

    Raises:
        ValueError: a folder has no measurements, or only those of a dry run.
    """
    from fastdiff.bench.record import RESULTS, Record, Share, save_records

    merged = []
    for folder in folders:
        paths = [p for p in sorted(folder.glob("results/*/*.json")) if p.parent.name != "dry-run"]
        if not paths:
            raise ValueError(f"{folder} contains no measurements (results/<device>/<commit>.json)")
        for path in paths:
            content = json.loads(path.read_text())
            merged.append(
                save_records(
                    [Record(**one) for one in content["records"]],
                    [Share(**one) for one in content["shares"]],
                    results=results or RESULTS,
                    extra=content["environment"],
                )
            )
    return list(dict.fromkeys(merged))
