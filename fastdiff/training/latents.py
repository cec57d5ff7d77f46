"""Training data of the denoiser: pixels, or latents of a trained autoencoder.

Rombach et al. 2022 (arXiv 2112.10752), section 3.2: the first stage is frozen, and its latents are
divided by the standard deviation of the first batch (appendix G).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.data import generator
from fastdiff.files import one_line_errors
from fastdiff.models.autoencoder import Autoencoder, Posterior
from fastdiff.training.batches import Batches, drawn

_ENCODED_AT_ONCE = 256


class Latents:
    """Latents of any step (or pixels without a first stage), as a function of (data, seed, step).

    Attributes:
        scale_factor: factor of the latents before the denoiser sees them; 1 on pixels.
    """

    def __init__(
        self,
        batches: Batches,
        autoencoder: Autoencoder | None,
        *,
        first_stage_hash: str = "",
        views: int = 0,
    ) -> None:
        """Prepare the latents, and encode the views if there are any.

        Args:
            autoencoder: the frozen first stage; None to train on pixels.
            first_stage_hash: hash of its weights, which lets a resumed run detect a change.
            views: number of augmented views of each image to encode once, now; 0: encode every
                batch.
        """
        self.batches = batches
        self.autoencoder = autoencoder
        self.first_stage_hash = first_stage_hash
        self._views: Tensor | None = None
        self.scale_factor = 1.0
        if autoencoder is not None:
            self._views = self._encode_views(autoencoder, views) if views else None
            self.scale_factor = 1 / float(self.unscaled(0)[0].double().std())

    def batch(self, step: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x0 (N, C, h, w) fp32, scaled to unit variance on latents, and labels (N,) int64; rows:
        only of these rows of the step's batch."""
        x0, labels = self.unscaled(step, rows)
        return x0 * self.scale_factor, labels

    @torch.no_grad()
    def unscaled(self, step: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`batch` before scaling; latents of a KL autoencoder are sampled from its posterior."""
        if self.autoencoder is None:
            return self.batches.images(step, rows)
        if self._views is not None:
            moments, labels = self._from_views(self._views, step, rows)
        else:
            images, labels = self.batches.images(step, rows)
            moments = _moments(self.autoencoder, images)
        if self.autoencoder.config.regularization == "vq":
            return moments, labels
        mean, std = moments.chunk(2, dim=1)
        device = self.batches.device
        source = generator(self.batches.seed, "posterior", step, device=device)
        noise = drawn(mean.shape, self.batches.order.batch_size, source, rows)
        return mean + std * noise, labels

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images to what `batch` is without noise: the scaled modes of their latents.

        images: (N, image_channels, H, W) in [-1, 1]. Returns (N, C, h, w); on pixels the images.
        """
        if self.autoencoder is None:
            return images
        return self.autoencoder.encode_latent(images) * self.scale_factor

    def views_of(self, step: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Indices (N,) of a step's images, and the epochs (N,) whose augmentation they have."""
        indices, epochs = self.batches.places(step, rows)
        return indices, epochs if self._views is None else epochs % len(self._views)

    @property
    def factor(self) -> int:
        """Ratio of the sides of the images to those of x0."""
        return 1 if self.autoencoder is None else self.autoencoder.downsample_factor

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of one sample, for images with sides of `image_size` pixels."""
        if self.autoencoder is None:
            return self.batches.config.channels, image_size, image_size
        side = image_size // self.factor
        return self.autoencoder.config.latent_channels, side, side

    def decode(self, x0: Tensor) -> Tensor:
        """Decode the output of `batch`, or samples like it, to images (N, C, H, W) in [-1, 1]."""
        if self.autoencoder is None:
            return x0.clamp(-1, 1)
        return self.autoencoder.decode(x0 / self.scale_factor).clamp(-1, 1)

    def state(self) -> dict[str, Any]:
        """The scale factor, and the identity of the first stage and the images."""
        first_stage = {"scale_factor": self.scale_factor, "autoencoder": self.first_stage_hash}
        return first_stage | self.batches.state()

    def load_state(self, state: Mapping[str, Any], *, first_stage: str) -> None:
        """Restore the scale factor.

        first_stage: the path of the autoencoder, for the message.

        Raises:
            ValueError: the images or the autoencoder's weights differ from those in `state`.
        """
        self.batches.check_state(state)
        if state["autoencoder"] != self.first_stage_hash:
            raise ValueError(
                f"the autoencoder in {first_stage} has changed since this run was started; restore "
                "it, or train in a new folder"
            )
        self.scale_factor = state["scale_factor"]

    @torch.no_grad()
    def _encode_views(self, autoencoder: Autoencoder, views: int) -> Tensor:
        """Moments of `views` augmented views of every image: (views, images, C, h, w)."""
        dataset = self.batches.dataset
        rows: list[Tensor] = []
        for view in range(views):
            for indices in torch.arange(len(dataset)).split(_ENCODED_AT_ONCE):
                images = self.batches.augmented(indices, torch.full_like(indices, view))
                rows.append(_moments(autoencoder, images))
        return torch.cat(rows).unflatten(0, (views, len(dataset)))

    def _from_views(self, views: Tensor, step: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        indices, chosen = self.views_of(step, rows)
        device = self.batches.device
        moments = views[chosen.to(device), indices.to(device)]
        return moments, self.batches.dataset.labels[indices].to(device)


@one_line_errors()
def first_stage(folder: str, *, image_size: int, device: torch.device) -> Model:
    """Load the trained autoencoder from the folder of a bundle or a run.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it contains no autoencoder, or one that was trained at another image size.
    """
    bundle = load_bundle(folder, device=device)
    if bundle.autoencoder is None:
        raise ValueError(f"{folder} contains no autoencoder; pass the run folder of an autoencoder")
    if bundle.image_size != image_size:
        raise ValueError(
            f"image_size must be {bundle.image_size}, at which the autoencoder was trained, got "
            f"{image_size}; set data image_size to {bundle.image_size}"
        )
    return bundle


def _moments(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Latents before quantisation (vq), or the posterior's [mean | std] along the channels (kl)."""
    if autoencoder.config.regularization == "vq":
        return autoencoder.encode_latent(images)
    posterior = autoencoder.encode(images)
    assert isinstance(posterior, Posterior)
    return torch.cat([posterior.mean, torch.exp(0.5 * posterior.logvar)], dim=1)
