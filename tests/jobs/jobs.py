"""Small jobs of a tiny model, for the tests of this folder and of tests/endure."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.jobs import JobSpec
from fastdiff.jobs.rows import open_rows
from fastdiff.jobs.shards import Shards
from tests.support.tiny import tiny_model

SAMPLERS = ("ddim", "euler", "dpmpp-2m", "heun", "ddpm")


def mixed_rows(count: int, seed: int = 0, steps: Sequence[int] = (1, 2, 3)) -> list[dict[str, Any]]:
    """Rows with five samplers, several numbers of steps, guided or not."""
    rng = random.Random(seed)
    return [
        {
            "label": rng.choice([None, 0, 1, 2, 3]),
            "steps": rng.choice(steps),
            "sampler": rng.choice(SAMPLERS),
            "guidance_scale": rng.choice([1, 2.5]),
        }
        for _ in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """JSONL; text is written as it is, so that a line can be broken."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def tiny_bundle(folder: Path) -> Path:
    save_bundle(tiny_model(), folder / "tiny", provenance={"command": "a test"})
    return folder / "tiny"


def spec_of(folder: Path, rows: Sequence[Any], out: str = "out", **changes: Any) -> JobSpec:
    """A job of these rows: shards of seven in tars, with the bundle in `folder`."""
    path = write_rows(folder / changes.pop("name", "rows.jsonl"), rows)
    fields: dict[str, Any] = {"shard_size": 7, "format": "webdataset", "device": "cpu"}
    fields |= {"rows": str(path), "model": str(folder / "tiny"), "out": folder / out, **changes}
    return JobSpec(**fields)


def shards_of(spec: JobSpec) -> Shards:
    return Shards.of(spec, open_rows(spec.rows).count)


def content(folder: Path) -> dict[str, bytes]:
    """The shards of a job and their errors: all files but the report, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.html"
    }
