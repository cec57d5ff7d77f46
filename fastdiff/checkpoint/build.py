"""From a config and the names in a file to a model: checked by shapes alone, then filled once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.weights import Weights
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.network import kind_of, network_family

Sources = dict[str, tuple[str, ...]]
"""Our parameter -> theirs, whose rows are concatenated."""
Place = tuple[str, nn.Module, str]
"""Our prefix, our module, their prefix."""
Layers = Mapping[type[nn.Module], Mapping[str, tuple[str, ...]]]
"""Our layer inside a block -> theirs; what is not named is called the same."""
Progress = Callable[[str, int], None]
"""Called as progress(tensor, bytes) after each tensor."""

Module = TypeVar("Module", bound=nn.Module)


def source_names(places: Iterable[Place], layers: Layers) -> Sources:
    """(our parameter -> their parameters) of a whole model."""
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


def empty_model(config: Any, file: str, tensors: int) -> nn.Module:
    """The module that a config describes, on the meta device: without memory.

    config: of an autoencoder or of a registered network; (rows, width) of an embedding.
    tensors: how many the file has.

    Raises:
        ValueError: the module has more blocks than the file has tensors (building it might never
            end), or sizes beyond 64 bits.
    """
    blocks = 1 if isinstance(config, tuple) else config.num_blocks
    if blocks > tensors:
        raise ValueError(
            f"{file}: the config asks for {blocks} blocks or more, the file has {tensors} tensors; "
            "use the weights that belong to this config"
        )
    try:
        with torch.device("meta"):
            if isinstance(config, tuple):
                return nn.Embedding(*config)
            if isinstance(config, AutoencoderConfig):
                return Autoencoder(config)
            return network_family(kind_of(config)).network(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file}: the config describes a network that cannot be built "
            f"({str(error).splitlines()[0]:.120}); use the config that belongs to these weights"
        ) from error


def check_names(
    model: nn.Module, sources: Sources, shapes: Mapping[str, tuple[int, ...]], file: str = ""
) -> None:
    """Raise unless the file has exactly the tensors that the model needs, in their shapes.

    Raises:
        ValueError: keys are unknown, missing or of the wrong shape; all of them are listed.
    """
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert sources.keys() == ours.keys(), sources.keys() ^ ours.keys()
    needed = {key for keys in sources.values() for key in keys}
    problems = [f"{key} is unknown" for key in sorted(shapes.keys() - needed)]
    problems += [f"{key} is missing" for key in sorted(needed - shapes.keys())]
    for name, keys in sources.items():
        if not all(key in shapes for key in keys):
            continue
        got = _stacked([shapes[key] for key in keys], len(ours[name]))
        if got != ours[name]:
            problems.append(f"{' + '.join(keys)} has shape {got}, expected {ours[name]}")
    if problems:
        raise ValueError(
            f"{f'{file}: ' * bool(file)}these are not the weights of this {type(model).__name__}: "
            f"{'; '.join(problems)}; check that the config and the weights belong together"
        )


def _stacked(shapes: list[tuple[int, ...]], ndim: int) -> tuple[int, ...] | None:
    """Shape of the tensors one below the other; a 1x1 convolution is a linear layer on tokens."""
    if len({shape[1:] for shape in shapes}) != 1 or not all(shapes):
        return shapes[0] if len(shapes) == 1 else None
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return shape[:ndim] if all(size == 1 for size in shape[ndim:]) else shape


def fill(
    model: Module,
    sources: Sources,
    weights: Weights,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Module:
    """Give a model on the meta device its numbers; eval mode, no gradients.

    dtype: what they become; None: what most of them are in the file.
    """
    dtype = dtype or common_dtype(weights)
    state: dict[str, Tensor] = {}
    for name, expected in model.state_dict().items():
        value = torch.empty(expected.shape, dtype=dtype, device=device)
        row = 0
        for key in sources[name]:
            rows = weights.places[key].shape[0]
            weights.copy_into(key, value[row : row + rows])
            row += rows
        state[name] = value
        if progress is not None:
            progress(name, value.nbytes)
    model.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval().requires_grad_(False)


def common_dtype(weights: Weights) -> torch.dtype:
    """The floating-point dtype of most numbers; fp32 where there are none."""
    counts: dict[torch.dtype, int] = {}
    for place in weights.places.values():
        if place.dtype.is_floating_point:
            counts[place.dtype] = counts.get(place.dtype, 0) + place.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


@dataclass(frozen=True)
class Plan:
    """A model without memory whose weights are known to fit: nothing of them has been read."""

    model: nn.Module
    sources: Sources
    weights: Weights


def plan_model(
    config: Any,
    names: Callable[[nn.Module], Sources],
    weights: Weights,
) -> Plan:
    """The model that a config describes, checked against the names and shapes in a file.

    Raises:
        ValueError: names or shapes do not fit.
    """
    model = empty_model(config, str(weights.path), len(weights.places))
    sources = names(model)
    check_names(model, sources, weights.shapes, str(weights.path))
    return Plan(model, sources, weights)
