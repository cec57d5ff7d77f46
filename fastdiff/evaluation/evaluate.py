"""Quality of samples, with every metric compared to the score of real images.

The near-copy criterion, subset sizes and limits were chosen before any model was trained. Every
metric is also computed on the held-out images, which no model has seen; this is the floor that a
perfect model would reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdiff.checkpoint.model import Model
from fastdiff.evaluation.classifier import Judge, Reference, pixels_of, reference_of
from fastdiff.evaluation.distances import (
    Neighbours,
    frechet_distance,
    nearest_training,
    precision_recall,
)
from fastdiff.evaluation.inception import InceptionScores, inception_scores
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.run import Progress, generate
from fastdiff.images import reduced

NEAR_COPY_QUANTILE = 0.05
"""A near-copy is closer to a training image than all but this fraction of held-out images."""
SUBSETS = 5
"""Number of random subsets of the held-out split's size over which metrics are averaged."""
MIN_ACCURACY = 0.95
MAX_FRECHET_RATIO = 3.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of a set of images."""

    count: int
    """Number of images."""
    accuracy: float
    """Fraction that the judge classifies as the requested class."""
    class_accuracy: tuple[float | None, ...]
    """Accuracy per class; None for a class without images."""
    frechet: float
    """Fréchet distance between all images of the set and the training images."""
    frechet_equal: float
    """Fréchet distance with as many images as the held-out split has, averaged over random
    subsets that keep the proportions of the classes."""
    precision: float
    """Fraction inside the manifold of training images, at equal sizes."""
    recall: float
    """Fraction of training images inside the set's manifold, at equal sizes."""
    near_copies: float
    """Fraction closer to one training image than the near-copy limit."""
    nearest_median: float
    """Median distance to the nearest training image, Euclidean, on pixels from -1 to 1."""
    nearest_5_percent: float
    """5th percentile of the distance to the nearest training image."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The result of an evaluation; `fastdiff.configs.to_dict` converts it to JSON."""

    samples: Scores
    held_out: Scores
    """The floor: real images that neither the model nor the judge has seen."""
    near_copy_limit: float
    """Ratio of distances below which an image counts as a near-copy."""
    frechet_ratio: float
    """samples.frechet / held_out.frechet; too low if there are more samples than held-out images.
    """
    frechet_equal_ratio: float
    """samples.frechet_equal / held_out.frechet_equal, which is a fair comparison."""
    feature_dim: int
    """Number of dimensions of the feature space."""
    training_images: int
    """Number of training images that the samples are compared with."""

    def failures(self) -> tuple[str, ...]:
        """One line for each metric that misses its limit; empty if all limits are met."""
        checks = [
            (
                self.samples.accuracy >= MIN_ACCURACY,
                f"class accuracy {self.samples.accuracy:.1%}, expected at least {MIN_ACCURACY:.0%}",
            ),
            (
                max(self.frechet_ratio, self.frechet_equal_ratio) <= MAX_FRECHET_RATIO,
                f"Fréchet distance {self.frechet_ratio:.2f} times the floor "
                f"({self.frechet_equal_ratio:.2f} at equal size), "
                f"expected at most {MAX_FRECHET_RATIO:g}",
            ),
            (
                self.samples.near_copies <= self.held_out.near_copies,
                f"near-copies {self.samples.near_copies:.1%}, expected at most the held-out "
                f"images' {self.held_out.near_copies:.1%}",
            ),
        ]
        return tuple(message for holds, message in checks if not holds)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results and the data they were computed from, for the report."""

    results: Results
    images: Tensor
    labels: Tensor
    seeds: tuple[int, ...]
    neighbours: Neighbours
    reference: Reference
    settings: SampleSettings
    weights_hash: str
    model: str
    inception: dict[str, InceptionScores] | None = None
    """On the features of an Inception network: "samples" and "held_out", each against as many
    training images."""


def evaluate(
    model: Model,
    *,
    count: int = 1000,
    settings: SampleSettings | None = None,
    first_seed: int = 0,
    reference: Reference | None = None,
    progress: Progress | None = None,
    by_classifier: bool = False,
    inception: nn.Module | None = None,
) -> Evaluation:
    """Sample from a model, cycling through the classes, and measure the samples.

    An upsampler enlarges held-out images, each reduced as in its training; see `small_images`.

    Args:
        count: number of samples.
        first_seed: the i-th sample has the seed first_seed + i.
        reference: real images; None: those that the model was trained on, see `reference_of`.
        progress: called as progress(done, total) after each step, counting rows of all images.
        by_classifier: the model's classifier gets the class, and the denoiser none.
        inception: a network whose features FID, KID, precision and recall are measured on too; see
            `fastdiff.evaluation.load_inception`.

    Raises:
        ValueError: the model does not fit the reference, or `count` is too small.
    """
    if reference is None:
        reference = reference_of(model)
    classes, shape = len(reference.class_names), tuple(reference.train_images.shape[1:])
    assert model.denoiser is not None
    part = model.classifier if by_classifier else model.denoiser
    known = None if part is None else part.config.num_classes
    if known != classes:
        raise ValueError(
            f"expected a model of the {classes} classes {', '.join(reference.class_names)}, got "
            f"{known or 'no'} classes; evaluate a model trained on this data"
        )
    if (model.image_channels, model.image_size, model.image_size) != shape:
        raise ValueError(
            f"expected a model of images of shape {shape}, got ({model.image_channels}, "
            f"{model.image_size}, {model.image_size}); evaluate a model trained on this data"
        )
    minimum = len(reference.held_out_images)
    if count < minimum:
        raise ValueError(
            f"expected at least {minimum} samples, the number of held-out images to compare with, "
            f"got {count}"
        )
    settings = settings or SampleSettings()
    labels = [index % classes for index in range(count)]
    seeds = [first_seed + index for index in range(count)]
    small = small_images(model, reference, labels)
    jobs = [
        ClassJob(seed=seed, settings=replace(settings, classifier_class=label))
        if by_classifier
        else ClassJob(label=label, seed=seed, settings=settings, image=image)
        for label, seed, image in zip(labels, seeds, small, strict=True)
    ]
    made = list(generate(model, jobs, progress=progress))
    images = torch.stack([result.image for result in made])
    wanted = torch.tensor(labels)
    results, neighbours = evaluate_images(images, wanted, reference)
    used = made[0].job.settings
    scores = None if inception is None else _on_inception(images, wanted, reference, inception)
    return Evaluation(
        results=results,
        images=images,
        labels=wanted,
        seeds=tuple(seeds),
        neighbours=neighbours,
        reference=reference,
        settings=replace(used, classifier_class=None) if by_classifier else used,
        weights_hash=model.weights_hash,
        model=model.name,
        inception=scores,
    )


def originals(reference: Reference, labels: Sequence[int]) -> Tensor:
    """A held-out image of each label, cycling through those of its class: (N, C, H, W)."""
    places = [
        torch.nonzero(reference.held_out_labels == label).flatten()
        for label in range(len(reference.class_names))
    ]
    turns, chosen = [0] * len(places), []
    for label in labels:
        chosen.append(places[label][turns[label] % len(places[label])])
        turns[label] += 1
    return reference.held_out_images[torch.stack(chosen)]


def small_images(
    model: Model, reference: Reference, labels: Sequence[int]
) -> Sequence[Tensor | None]:
    """For an upsampler `originals`, reduced to the side that it was trained to enlarge; for any
    other model None for each label.

    Raises:
        ValueError: the model is an upsampler, and does not say which side it enlarges.
    """
    assert model.denoiser is not None
    if Facts.of(model).extra != "upsampler":
        return [None] * len(labels)
    facts = model.provenance.get("facts")
    run = facts.get("run", {}) if isinstance(facts, dict) else {}
    if not (side := run.get("low_resolution")):
        raise ValueError(
            f"{model.name} is an upsampler that does not say which size it enlarges; evaluate one "
            "that was trained with low_resolution"
        )
    return list(reduced(originals(reference, labels), side))


def _on_inception(
    images: Tensor, labels: Tensor, reference: Reference, network: nn.Module
) -> dict[str, InceptionScores]:
    """Both sets against training images, all three of the held-out images' size, class by class."""
    size = len(reference.held_out_images)
    rng = np.random.default_rng(0)
    mine = images[torch.from_numpy(_subset(rng, labels.numpy(), size))]
    order = _subset(rng, reference.train_labels.numpy(), size)
    real = reference.train_images[torch.from_numpy(order)]
    sets = {"samples": mine, "held_out": reference.held_out_images}
    return {name: inception_scores(real, each, network) for name, each in sets.items()}


