"""The judge of drawings, and what it says of a text-to-image model's pictures.

The judge is a contrastive net (`fastdiff.models.contrastive`), trained on drawings of all four
styles but for the pairs of style and object that are held out. It names a picture after the nearest
of the full captions of 853 objects in the styles that it is asked about. What it says of the
held-out drawings themselves, which it has not seen, is the ceiling of what it can say of a model's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.configs import to_dict
from fastdiff.data import AugmentConfig, DataConfig, ImageDataset, augment, generator, open_dataset
from fastdiff.data.config import EMOJI_STYLES, Split
from fastdiff.data.dataset import to_float
from fastdiff.data.emoji import SHIPPABLE, caption, emoji_folder
from fastdiff.data.order import DataOrder
from fastdiff.evaluation.classifier import pixels_of
from fastdiff.evaluation.distances import nearest_training
from fastdiff.evaluation.evaluate import NEAR_COPY_QUANTILE
from fastdiff.files import atomic_file
from fastdiff.generate.job import SampleSettings, TextJob
from fastdiff.generate.run import Progress, generate
from fastdiff.models.contrastive import Contrastive, ContrastiveConfig
from fastdiff.training.text import Captions, TextConfig

TOP = 5
EMBEDDED_AT_ONCE = 256
_VERSION = 1  # of the training below; part of the cached file's name
_TEXT = TextConfig(layers=2, heads=4, tokens=24, vocabulary=2048, full_caption=0.7)
_WIDTH = 128
_MOVED = AugmentConfig(shift=6, scale=0.2, rotation=15, probability=0.9, fill="border")


@dataclass(frozen=True, kw_only=True)
class JudgeTraining:
    """How the judge is trained."""

    steps: int = 2400
    """Batches."""
    batch_size: int = 128
    """Pictures per batch, each the opposite of all the others."""
    learning_rate: float = 1e-3
    """AdamW's largest rate, which rises for a tenth of the steps and falls along a cosine."""


@dataclass(frozen=True)
class Named:
    """What the judge calls each of N pictures."""

    objects: Tensor
    """(N, 5) int64: the objects of the nearest captions, the nearest first."""
    styles: Tensor
    """(N,) int64: the style of the nearest caption, as its place in the styles asked about."""


@dataclass(frozen=True, kw_only=True)
class DrawingScores:
    """What the judge says of a set of pictures."""

    count: int
    """Number of pictures."""
    top1: float
    """Fraction whose nearest caption is of the object that was asked for, among 853."""
    top5: float
    """Fraction with that object among the five nearest."""
    style: float
    """Fraction whose nearest caption is of the style that was asked for."""
    near_copies: float
    """Fraction closer to one training drawing than all but 5% of the held-out drawings are."""
    nearest_median: float
    """Median Euclidean distance to the nearest training drawing, on pixels from -1 to 1."""


class DrawingJudge:
    """The trained judge; `trained` makes one.

    Attributes:
        objects: the objects' names, in the order of the labels.
    """

    def __init__(self, net: Contrastive, captions: Captions, objects: Sequence[str]) -> None:
        self.net, self.captions, self.objects = net.eval(), captions, tuple(objects)

    @classmethod
    def trained(
        cls,
        image_size: int = 64,
        *,
        styles: tuple[str, ...] = EMOJI_STYLES,
        training: JudgeTraining | None = None,
        progress: Progress | None = None,
    ) -> DrawingJudge:
        """Train the judge, or read it from the cache: some minutes on one core.

        styles: what it is trained on; more of them make a better judge, of any of them.
        progress: called as progress(done, total) with steps of the training.

        Raises:
            FileNotFoundError: the drawings of the styles have not been fetched.
        """
        training = training or JudgeTraining()
        data = open_dataset(
            DataConfig(source="emoji", image_size=image_size, channels=3, styles=styles)
        )
        captions = Captions(data.captions, _TEXT)
        architecture = ContrastiveConfig(text=captions.transformer(_WIDTH))
        net = _new(architecture)
        facts = [_VERSION, to_dict(architecture), to_dict(training), to_dict(_TEXT)]
        facts += [to_dict(_MOVED), data.fingerprint]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        path = emoji_folder() / f"judge-{image_size}-{digest}.safetensors"
        if path.is_file():
            net.load_state_dict(load_file(path))
        else:
            _fit(net, data, captions, training, progress)
            with atomic_file(path) as temporary:
                save_file(net.state_dict(), temporary)
        return cls(net, captions, data.classes)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] to unit vectors (N, D)."""
        parts = images.split(EMBEDDED_AT_ONCE)
        return torch.cat([self.net.embed_images(part) for part in parts])

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Captions to unit vectors (N, D)."""
        parts = self.captions.ids(texts).split(EMBEDDED_AT_ONCE)
        return torch.cat([self.net.embed_text(part) for part in parts])

    def name(self, images: Tensor, styles: Sequence[str] = SHIPPABLE) -> Named:
        """Name pictures (N, 3, H, W) in [-1, 1] after the captions of all objects in `styles`."""
        texts = [caption(item, style) for style in styles for item in self.objects]
        closeness = self.embed(images) @ self.embed_text(texts).T
        return named(closeness.unflatten(1, (len(styles), len(self.objects))))


