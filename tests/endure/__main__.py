"""Kill trainings, samplings, jobs and saves, start them in pairs, and fill the disk under them.

    python -m tests.endure                      50 kills, 20 pairs, full disks
    python -m tests.endure --kills 500 --pairs 0 --disks 0
    python -m tests.endure --only job

Exit code 1 if something was lost, mixed or left behind; those folders are kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.endure.campaign import Plan, trials
from tests.endure.kills import Row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.endure", description="Kills and more.")
    parser.add_argument("--kills", type=int, default=50, help="processes killed, in all")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of processes in one folder")
    parser.add_argument("--disks", type=int, default=8, help="sizes of the disk, for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only trials whose name has this in it")
    options = parser.parse_args()
    console = Console()
    root = Path(tempfile.mkdtemp(prefix="endure-"))
    plan = Plan(options.kills, options.pairs, options.disks, options.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rows: list[Row] = []
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=plan.total)
        for name, run in trials(plan, root):
            if options.only not in name:
                continue
            bar.update(task, description=name)
            rows.append(run(lambda: bar.advance(task)))
    table = Table("", "trials", "killed", "findings", "seconds")
    for row in rows:
        hits = ", ".join(f"{number} {how}" for how, number in sorted(row.hits.items()))
        table.add_row(row.name, f"{row.trials}", hits, f"{len(row.findings)}", f"{row.seconds:.0f}")
    console.print(table)
    for finding in (finding for row in rows for finding in row.findings):
        console.print(finding, markup=False, soft_wrap=True)
    found = any(row.findings for row in rows)
    if found:
        console.print(f"kept: {root}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
