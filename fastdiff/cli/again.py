"""``--like``: the options out of a picture's recipe, and whether the picture came out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from PIL import Image
from torch import Tensor

from fastdiff.cli.machine import TORCH_NAMES, BackendName
from fastdiff.cli.parsing import option_value
from fastdiff.cli.pictures import Command, Shared, identity
from fastdiff.configs import from_dict, to_dict
from fastdiff.generate.core import SampleSettings
from fastdiff.generate.text import TextSettings
from fastdiff.images import read_recipe, to_pil

COMMON = ("prompt", "model", "shared")


@dataclass(frozen=True)
class Original:
    """A picture given as --like, its recipe, and the options that made it."""

    path: Path
    recipe: dict[str, Any]
    options: Any

    def is_asked_again(self, options: Command) -> bool:
        """Whether nothing is changed on which the image depends; files may have moved."""
        mine, other = self.options.shared, options.shared
        kept = {name: getattr(other, name) for name in ("out", "preview", "like")}
        batch = replace(mine.settings, batch=other.settings.batch)
        shared = replace(mine, settings=batch, **kept)
        moved = {
            name: getattr(options, name)
            for name in ("image", "mask")
            if hasattr(options, name)
            and identity(getattr(options, name))["sha256"] == self.recipe[name].get("sha256")
        }
        return bool(replace(self.options, model=options.model, shared=shared, **moved) == options)

    def compared(self, image: Tensor, recipe: Mapping[str, Any]) -> tuple[int, str]:
        """0 if the image has the very pixels of the file, else 1; and what to say."""
        with Image.open(self.path) as file:
            old = file.convert("RGB")
        new = to_pil(image).convert("RGB")
        if old.size == new.size and old.tobytes() == new.tobytes():
            return 0, f"identical to {self.path}, bit for bit"
        changed = [
            f"{key} {_short(self.recipe.get(key))} then, {_short(now)} now"
            for key, now in recipe.items()
            if self.recipe.get(key) != now and key != "checkpoint"
        ]
        why = ", ".join(changed) or (
            "the file's pixels were changed, or this machine computes otherwise"
        )
        return 1, f"NOT identical to {self.path}: {why}"


def _short(value: Any) -> str:
    """A value of a recipe in a few characters; a hash as far as one compares it."""
    text = str(value.get("sha256", value) if isinstance(value, dict) else value)
    return text[:12] if len(text) == 64 else text[:40]


def original(
    command: Callable[..., Command], pipeline: str, words: Sequence[str]
) -> Original | None:
    """What --like names among the words; None where there is no --like.

    Raises:
        FileNotFoundError, ValueError: there is no such picture, or no whole recipe in it.
    """
    like = option_value(words, "--like")
    if like is None:
        return None
    path = Path(like)
    recipe = read_recipe(path)
    if recipe.get("pipeline") != pipeline or "seeds" in recipe:
        raise ValueError(f"{path} is no single image of 'fastdiff {pipeline}'; give one of those")
    try:
        options = command(
            prompt=str(recipe["prompt"]),
            model=Path(recipe["checkpoint"]),
            shared=_shared(recipe),
            **_own(command, recipe),
        )
    except KeyError as error:
        raise ValueError(f"the recipe in {path} lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"the recipe in {path} cannot be read: {error}") from None
    return Original(path, recipe, options)


def _shared(recipe: Mapping[str, Any]) -> Shared:
    short = {long: name for name, long in TORCH_NAMES.items()}
    for key, known in (("dtype", tuple(short)), ("backend", get_args(BackendName))):
        if recipe[key] not in known:
            raise ValueError(f"{key} is unknown, got {recipe[key]!r:.40}")
    return Shared(
        count=1,
        seed=int(recipe["seed"]),
        text=from_dict(TextSettings, recipe["text"]),
        settings=from_dict(SampleSettings, recipe["settings"]),
        tokenizer=tuple(Path(folder) for folder in recipe["tokenizer"]),
        backend=recipe["backend"],
        device=str(recipe["device"]),
        dtype=short[recipe["dtype"]],
    )


def _own(command: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one command alone; files as the paths in their identities."""
    hints = get_type_hints(command)
    names = [field.name for field in fields(command) if field.name not in COMMON]
    files = {name for name in names if hints[name] in (Path, Path | None)}
    kinds = [(name, str | None if name in files else hints[name]) for name in names]
    given = {
        name: recipe[name] and recipe[name]["path"] if name in files else recipe[name]
        for name in names
    }
    read = to_dict(from_dict(make_dataclass("Recipe", kinds, frozen=True, kw_only=True), given))
    return {
        name: Path(value) if name in files and value is not None else value
        for name, value in read.items()
    }
