"""Signals while training."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from fastdiff.training import interrupts


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    script = f"""
import os, runpy, signal
Interrupts = runpy.run_path({interrupts.__file__!r})["Interrupts"]
with Interrupts() as caught:
    os.kill(os.getpid(), signal.SIGTERM)
    assert (caught.received, caught.exit_code) == (15, 143)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "first\n"
    assert done.returncode == -signal.SIGINT
