"""What the bytes of a job's shards depend on: kept with them, checked before it is resumed."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import features

import fastdiff
from fastdiff.checkpoint.model import Model
from fastdiff.configs import to_dict
from fastdiff.extras import import_extra
from fastdiff.files import one_line_errors
from fastdiff.generate.recipe import place
from fastdiff.jobs.rows import Rows
from fastdiff.jobs.spec import JobSpec
from fastdiff.jobs.store import Store
from fastdiff.kernels.choose import selected_backend

NAME = "job.json"
VERSION = 2
INFORMATION = ("model",)
"""Entries that are not compared: the same weights may lie elsewhere."""


def fingerprint(
    spec: JobSpec,
    rows: Rows,
    model: Model,
    *,
    device: torch.device,
    slots: int | None,
    threads: int | None,
    pictures: str | None,
) -> dict[str, Any]:
    """The fingerprint of a job, as JSON-compatible values.

    device: of the workers; the model may lie elsewhere. slots: network rows per evaluation follow
    from it where they may decide bits, which is on a GPU; None on a CPU, where they follow from the
    size of the image alone. threads: of each worker on a CPU; None on a GPU. pictures: hash of the
    hashes of pictures that rows name, see `pictures.py`; None if there are none.
    """
    versions = {
        "fastdiff": fastdiff.__version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "zlib": features.version("zlib_ng") or features.version("zlib"),
    }
    if spec.image != "png":
        name = {"webp": "webp", "jpeg": "jpg"}[spec.image]
        versions[spec.image] = features.version(name)
    if spec.format == "parquet":
        versions["pyarrow"] = import_extra("pyarrow", extra="jobs").__version__
    on_cpu = device.type == "cpu"
    processor = (
        torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(device)
    )
    return {
        "fingerprint": VERSION,
        "model": name_of(model),
        "weights": model.weights_hash,
        "sampler": None if model.sampler is None else to_dict(model.sampler),
        "load": spec.load.recorded,
        "input": [
            {"name": file.name, "rows": file.rows, "bytes": file.size, "sha256": file.sha256}
            for file in rows.files
        ],
        "pictures": pictures,
        "columns": dict(sorted(spec.columns.items())),
        "ignore": sorted(spec.ignore),
        "defaults": {k: v for k, v in sorted(spec.defaults.items()) if k != "batch"},
        "seed": spec.seed,
        "shard_size": spec.shard_size,
        "format": spec.format,
        "image": spec.image,
        "quality": None if spec.image == "png" else spec.quality,
        "versions": versions,
        "compute": {
            "device": device.type,
            "processor": f"{platform.machine()} {processor}",
            "dtype": spec.dtype,
            "backend": selected_backend(),
            "graphs": None if on_cpu else spec.graphs,
            "threads": threads,
            "slots": slots,
        },
    }


def name_of(model: Model) -> str:
    """What recipes call a model: its name if it is shipped, else that of its file or folder.

    Whole paths would make the bytes of a job depend on where its files lie.
    """
    return Path(place(model)).absolute().name


@one_line_errors()
def read_fingerprint(store: Store) -> dict[str, Any] | None:
    """The fingerprint of the job in a store; None if there is no job.

    Raises:
        ValueError: the file is damaged.
    """
    data, path = store.read(NAME), f"{store.place}/{NAME}"
    if data is None:
        return None
    try:
        found = json.loads(data.decode())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); give another --out") from error
    if not isinstance(found, dict) or "fingerprint" not in found:
        raise ValueError(f"{path} is not the file of a job; give another --out")
    return found


def begin(store: Store, mine: dict[str, Any]) -> bool:
    """Write the fingerprint of a job that begins. Returns False if another process was faster.

    Raises:
        ValueError: the store has no conditional put.
    """
    try:
        store.create(NAME, (json.dumps(mine, indent=2) + "\n").encode())
    except FileExistsError:
        return False
    return True


def check_same(store: Store, found: dict[str, Any], mine: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the job in the store has another fingerprint; the message says what differs.
    """
    if wrong := list(differences(found, json.loads(json.dumps(mine)))):
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ValueError(
            f"{store.place} has a job that differs, so its shards would not belong together: "
            f"{shown}; give another --out, or make it as {store.place}/{NAME} says"
        )


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two fingerprints differ, as ``defaults.steps was 20, is 10``."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if name or key not in INFORMATION:
                yield from differences(
                    before.get(key), now.get(key), f"{name}.{key}" if name else key
                )
    elif name == "input" and isinstance(before, list) and isinstance(now, list):
        yield from _inputs(before, now)
    elif before != now:
        yield f"{name} was {_short(before)}, is {_short(now)}"


def _inputs(before: list[Any], now: list[Any]) -> Iterator[str]:
    if len(before) != len(now):
        yield f"the rows were {len(before)} files, are {len(now)}"
    for old, new in zip(before, now, strict=False):
        if {**old, "name": ""} != {**new, "name": ""}:  # a file may be renamed
            yield (
                f"{new['name']} has changed ({old['rows']:,} rows, sha256 {old['sha256'][:8]}, now "
                f"{new['rows']:,} rows, sha256 {new['sha256'][:8]})"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
