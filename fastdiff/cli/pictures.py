"""Shared by all commands that make images: from words to options to jobs to PNGs and a sheet.

Nothing heavy is imported before the options have been parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastdiff.cli.machine import at_work, check_room, device_and_dtype, progress
from fastdiff.cli.options import Command
from fastdiff.cli.parsing import option_value, parse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastdiff.checkpoint.model import Model
    from fastdiff.cli.again import Original
    from fastdiff.cli.machine import Clock
    from fastdiff.generate.facts import Facts
    from fastdiff.generate.job import Job
    from fastdiff.generate.run import Result
    from fastdiff.generate.session import Session

LARGE = 2**28
"""Models whose files have at least this many bytes are checked before weights are read."""
SHEET, PREVIEW = "sheet.png", "preview.png"
AnyJob = TypeVar("AnyJob")


@dataclass(frozen=True)
class Wanted:
    """The images to make: a row per name, with an image per seed or frame."""

    names: Sequence[str]
    """Names of the rows: the classes, or one prompt."""
    columns: range
    """Seeds or frames."""
    job: Callable[[int, int], tuple[str, Job]]
    """(row, column) -> the stem of the file, and the job."""
    column: str = "seed"
    """Meaning of the columns: "seed" or "frame"."""

    def __iter__(self) -> Iterator[tuple[str, Job]]:
        return (self.job(row, at) for row in range(len(self.names)) for at in self.columns)

    @property
    def total(self) -> int:
        return len(self.names) * len(self.columns)


def main(
    command: type[Any],
    job: type[Any],
    words: Sequence[str],
    run: Callable[[Any, Original | None], int],
    more: Callable[[Any], Mapping[str, Any]] = lambda job: {},
) -> int:
    """Parse a command's words, with defaults from the recipe of `--like` if given, and run it.

    Args:
        job: the dataclass of the job's options.
        more: the command's own options that follow from the job in a recipe.
        run: called with the options and the picture given as `--like`.
    """
    name, path = command.__name__.lower(), option_value(words, "--like")
    like = default = None
    if path is not None:
        from fastdiff.cli import again

        if (foreign := again.foreign(name, path)) is not None:
            default = again.foreign_options(foreign, command, job, **more(foreign))
        else:
            like = again.original(name, path)
            default = again.options(like, command, job, **more(like.recipe.job))
    options = parse(command, words, prog=f"fastdiff {name}", default=default)
    if options is None:
        return 0
    return run(options, like and like.asking(default))


def as_job(kind: type[AnyJob], options: Any, **change: Any) -> AnyJob:
    """Convert a command's options to a plain job."""
    own = {field.name: getattr(options, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{**own, **change})


def of_one_prompt(options: Command, kind: type[Any], count: int) -> Callable[[Facts], Wanted]:
    """The images of a single prompt: one per seed, named after the first words of the prompt."""
    prompt = options.job.prompt
    stem = file_stem(prompt or options.job.image.stem)

    def job(_: int, seed: int) -> tuple[str, Job]:
        return f"{stem}-seed{seed}", as_job(kind, options.job, seed=seed)

    seeds = range(options.job.seed, options.job.seed + count)
    return lambda facts: Wanted([prompt or stem], seeds, job)


def run(
    options: Command,
    want: Callable[[Facts], Wanted],
    *,
    inputs: Sequence[Path] = (),
    refiner: Path | None = None,
    original: Original | None = None,
) -> int:
    """Load the model, run the jobs, write each PNG when it is done, and a sheet of several.

    Args:
        want: called with the facts of the model, before anything is computed.
        inputs: files that must not be overwritten.
        original: the picture of ``--like``; if the same image is requested again, it is written as
            NAME-again.png and compared.
    """
    from fastdiff.cli import report

    out = options.output.out
    again = original if original is not None and original.is_asked_again(options) else None
    device, dtype = device_and_dtype(options.compute)
    with at_work(out, options.compute) as work:
        with work.clock("load"):
            if _is_large(options.model, refiner):  # nothing is read that will not fit
                planned = _load(options, refiner, device="meta", dtype=dtype)
                _check_fits(planned, want, device, dtype, loaded=False)
            models = _load(options, refiner, device=device, dtype=dtype)
        wanted = _check_fits(models, want, device, dtype, loaded=True)
        check_room(out, wanted.total)
        if options.output.preview:
            _keep([*inputs, *([original.path] if original else [])], out / PREVIEW)
        plan = _Plan(options, wanted, models, again)
        path, shown, last = _make(options, plan, models, work.clock)
        code, compared = 0, list[tuple[str, str]]()
        if again is not None:
            code, text = again.compared(last.image, recipe_of(options, last.recipe))
            compared = [("compared", text)]
        if wanted.total > 1:
            with work.clock("write"):
                recipe = recipe_of(options, last.recipe)
                path = report.save_sheet(out / SHEET, shown, wanted, recipe, last)
    if len(plan.there) == wanted.total:
        print(plan.there[wanted.total - 1])
        print(f"{wanted.total:,} of {wanted.total:,} already exist with the same recipe")
        return 0
    report.summary(path, wanted, last, len(plan.there), [*compared, *work.report()])
    return code


class _Plan:
    """The path of each image, and which images exist already.

    No file is overwritten, and no image is made twice.

    Attributes:
        paths: the paths of the images, in order; a number is added if another image has the name.
        there: index of an image -> the existing file with the same recipe.
    """

    def __init__(
        self,
        options: Command,
        wanted: Wanted,
        models: tuple[Model, Model | None],
        again: Original | None,
    ) -> None:
        out = options.output.out
        self.wanted = wanted
        self._sessions = _sessions(models)
        self.paths = [out / f"{stem}.png" for stem, _ in wanted]
        self.there: dict[int, Path] = {}
        if again is not None:  # it is made again in any case, to be compared
            self.paths = [out / f"{again.path.stem}-again.png"]
            return
        for number, (path, (_, job)) in enumerate(zip(self.paths, wanted, strict=True)):
            if path.exists() and (place := self._find(path, options, job)) is not None:
                self.there[number] = place

    def jobs(self) -> Iterator[Job]:
        """The jobs of the images that do not exist yet."""
        return (job for number, (_, job) in enumerate(self.wanted) if number not in self.there)

    def result(self, number: int) -> Result:
        """The result for an existing image, as if it had just been made."""
        from fastdiff.generate.facts import check
        from fastdiff.generate.run import Result
        from fastdiff.images import read_image

        session, refiner = self._sessions
        row, column = divmod(number, len(self.wanted.columns))
        _, job = self.wanted.job(row, self.wanted.columns[column])
        picture = read_image(self.there[number])
        grey = session.model.image_channels == 1
        job = check(job, session.facts)
        image = picture[:1] if grey else picture
        return Result(job=job, image=image, session=session, refiner=refiner)

    def _find(self, path: Path, options: Command, job: Job) -> Path | None:
        from fastdiff.generate.facts import check
        from fastdiff.generate.recipe import write_recipe
        from fastdiff.images import find_png

        session, refiner = self._sessions
        recipe = write_recipe(check(job, session.facts), session, refiner)
        return find_png(path, recipe_of(options, recipe))


def _sessions(models: tuple[Model, Model | None]) -> tuple[Session, Session | None]:
    from fastdiff.generate.session import Session

    return Session.of(models[0]), None if models[1] is None else Session.of(models[1])


def _load(options: Command, refiner: Path | None, **machine: Any) -> tuple[Model, Model | None]:
    from fastdiff.checkpoint.open import load

    model = load(options.model, options=options.load, **machine)
    if refiner is None:
        return model, None
    return model, load(refiner, tokenizer=options.load.tokenizer[-1:] or None, **machine)


def _is_large(model: str, refiner: Path | None) -> bool:
    """Whether the files of the models together are large enough to look at them first."""
    total = 0
    for place in [Path(model)] + ([] if refiner is None else [refiner]):
        files = place.rglob("*") if place.is_dir() else [place]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total > LARGE


def _check_fits(
    models: tuple[Model, Model | None],
    want: Callable[[Facts], Wanted],
    device: torch.device,
    dtype: torch.dtype,
    *,
    loaded: bool,
) -> Wanted:
    """Plan the images, after checking that they fit in memory.

    models: can be on the meta device if not `loaded`.

    Raises:
        NotEnoughMemory: they do not fit.
    """
    from fastdiff.cli.report import SHEET_COLUMNS, SHEET_ROWS
    from fastdiff.generate.facts import Facts, check, is_small

    facts = Facts.of(models[0])
    wanted = want(facts)
    job = check(next(iter(wanted))[1], facts)
    rows = min(len(wanted.names), SHEET_ROWS)
    kept = rows * min(len(wanted.columns), SHEET_COLUMNS)
    batch = min(job.settings.batch or kept, wanted.total)
    if loaded and is_small(job, facts, max(batch, kept), on_cpu=device.type == "cpu"):
        return wanted
    from fastdiff.generate.memory import Call, check_fits

    check_fits(
        models,
        job,
        Call(
            device=device,
            dtype=dtype,
            count=wanted.total,
            conditions=len(wanted.names),
            kept=kept,
        ),
        way_out="use a smaller --width, --height, --count or --batch",
        loaded=loaded,
    )
    return wanted


def _keep(inputs: Sequence[Path], preview: Path) -> None:
    """Raise ValueError if the preview would overwrite an input."""
    for path in inputs:
        if path.resolve() == preview.resolve():
            raise ValueError(f"the preview would overwrite {path}; give another --out")


def _make(
    options: Command,
    plan: _Plan,
    models: tuple[Model, Model | None],
    clock: Clock,
) -> tuple[Path, list[Tensor], Result]:
    """Make the images and write each one when it is done.

    Returns the path of the last image, the images of the sheet, and the last result.
    """
    from fastdiff.cli.report import SHEET_COLUMNS, SHEET_ROWS, preview_writer
    from fastdiff.generate.run import generate
    from fastdiff.generate.webui import to_parameters
    from fastdiff.images import add_png

    (model, refiner), out = models, options.output.out
    preview = preview_writer(model, out / PREVIEW) if options.output.preview else None
    shown: list[Tensor] = []
    with progress("sampling") as tell:
        results = generate(
            model,
            plan.jobs(),
            refiner=refiner,
            progress=tell,
            on_step=preview,
            clock=clock,
            graphs=options.compute.graphs,
            expected=plan.wanted.total - len(plan.there),
        )
        for number, place in enumerate(plan.paths):
            row, column = divmod(number, len(plan.wanted.columns))
            in_sheet = row < SHEET_ROWS and column < SHEET_COLUMNS
            if number not in plan.there:
                result = next(results)
                with clock("write"):
                    recipe = recipe_of(options, result.recipe)
                    path = add_png(place, result.image, recipe, parameters=to_parameters(recipe))
            elif in_sheet or number == len(plan.paths) - 1:
                path, result = plan.there[number], plan.result(number)
            if in_sheet:
                shown.append(result.image)
    return path, shown, result


def recipe_of(options: Command, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A job's recipe, with the options that the model was loaded with."""
    return {**recipe, "load": options.load.recorded}


def file_stem(prompt: str) -> str:
    """A file name for a prompt: its first words, as letters and digits."""
    words = re.findall(r"\w+", prompt)
    return "-".join(words)[:40].strip("-_").lower() or "image"
