"""Fine-tuning: the first weights of a run, taken from a trained model.

Weights only: moments and the average begin anew, the average from these weights.
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
"""Fields of a network's config that may change between two trainings."""
SHOWN = 5
"""Differences that a message names."""


def take_weights(network: nn.Module, part: str, place: str, device: torch.device) -> Model:
    """Give a network the weights of a trained one.

    network: with a `config`. part: "denoiser" or "autoencoder". place: what `fastdiff.load` opens.

    Returns the model that they are from.

    Raises:
        FileNotFoundError, ValueError: as `fastdiff.load`; the model lacks the part, or has another
            config, whose differences are named.
    """
    model = load(place, device=device, text_encoders=False)
    source: Any = getattr(model, part)
    if source is None:
        raise ValueError(f"{place} contains no {part} to start from; give a model that has one")
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
            f"the {part} of {place} is not the one that this run trains: "
            f"{'; '.join(wrong[:SHOWN])}{more}; set the run's model to match, or leave init_from "
            "out"
        )
    network.load_state_dict(theirs)
    return model


def origin(model: Model) -> dict[str, str]:
    """What a run remembers of where it began."""
    return {"model": model.name, "weights": model.weights_hash}


def warn_of_another_task(model: Model, prediction: str, schedule: Any) -> None:
    """Warn where a denoiser was trained to return something else, or under other noise."""
    told = [
        f"{name} was {old} there and is {new} here"
        for name, old, new in (
            ("prediction", model.prediction, prediction),
            ("schedule", model.schedule, schedule),
        )
        if old is not None and old != new
    ]
    if told:
        warnings.warn(
            f"init_from: the {' and the '.join(told)}, so the first steps learn that anew",
            stacklevel=2,
        )


def _differences(theirs: Any, ours: Any) -> list[str]:
    """Fields of two configs that differ; with equal shapes, so nobody would see it."""
    if type(theirs) is not type(ours):
        return [f"it is a {type(theirs).__name__}, this run has a {type(ours).__name__}"]
    return [
        f"{field.name} is {getattr(theirs, field.name)!r} there, {getattr(ours, field.name)!r} here"
        for field in fields(ours)
        if field.name not in MAY_DIFFER and getattr(theirs, field.name) != getattr(ours, field.name)
    ]


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
