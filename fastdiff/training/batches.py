"""The images of a training step: order, augmentation, transfer to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.data import DataConfig, DataOrder, ImageDataset, augment


class Batches:
    """Images and labels of any step, as a function of (config, seed, step)."""

    def __init__(
        self,
        dataset: ImageDataset,
        config: DataConfig,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        assert dataset.channels == config.channels
        self.dataset = dataset
        self.config = config
        self.seed = seed
        self.device = device
        self.order = DataOrder(len(dataset), batch_size, seed=seed)

    def state(self) -> dict[str, Any]:
        """What must not change before a run is resumed: the number of images and their hash."""
        return {"images": len(self.dataset), "data": self.dataset.fingerprint}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the data differs from `state`; entries that it lacks are ignored."""
        now = self.state()
        if any(state.get(key, now[key]) != now[key] for key in now):
            raise ValueError(
                f"the images of {self.config.path or self.config.source} have changed since this "
                f"run was started ({state.get('images')} images then, {now['images']} now); "
                "restore them, or train in a new folder"
            )

    def places(self, step: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Indices and epochs (N,) of a step's images; rows: only of these rows of the batch."""
        indices, epochs = self.order.batch(step)
        return (indices, epochs) if rows is None else (indices[rows], epochs[rows])

    def images(self, step: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), fp32 in [-1, 1], and labels (N,) int64; rows: only these."""
        indices, epochs = self.places(step, rows)
        labels = self.dataset.labels[indices].to(self.device, non_blocking=True)
        return self.augmented(indices, epochs), labels

    def augmented(self, indices: Tensor, epochs: Tensor) -> Tensor:
        """Images (N, C, H, W) augmented for their epochs (N,), on the device."""
        images, _ = self.dataset.batch(indices)
        images = images.to(self.device, non_blocking=True)
        return augment(images, indices, epochs, seed=self.seed, config=self.config.augment)

    def fixed(self, count: int) -> Tensor:
        """Up to `count` unaugmented images, evenly spread over the data set, for previews."""
        indices = torch.linspace(0, len(self.dataset) - 1, min(count, len(self.dataset))).long()
        return self.dataset.batch(indices)[0].to(self.device)


def drawn(
    shape: Sequence[int], batch_size: int, source: torch.Generator, rows: Tensor | None
) -> Tensor:
    """Normal noise (N, ...) of a batch, or of some of its rows: the same whoever takes them.

    shape: (N, ...) of what is returned.
    """
    noise = torch.randn((batch_size, *shape[1:]), generator=source, device=source.device)
    return noise if rows is None else noise[rows.to(noise.device)]


def check_model_fits(config: DataConfig, *, channels: int, what: str) -> None:
    """Raise ValueError if a model for `channels` image channels cannot take the data."""
    if channels != config.channels:
        raise ValueError(
            f"the {what} expects images with {channels} channels, the data has {config.channels}; "
            f"set data channels to {channels}, or choose another model"
        )
