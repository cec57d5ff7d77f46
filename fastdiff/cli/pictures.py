"""What the commands that make images share: a model and jobs in, PNGs and a contact sheet out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import load
from fastdiff.cli.again import Original
from fastdiff.cli.console import Clock, backends_line, print_pairs, progress
from fastdiff.cli.machine import check_room, chosen_backend, device_and_dtype, output_folder
from fastdiff.cli.options import Command, as_job, seeds
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import Job
from fastdiff.generate.run import Result, generate
from fastdiff.generate.session import Session
from fastdiff.generate.settings import first_step
from fastdiff.images import contact_sheet, save_png

if TYPE_CHECKING:
    from fastdiff.diffusion.sampling import OnStep

SHEET, PREVIEW = "sheet.png", "preview.png"
SHEET_ROWS, SHEET_COLUMNS = 64, 32
PREVIEW_SIDE = 256


@dataclass(frozen=True)
class Wanted:
    """What a command is to make: a row of images per name, an image per seed in it."""

    names: Sequence[str]
    """Of the rows: classes, or one prompt."""
    seeds: range
    job: Callable[[int, int], tuple[str, Job]]
    """(row, seed) -> the name of the file without its ending, and what is to be done."""

    def __iter__(self) -> Iterator[tuple[str, Job]]:
        return (self.job(row, seed) for row in range(len(self.names)) for seed in self.seeds)

    @property
    def total(self) -> int:
        return len(self.names) * len(self.seeds)


def of_one_prompt(options: Command, kind: type[Any]) -> Callable[[Facts], Wanted]:
    """Images of a single prompt: an image per seed, called after its first words."""
    prompt = options.job.prompt
    stem = file_stem(prompt or options.job.image.stem)

    def job(_: int, seed: int) -> tuple[str, Job]:
        return f"{stem}-seed{seed}", as_job(kind, options.job, seed=seed)

    return lambda facts: Wanted([prompt or stem], seeds(options), job)


def run(
    options: Command,
    want: Callable[[Facts], Wanted],
    *,
    inputs: Sequence[Path] = (),
    refiner: Path | None = None,
    original: Original | None = None,
) -> int:
    """Load the model, do the jobs, write a PNG each as they come, and a contact sheet of several.

    want: called with what the model is like, before anything is computed. inputs: files that must
    not be written over. original: the picture of ``--like``; if its image is asked for again, the
    new one is NAME-again.png and the two are compared.
    """
    from fastdiff.kernels import record_backends

    machine = options.machine
    again = original if original is not None and original.is_asked_again(options) else None
    device, dtype = device_and_dtype(machine.device, machine.dtype)
    clock, code, compared = Clock(), 0, list[tuple[str, str]]()
    with output_folder(machine.out), chosen_backend(machine.backend), record_backends() as served:
        with clock("load"):
            model, second = _load(options, refiner, device, dtype)
        wanted = want(Facts.of(model))
        check_room(machine.out, wanted.total)
        paths = _paths(options, wanted, again)
        _keep([*inputs, *([original.path] if original else [])], paths, options)
        shown, last = _make(options, wanted, paths, (model, second), clock)
        if again is not None:
            code, text = again.compared(last.image, recipe_of(options, last))
            compared = [("compared", text)]
        if wanted.total > 1:
            paths.append(machine.out / SHEET)
            with clock("write"):
                _save_sheet(paths[-1], shown, wanted, options, last)
    print(paths[-1])
    print_pairs(
        [
            ("images", f"{wanted.total:,} of {_made_by(last)}"),
            ("weights", model.weights_hash[:12]),
            *about_files(model),
            *compared,
            ("backends", backends_line(served)),
            ("time", clock.report()),
        ]
    )
    return code


def _load(
    options: Command, refiner: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[Model, Model | None]:
    model = load(options.model, device=device, dtype=dtype, options=options.load)
    if refiner is None:
        return model, None
    words = options.load.tokenizer[-1:] or None
    return model, load(refiner, device=device, dtype=dtype, tokenizer=words)


def about_files(model: Model) -> list[tuple[str, str]]:
    """What had to be assumed of the model's files, and what of them is not supported."""
    lines = (line.partition(": ") for line in model.assumed_lines(flags=True))
    return [(title, text) for title, _, text in lines]