def named(closeness: Tensor) -> Named:
    """The nearest captions: closeness (N, styles, objects) of each picture to each caption."""
    best, style = closeness.max(1)  # of an object in any style
    objects = best.topk(min(TOP, best.shape[1]), dim=1).indices
    return Named(objects, style.gather(1, objects[:, :1]).squeeze(1))


def _new(config: ContrastiveConfig) -> Contrastive:
    torch.manual_seed(generator(0, "judge-weights").initial_seed())
    return Contrastive(config)


def _fit(
    net: Contrastive,
    data: ImageDataset,
    captions: Captions,
    training: JudgeTraining,
    progress: Progress | None,
) -> None:
    """Train on degraded pictures."""
    steps, rate = training.steps, training.learning_rate
    order = DataOrder(len(data), training.batch_size, seed=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for step in range(steps):
        indices, epochs = order.batch(step)
        source = generator(0, "judge", step)
        images = augment(data.batch(indices)[0], indices, epochs, seed=0, config=_MOVED)
        images = degraded(images, source).contiguous(memory_format=torch.channels_last)
        uniform = torch.rand(len(indices), 2, generator=source, dtype=torch.float64)
        ids = captions.drawn(indices, uniform, torch.zeros(len(indices), dtype=torch.bool))
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(images, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def degraded(images: Tensor, source: torch.Generator) -> Tensor:
    """Pictures as a small autoencoder might draw them: blurred, with noise, in other colours.

    images: (N, C, H, W) in [-1, 1]; half of them are blurred, all get noise and a change of colour.
    """
    count, side = len(images), images.shape[-1]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, 1, 1, generator=source)

    small = torch.nn.functional.interpolate(images, size=side // 2, mode="bilinear", antialias=True)
    soft = torch.nn.functional.interpolate(small, size=side, mode="bilinear")
    images = torch.where(uniform(1) < 0.5, torch.lerp(images, soft, uniform(1)), images)
    ink = (1 - images) * (0.8 + 0.4 * uniform(images.shape[1]))  # white stays white
    noise = torch.randn(images.shape, generator=source)
    return (1 - ink + 0.1 * uniform(1) * noise).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class DrawingReference:
    """Real drawings to compare with, in the styles that a model was trained on."""

    train: ImageDataset
    held_out: ImageDataset
    styles: tuple[str, ...]

    @classmethod
    def open(cls, image_size: int, styles: tuple[str, ...] = SHIPPABLE) -> DrawingReference:
        """Open both splits.

        Raises:
            FileNotFoundError: the drawings have not been fetched.
        """
        config = DataConfig(source="emoji", image_size=image_size, channels=3, styles=styles)
        return cls(
            train=open_dataset(config),
            held_out=open_dataset(replace(config, split="held-out")),
            styles=styles,
        )

    def asked(self, split: Split, count: int) -> tuple[list[str], Tensor, Tensor]:
        """Full captions of drawings, evenly spread over a split or cycling through it, with their
        objects (count,) and styles (count,)."""
        data = self.held_out if split == "held-out" else self.train
        total = len(data)
        places = [i % total for i in range(count)]
        if count < total:
            places = torch.linspace(0, total - 1, count).round().long().tolist()
        texts = [data.captions[place][0] for place in places]
        names = [f"{style} style" for style in self.styles]
        styles = [next(i for i, s in enumerate(names) if text.endswith(s)) for text in texts]
        return texts, data.labels[places], torch.tensor(styles)


class DrawingScorer:
    """Scores sets of pictures with one judge and reference."""

    def __init__(self, judge: DrawingJudge, reference: DrawingReference) -> None:
        self.judge, self.reference = judge, reference
        self._training = pixels_of(to_float(reference.train.images))
        near = nearest_training(pixels_of(to_float(reference.held_out.images)), self._training)
        self.near_copy_limit = float(np.quantile(near.ratio, NEAR_COPY_QUANTILE))

    def score(self, images: Tensor, objects: Tensor, styles: Tensor) -> DrawingScores:
        """images: (N, 3, H, W) in [-1, 1], of these objects (N,) in these styles (N,)."""
        found = self.judge.name(images, self.reference.styles)
        near = nearest_training(pixels_of(images), self._training)
        hits = found.objects == objects[:, None]
        return DrawingScores(
            count=len(images),
            top1=float(hits[:, 0].float().mean()),
            top5=float(hits.any(1).float().mean()),
            style=float((found.styles == styles).float().mean()),
            near_copies=float((near.ratio < self.near_copy_limit).mean()),
            nearest_median=float(np.median(near.distance)),
        )

    def ceiling(self) -> DrawingScores:
        """The scores of the held-out drawings themselves."""
        data = self.reference.held_out
        _, objects, styles = self.reference.asked("held-out", len(data))
        return self.score(to_float(data.images), objects, styles)


def sample_drawings(
    model: Model,
    texts: Sequence[str],
    *,
    settings: SampleSettings,
    first_seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """A picture of each caption, with seeds that count up: (N, 3, H, W) in [-1, 1]."""
    jobs = [
        TextJob(prompt=text, seed=first_seed + i, settings=settings) for i, text in enumerate(texts)
    ]
    return torch.stack([made.image for made in generate(model, jobs, progress=progress)])