def evaluate_images(
    images: Tensor, labels: Tensor, reference: Reference, *, judge: Judge | None = None
) -> tuple[Results, Neighbours]:
    """Measure a set of images, from any source.

    Args:
        images: (N, C, H, W) in [-1, 1], N at least the size of the held-out split.
        labels: (N,) int64, the class that each image should show.
        judge: a judge fitted to the reference; None fits a new one.

    Returns:
        The results, and the nearest training image of each image.
    """
    judge = judge or Judge(reference)
    judge.check(images)
    training = pixels_of(reference.train_images)
    training_features = judge.features(reference.train_images)
    training_labels = reference.train_labels.numpy()
    sets = {
        "samples": (images, labels),
        "held_out": (reference.held_out_images, reference.held_out_labels),
    }
    size = len(reference.held_out_images)
    if len(images) < size:
        raise ValueError(
            f"expected at least {size} images, the size of the held-out split, got {len(images)}"
        )
    near = {name: nearest_training(pixels_of(x), training) for name, (x, _) in sets.items()}
    limit = float(np.quantile(near["held_out"].ratio, NEAR_COPY_QUANTILE))
    scores = {
        name: _scores(x, y, judge, training_features, training_labels, near[name], limit, size)
        for name, (x, y) in sets.items()
    }
    samples, held_out = scores["samples"], scores["held_out"]
    results = Results(
        samples=samples,
        held_out=held_out,
        near_copy_limit=limit,
        frechet_ratio=samples.frechet / held_out.frechet,
        frechet_equal_ratio=samples.frechet_equal / held_out.frechet_equal,
        feature_dim=training_features.shape[1],
        training_images=len(training),
    )
    return results, near["samples"]


