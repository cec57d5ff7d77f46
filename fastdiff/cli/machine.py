"""The environment of a command: device, backend, output folder, a clock, a progress bar."""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastdiff.cli.console import backends_line, seconds
from fastdiff.files import remove_leftovers

if TYPE_CHECKING:
    import torch

BackendName = Literal["auto", "reference", "triton", "cuda", "library", "cpu"]
DtypeName = Literal["fp32", "fp16", "bf16"]
BLOCK_BYTES = 4096
"""Space that the smallest file takes on a usual disk."""
TORCH_NAMES: dict[DtypeName, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Device and dtype that a command computes with."""

    backend: BackendName = "auto"
    """Backend of the ops; auto uses the fastest available ('fastdiff doctor' lists them)."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto uses a GPU if there is one."""
    dtype: DtypeName = "fp32"
    """Number format of the networks; with fp16 the autoencoder still computes in fp32."""


@dataclass(frozen=True, kw_only=True)
class SamplingCompute(Compute):
    """Device and dtype that a command samples with."""

    graphs: bool = True
    """On a GPU, run each step as one CUDA graph; --no-graphs launches it kernel by kernel."""


def device_and_dtype(compute: Compute) -> tuple[torch.device, torch.dtype]:
    """Check that the device is available and the number format makes sense on it; return both.

    Raises:
        ValueError: the device is not available, or fp16 is requested on a CPU.
    """
    import torch

    device, dtype = compute.device, compute.dtype
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise ValueError(f"unknown device {device!r}; expected one of auto, cpu, cuda, cuda:0")
    there = torch.cuda.is_available()
    if kind == "auto":
        kind = "cuda" if there else "cpu"
    if kind == "cuda" and not there:
        why = "no GPU found" if torch.version.cuda else "this torch is built without CUDA"
        raise ValueError(f"device {device!r} is not available: {why}; use --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} is not available: this machine has {torch.cuda.device_count()} "
            "GPUs, counted from 0"
        )
    if kind == "cpu" and dtype == "fp16":
        raise ValueError(
            "dtype fp16 needs a GPU, got device cpu, where it is slower than fp32; use --dtype fp32"
        )
    return torch.device(f"{kind}:{index}" if index else kind), getattr(torch, TORCH_NAMES[dtype])


def chosen_backend(name: BackendName) -> contextlib.AbstractContextManager[None]:
    """``--backend`` for a block of code; "auto" leaves the choice to FASTDIFF_BACKEND if it is set.

    Raises:
        ValueError: FASTDIFF_BACKEND names no backend.
    """
    from fastdiff.kernels import backend
    from fastdiff.kernels.choose import selected_backend

    return backend(selected_backend() if name == "auto" else name)


def size(count: int) -> str:
    """Format a number of bytes with about three digits and a unit.

    >>> size(0), size(1536), size(5 * 2**30), size(3 * 2**50)
    ('0 B', '1.5 KiB', '5 GiB', '3,072 TiB')
    """
    unit = min(max(count.bit_length() - 1, 0) // 10, 4)
    return (
        f"{count / 2 ** (10 * unit):,.{1 if count < 10 << (10 * unit) else 0}f}".removesuffix(".0")
        + (" B", " KiB", " MiB", " GiB", " TiB")[unit]
    )


def check_room(folder: Path, files: int) -> None:
    """Raise ValueError if so many files, however small, cannot fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if files * BLOCK_BYTES > free:
        raise ValueError(
            f"{files:,} images need at least {size(files * BLOCK_BYTES)}, but {folder} has only "
            f"{size(free)} free; make fewer images, or give another --out"
        )


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Create a folder before the work starts; remove it if it is empty afterwards.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # try to write: permissions do not bind root
            pass
    except FileExistsError:
        raise NotADirectoryError(
            errno.ENOTDIR, f"the output must be a folder, got a file: {path}; give another --out"
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(
            error.errno, f"cannot write to the folder {path}: {reason}; give another --out"
        ) from error
    try:
        yield path
    finally:
        remove_leftovers(path)  # temporary files of runs that were killed
        for folder in made:
            with contextlib.suppress(OSError):  # keep it if it is not empty
                folder.rmdir()


@dataclass
class Clock:
    """Wall time per stage, in the order in which the stages were first entered."""

    stages: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start

    def report(self) -> str:
        return ", ".join(f"{stage} {seconds(value)}" for stage, value in self.stages.items())


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, updated by calling (done, total), if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@dataclass(frozen=True)
class Work:
    """Measurements of a command's work."""

    served: dict[str, set[str]]
    """Op -> the backends that ran it."""
    clock: Clock = field(default_factory=Clock)

    def report(self) -> list[tuple[str, str]]:
        """Lines for the end of the output: the backends used, and the time of each stage."""
        return [("backends", backends_line(self.served)), ("time", self.clock.report())]


@contextlib.contextmanager
def at_work(out: Path, compute: Compute) -> Iterator[Work]:
    """Set up the output folder and the backend for a block of code, and measure its work.

    Raises:
        OSError: as for `output_folder`.
        ValueError: as for `chosen_backend`.
    """
    from fastdiff.kernels import record_backends

    with output_folder(out), chosen_backend(compute.backend), record_backends() as served:
        yield Work(served)
