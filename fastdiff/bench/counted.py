"""docs/counts.json: counts of docs/counts.md that take minutes, or that vary from run to run."""

from __future__ import annotations

import json
from typing import Any

from fastdiff.bench.record import ROOT

PATH = ROOT / "docs" / "counts.json"


def recorded(section: str) -> dict[str, dict[str, Any]]:
    """The entries of a section, by name; none in an installed package, which has no docs/."""
    if not PATH.exists():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(PATH.read_text()).get(section, {})
    return found


def record(section: str, name: str, values: dict[str, Any]) -> None:
    """Write one entry, next to the others."""
    whole = json.loads(PATH.read_text()) if PATH.exists() else {}
    entries = {**whole.get(section, {}), name: values}
    whole[section] = dict(sorted(entries.items()))
    PATH.write_text(json.dumps(dict(sorted(whole.items())), indent=1) + "\n")
