"""The published metrics, FID, KID, IS, precision and recall, on features of your own network.

fastdiff ships no Inception network. `load_inception` opens yours, and `inception_scores` measures
by torchmetrics what the network returns for both sets of images.
"""

from __future__ import annotations

import importlib
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from fastdiff.files import printable
from fastdiff.images import to_uint8

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class InceptionScores:
    """Metrics of a set of images against a set of real ones, on an Inception network's features."""

    count: int
    """Number of images."""
    real_count: int
    """Number of real images that they are compared with."""
    feature_dim: int
    """Number of features."""
    fid: float
    """Fréchet distance (Heusel et al. 2017); it falls with the numbers of images."""
    kid: float
    """Kernel distance, unbiased (Bińkowski et al. 2018): the mean over subsets."""
    kid_deviation: float
    """Standard deviation over the subsets, 0 where a subset is a whole set."""
    precision: float
    """Fraction inside the manifold of the real images (Kynkäänniemi et al. 2019)."""
    recall: float
    """Fraction of the real images inside the set's manifold."""
    inception_score: float | None
    """exp of the mean divergence of the classes' probabilities from their mean (Salimans et al.
    2016); None if the network returns features alone."""


def load_inception(place: str) -> nn.Module:
    """Load an Inception network.

    It gets images (N, 3, H, W), uint8 from 0 to 255, of any size, on the CPU, and returns features
    (N, D), or features and logits (N, K), from which the Inception score is computed.

    Args:
        place: a TorchScript file, or ``module:function``, where the function takes no arguments and
            returns the network. Modules are also searched in the current folder. Either runs code:
            open only what you trust.

    Raises:
        FileNotFoundError, ValueError: there is no such file, module or function, or it is of
            another kind.
    """
    path = Path(place)
    if path.is_file():
        return _script(path)
    name, colon, function = place.partition(":")
    if not colon or path.suffix:
        raise FileNotFoundError(
            f"no Inception network at {printable(place)}; give a TorchScript file, or "
            "module:function for a function that returns the network"
        )
    network = _function(name, function)()
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{printable(place)} must return the network, a torch.nn.Module, got "
            f"{type(network).__name__}; name a function without arguments that returns it"
        )
    return network.eval()


def _script(path: Path) -> nn.Module:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            is_script = any(name.endswith("/constants.pkl") for name in file.namelist())
        if is_script:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript by torch
                return torch.jit.load(path, map_location="cpu").eval()
    raise ValueError(
        f"{printable(str(path))} is not a TorchScript file; write one with "
        "torch.jit.trace(network, images).save(path), or give module:function for a function that "
        "returns the network"
    )


def _function(name: str, function: str) -> Callable[[], Any]:
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # it exists, and lacks a module of its own
        raise ValueError(
            f"no module {printable(name)}; start fastdiff in its folder, or set PYTHONPATH"
        ) from None
    finally:
        if added:
            sys.path.remove(folder)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(
            f"module {printable(name)} has no function {printable(function)}; name one without "
            "arguments that returns the network"
        )
    return found


@torch.no_grad()
def inception_features(
    network: nn.Module, images: Tensor, *, batch: int = BATCH
) -> tuple[Tensor, Tensor | None]:
    """What the network returns for images.

    images: (N, C, H, W) in [-1, 1], C = 1 (repeated) or 3; rounded to 8 bits, as they are saved.

    Returns features (N, D) and logits (N, K) or None, both fp64.

    Raises:
        ValueError: the output is not of that form, not finite, or probabilities.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1 or 3, H, W), got {tuple(images.shape)}")
    parts: list[tuple[Tensor, Tensor | None]] = []
    for part in images.split(batch):
        output = network(to_uint8(part).expand(-1, 3, -1, -1).contiguous())
        pair = tuple(output) if isinstance(output, tuple | list) else (output, None)
        features, logits = pair if len(pair) == 2 else (None, None)
        for values in (features, logits) if logits is not None else (features,):
            if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(part):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(output).__name__
                raise ValueError(
                    f"the Inception network must return features ({len(part)}, D) or a pair of "
                    f"features and logits, got {got}; wrap it in a function of a module of yours "
                    "and give module:function"
                )
            if not bool(values.isfinite().all()):
                raise ValueError(
                    "the Inception network returned NaN or infinity; check that it takes images "
                    "(N, 3, H, W) in uint8 from 0 to 255"
                )
        assert features is not None
        parts.append((features.double().cpu(), None if logits is None else logits.double().cpu()))
    whole = torch.cat([features for features, _ in parts])
    if bool((whole >= 0).all()) and bool(((whole.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "the Inception network returned probabilities, whose rows sum to 1, instead of "
            "features; wrap it in a function of a module of yours that returns the features, for "
            "StyleGAN's file by its argument return_features=True, and give module:function"
        )
    given = [logits for _, logits in parts if logits is not None]
    return whole, torch.cat(given) if given else None


def inception_scores(
    real: Tensor, images: Tensor, network: nn.Module, *, seed: int = 0
) -> InceptionScores:
    """Measure images against real ones.

    real, images: (M, C, H, W) and (N, C, H, W) in [-1, 1], at least 4 each; about equally many, or
    precision and recall compare manifolds of different density. network: as `load_inception`
    returns it. seed: of the subsets of KID and the Inception score.

    Raises:
        ValueError: too few images, or as `inception_features`.
    """
    if min(len(real), len(images)) < 4:
        raise ValueError(f"expected at least 4 images each, got {len(real)} and {len(images)}")
    wanted, _ = inception_features(network, real)
    features, logits = inception_features(network, images)
    a, b = wanted.numpy(), features.numpy()
    kid, deviation = kernel_distance(a, b, seed=seed)
    precision, recall = precision_recall(a, b)
    return InceptionScores(
        count=len(images),
        real_count=len(real),
        feature_dim=a.shape[1],
        fid=frechet_distance(a, b),
        kid=kid,
        kid_deviation=deviation,
        precision=precision,
        recall=recall,
        inception_score=None if logits is None else inception_score(np.asarray(logits), seed=seed),
    )
