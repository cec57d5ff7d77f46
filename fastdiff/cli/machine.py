"""What the commands ask of the machine: a device, a number format, a folder to write to."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

BackendName = Literal["auto", "reference", "triton", "cuda", "cpu"]
DtypeName = Literal["fp32", "fp16", "bf16"]
BLOCK_BYTES = 4096
"""What the smallest file takes on a usual disk."""
TORCH_NAMES: dict[DtypeName, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def device_and_dtype(device: str, dtype: DtypeName) -> tuple[torch.device, torch.dtype]:
    """Check that the device is there and that the format makes sense on it.

    Raises:
        ValueError: no such device, or fp16 on a CPU.
    """
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise ValueError(f"unknown device {device!r}; expected one of auto, cpu, cuda, cuda:0")
    there = torch.cuda.is_available()
    if kind == "auto":
        kind = "cuda" if there else "cpu"
    if kind == "cuda" and not there:
        why = "no GPU is found" if torch.version.cuda else "this torch is built without CUDA"
        raise ValueError(f"device {device!r} is not there: {why}; use --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} is not there; there are {torch.cuda.device_count()}, counted from 0"
        )
    if kind == "cpu" and dtype == "fp16":
        raise ValueError(
            "dtype fp16 is for GPUs, got device cpu, where it is slower than fp32; use --dtype fp32"
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


def check_room(folder: Path, files: int) -> None:
    """Raise ValueError if so many small files cannot fit on the disk that ``folder`` lies on."""
    free = shutil.disk_usage(folder).free
    if files * BLOCK_BYTES > free:
        raise ValueError(
            f"{files:,} images need {files * BLOCK_BYTES / 2**30:,.0f} GiB or more, {folder} has "
            f"{free / 2**30:,.0f} GiB free; a smaller --count, or another --out"
        )


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make a folder before the work starts; take it away again if the work leaves it empty.

    Raises:
        OSError: it cannot be made or written to.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # root may write where permissions say no: try it
            pass
    except FileExistsError:
        raise NotADirectoryError(
            errno.ENOTDIR, f"the output must be a folder, {path} is something else; name another"
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(
            error.errno, f"cannot write to the folder {path}: {reason}; name another"
        ) from error
    try:
        yield path
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: it stays
                folder.rmdir()
