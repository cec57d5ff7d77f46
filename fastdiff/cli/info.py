"""``fastdiff info``: show the contents of a model, or the recipe in a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastdiff.cli.console import print_pairs
from fastdiff.cli.options import FLAT, NO_NONE, LoadOptions
from fastdiff.cli.parsing import parse
from fastdiff.files import printable

MAX_VALUE = 2000
"""Characters of a value that are shown; --json has all of them."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show a model's config, parameters, hash and provenance, or the recipe inside a PNG.

    The weights of a bundle are verified against the hashes in its config.

    Examples:
      fastdiff info digits
      fastdiff info runs/diffusion/model --json
      fastdiff info out/sheet.png
    """

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH|NAME")]
    """File or folder of a checkpoint, folder of a run, name of a shipped model, or a PNG."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)


def main(words: Sequence[str]) -> int:
    options = parse(Info, words, prog="fastdiff info")
    return 0 if options is None else run(options)


def run(options: Info) -> int:
    path = Path(options.what)
    is_picture = path.suffix.lower() == ".png" or (path.is_file() and _begins_as_png(path))
    if is_picture and (given := options.load.given):
        raise ValueError(
            f"{path} is a picture, but {', '.join(given)} can only be given for a model; leave it "
            "out"
        )
    report = _picture(path) if is_picture else _model(options.what, options.load)
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    for number, (title, facts) in enumerate(report.items()):
        if number:
            print()
        if isinstance(facts, Mapping):
            print(title)
            counts = title == "parameters"  # separate thousands, but not in a seed to be copied
            print_pairs(
                [(n, f"{int(t):,}" if counts else t) for n, t in _flat(facts)] or [("none", "")],
                indent=2,
            )
        else:
            print_pairs([(title, str(facts))])
    return 0


def _begins_as_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def _picture(path: Path) -> dict[str, Any]:
    from fastdiff.images import read_recipe

    return {"picture": str(path), "recipe": read_recipe(path)}


def _model(name: str, options: LoadOptions) -> dict[str, Any]:
    from fastdiff.checkpoint.open import load
    from fastdiff.configs import to_dict

    model = load(name, options=options)
    parts = {"denoiser": model.denoiser, "autoencoder": model.autoencoder}
    facts = {
        name: getattr(model, name)
        for name in ("prediction", "scale_factor", "image_size", "image_channels", "class_names")
    }
    schedule = {} if model.schedule is None else {"schedule": to_dict(model.schedule)}
    known = model.provenance.get("facts", {})
    rest = {name: value for name, value in model.provenance.items() if name != "facts"}
    if assumed := rest.get("assumed"):
        rest["assumed"] = {n: to_dict(v) if is_dataclass(v) else v for n, v in assumed.items()}
    sampler = {} if model.sampler is None else {"sampler": to_dict(model.sampler)}
    return {
        "path": str(model.path),
        "layout": model.layout,
        "weights hash": model.weights_hash,
        "parameters": {
            part: sum(parameter.numel() for parameter in module.parameters())
            for part, module in model.modules.items()
        },
        "config": {
            **{part: to_dict(module.config) for part, module in parts.items() if module},
            **schedule,
            **sampler,
            **facts,
        },
        "provenance": {**rest, **known},
    }


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as ``unet.channels  64`` lines."""
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append((printable(f"{prefix}{name}"), printable(_text(value), MAX_VALUE)))
    return lines


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, Mapping):
        return "none"
    return "none" if value is None else str(value)
