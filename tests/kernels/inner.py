"""What a pytest that ran in another process, under sanitizers, has said."""

from __future__ import annotations

import re
import subprocess


def assert_all_passed(output: str, files: list[str]) -> None:
    """pytest's output (with -rps) tells of a test that passed in each file, and of no other end but
    for what this CPU cannot run."""
    selected = re.search(r"(\d+) selected$", output, flags=re.MULTILINE)
    assert selected is not None, output[-2000:]
    passed = re.findall(r"^PASSED ([^:]+)::", output, flags=re.MULTILINE)
    skipped = re.findall(r"^SKIPPED \[(\d+)\].* not in this CPU$", output, flags=re.MULTILINE)
    assert len(passed) + sum(map(int, skipped)) == int(selected[1]), output[-2000:]
    assert set(passed) == set(files)


def assert_caught(done: subprocess.CompletedProcess[str]) -> None:
    """A kernel that goes too far (one_row_too_far.py) has ended the process."""
    told = done.stdout + done.stderr
    assert done.returncode != 0, told[-3000:]
    assert "heap-buffer-overflow" in told, told[-3000:]
    assert "geglu" in told[told.index("heap-buffer-overflow") :]
