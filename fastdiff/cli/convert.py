"""``fastdiff convert``: a checkpoint in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastdiff.cli.console import Clock, print_pairs, progress
from fastdiff.cli.machine import TORCH_NAMES, DtypeName
from fastdiff.cli.parsing import OptionalFloat, OptionalInt, OptionalName, OptionalPath, parse

if TYPE_CHECKING:
    from fastdiff.checkpoint.model import Model


SAID = (
    *("prediction", "num_heads", "head_dim", "qkv_order", "image_size"),
    *("scale_factor", "timestep_scale"),
)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint as a diffusers folder, or as a fastdiff bundle.

    Reads diffusers folders, single files of Stable Diffusion and latent diffusion, OpenAI's
    guided-diffusion and improved-diffusion, ports of DDPM, and bundles. What a file does not say is
    taken from the published models and printed; the options say it otherwise.

    Examples:
      fastdiff convert sd-v1-5.safetensors sd15
      fastdiff convert v2-768.ckpt sd2 --prediction v --dtype fp16
      fastdiff convert 256x256_diffusion.pt adm256 --to bundle
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """A file or folder; the layout is recognised from what is in it."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The folder to write; one that exists already is left alone."""
    to: Literal["diffusers", "bundle"] = "diffusers"
    """The layout to write."""
    dtype: Annotated[DtypeName | None, tyro.conf.arg(help_behavior_hint="")] = None
    """What the weights are stored as; left out: as in the source."""
    variant: OptionalName = None
    """Which files of a diffusers folder to read, such as fp16."""
    prediction: Annotated[
        Literal["eps", "v", "x0"] | None, tyro.conf.arg(help_behavior_hint="")
    ] = None
    """What the network returns, where a file does not say: v for Stable Diffusion 2 at 768."""
    num_heads: OptionalInt = None
    """Heads of every attention, where a file does not say."""
    head_dim: OptionalInt = None
    """Width of a head, where a file does not say."""
    qkv_order: Annotated[Literal["legacy", "new"] | None, tyro.conf.arg(help_behavior_hint="")] = (
        None
    )
    """Attention order of an OpenAI file."""
    image_size: OptionalInt = None
    """Height and width of the training's images, where a file does not say."""
    scale_factor: OptionalFloat = None
    """The latents are multiplied by it, where a file does not say."""
    timestep_scale: OptionalFloat = None
    """The network sees t times this; 1000 / T for improved-diffusion's rescale_timesteps."""
    tokenizer: OptionalPath = None
    """A CLIP tokenizer's folder, to go with a single file."""
    ema: bool = True
    """Take the averaged weights where the file has both."""
    text_encoders: bool = True
    """Convert the text encoders too; they need transformers."""


def main(words: Sequence[str]) -> int:
    options = parse(Convert, words, prog="fastdiff convert")
    return 0 if options is None else run(options)


def run(options: Convert) -> int:
    import torch

    from fastdiff.checkpoint.layouts.bundle import save_bundle
    from fastdiff.checkpoint.open import load
    from fastdiff.checkpoint.save import save_diffusers

    if options.target.exists():
        raise ValueError(f"{options.target} exists already; choose another folder")
    unsaid = {name: value for name in SAID if (value := getattr(options, name)) is not None}
    dtype = getattr(torch, TORCH_NAMES[options.dtype]) if options.dtype else None
    clock, total = Clock(), _bytes(options.source)
    with progress("reading") as bar, clock("read"):
        model = load(
            options.source,
            variant=options.variant,
            dtype=None,
            text_encoders=options.text_encoders and options.to != "bundle",
            tokenizer=options.tokenizer,
            ema=options.ema,
            progress=_counter(bar, total),
            **unsaid,
        )
    size = sum(tensor.nbytes for tensor in _tensors(model))
    with progress("writing") as bar, clock("write"):
        if options.to == "bundle":
            save_bundle(model, options.target, dtype=dtype)
        else:
            save_diffusers(model, options.target, dtype=dtype, progress=_counter(bar, size))
    context = model.denoiser is not None and model.denoiser.config.context_dim is not None
    left_out = options.to == "bundle" and context and options.text_encoders
    print_pairs(
        [
            ("layout", model.layout),
            *([("left out", "text encoders, for which a bundle has no place")] * left_out),
            *(
                (f"assumed {name}", str(value))
                for name, value in model.provenance.get("assumed", {}).items()
            ),
            ("written", f"{options.target} ({options.to})"),
            ("time", clock.report()),
        ]
    )
    return 0


def _tensors(model: Model) -> list[Any]:
    return [tensor for module in model.modules.values() for tensor in module.parameters()]


def _bytes(path: Path) -> int:
    """Of a file, or of a model's folder and its parts': a wrong folder may hold a whole disk."""
    inside = (*path.glob("*"), *path.glob("*/*"))
    files = [path] if path.is_file() else [file for file in inside if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _counter(bar: Any, total: int) -> Any:
    """Adds up what the loader tells in bytes, shown in MiB."""
    done = 0

    def count(_: str, size: int) -> None:
        nonlocal done
        done = min(done + size, total)
        bar(done // 2**20, max(total // 2**20, 1))

    return count
