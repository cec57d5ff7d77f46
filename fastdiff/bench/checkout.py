"""Run the package of another checkout in a process of its own, and query it."""

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
    """Runs a worker, which is a file of this checkout, with the package of another checkout.

    The worker reads lines ``["method", argument, ...]`` and answers each with a line of JSON. It
    must not import anything from ``fastdiff`` that the other checkout may lack.
    """

    def __init__(self, checkout: Path, worker: Path, **variables: str) -> None:
        """variables: environment variables to add to those of this process."""
        program = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        environment = {**os.environ, **variables}
        environment.pop("PYTHONPATH", None)  # -c puts the working directory first on sys.path
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
        with contextlib.suppress(BrokenPipeError):  # if it has exited, there is no answer below
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"the process in {self.checkout} exited with code {code}")
        return json.loads(line)

    def close(self) -> None:
        """Close the input of the process, which makes it exit."""
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
    """Parse a command-line argument that names a checkout."""
    path = Path(text).resolve()
    if not (path / "fastdiff" / "kernels" / "__init__.py").exists():
        raise argparse.ArgumentTypeError(f"{text} does not contain the package fastdiff")
    return path
