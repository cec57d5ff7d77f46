"""Distances between sets of images: Fréchet, kernel, precision and recall, nearest neighbours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.extras import import_extra

Rows = NDArray[np.float64] | NDArray[np.float32]


def frechet_distance(a: Rows, b: Rows) -> float:
    """|mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017).

    a, b: (N, D) and (M, D), fp64. It is computed by torchmetrics. It is biased upwards by about
    1/N, so only distances between sets of equal size are comparable.
    """
    metric = import_extra("torchmetrics.image.fid", extra="train").FrechetInceptionDistance
    distance = metric(feature=_as_they_are(a))
    distance.set_dtype(torch.float64)
    distance.update(_tensor(a), real=True)
    distance.update(_tensor(b), real=False)
    return max(0.0, float(distance.compute()))


def kernel_distance(
    a: Rows, b: Rows, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The kernel distance KID (Bińkowski et al. 2018): squared MMD, unbiased, of the kernel
    (x y / D + 1)³; the mean and standard deviation over random subsets. May be negative.

    a, b: (N, D) and (M, D), fp64. subset_size: at most N and M are taken; with all of both there is
    one subset. It is computed by torchmetrics.
    """
    metric = import_extra("torchmetrics.image.kid", extra="train").KernelInceptionDistance
    size = min(subset_size, len(a), len(b))
    if size == len(a) == len(b):
        subsets = 1
    with _drawing(seed):
        distance = metric(feature=_as_they_are(a), subsets=subsets, subset_size=size)
        distance.set_dtype(torch.float64)
        distance.update(_tensor(a), real=True)
        distance.update(_tensor(b), real=False)
        mean, deviation = distance.compute()
    return float(mean), float(deviation)


def inception_score(logits: Rows, *, splits: int = 10, seed: int = 0) -> float:
    """The Inception score exp E KL(p(y | x) || p(y)) (Salimans et al. 2016), the mean over splits.

    logits: (N, K), fp64; with fewer than ten images per split there are fewer splits. It is
    computed by torchmetrics.
    """
    metric = import_extra("torchmetrics.image.inception", extra="train").InceptionScore
    with _drawing(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="std")  # of a single split
        score = metric(feature=_as_they_are(logits), splits=min(splits, max(len(logits) // 10, 1)))
        score.set_dtype(torch.float64)
        score.update(_tensor(logits))
        mean, _ = score.compute()
    return float(mean)


def _as_they_are(rows: Rows) -> Any:
    """What torchmetrics takes for an Inception network: rows pass through."""
    identity = torch.nn.Identity()
    identity.num_features = rows.shape[1]
    return identity


def _tensor(rows: Rows) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float64))


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """torchmetrics draws from torch's generator, which keeps its state, and warns of memory."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `.*` will save all extracted features")
        torch.manual_seed(seed)
        yield


def precision_recall(real: Rows, generated: Rows, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A set's manifold is the union of balls around its points, each extending to the k-th neighbour
    within the set. Precision is the fraction of generated points inside the real manifold; recall
    is the fraction of real points inside the generated one. torchmetrics implements neither.

    real, generated: (N, D) and (M, D).
    """
    return _covered(real, generated, k), _covered(generated, real, k)


def _covered(manifold: Rows, points: Rows, k: int) -> float:
    neighbours = import_extra("sklearn.neighbors", extra="train").NearestNeighbors
    pairwise = import_extra("sklearn.metrics", extra="train").pairwise_distances
    # k + 1, because the first neighbour of each point is the point itself.
    radii = neighbours(n_neighbors=k + 1).fit(manifold).kneighbors(manifold)[0][:, -1]
    return float((pairwise(points, manifold) <= radii).any(axis=1).mean())


@dataclass(frozen=True)
class Neighbours:
    """The nearest training image of each point: its index, its distance, and a relative distance.

    index: (N,), into the training set. distance: (N,), Euclidean, on pixels from -1 to 1.
    ratio: (N,), distance divided by the mean distance to the 50 nearest: 0 for a copy, 1 for an
    image equally close to many. Unlike the distance itself, it does not flag plain shapes that are
    close to everything (Carlini et al. 2023, section 4.2).
    """

    index: NDArray[np.int64]
    distance: NDArray[np.float64]
    ratio: NDArray[np.float64]


def nearest_training(points: Rows, training: Rows, *, crowd: int = 50) -> Neighbours:
    """Find the nearest training images of each point.

    points: (N, D), training: (M, D). crowd: number of neighbours that the ratio averages over.
    """
    neighbours = import_extra("sklearn.neighbors", extra="train").NearestNeighbors
    # fp64, because |a|² - 2ab + |b|² in fp32 could give 0.01 instead of 0 for a copy.
    search = neighbours(n_neighbors=min(crowd, len(training)), algorithm="brute")
    search.fit(training.astype(np.float64))
    distance, index = search.kneighbors(points.astype(np.float64))
    mean = np.maximum(distance.mean(axis=1), np.finfo(np.float64).tiny)
    return Neighbours(index[:, 0], distance[:, 0], distance[:, 0] / mean)
