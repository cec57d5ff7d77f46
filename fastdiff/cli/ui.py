"""``fastdiff ui``: a page to try a model in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastdiff.checkpoint.options import LoadOptions
from fastdiff.cli.machine import SamplingCompute, chosen_backend, device_and_dtype
from fastdiff.cli.options import FLAT, NO_NONE
from fastdiff.cli.parsing import OptionalInt, OptionalPath, parse
from fastdiff.serve.limits import Limits

SHORTEST_PASSWORD = 12


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Open a page to try a model in: prompt, sampler, a canvas with a brush, previews, history.

    All visitors share one batch of the model, as in 'fastdiff serve', without sharing images.
    Ctrl-C ends it. Needs the extra: pip install 'fastdiff[ui]'.

    Examples:
      fastdiff ui
      fastdiff ui --model runs/my-model --open
      fastdiff ui --host 0.0.0.0 --passwords users.txt --limits.queue 16
    """

    model: str = "digits"
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own needs --passwords."""
    port: int = 7860
    """Port to listen on; 0 chooses a free one."""
    passwords: OptionalPath = None
    """File with one NAME:PASSWORD per line, the passwords of at least 12 characters; the page then
    asks for one of them."""
    open: bool = False
    """Open the page in a browser."""
    slots: OptionalInt = None
    """Images in a batch: bounds memory; by default chosen by their size."""
    limits: Limits = field(default_factory=Limits)
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    compute: Annotated[SamplingCompute, FLAT, NO_NONE] = field(default_factory=SamplingCompute)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"--port must be 0 to 65535, got {self.port}")
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"--slots must be at least 1, got {self.slots}")


def main(words: Sequence[str]) -> int:
    options = parse(Ui, words, prog="fastdiff ui")
    return 0 if options is None else run(options)


def run(options: Ui) -> int:
    from fastdiff.extras import import_extra

    for package in ("gradio", "prometheus_client"):
        import_extra(package, extra="ui")
    from fastdiff.checkpoint.open import load
    from fastdiff.serve.http import is_loopback
    from fastdiff.serve.metrics import Metrics
    from fastdiff.serve.ui import Page, launch
    from fastdiff.serve.worker import Worker

    users = [] if options.passwords is None else read_users(options.passwords)
    if not is_loopback(options.host) and not users:
        raise ValueError(f"--host {options.host} lets other machines connect; set --passwords")
    port = free_port(options.host, options.port)
    device, dtype = device_and_dtype(options.compute)
    with chosen_backend(options.compute.backend):
        model = load(options.model, options=options.load, device=device, dtype=dtype)
        worker = Worker(
            model,
            Metrics(),
            queue=options.limits.queue,
            slots=options.slots,
            graphs=options.compute.graphs,
        )
        worker.start()
    page = Page(worker, options.limits, model.name)
    url = launch(page, options.host, port, auth=users, browser=options.open)
    print(f"open {url} in a browser; Ctrl-C ends it", flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1) and worker.alive:
        pass
    page.close()
    crashed = worker.crashed
    worker.stop()
    worker.join(10)
    if crashed:
        raise RuntimeError("the worker has crashed; its traceback is above")
    return 0


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        OSError: it is in use, or the address is not of this machine.
    """
    from fastdiff.serve.http import bind

    with bind(host, port) as listener:
        found: int = listener.getsockname()[1]
    return found


def read_users(path: Path) -> list[tuple[str, str]]:
    """Names and passwords of a file.

    Raises:
        ValueError: a line is not NAME:PASSWORD, a password is short, or there is none.
        OSError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, colon, password = line.strip().partition(":")
        if not name or not colon:
            raise ValueError(f"line {number} of {path} must be NAME:PASSWORD")
        if len(password) < SHORTEST_PASSWORD:
            raise ValueError(
                f"the password in line {number} of {path} must have at least {SHORTEST_PASSWORD} "
                "characters"
            )
        found.append((name, password))
    if not found:
        raise ValueError(f"{path} contains no user; write NAME:PASSWORD in a line")
    return found
