"""Plant each fault in a copy of the repository and see whether its test notices.

    python -m tests.faults                          all of them, a few seconds each
    python -m tests.faults --only ddim heun         those whose names contain one of these words

Every test must pass before the fault is planted and fail after it. Exit code 1 if fewer than 95%
of the faults are noticed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.faults.faults import NOTHING, Fault, apply, copy_of_the_repository, faults

SHARE = 0.95
"""Required share of faults that a test notices."""
LIMIT = 600
"""Seconds for one test; a test that hangs on a fault has noticed it."""


def passes(root: Path, *tests: str) -> bool:
    """Whether tests pass in a copy of the repository.

    Raises:
        RuntimeError: pytest found no such test, or could not start.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
    return done.returncode == 0


def rebuild(root: Path) -> None:
    """Compile the CPU kernels of a copy again."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=root, env={**os.environ, "FASTDIFF_BUILD_CUDA": "0"}, check=True, capture_output=True,
    )  # fmt: skip


def noticed(fault: Fault, root: Path) -> bool:
    """Plant a fault, run its test, and take the fault out again."""
    target, compiled = root / fault.path, fault.path.startswith("csrc/")
    before = target.read_bytes()
    apply(fault, root)
    try:
        if compiled:
            rebuild(root)
        return not passes(root, fault.test)
    finally:
        target.write_bytes(before)
        if compiled:
            rebuild(root)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="parts of names")
    only: list[str] = parser.parse_args().only
    chosen = [f for f in faults() if not only or any(word in f.name for word in only)]
    if not chosen:
        parser.error(f"no fault has {' or '.join(only)} in its name")
    console, rows = Console(), list[tuple[Fault, str, float]]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_of_the_repository(root)
        wanted = sorted({fault.test for fault in chosen} - {NOTHING})
        console.print(f"{len(chosen)} faults; first their {len(wanted)} tests without any fault")
        if wanted and not passes(root, *wanted):
            console.print("a test fails although no fault is planted; run make test")
            return 1
        for fault in track(chosen, description="planting", console=console):
            start = time.monotonic()
            seen = fault.test != NOTHING and noticed(fault, root)
            rows.append((fault, "yes" if seen else "no", time.monotonic() - start))
    table = Table("fault", "what is wrong", "test", "seen", "s")
    for fault, seen, seconds in rows:
        table.add_row(fault.name, fault.what, fault.test, seen, f"{seconds:.0f}")
    console.print(table)
    count = sum(seen == "yes" for _, seen, _ in rows)
    console.print(f"{count} of {len(rows)} faults are noticed ({count / len(rows):.0%})")
    return int(count < SHARE * len(rows))


if __name__ == "__main__":
    sys.exit(main())
