"""A data set in memory: pixels, labels, class names, and the files that could not be read."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import printable

_NAMED_IN_WARNING = 10


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)} ({printable(self.reason, 200)})"


@dataclass
class ImageDataset:
    """Images of one size with a class each.

    Attributes:
        images: (N, C, H, W), uint8 (0 to 255) or fp32 in [-1, 1].
        labels: (N,) int64; all 0 for data without classes.
        classes: the class names; empty for data without classes.
        skipped: the files that could not be read.
        fingerprint: a hash of the pixels and class names in order; empty for the digits, which
            never change.
        captions: the captions of each image, the most complete one first; empty for data without.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()
    skipped: list[Skipped] = field(default_factory=list)
    fingerprint: str = ""
    captions: tuple[tuple[str, ...], ...] = ()

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.images.shape[-1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image (C, H, W), fp32 in [-1, 1], and its label."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image index {index} is out of range for {len(self)} images")
        return to_float(self.images[index]), int(self.labels[index])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), fp32 in [-1, 1], and labels (N,) of `indices` (N,)."""
        return to_float(self.images[indices]), self.labels[indices]


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 0 to 255 to fp32 -1 to 1; fp32 is returned unchanged."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def collect(
    decoded: Iterable[tuple[np.ndarray, str | int]],
    skipped: list[Skipped],
    *,
    where: str,
    channels: int,
    image_size: int,
) -> tuple[Tensor, list[str | int], str]:
    """Write decoded images to an unnamed temporary file and memory-map it.

    So a data set may be larger than memory, and random access costs at most a page fault. The file
    is created in the directory of Python's `tempfile` (set by `TMPDIR`) and disappears with the
    process.

    Args:
        decoded: (C, H, W) uint8 images with their labels, in order.
        skipped: filled by `decoded` while it is being read; reported here once.
        where: the source of the images, for messages.
        channels: C.
        image_size: H = W.

    Returns:
        Images (N, C, H, W) uint8, the labels, and a hash of both.

    Raises:
        ValueError: no image could be read.
        OSError: the temporary file does not fit on the disk.
    """
    labels: list[str | int] = []
    digest = hashlib.blake2b(digest_size=16)
    with tempfile.TemporaryFile() as file:
        for image, label in decoded:
            assert image.dtype == np.uint8, image.dtype
            pixels = np.ascontiguousarray(image).data
            digest.update(pixels)
            digest.update(repr(label).encode(errors="backslashreplace"))
            with _room_for(where):
                file.write(pixels)
            labels.append(label)
        with _room_for(where):
            file.flush()
        report(skipped, where)
        if not labels:
            found = f"all {len(skipped)} files are unreadable" if skipped else "it contains none"
            raise ValueError(f"no image could be read from {where}: {found}")
        shape = (len(labels), channels, image_size, image_size)
        mapped = np.memmap(file, dtype=np.uint8, mode="c", shape=shape)  # outlives the file object
    return torch.from_numpy(mapped), labels, digest.hexdigest()


@contextlib.contextmanager
def _room_for(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot store the decoded images of {where} in {tempfile.gettempdir()}: "
            f"{error.strerror}; set TMPDIR to a larger disk",
        ) from error


def report(skipped: list[Skipped], where: str) -> None:
    """Warn once about the skipped files, with their number and names."""
    if not skipped:
        return
    named = "; ".join(map(str, skipped[:_NAMED_IN_WARNING]))
    rest = len(skipped) - _NAMED_IN_WARNING
    more = f"; and {rest} more" if rest > 0 else ""
    files = "file" if len(skipped) == 1 else "files"
    warnings.warn(
        f"skipped {len(skipped)} unreadable {files} in {where}: {named}{more}", stacklevel=4
    )
