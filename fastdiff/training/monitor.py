"""Logging of a run: log.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdiff.extras import import_extra
from fastdiff.files import NO_SPACE, write_text

LOG_FILE = "log.jsonl"


class Monitor:
    """Context manager that writes and shows the scalars and sheets of a run.

    A terminal gets a progress bar with loss, it/s and ETA; other outputs get a line per record.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        steps: int,
        tensorboard: bool,
        console: Console | None = None,
    ) -> None:
        self.folder = folder
        self.steps = steps
        self.console = console or Console()
        _drop_lines_after(folder / LOG_FILE, first_step)
        self._log = (folder / LOG_FILE).open("a")
        self._board: Any = None
        if tensorboard:
            import_extra("tensorboard", extra="train")
            module = import_extra("torch.utils.tensorboard", extra="train")
            self._board = module.SummaryWriter(
                str(folder / "tensorboard"),
                purge_step=first_step + 1,  # steps are counted from 1 there
            )
        self._progress: Progress | None = None
        self._since = (first_step, time.perf_counter())
        self._done = first_step

    def __enter__(self) -> Monitor:
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self.folder.name, total=self.steps, completed=self._done, text=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        # closing retries a failed write: suppress its error so that the first one is raised
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            if self._board is not None:
                self._board.close()
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self._log.close()

    def tick(self, done: int) -> None:
        """Show that `done` steps are finished."""
        self._done = done
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def record(self, done: int, scalars: dict[str, float]) -> None:
        """Write the scalars after `done` steps to the log, TensorBoard and the console."""
        now = time.perf_counter()
        rate = (done - self._since[0]) / max(now - self._since[1], 1e-9)
        self._since = (done, now)
        try:
            self._log.write(json.dumps({"step": done, **scalars, "steps_per_second": rate}) + "\n")
            self._log.flush()
            if self._board is not None:
                for name, value in scalars.items():
                    self._board.add_scalar(name, value, done)
                self._board.add_scalar("steps_per_second", rate, done)
        except OSError as error:
            full = error.errno in NO_SPACE
            what = "no space left to write" if full else f"{error.strerror or error}:"
            raise OSError(
                error.errno,
                f"{what} {self.folder / LOG_FILE} (the last checkpoint is intact); free "
                "some space and resume",
            ) from error
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        if self._progress is not None:
            self._progress.update(
                self._task, text=f"loss {scalars.get('loss', 0):.4g}  {rate:.2f} it/s"
            )
        else:
            left = (self.steps - done) / rate
            eta = f"{int(left) // 60}:{int(left) % 60:02d}"
            self.say(f"step {done}/{self.steps}  {shown}  {rate:.2f} it/s  ETA {eta}")

    def sheet(self, done: int, image: Image.Image, name: str) -> None:
        """Write a sheet of images to TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(image.convert("RGB")), done, dataformats="HWC")

    def pause(self) -> None:
        """Exclude the time until now (previews, saving) from the next rate."""
        self._since = (self._done, time.perf_counter())

    def say(self, text: str) -> None:
        """Print one line for the user, above the progress bar if there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the records of log.jsonl up to the first damaged line, such as a truncated last one."""
    records = []
    for line in (folder / LOG_FILE).read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the records of steps after the checkpoint, which a resumed run repeats."""
    if not path.exists():
        return
    kept = [record for record in read_log(path.parent) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
