"""Map the tensors of published files to our parameters, and check their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdiff.checkpoint.weights import Sources, Weights, empty_model
from fastdiff.files import printable

Place = tuple[str, nn.Module, str]
"""Our prefix, our module, their prefix."""
Layers = Mapping[type[nn.Module], Mapping[str, tuple[str, ...]]]
"""Our layer inside a block -> their layers; layers not listed have the same name."""
LISTED = 3
"""Number of tensors that a message names for each kind of mistake."""


def source_names(places: Iterable[Place], layers: Layers) -> Sources:
    """The map (our parameter -> their parameters) of a whole model."""
    return dict(_source_names(places, layers))


def _source_names(places: Iterable[Place], layers: Layers) -> Iterator[tuple[str, tuple[str, ...]]]:
    for ours, module, theirs in places:
        named = layers.get(type(module), {})
        for name, _ in module.named_parameters():
            stem, _, leaf = name.rpartition(".")
            # "blocks.3.attn1.qkv" -> "transformer_blocks.3." and "attn1.qkv"
            match = re.match(r"blocks(\.\d+\.)(.*)", stem)
            prefix, stem = (f"transformer_blocks{match[1]}", match[2]) if match else ("", stem)
            yield (
                f"{ours}.{name}",
                tuple(
                    ".".join(filter(None, (theirs, prefix + layer, leaf)))
                    for layer in named.get(stem, (stem,))
                ),
            )


def check_names(
    model: nn.Module, sources: Sources, shapes: Mapping[str, tuple[int, ...]], file: str = ""
) -> None:
    """Check that the file has exactly the tensors that the model needs, in the right shapes.

    Raises:
        ValueError: keys are unknown, missing or of the wrong shape; the message lists the first
            ones of each kind.
    """
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert sources.keys() == ours.keys(), sources.keys() ^ ours.keys()
    needed = {key for keys in sources.values() for key in keys}
    unknown = [f"{printable(key)} is unknown" for key in sorted(shapes.keys() - needed)]
    missing = [f"{key} is missing" for key in sorted(needed - shapes.keys())]
    misshapen = []
    for name, keys in sources.items():
        if not all(key in shapes for key in keys):
            continue
        got = _stacked([shapes[key] for key in keys], len(ours[name]))
        if got != ours[name]:
            misshapen.append(f"{' + '.join(keys)} has shape {got}, expected {ours[name]}")
    kinds = (unknown, missing, misshapen)
    if listed := [problem for problems in kinds for problem in problems[:LISTED]]:
        more = sum(map(len, kinds)) - len(listed)
        raise ValueError(
            f"{f'{file}: ' * bool(file)}these are not the weights of this {type(model).__name__}: "
            f"{'; '.join(listed)}{f'; and {more} more' * bool(more)}; use a config and weights "
            "that belong together"
        )


def _stacked(shapes: list[tuple[int, ...]], ndim: int) -> tuple[int, ...] | None:
    """Shape of the concatenated rows; a 1x1 convolution counts as a linear layer on tokens."""
    if len({shape[1:] for shape in shapes}) != 1 or not all(shapes):
        return shapes[0] if len(shapes) == 1 else None
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return shape[:ndim] if all(size == 1 for size in shape[ndim:]) else shape


@dataclass(frozen=True)
class Plan:
    """A model on the meta device whose weights are known to fit, but have not been read yet."""

    model: nn.Module
    sources: Sources
    weights: Weights
    check: Callable[[], None] = lambda: None
    """Called before the weights are read: raises ValueError if tensors that the model does not
    store, because it computes them, have other values in the file."""


def plan_model(
    config: Any,
    names: Callable[[nn.Module], Sources],
    weights: Weights,
) -> Plan:
    """Build the model that a config describes and check the names and shapes in a file.

    Raises:
        ValueError: names or shapes do not fit.
    """
    model = empty_model(config, str(weights.path), len(weights.places))
    sources = names(model)
    check_names(model, sources, weights.shapes, str(weights.path))
    return Plan(model, sources, weights)
