"""``fastdiff txt2img``: images from a text-conditioned checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from torch import Tensor

from fastdiff.checkpoint.config import from_dict
from fastdiff.cli import pictures
from fastdiff.cli.machine import TORCH_NAMES
from fastdiff.cli.parsing import OptionalInt, OptionalPath, option_value, parse
from fastdiff.images import read_recipe, to_pil
from fastdiff.pipelines.core import OnStep, Progress, SampleSettings
from fastdiff.pipelines.text import TextDiffusion, TextSettings
from fastdiff.pipelines.text_to_image import text_to_image


@dataclass(frozen=True, kw_only=True)
class Txt2Img:
    """Make images from a prompt with a Stable Diffusion checkpoint (1, 2, XL).

    Weights in prompts: (word:1.3), (word), [word]; a backslash before a bracket takes it as text.
    Writes a PNG per seed with its recipe inside, and a contact sheet of several.

    Examples:
      fastdiff txt2img "a red cat, oil painting" --model stable-diffusion-v1-5/ --seed 7
      fastdiff txt2img "a (foggy:1.3) harbour" --model sd15.ckpt --negative people --count 4
      fastdiff txt2img --like out/a-red-cat-seed7.png
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What to draw."""
    model: Path
    """The checkpoint: a diffusers folder, or a .safetensors or .ckpt file."""
    height: OptionalInt = None
    """Height in pixels; as the model was trained if left out."""
    width: OptionalInt = None
    """Width in pixels; as the model was trained if left out."""
    shared: Annotated[pictures.Shared, tyro.conf.arg(name="")] = field(
        default_factory=pictures.Shared
    )
    like: OptionalPath = None
    """Take the options from the recipe in this PNG; without others the image is made again and
    compared, into another --out."""


def main(words: Sequence[str]) -> int:
    like = option_value(words, "--like")
    recipe = None if like is None else _options_of(Path(like))
    options = parse(Txt2Img, words, prog="fastdiff txt2img", default=recipe)
    return 0 if options is None else run(options, recipe)


def run(options: Txt2Img, recipe: Txt2Img | None = None) -> int:
    """``recipe``: the options that the picture given as --like was made with."""
    shared = options.shared

    def prepare(model: TextDiffusion) -> tuple[pictures.Make, dict[str, Any]]:
        height, width = model.default_size(options.height, options.width)

        def make(
            model: TextDiffusion, seeds: Sequence[int], on_step: OnStep | None, tell: Progress
        ) -> Tensor:
            return text_to_image(
                model,
                options.prompt,
                seeds,
                height=height,
                width=width,
                text=shared.text,
                settings=shared.settings,
                on_step=on_step,
                progress=tell,
            )

        return make, {"pipeline": "txt2img", "height": height, "width": width}

    compare: pictures.Compare | None = None
    if recipe is not None and options.like is not None:
        again = replace(recipe.shared, out=shared.out, preview=shared.preview)
        unchanged = replace(recipe, like=options.like, model=options.model, shared=again)
        path = options.like
        if options == unchanged:
            target = shared.out / f"{pictures.file_stem(options.prompt)}-seed{shared.seed}.png"
            if target.exists() and target.samefile(path):
                raise ValueError(f"{path} would be written over; give another --out")
            compare = functools.partial(_compared, path)
    return pictures.run(options.model, options.prompt, shared, prepare, compare=compare)


def _compared(path: Path, image: Tensor) -> tuple[int, list[tuple[str, str]]]:
    """0 if the image has the very pixels of the file."""
    with Image.open(path) as file:
        old = file.convert("RGB")
    new = to_pil(image).convert("RGB")
    if old.size == new.size and old.tobytes() == new.tobytes():
        return 0, [("compared", f"identical to {path}, bit for bit")]
    return 1, [
        (
            "compared",
            f"NOT identical to {path}: other weights, another version of torch, or this machine "
            "computes otherwise",
        )
    ]


def _options_of(path: Path) -> Txt2Img:
    """The options that made a picture, from its recipe.

    Raises:
        FileNotFoundError, ValueError: there is no such picture, or no whole recipe in it.
    """
    recipe = read_recipe(path)
    if recipe.get("pipeline") != "txt2img" or "seeds" in recipe:
        raise ValueError(f"{path} is no single image of 'fastdiff txt2img'; give one of those")
    short = {long: name for name, long in TORCH_NAMES.items()}
    try:
        dtype = short[str(recipe["dtype"])]
        shared = pictures.Shared(
            count=1,
            seed=int(recipe["seed"]),
            text=from_dict(TextSettings, recipe["text"]),
            settings=from_dict(SampleSettings, recipe["settings"]),
            tokenizer=tuple(Path(folder) for folder in recipe["tokenizer"]),
            backend=recipe["backend"],
            device=str(recipe["device"]),
            dtype=dtype,
        )
        return Txt2Img(
            prompt=str(recipe["prompt"]),
            model=Path(recipe["checkpoint"]),
            height=int(recipe["height"]),
            width=int(recipe["width"]),
            shared=shared,
        )
    except KeyError as error:
        raise ValueError(f"the recipe in {path} lacks or does not know {error}") from None
