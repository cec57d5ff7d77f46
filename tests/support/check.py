"""`make check`: lint, types and the fast tests of changed files, within a minute on two cores.

Prints the files that differ from the branch point of main, the test files these select, and the
number of tests that did not fit in the time. `make test` runs everything.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.imports import ROOT
from tests.support.selection import mirrors

SECONDS = 50.0
"""Time after the start of the command at which no more tests are started."""


@dataclass(frozen=True)
class Change:
    """The files that differ from a commit."""

    since: str
    paths: list[str]


def changes(root: Path = ROOT) -> Change:
    """Files that differ from the branch point of main, including uncommitted changes; on main
    itself, from the previous commit."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    names = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/remotes")
    main = next((name for name in ("main", "origin/main") if name in names.split()), None)
    since, label = git("merge-base", main, "HEAD") if main else "", main or ""
    if since in ("", git("rev-parse", "HEAD")):
        since = label = "HEAD~1"
    edited = git("diff", "--name-only", "--no-renames", since)
    new = git("ls-files", "--others", "--exclude-standard")
    return Change(label, sorted({*edited.splitlines(), *new.splitlines()}))


class Budget:
    """A pytest plugin that gives each file an equal share of the remaining time."""

    def __init__(self, files: list[str], deadline: float) -> None:
        self.left, self.deadline = list(files), deadline
        self.now, self.until = "", deadline
        self.skipped = self.ran = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        file = item.path.relative_to(ROOT).as_posix()
        if file != self.now:
            self.now, now = file, time.monotonic()
            self.until = now + (self.deadline - now) / max(1, len(self.left))
            self.left = [path for path in self.left if path != file]
        if time.monotonic() > self.until:
            self.skipped += 1
            return True
        self.ran += 1
        return None


def main() -> int:
    start, change = time.monotonic(), changes()
    tests = [p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("test_*.py")]
    selected = {path: mirrors(path, tests) for path in change.paths}
    files = list(dict.fromkeys(test for found in selected.values() for test in found))
    print(f"{len(change.paths)} files differ from {change.since}:")
    for path, found in selected.items():
        print(f"  {path} -> {', '.join(found) or 'no test mirrors it'}")
    types = subprocess.Popen(
        [sys.executable, "-m", "mypy"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    lint = [
        subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, check=False).returncode
        for command in (["check", "."], ["format", "--check", "."])
    ]
    failed = [name for name, code in zip(("lint", "format"), lint, strict=True) if code]
    if files:
        budget = Budget(files, start + SECONDS)
        code = pytest.main(["-q", "-m", "not slow and not gpu", *files], plugins=[budget])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            failed.append("tests")
        print(f"{budget.ran} tests ran, {budget.skipped} left out (make test runs all)")
    else:
        print("no tests selected")
    print(types.communicate()[0], end="")
    if types.returncode:
        failed.append("types")
    verdict = f"failed: {', '.join(failed)}" if failed else "ok"
    print(f"{time.monotonic() - start:.0f} s; {verdict}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
