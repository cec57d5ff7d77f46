"""The package of another checkout, in a process of its own that answers questions."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class CheckoutProcess:
    """Runs a worker, a file of this checkout, with the package of another one.

    The worker reads lines ``["method", argument, ...]`` and answers each with a line of JSON. It
    imports nothing of ``fastdiff`` that the other checkout may lack.
    """

    def __init__(self, checkout: Path, worker: Path, **variables: str) -> None:
        """variables: of the environment, beside this process's."""
        program = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        environment = {**os.environ, **variables}
        environment.pop("PYTHONPATH", None)  # -c puts the working folder first
        environment.pop("FASTDIFF_BACKEND", None)
        self.checkout = checkout
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, str(worker)],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the worker. Raises RuntimeError if the process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # no answer tells that it has ended
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"the process in {self.checkout} ended with exit code {code}")
        return json.loads(line)

    def close(self) -> None:
        """End the process: it stops at the end of its input."""
        with self._process:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


@contextlib.contextmanager
def checkout_process(checkout: Path, worker: Path, **variables: str) -> Iterator[CheckoutProcess]:
    process = CheckoutProcess(checkout, worker, **variables)
    try:
        yield process
    finally:
        process.close()


def checkout_folder(text: str) -> Path:
    """A command's argument."""
    path = Path(text).resolve()
    if not (path / "fastdiff" / "kernels" / "__init__.py").exists():
        raise argparse.ArgumentTypeError(f"{text} is not a folder that holds the package fastdiff")
    return path
