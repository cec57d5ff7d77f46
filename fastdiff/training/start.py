"""Fine-tuning: initialize the weights of a run from a trained model.

Only weights are used: moments start at zero, and the average starts at these weights.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import load

MAY_DIFFER = ("dropout",)
"""Fields of a network's config that may differ from the trained model's."""
SHOWN = 5
"""Maximum number of differences listed in a message."""


def take_weights(network: nn.Module, part: str, place: str, device: torch.device) -> Model:
    """Copy the weights of a trained network into a network.

    network: with a `config`. part: "denoiser" or "autoencoder". place: anything that
    `fastdiff.load` opens.

    Returns the model that the weights come from.

    Raises:
        FileNotFoundError, ValueError: as for `fastdiff.load`; or the model lacks the part, or the
            configs differ (the message lists the differences).
    """
    model = load(place, device=device, text_encoders=False)
    source: Any = getattr(model, part)
    if source is None:
        raise ValueError(f"{place} contains no {part} to start from; choose a model that has one")
    ours, theirs = network.state_dict(), source.state_dict()
    wrong = [
        f"{name}: {_shape(theirs.get(name))} there, {_shape(ours.get(name))} here"
        for name in dict.fromkeys([*ours, *theirs])
        if _shape(theirs.get(name)) != _shape(ours.get(name))
    ]
    wrong = wrong or _differences(source.config, network.config)
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"the {part} of {place} differs from the one that this run trains: "
            f"{'; '.join(wrong[:SHOWN])}{more}; set the run's model to match, or leave init_from "
            "out"
        )
    network.load_state_dict(theirs)
    return model


def origin(model: Model) -> dict[str, str]:
    """The origin of a run's initial weights, as stored in its checkpoints."""
    return {"model": model.name, "weights": model.weights_hash}


def warn_of_another_task(model: Model, prediction: str, schedule: Any) -> None:
    """Warn if a denoiser was trained with another prediction type or noise schedule."""
    changed = [
        f"{name} was {old} there and is {new} here"
        for name, old, new in (
            ("prediction", model.prediction, prediction),
            ("schedule", model.schedule, schedule),
        )
        if old is not None and old != new
    ]
    if changed:
        warnings.warn(
            f"init_from: the {' and the '.join(changed)}, so the first steps have to adapt to that",
            stacklevel=2,
        )


def _differences(theirs: Any, ours: Any) -> list[str]:
    """Fields that differ between two configs, which equal shapes do not reveal."""
    if type(theirs) is not type(ours):
        return [f"{type(theirs).__name__} there, {type(ours).__name__} here"]
    return [
        f"{field.name} is {getattr(theirs, field.name)!r} there, {getattr(ours, field.name)!r} here"
        for field in fields(ours)
        if field.name not in MAY_DIFFER and getattr(theirs, field.name) != getattr(ours, field.name)
    ]


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
