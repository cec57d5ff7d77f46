"""``fastdiff sample``: new images, each with its recipe inside, and a contact sheet of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, get_args

import torch
import tyro
from PIL import Image
from torch import Tensor

from fastdiff.cli.console import Clock, backends_line, print_pairs, progress
from fastdiff.cli.machine import (
    TORCH_NAMES,
    BackendName,
    DtypeName,
    check_room,
    chosen_backend,
    device_and_dtype,
    output_folder,
)
from fastdiff.cli.parsing import OptionalPath, option_value, parse
from fastdiff.generate.core import MAX_SEED, SampleSettings
from fastdiff.generate.latent import LatentDiffusion, from_recipe
from fastdiff.images import contact_sheet, read_recipe, save_png, to_pil

NO_CLASS = "none"
SHEET_ROWS, SHEET_COLUMNS = 64, 32
DEVICES = ("cpu", "cuda")
Facts = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Make new images from a trained model.

    Writes one PNG per image, with its recipe in the metadata, and a contact sheet, sheet.png. An
    image depends on its class, its seed and the settings, not on what else is made with it.

    Examples:
      fastdiff sample
      fastdiff sample --classes 3 7 --count 4 --steps 20 --sampler ddim --out out/digits
      fastdiff sample --like out/3-seed0.png
    """

    model: str = "digits"
    """A bundle's or a run's folder, or the name of a shipped bundle."""
    classes: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="CLASS [CLASS ...]", help_behavior_hint="")
    ] = ()
    """Classes by name or number, "none" for no class; all that the model knows if left out."""
    count: int = 8
    """Images per class."""
    seed: int = 0
    """Seed of the first image of each class; the next ones count up from it."""
    settings: Annotated[SampleSettings, tyro.conf.arg(name="")] = field(
        default_factory=SampleSettings
    )
    out: Path = Path("out")
    """Folder for the images; made if it is missing."""
    backend: BackendName = "auto"
    """Who computes the ops; auto takes the best that serves ('fastdiff doctor' lists them)."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    dtype: DtypeName = "fp32"
    """Number format of the networks."""
    like: OptionalPath = None
    """Take the options from the recipe in this PNG. Without others the image is made again, bit for
    bit, and written as NAME-again.png."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if not 0 <= self.seed <= MAX_SEED - (self.count - 1):
            raise ValueError(
                f"seeds must lie in 0 to 2^63 - 1, got {self.seed} to {self.seed + self.count - 1}"
            )


def main(words: Sequence[str]) -> int:
    like = option_value(words, "--like")
    recipe = None if like is None else _options_of(Path(like))
    options = parse(Sample, words, prog="fastdiff sample", default=recipe)
    return 0 if options is None else run(options, recipe)


def run(options: Sample, recipe: Sample | None = None) -> int:
    """``recipe``: the options that the picture given as --like was made with."""
    from fastdiff.checkpoint.open import load
    from fastdiff.kernels import record_backends

    device, dtype = device_and_dtype(options.device, options.dtype)
    clock = Clock()
    with output_folder(options.out), chosen_backend(options.backend), record_backends() as served:
        with clock("load"):
            model = load(options.model, device=device, dtype=dtype)
            pipeline = LatentDiffusion(model)
        make = _make
        if recipe is not None and options.like is not None:
            from_recipe(read_recipe(options.like), weights_hash=pipeline.weights_hash)
            unchanged = replace(recipe, out=options.out, model=options.model, like=options.like)
            make = _make_again if options == unchanged else _make
        code, facts = make(pipeline, options, clock)
    print_pairs([*facts, ("backends", backends_line(served)), ("time", clock.report())])
    return code


def _make(pipeline: LatentDiffusion, options: Sample, clock: Clock) -> tuple[int, Facts]:
    """Images of every class asked for, written as they come, and their sheet."""
    labels = class_labels(options.classes, pipeline)
    seeds = range(options.seed, options.seed + options.count)
    rows, columns = labels[:SHEET_ROWS], seeds[:SHEET_COLUMNS]
    names = _file_names(labels, pipeline)
    shown: list[Tensor] = []
    path = options.out
    jobs = ((label, seed) for label in labels for seed in seeds)
    total = len(labels) * len(seeds)
    check_room(options.out, total)
    for label, seed, image in _images(pipeline, jobs, total, options.settings, clock):
        path = options.out / f"{names[label]}-seed{seed}.png"
        with clock("write"):
            save_png(path, image, pipeline.recipe(label, seed, options.settings))
        if label in rows and seed in columns:
            shown.append(image)
    if total == 1:
        print(path)
        return 0, [("made by", _caption(pipeline, options))]
    sheet = options.out / "sheet.png"
    with clock("write"):
        _save_sheet(sheet, torch.stack(shown), rows, columns, pipeline, options)
    print(sheet)
    first = f"{names[labels[0]]}-seed{seeds[0]}.png"
    return 0, [
        ("images", f"{total}, from {first} to {path.name}"),
        ("made by", _caption(pipeline, options)),
    ]


def _make_again(pipeline: LatentDiffusion, options: Sample, clock: Clock) -> tuple[int, Facts]:
    """The image of a recipe. The code is 0 if it has the very pixels of the file it comes from."""
    assert options.like is not None
    [label] = class_labels(options.classes, pipeline)
    job = iter([(label, options.seed)])
    [(label, seed, image)] = _images(pipeline, job, 1, options.settings, clock)
    path = options.out / f"{options.like.stem}-again.png"
    now = pipeline.recipe(label, seed, options.settings)
    with clock("write"):
        save_png(path, image, now)
    print(path)
    with Image.open(options.like) as file:
        old = file.convert("RGB")
    new = to_pil(image).convert("RGB")
    if old.size == new.size and old.tobytes() == new.tobytes():
        return 0, [("compared", f"identical to {options.like}, bit for bit")]
    then = read_recipe(options.like)
    changed = [
        f"{key} {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]
    ]
    why = ", ".join(changed) or "the file's pixels were changed, or this machine computes otherwise"
    return 1, [("compared", f"NOT identical to {options.like}: {why}")]


