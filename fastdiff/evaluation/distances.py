"""Distances between sets of images: Fréchet, precision and recall, nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

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
    identity = torch.nn.Identity()
    identity.num_features = a.shape[1]
    distance = metric(feature=identity)
    distance.set_dtype(torch.float64)
    distance.update(torch.from_numpy(np.ascontiguousarray(a, dtype=np.float64)), real=True)
    distance.update(torch.from_numpy(np.ascontiguousarray(b, dtype=np.float64)), real=False)
    return max(0.0, float(distance.compute()))


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
