"""Check the output of a pytest that ran in another process under sanitizers."""

from __future__ import annotations

import re
import subprocess


def assert_all_passed(output: str, files: list[str]) -> None:
    """Assert that pytest's output (with -rps) lists a passed test in every file, and no other
    outcome except skips for instructions this CPU lacks."""
    selected = re.search(r"(\d+) selected$", output, flags=re.MULTILINE)
    assert selected is not None, output[-2000:]
    passed = re.findall(r"^PASSED ([^:]+)::", output, flags=re.MULTILINE)
    skipped = re.findall(r"^SKIPPED \[(\d+)\].* not in this CPU$", output, flags=re.MULTILINE)
    assert len(passed) + sum(map(int, skipped)) == int(selected[1]), output[-2000:]
    assert set(passed) == set(files)


def assert_caught(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that the out-of-bounds kernel of one_row_too_far.py ended the process."""
    output = done.stdout + done.stderr
    assert done.returncode != 0, output[-3000:]
    assert "heap-buffer-overflow" in output, output[-3000:]
    assert "geglu" in output[output.index("heap-buffer-overflow") :]