def _images(
    pipeline: LatentDiffusion,
    jobs: Iterator[tuple[int | None, int]],
    total: int,
    settings: SampleSettings,
    clock: Clock,
) -> Iterator[tuple[int | None, int, Tensor]]:
    """(class, seed, image) of each job, a batch at a time."""
    rows = len(pipeline.table(settings))
    before = 0
    with progress("sampling") as tell:
        while chunk := list(itertools.islice(jobs, settings.batch)):
            labels, seeds = zip(*chunk, strict=True)

            def advance(now: int, _: int, before: int = before) -> None:
                tell(before + now, rows * total)

            with clock("sample"):
                z = pipeline.latents(labels, seeds, settings, progress=advance)
            with clock("decode"):
                images = pipeline.decode(z, tile=settings.tile).cpu()
            yield from zip(labels, seeds, images, strict=True)
            before += rows * len(chunk)


def class_labels(words: Sequence[str], pipeline: LatentDiffusion) -> list[int | None]:
    """Class names or numbers to labels, None for no class; no words: all classes of the model.

    Raises:
        ValueError: the model has no such class.
    """
    names = pipeline.model.class_names
    count = pipeline.unet.config.num_classes
    if not words:
        return [None] if count is None else [*range(count)]
    labels: list[int | None] = []
    for word in dict.fromkeys(words):
        if word in names:
            labels.append(names.index(word))
        elif word == NO_CLASS:
            labels.append(None)
        elif count is None:
            raise ValueError(f"this model has no classes, got class {word!r}; leave --classes out")
        elif word.isdecimal() and int(word) < count:
            labels.append(int(word))
        else:
            known = names or [str(label) for label in range(count)]
            shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise ValueError(f"unknown class {word!r}; expected one of {shown}")
    return [*dict.fromkeys(labels)]


def _file_names(labels: Sequence[int | None], pipeline: LatentDiffusion) -> dict[int | None, str]:
    """What the files of a class are called: its name, where that is a name that a file can have."""
    known = pipeline.model.class_names
    names = {label: _class_name(label, pipeline) for label in labels}
    safe = all(re.fullmatch(r"\w[\w-]*", name) for name in names.values())
    if safe and len(set(map(str.lower, names.values()))) == len(names):
        return names
    return {
        label: "none" if label is None else f"{label}-{re.sub(r'[^0-9A-Za-z]+', '-', known[label])}"
        for label in labels
    }


def _class_name(label: int | None, pipeline: LatentDiffusion) -> str:
    if label is None:
        return NO_CLASS
    return pipeline.model.class_names[label] if pipeline.model.class_names else f"class{label}"


def _save_sheet(
    path: Path,
    images: Tensor,
    labels: Sequence[int | None],
    seeds: Sequence[int],
    pipeline: LatentDiffusion,
    options: Sample,
) -> None:
    """A row per class and a column per seed; with one seed the classes share the row."""
    classes = [_class_name(label, pipeline) for label in labels]
    columns = [f"seed {seed}" for seed in seeds]
    named = len(classes) <= SHEET_COLUMNS
    sheet = contact_sheet(
        images,
        row_labels=None if len(seeds) == 1 else classes,
        columns=min(len(classes), SHEET_COLUMNS) if len(seeds) == 1 else None,
        column_labels=columns if len(seeds) > 1 else classes if named else None,
        title=pipeline.name,
        caption=_caption(pipeline, options),
    )
    recipe = pipeline.recipe(labels[0], seeds[0], options.settings)
    for key in ("class", "class_name", "seed"):
        del recipe[key]
    save_png(path, sheet, {**recipe, "classes": list(labels), "seeds": list(seeds)})


def _caption(pipeline: LatentDiffusion, options: Sample) -> str:
    settings = options.settings
    guidance = f"guidance {settings.guidance_scale:g}" if settings.guidance_scale != 1 else ""
    weights = f"weights {pipeline.weights_hash[:12]}"
    return ", ".join(filter(None, [settings.sampler, f"{settings.steps} steps", guidance, weights]))


def _options_of(path: Path) -> Sample:
    """The options that made a picture, from its recipe.

    Raises:
        FileNotFoundError, ValueError: there is no such picture, or no whole recipe in it.
    """
    recipe = read_recipe(path)
    if "classes" in recipe:
        raise ValueError(f"{path} is a contact sheet; give one of the images beside it")
    label, seed, settings = from_recipe(recipe)
    short = {long: name for name, long in TORCH_NAMES.items()}
    for key, known in (("dtype", short), ("backend", get_args(BackendName)), ("device", DEVICES)):
        if recipe.get(key) not in tuple(known):  # a list is no key of a dictionary
            raise ValueError(f"the recipe in {path} has an unknown {key}: {recipe.get(key)!r:.40}")
    return Sample(
        model=str(recipe.get("model", "")),
        classes=(NO_CLASS if label is None else str(label),),
        count=1,
        seed=seed,
        settings=settings,
        backend=recipe["backend"],
        device=recipe["device"],
        dtype=short[recipe["dtype"]],
    )
