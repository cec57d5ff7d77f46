"""Open mutated files of every format that is read.

    python -m tests.fuzz --count 10000
    python -m tests.fuzz --target bundle --count 500
    python -m tests.fuzz --target bundle --case 17      one case again, with its traceback

Exit code 1 if there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.fuzz.mutate import mutant
from tests.fuzz.property import Bench, Campaign, Case, cases
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000, help="cases in all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="several may be given")
    parser.add_argument("--case", type=int, help="open this case of the target, here")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        if options.case is not None:
            return again(
                Case((options.target or [next(iter(TARGETS))])[0], options.case), Path(root)
            )
        todo = cases(options.count, tuple(options.target or TARGETS))
        console, start = Console(), time.perf_counter()
        campaign = Campaign(todo, processes=options.processes, root=Path(root))
        columns = (TextColumn("files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=len(todo))
            with contextlib.suppress(KeyboardInterrupt):  # what there is so far is shown
                campaign.run(lambda done: bar.update(task, completed=done))
        show(campaign, time.perf_counter() - start, console)
    return bool(campaign.findings)


def again(case: Case, root: Path) -> int:
    """Open one case without a net."""
    bench, rng = Bench.make(case.target, root), case.rng
    name = rng.choice(bench.names)
    (bench.folder / name).write_bytes(mutant(name, bench.originals[name], rng))
    print(f"{case.target} {case.number}: {name} is changed", flush=True)
    bench.open()
    print("opened")
    return 0


def show(campaign: Campaign, seconds: float, console: Console) -> None:
    """A row per target, then every finding."""
    table = Table("target", "files", "opened", "refused", "findings")
    for name, tried in campaign.tried.items():
        found = sum(finding.case.target == name for finding in campaign.findings)
        opened = campaign.opened[name]
        table.add_row(name, *map(str, (tried, opened, tried - opened - found, found)))
    console.print(table)
    for finding in campaign.findings:
        case = finding.case
        console.print(f"{case.target} {case.number}: {finding.what}", markup=False, soft_wrap=True)
    total = sum(campaign.tried.values())
    rate = 60 * total / seconds
    console.print(f"{total:,} files in {seconds:.0f} s ({rate:,.0f} a minute)", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
