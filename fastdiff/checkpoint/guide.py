"""A model together with a noisy classifier or CLIP that guides it, if the two belong together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.schedules import ScheduleConfig, noise_schedule
from fastdiff.models.classifier import Classifier
from fastdiff.models.network import Network

ASSUMPTIONS = ("assumed", "undecided")
"""Entries of `Model.provenance`."""
PREFIX = "classifier "
Fact = tuple[str, Any, Any]
"""What is compared, and what the model and the classifier say; None: it is not known."""


def check_denoiser(model: Model, guide: str = "classifier") -> Network:
    """The denoiser of a model that a classifier or a CLIP is to guide.

    guide: the option that names it.

    Raises:
        ValueError: it has none.
    """
    if model.denoiser is None:
        raise ValueError(
            f"{model.path} contains no denoiser, so a {guide} cannot guide it; leave {guide} out"
        )
    return model.denoiser


def with_classifier(model: Model, other: Model) -> Model:
    """A model guided by the classifier of another one: the model itself, with `classifier` set.

    What was assumed about the classifier is added to the assumptions as "classifier NAME".

    Raises:
        ValueError: there is no denoiser or no classifier, or the classifier was trained on other
            samples (channels, size, scale), another noise schedule or other classes.
    """
    check_denoiser(model)
    if other.classifier is None:
        raise ValueError(
            f"{other.path} contains no noisy classifier; train one with 'fastdiff train classifier'"
        )
    _check_fits(model, other, "classifier", _facts(model, other, other.classifier))
    return replace(
        model,
        classifier=other.classifier,
        class_names=model.class_names or other.class_names,
        provenance={
            **model.provenance,
            **{name: found for name in ASSUMPTIONS if (found := _both(model, other, name))},
            "classifier": str(other.path),
        },
        stored_hash="",
    )


def with_clip(model: Model, other: Model) -> Model:
    """A model guided by the noised CLIP of another one: the model itself, with `clip` set.

    Raises:
        ValueError: there is no denoiser or no CLIP, the denoiser does not read text, or the CLIP
            was trained on other samples (channels, scale) or another noise schedule.
    """
    denoiser = check_denoiser(model, "clip")
    if other.clip is None:
        raise ValueError(
            f"{other.path} contains no noised CLIP; train one with 'fastdiff train clip'"
        )
    if denoiser.config.context_dim is None or model.class_embedding is not None:
        raise ValueError(
            f"{model.path} does not read text, so its images have no caption for a CLIP to guide "
            "to; leave clip out"
        )
    facts = [
        ("channels", _channels(denoiser.config), other.clip.model.config.image_channels),
        ("scale factor", *_scales(model, other)),
    ]
    _check_fits(model, other, "clip", facts)
    return replace(
        model,
        clip=other.clip,
        provenance={**model.provenance, "clip": str(other.path)},
        stored_hash="",
    )


def _check_fits(model: Model, other: Model, part: str, facts: list[Fact]) -> None:
    """Raise ValueError unless facts and noise schedules agree; part: a stage of training."""
    wrong = [
        f"{what}: {theirs} for the {part}, {ours} for the denoiser"
        for what, ours, theirs in facts
        if None not in (ours, theirs) and ours != theirs
    ]
    if not _same_schedule(_known_schedule(model), _known_schedule(other)):
        wrong.append("the noise schedule differs")
    if wrong:
        raise ValueError(
            f"the {part} of {other.path} does not fit {model.path} ({'; '.join(wrong)}); train "
            f"one with 'fastdiff train {part} --guides' and this model"
        )


def _channels(config: Any) -> int:
    """Channels of x, as a denoiser predicts it."""
    channels: int = config.out_channels // (1 + config.learned_sigma)
    return channels


def _scales(model: Model, other: Model) -> tuple[float | None, float]:
    """The scale factors of both; None for the first if they are equal up to rounding."""
    ours, theirs = model.scale_factor, other.scale_factor
    return None if math.isclose(ours, theirs, rel_tol=1e-5) else ours, theirs


def _facts(model: Model, other: Model, classifier: Classifier) -> list[Fact]:
    assert model.denoiser is not None
    config, guide, first = model.denoiser.config, classifier.config, model.autoencoder
    table = model.class_embedding
    classes = config.num_classes
    if table is not None:  # its last row may mean "no class"
        rows = table.num_embeddings
        classes = guide.num_classes if guide.num_classes in (rows, rows - 1) else rows
    factor = 1 if first is None else first.downsample_factor
    side = None if model.image_size is None else model.image_size // factor
    return [
        ("channels", _channels(config), guide.in_channels),
        ("side of x", side, guide.sample_size),
        ("scale factor", *_scales(model, other)),
        ("classes", classes, guide.num_classes),
        ("names of the classes", model.class_names or None, other.class_names or None),
    ]


def _both(model: Model, other: Model, kind: str) -> dict[str, Any]:
    """The assumptions about a model's own parts and about the classifier that it gets."""
    own, theirs = model.provenance.get(kind, {}), other.provenance.get(kind, {})
    kept = {name: value for name, value in own.items() if not name.startswith(PREFIX)}
    return {**kept, **{f"{PREFIX}{name}": value for name, value in theirs.items()}}


def _known_schedule(model: Model) -> ScheduleConfig | None:
    """The model's noise schedule, unless it was guessed."""
    return None if "schedule" in model.provenance.get("undecided", {}) else model.schedule


def _same_schedule(one: ScheduleConfig | None, other: ScheduleConfig | None) -> bool:
    """Whether two configs describe the same noise levels; an unknown one fits any."""
    if one is None or other is None or one == other:
        return True
    if one.num_timesteps != other.num_timesteps:
        return False
    t = torch.arange(one.num_timesteps)
    return torch.allclose(noise_schedule(one).alpha(t), noise_schedule(other).alpha(t), atol=1e-6)
