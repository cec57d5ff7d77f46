"""The images of a training step: order, augmentation, transfer to the device."""

from __future__ import annotations

from collections.abc import Mapping
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

    def images(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch_size, C, H, W), fp32 in [-1, 1], and labels (batch_size,) int64."""
        indices, epochs = self.order.batch(step)
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


def check_model_fits(config: DataConfig, *, channels: int, what: str) -> None:
    """Raise ValueError if a model for `channels` image channels cannot take the data."""
    if channels != config.channels:
        raise ValueError(
            f"the {what} expects images with {channels} channels, the data has {config.channels}; "
            f"set data channels to {channels}, or choose another model"
        )
