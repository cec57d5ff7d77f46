"""Class accuracy and Fréchet distance of small sets of samples of the digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.data.digits import CLASSES
from fastdiff.evaluation import Judge, digits_reference
from fastdiff.evaluation.distances import frechet_distance


@dataclass(frozen=True)
class Score:
    """accuracy: fraction that the judge classifies as requested. frechet: the distance to the
    training images, divided by that of as many held-out images."""

    accuracy: float
    frechet: float


class SmallSets:
    """Scores sets of one size, `per_class` images of each digit, at most 35.

    The Fréchet distance of a small set is biased, by about 1 / N, so its ratio to that of real
    images is only comparable within the same `per_class`.
    """

    def __init__(self, per_class: int, *, image_size: int = 32) -> None:
        reference = digits_reference(image_size)
        labels = reference.held_out_labels
        places = [torch.nonzero(labels == digit).flatten() for digit in range(len(CLASSES))]
        fewest = min(map(len, places))
        if not 1 <= per_class <= fewest:
            raise ValueError(
                f"per_class must be from 1 to {fewest}, the held-out images of the rarest digit, "
                f"got {per_class}"
            )
        self.per_class = per_class
        self.labels = [index % len(CLASSES) for index in range(per_class * len(CLASSES))]
        """What to sample: cycling through the digits."""
        self._judge = Judge(reference)
        self._training = self._judge.features(reference.train_images)
        chosen = torch.cat([place[:per_class] for place in places])
        self._floor = self._distance(reference.held_out_images[chosen])

    def score(self, images: Tensor) -> Score:
        """images: (len(self.labels), C, H, W) in [-1, 1], of the classes in `labels`."""
        wanted = torch.tensor(self.labels)
        if len(images) != len(wanted):
            raise ValueError(f"expected {len(wanted)} images, got {len(images)}")
        return Score(self._judge.accuracy(images, wanted), self._distance(images) / self._floor)

    def _distance(self, images: Tensor) -> float:
        return frechet_distance(self._training, self._judge.features(images))
