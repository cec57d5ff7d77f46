"""SIGTERM and Ctrl-C stop a run after the current step; a second signal kills the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Context manager that stores the first signal in `received`; a second one kills the process.

    Python delivers signals only to the main thread, so nothing is caught in other threads.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """128 + the signal number, as in shells: 143 for SIGTERM, 130 for Ctrl-C. Without a signal,
        143: another rank has received one."""
        return 128 + (self.received or signal.SIGTERM)

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
