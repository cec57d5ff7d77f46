"""``fastdiff convert``: convert a checkpoint to another layout."""

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
    """Convert a checkpoint to a diffusers folder or a fastdiff bundle.

    Reads diffusers folders, single files of Stable Diffusion and latent diffusion, OpenAI's
    guided-diffusion and improved-diffusion, ports of DDPM, and bundles. What a file does not state
    is taken from the published models and printed; the options override it.

    Examples:
      fastdiff convert sd-v1-5.safetensors sd15
      fastdiff convert v2-768.ckpt sd2 --prediction v --dtype fp16
      fastdiff convert 256x256_diffusion.pt adm256 --to bundle
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """File or folder to read; its layout is recognised from the contents."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to write, which must not exist yet."""
    to: Literal["diffusers", "bundle"] = "diffusers"
    """Layout to write."""
    dtype: Annotated[DtypeName | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Number format of the stored weights; by default that of the source."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)


def main(words: Sequence[str]) -> int:
    options = parse(Convert, words, prog="fastdiff convert")
    return 0 if options is None else run(options)


def run(options: Convert) -> int:
    import torch

    from fastdiff.checkpoint.open import load
    from fastdiff.checkpoint.save import save

    if options.target.exists():
        raise ValueError(f"{options.target} already exists; choose another folder")
    said = options.load
    if options.to == "bundle":
        bare = replace(said, text_encoders=False)
        if load(options.source, device="meta", options=bare).layout != "bundle":
            said = bare  # a bundle stores the text encoder of another bundle, but no others
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
    left_out = reads_text and options.load.text_encoders and not said.text_encoders
    print_pairs(
        [
            ("layout", model.layout),
            *([("left out", "text encoders, which a bundle cannot store")] * left_out),
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
    """Size of a file, or of a model's folder to a depth of two: a wrong folder may be huge."""
    inside = (*path.glob("*"), *path.glob("*/*"))
    files = [path] if path.is_file() else [file for file in inside if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _counter(bar: Any, total: int) -> Any:
    """A callback that adds up bytes and shows MiB."""
    done = 0

    def count(_: str, size: int) -> None:
        nonlocal done
        done = min(done + size, total)
        bar(done // 2**20, max(total // 2**20, 1))

    return count
