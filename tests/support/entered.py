"""List the files that `fastdiff sample` runs through before the first kernel.

    python -m tests.support.entered                     one file per line
    python -m tests.support.entered --count 1           options are passed to `fastdiff sample`

A file counts if one of its functions is called on the main thread between the start of the command
and the first call of an op in `kernels/`, including the file of that op. Code that runs only during
imports does not count: class bodies, decorators, module-level calls.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (ROOT / "fastdiff", ROOT / "kernels")


class Entered:
    """A profile function that records files until an op of `kernels.OPS` is called.

    Args:
        ops: names of the public functions that end the recording.
    """

    def __init__(self, ops: frozenset[str]) -> None:
        self.ops = ops
        self.files: list[str] = []
        """Paths relative to the repository, in the order in which they were entered."""
        self.op: str | None = None
        """The first op that was called, if any."""
        self._places: dict[CodeType, str | None] = {}
        self._importing = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if code.co_name == "<module>":
            self._importing += {"call": 1, "return": -1}.get(event, 0)
        if event != "call" or self._importing:
            return
        if code not in self._places:
            self._places[code] = place(code.co_filename)
        where = self._places[code]
        if where is None:
            return
        if where not in self.files:
            self.files.append(where)
        if where.startswith("kernels/") and code.co_name in self.ops:
            self.op = code.co_name
            sys.setprofile(None)


def place(filename: str) -> str | None:
    """The path in the repository if the file belongs to fastdiff, else None."""
    if filename.startswith("<"):
        return None
    path = Path(filename).resolve()
    if any(path.is_relative_to(room) for room in ROOMS):
        return path.relative_to(ROOT).as_posix()
    return None


def files_of_sample(options: Sequence[str] = ()) -> tuple[list[str], str | None]:
    """The files that ``fastdiff sample`` enters, and the op that ended it (None if none ran)."""
    from fastdiff import kernels
    from fastdiff.cli import main

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        entered = Entered(frozenset(kernels.OPS))
        sys.setprofile(entered)
        try:
            code = main(["sample", "--steps", "1", "--out", out, *options])
        finally:
            sys.setprofile(None)
    if code:
        raise RuntimeError(f"fastdiff sample ended with exit code {code}")
    return entered.files, entered.op


if __name__ == "__main__":
    found, op = files_of_sample(sys.argv[1:])
    if "torch._dynamo" in sys.modules:
        print("the command imports torch._dynamo, which takes over a second")
    print("\n".join(found))
    print(f"{len(found)} files to {op}")