def _scores(
    images: Tensor,
    labels: Tensor,
    judge: Judge,
    training: NDArray[np.float64],
    training_labels: NDArray[np.int64],
    near: Neighbours,
    limit: float,
    size: int,
) -> Scores:
    """Score a set of images. size: number of images in the subsets of equal size."""
    features = judge.features(images)
    right = judge.predict(images) == labels.numpy()
    rng = np.random.default_rng(0)
    rows: list[tuple[float, float, float]] = []
    for _ in range(SUBSETS):
        mine = features[_subset(rng, labels.numpy(), size)]
        real = training[_subset(rng, training_labels, size)]
        rows.append((frechet_distance(training, mine), *precision_recall(real, mine)))
    frechet_equal, precision, recall = np.mean(rows, axis=0).tolist()
    return Scores(
        count=len(images),
        accuracy=float(right.mean()),
        class_accuracy=_per_class(right, labels.numpy(), judge.classes),
        frechet=frechet_distance(training, features),
        frechet_equal=frechet_equal,
        precision=precision,
        recall=recall,
        near_copies=float((near.ratio < limit).mean()),
        nearest_median=float(np.median(near.distance)),
        nearest_5_percent=float(np.quantile(near.distance, 0.05)),
    )


def _subset(rng: np.random.Generator, labels: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Indices of a random subset that keeps the proportions of the classes.

    The held-out images were drawn in the same way. Random proportions would add to the distance.
    """
    order = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(place, kind="stable")[:size]


def _per_class(
    right: NDArray[np.bool_], labels: NDArray[np.int64], classes: int
) -> tuple[float | None, ...]:
    return tuple(
        float(right[labels == label].mean()) if (labels == label).any() else None
        for label in range(classes)
    )
