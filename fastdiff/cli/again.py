"""``--like``: options from the recipe of a picture, and a comparison with the new picture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import tyro
from PIL import Image, ImageChops
from torch import Tensor

from fastdiff.cli.machine import TORCH_NAMES, BackendName
from fastdiff.cli.options import Command, LoadOptions, SamplingCompute
from fastdiff.files import one_line_errors
from fastdiff.generate.job import (
    PICTURES,
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    TextJob,
)
from fastdiff.generate.recipe import NEW_BITS, Recipe, hashes, identities, read
from fastdiff.generate.webui import from_parameters
from fastdiff.images import has_own_recipe, read_parameters, read_recipe, to_pil

COMMANDS: dict[str, type[Any]] = {
    "sample": ClassJob,
    "txt2img": TextJob,
    "img2img": ImageToImageJob,
    "inpaint": InpaintJob,
    "interpolate": InterpolationJob,
}
ROUNDING = 1
"""Grey levels of 255 by which a picture with a recipe of version 1 may differ from a new one."""


@dataclass(frozen=True)
class Original:
    """A picture given as --like, its recipe, and the options that made it."""

    path: Path
    recipe: Recipe
    data: dict[str, Any]
    """The recipe exactly as stored in the file."""
    options: Any = None

    def asking(self, options: Any) -> Original:
        """A copy with the options that `options` derived from the recipe."""
        return replace(self, options=options)

    def is_asked_again(self, options: Command) -> bool:
        """Whether no option that affects the image has changed; files may have moved."""
        mine = self.options
        settings = replace(mine.job.settings, batch=options.job.settings.batch)
        moved = {
            name: getattr(options.job, name)
            for name in PICTURES
            if getattr(options.job, name, None) is not None
            and hashes(identities(getattr(options.job, name))) == self._sha256(name)
        }
        unchanged = replace(
            mine,
            model=options.model,
            load=replace(mine.load, tokenizer=options.load.tokenizer),
            job=replace(mine.job, settings=settings, **moved),
            output=options.output,
        )
        return bool(unchanged == options)

    def _sha256(self, name: str) -> Any:
        """The hash of an input picture of the job, from the recipe."""
        data = self.data if self.recipe.version == 1 else self.data["job"]
        return hashes(data.get(name))

    def compared(self, image: Tensor, recipe: Mapping[str, Any]) -> tuple[int, str]:
        """Compare with the file. Returns an exit code, 0 if all pixels are equal, and a text."""
        with Image.open(self.path) as file:
            old = file.convert("RGB")
        new = to_pil(image).convert("RGB")
        if old.size == new.size and old.tobytes() == new.tobytes():
            return 0, f"identical to {self.path}, bit for bit"
        changed = self._changed(recipe)
        if old.size == new.size and self.recipe.version == 1 and not changed:
            extrema = ImageChops.difference(old, new).getextrema()
            most = max(high for _, high in extrema)  # type: ignore[misc]
            if most <= ROUNDING:
                return 0, f"equal to {self.path} up to {most} of 255 levels ({NEW_BITS})"
        why = ", ".join(changed) or (
            "the pixels of the file were changed, or this machine rounds differently"
        )
        if self.recipe.version == 1:
            why += f"; {NEW_BITS}"
        return 1, f"NOT identical to {self.path}: {why}"

    def _changed(self, now: Mapping[str, Any]) -> list[str]:
        """List the changes in everything that an image depends on."""
        then = self.data
        pairs = {name: (then.get(name), now[name]) for name in ("fastdiff", "torch", "weights")}
        pairs |= {name: (then.get(name), now[name]) for name in ("backend", "device", "dtype")}
        for name in PICTURES:
            if (found := hashes(now["job"].get(name))) is not None:
                pairs[name] = (self._sha256(name), found)
        if self.recipe.refiner is not None and now["refiner"] is not None:
            pairs["refiner"] = (self.recipe.refiner["weights"], now["refiner"]["weights"])
        if self.recipe.version > 1:
            pairs["sampler"] = (then.get("sampler"), now["sampler"])
        return [
            f"{name} {_short(old)} then, {_short(new)} now"
            for name, (old, new) in pairs.items()
            if old != new
        ]


def _short(value: Any) -> str:
    """Shorten a value of a recipe; a hash to the length that people compare."""
    text = str(value)
    return text[:12] if len(text) == 64 else text[:40]


@one_line_errors()
def original(command: str, like: str) -> Original:
    """The picture that --like names.

    Raises:
        FileNotFoundError, ValueError: the picture does not exist, or has no complete recipe.
    """
    path = Path(like)
    data = read_recipe(path)
    try:
        recipe = read(data)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the recipe in {path} cannot be read: {error}") from None
    if not isinstance(recipe.job, COMMANDS[command]):
        made = [name for name, kind in COMMANDS.items() if isinstance(recipe.job, kind)]
        raise ValueError(
            f"{path} is not a single image made by 'fastdiff {command}'; "
            + (f"use 'fastdiff {made[0]} --like {path}'" if made else "give such an image")
        )
    if recipe.reread:
        warnings.warn(
            f"{path} was made when BREAK and other syntax of web UIs was plain text in prompts; "
            "backslashes were added to keep it as text",
            stacklevel=1,
        )
    return Original(path, recipe, data)


@one_line_errors()
def foreign(command: str, like: str) -> TextJob | None:
    """The job of a picture made by a web UI; None for any other file.

    A warning lists the settings that have no equivalent in fastdiff.

    Raises:
        ValueError: its parameters cannot be read, or belong to another command.
    """
    text = read_parameters(like)
    if text is None or has_own_recipe(like):
        return None
    try:
        found = from_parameters(text)
    except ValueError as error:
        raise ValueError(f"the parameters in {like} cannot be read: {error}") from None
    if not isinstance(found.job, COMMANDS[command]):
        raise ValueError(
            f"{like} was made from a prompt by another program; "
            f"use 'fastdiff txt2img --like {like}'"
        )
    left = f"; not taken: {', '.join(found.left_out)}" if found.left_out else ""
    warnings.warn(
        f"{like} was made by another program, whose noise fastdiff does not have: a new picture is "
        f"made with its prompt and settings{left}",
        stacklevel=1,
    )
    return found.job


def foreign_options(made: TextJob, command: type[Any], job: type[Any], **more: Any) -> Any:
    """The options of a web UI's picture; which model to use it does not say in a way that counts
    here."""
    return command(model=tyro.MISSING, job=_as_options(job, made), **more)


@one_line_errors()
def options(like: Original, command: type[Any], job: type[Any], **more: Any) -> Any:
    """The options that made a picture.

    job: the command's dataclass of the job's options. more: the command's own options.

    Raises:
        ValueError: the recipe contains values that the command does not accept.
    """
    recipe = like.recipe
    short = {long: name for name, long in TORCH_NAMES.items()}
    for name, value, known in (
        ("dtype", recipe.dtype, tuple(short)),
        ("backend", recipe.backend, get_args(BackendName)),
        ("device", recipe.device, ("cpu", "cuda")),
    ):
        if value not in known:
            raise ValueError(f"the recipe in {like.path} has an unknown {name}: {value!r:.40}")
    try:
        load = LoadOptions.of_recipe(recipe.load)
    except ValueError as error:
        raise ValueError(f"the recipe in {like.path} cannot be read: {error}") from None
    names = {field.name for field in fields(command)}
    if "count" in names:
        more["count"] = 1
    if "refiner" in names:
        more["refiner"] = recipe.refiner and Path(recipe.refiner["path"])
    return command(
        model=recipe.model,
        job=_as_options(job, recipe.job),
        load=load,
        compute=SamplingCompute(
            backend=recipe.backend,  # type: ignore[arg-type]
            device=recipe.device,
            dtype=short[recipe.dtype],
        ),
        **more,
    )


def _as_options(cls: type[Any], job: Any) -> Any:
    """Convert a job to options."""
    own = {f.name: getattr(job, f.name) for f in fields(cls) if hasattr(job, f.name)}
    for name in PICTURES:
        if isinstance(given := own.get(name), tuple):
            own[name] = tuple(map(Path, given))
        elif given is not None:
            own[name] = Path(given)
    for name in ("label", "to_label"):
        if not isinstance(job, ClassJob) and own.get(name) is not None:
            own[name] = str(own[name])
    return cls(**own)
