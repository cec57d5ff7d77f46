"""webdataset shards: tar files in which `name.jpg` and `name.cls` form a sample."""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastdiff.data.config import DataConfig
from fastdiff.data.dataset import ImageDataset, Skipped, collect
from fastdiff.data.decode import decode
from fastdiff.extras import import_extra
from fastdiff.images import UNREADABLE, reason

MAX_MEMBER_BYTES = 256 * 2**20
_LABEL_KEYS = ("label", "class", "cls")


def open_shards(config: DataConfig) -> ImageDataset:
    """Read all samples of the shards that match `config.path`, with the shards sorted by name.

    The class of a sample is the text of its `.cls` (or `.txt`) member, or the field `label`,
    `class` or `cls` of its `.json` member. If no sample has a class, there are no classes; if only
    some have one, that is an error.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: the shards contain no readable image, or only some samples have a class.
    """
    paths = [Path(name) for name in sorted(glob.glob(config.path, recursive=True))]
    if not paths:
        raise FileNotFoundError(
            f"no shard matches {config.path!r}; set path to a .tar file or a pattern for several"
        )
    skipped: list[Skipped] = []
    pixels, labels, fingerprint = collect(
        _decoded(paths, config, skipped),
        skipped,
        where=config.path,
        channels=config.channels,
        image_size=config.image_size,
    )
    names = {str(label) for label in labels}
    if "" in names and len(names) > 1:
        count = sum(label == "" for label in labels)
        raise ValueError(
            f"{count} of {len(labels)} samples in {config.path} have no class; "
            "add a .cls member to all samples, or to none"
        )
    classes = tuple(sorted(names - {""}, key=_natural))
    numbers = {name: number for number, name in enumerate(classes)}
    label_numbers = torch.tensor([numbers.get(str(label), 0) for label in labels])
    return ImageDataset(pixels, label_numbers, classes, skipped, fingerprint)


def _decoded(
    paths: list[Path], config: DataConfig, skipped: list[Skipped]
) -> Iterator[tuple[np.ndarray, str]]:
    """Yield pixels and class name of each readable sample; members are never unpickled or run."""
    endings = {ending.lower().lstrip(".") for ending in Image.registered_extensions()}
    for path in paths:
        for sample in _samples(path, skipped):
            image = next((key for key in sample if key.rpartition(".")[2] in endings), None)
            try:
                if image is None:
                    raise ValueError("no image among its members")
                if sample[image] is None:
                    raise ValueError(f"larger than {MAX_MEMBER_BYTES >> 20} MiB")
                yield decode(sample[image], config), _label(sample)
            except UNREADABLE as error:
                skipped.append(Skipped(f"{path.name}:{sample['__key__']}", reason(error)))


def _samples(path: Path, skipped: list[Skipped]) -> Iterator[dict[str, Any]]:
    """The members of one shard, grouped by webdataset.

    The file is opened and read here, because webdataset would run a name such as "pipe:command" in
    a shell, and would unpack gigabytes of zeros from a compressed shard into memory.
    """
    tar = import_extra("webdataset.tariterators", extra="train")

    def note(error: Exception) -> bool:
        if not any(item.name == path.name for item in skipped):  # the same error is raised twice
            skipped.append(Skipped(path.name, f"damaged archive: {reason(error)}"))
        return True

    yield from tar.group_by_keys(_members(path, note), handler=note)


def _members(path: Path, note: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """Yield name and content of each file in the shard; the content is None if it is too large."""
    try:
        with tarfile.open(path, mode="r|*") as archive:
            for member in archive:
                if not member.isreg() or member.name.startswith("__"):  # webdataset's own records
                    continue
                file = archive.extractfile(member) if member.size <= MAX_MEMBER_BYTES else None
                data = file.read() if file is not None else None
                yield {"fname": member.name, "data": data, "__url__": str(path)}
                archive.members = []  # type: ignore[attr-defined]  # else it keeps all headers
    except UNREADABLE as error:
        note(error)


def _label(members: dict[str, Any]) -> str:
    for ending in ("cls", "txt"):
        if ending in members:
            return str(members[ending].decode()).strip()
    if "json" in members:
        record = json.loads(members["json"])
        for key in _LABEL_KEYS:
            if isinstance(record, dict) and key in record:
                return str(record[key])
    return ""


def _natural(name: str) -> tuple[int, int, str]:
    """Sort key with numbers by value and before words, so that class 10 follows class 9."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
