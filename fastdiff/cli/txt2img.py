"""``fastdiff txt2img``: images from a text-conditioned checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

import fastdiff
from fastdiff.cli import pictures
from fastdiff.cli.again import Original, original
from fastdiff.cli.parsing import OptionalFloat, OptionalInt, OptionalPath, parse
from fastdiff.generate.image_to_image import first_step
from fastdiff.generate.refine import refine
from fastdiff.generate.text import TextDiffusion
from fastdiff.generate.text_to_image import text_to_image, text_to_latents
from fastdiff.generate.upscale import Via, check_scale, upscale


@dataclass(frozen=True, kw_only=True)
class Txt2Img:
    """Make images from a prompt with a Stable Diffusion checkpoint (1, 2, XL).

    Weights in prompts: (word:1.3), (word), [word]; a backslash before a bracket takes it as text.
    Writes a PNG per seed with its recipe inside, and a contact sheet of several.

    Examples:
      fastdiff txt2img "a red cat, oil painting" --model stable-diffusion-v1-5/ --seed 7
      fastdiff txt2img "a (foggy:1.3) bay" --model sdxl/ --refiner refiner/ --negative people
      fastdiff txt2img --like out/a-red-cat-oil-painting-seed7.png
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What to draw."""
    model: Path
    """The checkpoint: a diffusers folder, or a .safetensors or .ckpt file."""
    height: OptionalInt = None
    """Height in pixels; as the model was trained if left out."""
    width: OptionalInt = None
    """Width in pixels; as the model was trained if left out."""
    upscale: OptionalFloat = None
    """Enlarge both sides by this factor in a second pass ("hires fix")."""
    upscale_strength: float = 0.6
    """Share of the steps that the second pass does."""
    upscale_via: Via = "latent"
    """Enlarge the latents, or the image between decoding and encoding."""
    refiner: OptionalPath = None
    """Stable Diffusion XL's refiner, for the last of the noise; takes the last --tokenizer."""
    switch: float = 0.8
    """Share of the noise that is the base's, the rest the refiner's."""
    shared: Annotated[pictures.Shared, tyro.conf.arg(name="")] = field(
        default_factory=pictures.Shared
    )

    def __post_init__(self) -> None:
        if self.upscale is not None and self.refiner is not None:
            raise ValueError("upscale and refiner do not go together; give one of them")


def main(words: Sequence[str]) -> int:
    like = original(Txt2Img, "txt2img", words)
    options = parse(Txt2Img, words, prog="fastdiff txt2img", default=like and like.options)
    return 0 if options is None else run(options, like)


def run(options: Txt2Img, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""
    shared = options.shared
    if options.upscale is not None:
        check_scale(options.upscale)
        first_step(shared.settings.steps, options.upscale_strength)

    def prepare(model: TextDiffusion) -> tuple[pictures.Make, dict[str, Any]]:
        height, width = model.default_size(options.height, options.width)
        call: dict[str, Any] = {
            "height": height,
            "width": width,
            "text": shared.text,
            "settings": shared.settings,
        }
        facts = {
            "pipeline": "txt2img",
            "height": height,
            "width": width,
            "upscale": options.upscale,
            "upscale_strength": options.upscale_strength,
            "upscale_via": options.upscale_via,
            "refiner": None,
            "switch": options.switch,
        }
        if options.refiner is not None:
            refiner = _refiner(options.refiner, model, shared.tokenizer[-1:])
            facts["refiner"] = {"path": str(options.refiner), "sha256": refiner.weights_hash}
            make = functools.partial(
                refine, model, refiner, options.prompt, switch=options.switch, **call
            )
        elif options.upscale is not None:
            make = functools.partial(_enlarged, model, options, call)
        else:
            make = functools.partial(text_to_image, model, options.prompt, **call)
        return make, facts

    return pictures.run(options, prepare, original=like)


def _refiner(path: Path, base: TextDiffusion, tokenizer: Sequence[Path]) -> TextDiffusion:
    device, dtype = base.core.device, base.core.dtype
    loaded = fastdiff.load(path, device=device, dtype=dtype, tokenizer=tokenizer or None)
    return TextDiffusion(loaded, device=device, dtype=dtype)


def _enlarged(
    model: TextDiffusion,
    options: Txt2Img,
    call: Mapping[str, Any],
    seeds: Sequence[int],
    **tell: Any,
) -> Tensor:
    """`text_to_image`, then `upscale`."""
    assert options.upscale is not None
    z = text_to_latents(model, options.prompt, seeds, **call, **tell)
    return upscale(
        model,
        z,
        options.prompt,
        seeds,
        scale=options.upscale,
        via=options.upscale_via,
        strength=options.upscale_strength,
        text=options.shared.text,
        settings=options.shared.settings,
        **tell,
    )