def _paths(options: Command, wanted: Wanted, again: Original | None) -> list[Path]:
    """The files to write, one per image."""
    out = options.machine.out
    if again is not None:
        return [out / f"{again.path.stem}-again.png"]
    return [out / f"{stem}.png" for stem, _ in wanted]


def _keep(inputs: Sequence[Path], paths: Sequence[Path], options: Command) -> None:
    """Raise ValueError if an input would be written over."""
    out = options.machine.out
    written = {path.resolve() for path in paths}
    if len(paths) > 1:
        written.add((out / SHEET).resolve())
    if options.machine.preview:
        written.add((out / PREVIEW).resolve())
    for path in inputs:
        if path.resolve() in written:
            raise ValueError(f"{path} would be written over; give another --out")


def _make(
    options: Command,
    wanted: Wanted,
    paths: Sequence[Path],
    models: tuple[Model, Model | None],
    clock: Clock,
) -> tuple[list[Tensor], Result]:
    """Make and write the images as they come; returns those of the sheet, and the last result."""
    model, refiner = models
    preview = _preview_writer(model, options.machine.out) if options.machine.preview else None
    shown: list[Tensor] = []
    with progress("sampling") as tell:
        results = generate(
            model,
            (job for _, job in wanted),
            refiner=refiner,
            progress=tell,
            on_step=preview,
            clock=clock,
            expected=wanted.total,
        )
        for number, (path, result) in enumerate(zip(paths, results, strict=True)):
            row, column = divmod(number, len(wanted.seeds))
            if row < SHEET_ROWS and column < SHEET_COLUMNS:
                shown.append(result.image)
            with clock("write"):
                save_png(path, result.image, recipe_of(options, result))
    return shown, result


def recipe_of(options: Command, result: Result) -> dict[str, Any]:
    """A result's recipe with what the model was loaded with."""
    return {**result.recipe, "load": options.load.recorded}


def _preview_writer(model: Model, folder: Path) -> OnStep:
    def write(step: Any) -> None:
        small = Session.of(model).latents.preview(step.denoised).float().cpu()
        save_png(
            folder / PREVIEW,
            contact_sheet(small, cell=PREVIEW_SIDE, caption=f"{step.done}/{step.total}"),
        )

    return write


def _save_sheet(
    path: Path, images: Sequence[Tensor], wanted: Wanted, options: Command, last: Result
) -> None:
    """A row per name and a column per seed; of one seed, or one name, the others share a row."""
    names, columns = wanted.names[:SHEET_ROWS], wanted.seeds[:SHEET_COLUMNS]
    labels = [f"seed {seed}" for seed in columns]
    grid = len(columns) > 1 and len(names) > 1
    if not grid:
        labels = [name[:80] for name in names] if len(columns) == 1 else labels
    wide = min(len(labels), SHEET_COLUMNS if images[0].shape[-1] <= 64 else 4)
    named = grid or wide == len(labels)
    sheet = contact_sheet(
        torch.stack(list(images)),
        row_labels=names if grid else None,
        columns=None if grid else wide,
        column_labels=labels if named else None,
        title=last.session.facts.name if grid or len(columns) == 1 else wanted.names[0][:80],
        caption=f"{_made_by(last)}, weights {last.session.model.weights_hash[:12]}",
    )
    recipe = recipe_of(options, last)
    job = {key: value for key, value in recipe.pop("job").items() if key not in ("seed", "label")}
    kept = {"names": list(wanted.names[:SHEET_ROWS]), "seeds": list(columns)}
    save_png(path, sheet, {**recipe, "of": job, **kept})


def _made_by(result: Result) -> str:
    """The size, the sampler, how many steps were done, the guidance."""
    settings, session = result.job.settings, result.session
    asked, strength = settings.total, getattr(result.job, "strength", 1.0)
    done = asked - first_step(asked, strength)
    of = "" if done == asked else f"{done} of "
    guidance = f", guidance {settings.weight:g}" if settings.weight != 1 else ""
    height, width = result.image.shape[1:]
    return f"{width} x {height}, {session.sampling(settings)[0]}, {of}{asked} steps{guidance}"


def file_stem(prompt: str) -> str:
    """A file name for a prompt: its first words, as letters and digits."""
    words = re.findall(r"\w+", prompt)
    return "-".join(words)[:40].strip("-_").lower() or "image"
