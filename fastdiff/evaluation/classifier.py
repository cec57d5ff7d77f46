"""The judge: a classifier trained on real images only, and its feature space.

It is a multilayer perceptron on pixels that reaches 98% on held-out digits after seconds of
training, and 96% on MNIST's. Fréchet distance, precision and recall are computed on its last hidden
layer, projected onto the principal components with 99.9% of the variance, because units that never
fire would make the covariance singular.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.data.config import CAPTIONED_SOURCES
from fastdiff.data.digits import CLASSES, digits_split
from fastdiff.data.mnist import mnist_split
from fastdiff.extras import import_extra

Features = NDArray[np.float64]
HIDDEN = (128, 32)
EPOCHS = 100
KEPT_VARIANCE = 0.999


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images to compare with: images (N, C, H, W) in [-1, 1], labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    class_names: tuple[str, ...]
    judge_shift: int = 0
    """The judge also trains on the images moved by so many pixels up, down, left and right."""


def _reference(
    split: Callable[..., tuple[Tensor, Tensor]], image_size: int, judge_shift: int = 0
) -> Reference:
    train_images, train_labels = split("train", image_size=image_size)
    held_out_images, held_out_labels = split("held-out", image_size=image_size)
    return Reference(
        train_images=train_images,
        train_labels=train_labels,
        held_out_images=held_out_images,
        held_out_labels=held_out_labels,
        class_names=CLASSES,
        judge_shift=judge_shift,
    )


@functools.cache
def digits_reference(image_size: int = 32) -> Reference:
    """The digits: 1,437 for training judge and model, and 360 that neither has seen."""
    return _reference(digits_split, image_size)


@functools.cache
def mnist_reference(image_size: int = 28) -> Reference:
    """5,000 digits of MNIST: 4,000 for training judge and model, and 1,000 that neither has seen.

    The judge reaches 92% on the held-out images, and 96% with shifts by a pixel.
    """
    return _reference(mnist_split, image_size, judge_shift=1)


def reference_of(model: Model) -> Reference:
    """The real images to compare a model's with: MNIST's if its run used them, else the digits.

    Raises:
        ValueError: the model makes pictures from captions, which no judge of digits can compare.
    """
    facts = model.provenance.get("facts")
    source = facts.get("data") if isinstance(facts, dict) else None
    size = model.image_size
    if source in CAPTIONED_SOURCES:
        raise ValueError(
            f"evaluate measures models of digits, and this one was trained on {source}; make "
            "pictures with it instead: fastdiff txt2img"
        )
    if source == "mnist-5k":
        return mnist_reference(size or 28)
    return digits_reference(size or 32)


class Judge:
    """Classifier and feature space, fitted only to the training images of a reference."""

    def __init__(self, reference: Reference, *, seed: int = 0) -> None:
        """Fit the judge. seed: determines the perceptron's initial weights and batches."""
        neural_network = import_extra("sklearn.neural_network", extra="train")
        decomposition = import_extra("sklearn.decomposition", extra="train")
        exceptions = import_extra("sklearn.exceptions", extra="train")
        copies = _moved(reference.train_images, reference.judge_shift)
        pixels, labels = pixels_of(torch.cat(copies)), reference.train_labels.numpy()
        self.classifier: Any = neural_network.MLPClassifier(
            HIDDEN, alpha=1e-2, max_iter=EPOCHS // len(copies), random_state=seed
        )
        with warnings.catch_warnings():
            # Stopping at max_iter is intended; the held-out accuracy shows whether it matters.
            warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
            self.classifier.fit(pixels, np.tile(labels, len(copies)))
        self.projection: Any = decomposition.PCA(KEPT_VARIANCE, svd_solver="full")
        self.projection.fit(self._hidden(pixels_of(reference.train_images)))
        self.classes = len(reference.class_names)
        self.shape = tuple(reference.train_images.shape[1:])

    def predict(self, images: Tensor) -> NDArray[np.int64]:
        """Classify images (N, C, H, W). Returns classes (N,)."""
        self.check(images)
        return self.classifier.predict(pixels_of(images))

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of the images that the judge classifies as their label."""
        return float((self.predict(images) == labels.numpy()).mean())

    def features(self, images: Tensor) -> Features:
        """Features (N, D) fp64 of images (N, C, H, W)."""
        self.check(images)
        return self.projection.transform(self._hidden(pixels_of(images))).astype(np.float64)

    def _hidden(self, pixels: NDArray[np.float32]) -> Features:
        h: Any = pixels.astype(np.float64)
        for weight, bias in zip(
            self.classifier.coefs_[:-1], self.classifier.intercepts_[:-1], strict=True
        ):
            h = np.maximum(h @ weight + bias, 0)
        return h

    def check(self, images: Tensor) -> None:
        """Raise ValueError unless the images have the shape that the judge was trained on."""
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"expected images of shape {self.shape}, on which the judge was trained, got "
                f"{tuple(images.shape[1:])}; evaluate a model with images of that shape"
            )


def _moved(images: Tensor, shift: int) -> list[Tensor]:
    """The images, and with a shift the images moved up, down, left and right, around the edges."""
    moves = [(0, 0), (-shift, 0), (shift, 0), (0, -shift), (0, shift)] if shift else [(0, 0)]
    return [images.roll(move, dims=(2, 3)) for move in moves]


def pixels_of(images: Tensor) -> NDArray[np.float32]:
    """(N, C, H, W) in [-1, 1] -> (N, C*H*W) fp32.

    Raises:
        ValueError: a pixel is NaN or infinite.
    """
    if not images.isfinite().all():
        raise ValueError("images to evaluate must be finite, got NaN or infinity; check the model")
    return images.detach().flatten(1).float().cpu().numpy()
