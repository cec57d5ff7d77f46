"""``fastdiff convert``: a checkpoint in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastdiff.cli.console import print_pairs
from fastdiff.cli.machine import TORCH_NAMES, Clock, DtypeName, progress
from fastdiff.cli.options import FLAT, NO_NONE, LoadOptions
from fastdiff.cli.parsing import parse

if TYPE_CHECKING:
    from fastdiff.checkpoint.model import Model


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
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)


def main(words: Sequence[str]) -> int:
    options = parse(Convert, words, prog="fastdiff convert")
    return 0 if options is None else run(options)


def run(options: Convert) -> int:
    import torch

    from fastdiff.checkpoint.open import load
    from fastdiff.checkpoint.save import save

    if options.target.exists():
        raise ValueError(f"{options.target} exists already; choose another folder")
    said = options.load
    if options.to == "bundle":  # a bundle has no place for them
        said = replace(said, text_encoders=False)
    dtype = getattr(torch, TORCH_NAMES[options.dtype]) if options.dtype else None
    clock, total = Clock(), _bytes(options.source)
    with progress("reading") as bar, clock("read"):
        model = load(options.source, dtype=None, progress=_counter(bar, total), options=said)
    size = sum(tensor.nbytes for tensor in _tensors(model))
    with progress("writing") as bar, clock("write"):
        counter = _counter(bar, size)
        save(model, options.target, layout=options.to, dtype=dtype, progress=counter)
    reads_text = (
        model.denoiser is not None
        and model.denoiser.config.context_dim is not None
        and model.class_embedding is None
    )
    left_out = options.to == "bundle" and reads_text and options.load.text_encoders
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
