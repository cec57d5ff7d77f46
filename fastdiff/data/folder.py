"""A folder of images, with one sub-folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdiff.data.config import DataConfig
from fastdiff.data.dataset import ImageDataset, Skipped, collect
from fastdiff.data.decode import decode
from fastdiff.files import printable
from fastdiff.images import UNREADABLE, in_colour, reason

_LOOKED_AT = 16  # images of each class that are checked for colour
_AHEAD = 256  # maximum number of decoded images waiting to be written


def open_folder(config: DataConfig) -> ImageDataset:
    """Read all images below `config.path`.

    Each sub-folder, including its own sub-folders, is a class; image files directly in the folder
    have no class. Images are ordered by class, then by path, on every file system.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it contains no readable image, or both images and sub-folders with images.
    """
    root = Path(config.path)
    if not root.exists():
        raise FileNotFoundError(f"no folder at {root}; set path to a folder of images")
    if not root.is_dir():
        raise ValueError(f"expected a folder of images, got the file {root}")
    files = list_images(root)
    if not files:
        raise ValueError(
            f"no images in {root}; expected files that Pillow can read, such as .png or .jpg"
        )
    _check_names(root, files)
    top_level = [path for path in files if len(path.parts) == 1]
    if top_level and len(top_level) != len(files):
        raise ValueError(
            f"{root} contains both images ({top_level[0]}) and folders of images; "
            f"put every image into the folder of its class, or all images directly into {root}"
        )
    skipped: list[Skipped] = []
    names = [() if top_level else (path.parts[0],) for path in files]
    pixels, labels, fingerprint = collect(
        _decoded(root, files, config, skipped),
        skipped,
        where=str(root),
        channels=config.channels,
        image_size=config.image_size,
    )
    classes = tuple(sorted({name for parts in names for name in parts}))
    numbers = {name: number for number, name in enumerate(classes)}
    label_numbers = torch.tensor([numbers.get(str(label), 0) for label in labels])
    return ImageDataset(pixels, label_numbers, classes, skipped, fingerprint)


def _check_names(root: Path, files: list[Path]) -> None:
    """Reject class names that cannot be stored in a text file, before they are used."""
    for path in files:
        name = path.parts[0]
        if len(path.parts) > 1 and printable(name) != name:
            raise ValueError(
                f"the name of the class folder {printable(name)} in {printable(str(root))} "
                "contains unprintable or invalid characters; rename the folder"
            )


def describe_folder(root: Path) -> tuple[int, int]:
    """Number of channels and classes of a folder of images, as :func:`open_folder` would read it.

    Returns:
        The channels: 3 if any of the first images of the classes is in colour, else 1. The number
        of classes: 0 without sub-folders.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}; set path to a folder of images")
    folders: dict[str, list[Path]] = {}
    for path in list_images(root):
        folders.setdefault(path.parts[0] if len(path.parts) > 1 else "", []).append(path)
    looked_at = [path for paths in folders.values() for path in paths[:_LOOKED_AT]]
    colours = any(in_colour(root / path) for path in looked_at)
    return 3 if colours else 1, len(folders.keys() - {""})


def list_images(root: Path) -> list[Path]:
    """Files below `root` with an extension that Pillow knows, as sorted relative paths.

    Hidden files are left out. Symbolic links are followed, but each real folder is visited once.
    """
    endings = {ending.lower() for ending in Image.registered_extensions()}
    found: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found.extend(
            Path(folder, name).relative_to(root)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in endings
        )
    return sorted(found, key=lambda path: path.parts)


def _decoded(
    root: Path, files: list[Path], config: DataConfig, skipped: list[Skipped]
) -> Iterator[tuple[np.ndarray, str]]:
    """Yield pixels and class name of each readable file in order, decoding in threads."""

    def read(path: Path) -> np.ndarray | Skipped:
        try:
            return decode(root / path, config)
        except UNREADABLE as error:
            return Skipped(printable(path.as_posix()), reason(error))

    with ThreadPoolExecutor() as pool:
        for chunk in _chunks(files, _AHEAD):
            for path, result in zip(chunk, pool.map(read, chunk), strict=True):
                if isinstance(result, Skipped):
                    skipped.append(result)
                else:
                    yield result, path.parts[0] if len(path.parts) > 1 else ""


def _chunks(items: Iterable[Path], size: int) -> Iterator[list[Path]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
