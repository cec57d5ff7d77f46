"""Planted faults: small wrong changes, each a patch that names the test that must notice it.

A patch begins with two headers and a blank line:

    Fault: what is wrong, in one line
    Seen-by: tests/room/test_file.py::test_name

`Seen-by: nothing` marks a fault that the suite is known to miss.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.imports import ROOT

FOLDER = Path(__file__).parent
NOTHING = "nothing"
_HEADER = re.compile(r"Fault: (?P<what>.+)\nSeen-by: (?P<test>.+)\n\n")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A planted fault."""

    name: str
    what: str
    test: str
    """The pytest id of the test that must fail; NOTHING: none does."""
    path: str
    """The file that is changed, relative to the root of the repository."""
    patch: Path


def faults() -> list[Fault]:
    """All planted faults, by name.

    Raises:
        ValueError: a patch without its headers, or one that changes several files.
    """
    return [read(patch) for patch in sorted(FOLDER.glob("*.patch"))]


def read(patch: Path) -> Fault:
    """Read one patch."""
    text = patch.read_text()
    header = _HEADER.match(text)
    paths = re.findall(r"^\+\+\+ b/(.+)$", text, re.MULTILINE)
    if header is None or len(paths) != 1:
        raise ValueError(
            f"{patch.name} must begin with 'Fault:' and 'Seen-by:' and change one file, got "
            f"{len(paths)} files and {text[:60]!r}; see {Path(__file__).name}"
        )
    return Fault(name=patch.stem, path=paths[0], patch=patch, **header.groupdict())


def apply(fault: Fault, root: Path, *, check: bool = False) -> None:
    """Apply a fault to a copy of the repository, or only check that it applies.

    Raises:
        ValueError: the lines that it changes are not there any more.
    """
    command = ["git", "apply", "--unsafe-paths", f"--directory={root}", str(fault.patch)]
    if check:
        command.insert(2, "--check")
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"{fault.patch.name} does not apply to {fault.path}: {done.stderr.strip()}; plant the "
            "fault again in the code of today"
        )


def copy_of_the_repository(to: Path) -> None:
    """Copy the tracked files, and the compiled kernels, to a new folder."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kernels = [path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("_native*")]
    for name in [*listed.stdout.splitlines(), *kernels]:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():  # else it was deleted and is not committed yet
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)
