"""Tiny workloads for tests that kill processes: training, sampling, jobs, saving.

A `Work` defines what its folder contains if undisturbed, and what must hold at every instant.
"""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.cli import main
from fastdiff.training import checkpoints, train_diffusion
from tests.jobs.jobs import content, mixed_rows, write_rows
from tests.support.tiny import tiny_pixel_model
from tests.training import runs

STEMS = ("networks", "ema", "optimizers")


@dataclass(frozen=True)
class Work:
    """Something to do in a folder.

    Attributes:
        start: does it, or goes on with it, in a folder; returns the exit code.
        whole: what is wrong with a folder at an instant; empty if nothing is.
        done: what is wrong with a folder when it is done, against that of undisturbed work.
        progress: numbers that may never fall.
    """

    start: Callable[[Path], int | None]
    whole: Callable[[Path], str]
    done: Callable[[Path, Path], str]
    progress: Callable[[Path], tuple[int, ...]] = lambda folder: ()


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its content."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """Files that were lost, left behind or changed."""
    lost, more = sorted(expected.keys() - found), sorted(found.keys() - expected)
    changed = [name for name in expected.keys() & found.keys() if found[name] != expected[name]]
    pairs = (("lost", lost), ("left behind", more), ("changed", sorted(changed)))
    return "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in pairs if names)


# --- training -------------------------------------------------------------------------------------


def training(images: Path) -> Work:
    """Six steps with a checkpoint after each, and two previews."""

    def start(folder: Path) -> None:
        torch.set_num_threads(1)
        run = runs.with_output(runs.diffusion_run(images, folder), save_every=1, keep=2)
        train_diffusion(run, resume=(folder / "config.json").exists())

    return Work(start, _training_is_whole, _training_is_done, _step_and_bundle)


def _step_and_bundle(folder: Path) -> tuple[int, ...]:
    """The step of the newest checkpoint, and whether there is a bundle."""
    newest = checkpoints.latest_checkpoint(folder / "checkpoints")
    step = 0 if newest is None else checkpoints.step_of(newest)
    return step, int((folder / "model").exists())


def _training_is_whole(folder: Path) -> str:
    """`latest` names a whole checkpoint, model/ is whole, config.json and the pictures are."""
    try:
        newest = checkpoints.latest_checkpoint(folder / "checkpoints")
        if newest is not None:
            checkpoints.load_checkpoint(newest, STEMS)
        if (folder / "model").exists():
            load_bundle(folder / "model")
        if (folder / "config.json").exists():
            json.loads((folder / "config.json").read_bytes())
        for path in (folder / "samples").glob("*.png"):
            Image.open(path).load()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _training_is_done(folder: Path, undisturbed: Path) -> str:
    try:
        runs.assert_same_run(undisturbed, folder)
    except (AssertionError, FileNotFoundError) as error:
        return f"not the same run: {str(error)[:300]}"
    return difference(dict.fromkeys(listing(folder), b""), dict.fromkeys(listing(undisturbed), b""))


# --- sampling -------------------------------------------------------------------------------------


def sampling(bundle: Path, *more: str) -> Work:
    """Four images and a sheet of them."""
    words = ["sample", "--model", str(bundle), "--classes", "1", "2", "--count", "2"]

    def start(folder: Path) -> int:
        torch.set_num_threads(1)
        return main([*words, "--steps", "2", "--device", "cpu", "--out", str(folder), *more])

    return Work(start, _pictures_are_whole, lambda a, b: difference(listing(a), listing(b)))


def _pictures_are_whole(folder: Path) -> str:
    for path in folder.glob("[!.]*"):
        try:
            Image.open(path).load()
        except (OSError, SyntaxError) as error:
            return f"{path.name}: {error}"
    return ""


# --- jobs -----------------------------------------------------------------------------------------

SHARD, JOB_ROWS = 5, 23
BAD_ROW = 11


def job(bundle: Path, rows: Path, *more: str) -> Work:
    """23 rows, one of them bad, in shards of five."""
    lines = [*mixed_rows(BAD_ROW), "no json", *mixed_rows(JOB_ROWS - BAD_ROW - 1, seed=1)]
    write_rows(rows, lines)
    words = ["generate", str(rows), "--model", str(bundle), "--device", "cpu", "--threads", "1"]
    words += ["--shard-size", str(SHARD), "--format", "webdataset"]

    def start(folder: Path) -> int:
        torch.set_num_threads(1)
        return main([*words, "--out", str(folder), *more])

    return Work(start, _shards_are_whole, _same_job, _finished_shards)


def _finished_shards(folder: Path) -> tuple[int, ...]:
    """Which shards are finished."""
    count = -(-JOB_ROWS // SHARD)
    return tuple(int((folder / f"{number:06d}.tar").exists()) for number in range(count))


def _shards_are_whole(folder: Path) -> str:
    """Each finished shard has an image and a recipe, or an error, for each of its rows."""
    for path in sorted(folder.glob("0*.tar")):
        first = int(path.stem) * SHARD
        rows = {*range(first, min(first + SHARD, JOB_ROWS))} - {BAD_ROW}
        expected = [f"{row:09d}.{ending}" for row in sorted(rows) for ending in ("png", "json")]
        try:
            with tarfile.open(path) as archive:
                names = archive.getnames()
        except tarfile.TarError as error:
            return f"{path.name}: {error}"
        if names != expected:
            return f"{path.name} has {names}"
        if BAD_ROW in range(first, first + SHARD):
            (record,) = path.with_suffix(".errors.jsonl").read_text().splitlines()
            if json.loads(record)["row"] != BAD_ROW:
                return f"the record of {path.name} is {record}"
    return ""


def _same_job(folder: Path, undisturbed: Path) -> str:
    return difference(content(folder), content(undisturbed))


# --- saving ---------------------------------------------------------------------------------------


def saving(seed: int) -> Work:
    """A bundle, over the one that is there."""

    def start(folder: Path) -> None:
        torch.set_num_threads(1)
        save_bundle(_model(seed), folder / "model", provenance={"seed": seed})

    return Work(start, _bundle_is_whole, lambda a, b: difference(listing(a), listing(b)))


@functools.cache
def _model(seed: int) -> object:
    model = tiny_pixel_model()
    assert model.denoiser is not None
    torch.manual_seed(seed)
    for parameter in model.denoiser.parameters():
        parameter.data = torch.randn_like(parameter)
    return model


def _bundle_is_whole(folder: Path) -> str:
    if not (folder / "model").exists() and any(folder.glob(".model.old-*")):
        return ""  # a file system on which two folders cannot change places in one step
    try:
        load_bundle(folder / "model")
    except (ValueError, OSError) as error:
        return str(error)
    return ""
