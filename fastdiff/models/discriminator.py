"""The patch discriminator of the autoencoder's adversarial loss.

Isola et al. 2017 (arXiv 1611.07004), as in VQGAN and latent diffusion (Esser et al. 2021, section
3.1). Every output judges one patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastdiff.models.layers import GroupNorm


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The architecture of a patch discriminator."""

    image_channels: int = 3  # channels of the image, values in [-1, 1]
    model_channels: int = 64  # width of the first convolution; doubles up to 8 times
    num_layers: int = 3  # convolutions of stride 2; 3 gives patches of 70x70 pixels, 2 of 34x34
    norm: Literal["batch", "group"] = "batch"  # batch: the papers'; group: independent of the batch

    def __post_init__(self) -> None:
        for name in ("image_channels", "model_channels", "num_layers"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"DiscriminatorConfig: {name} must be positive, got {value}")
        if self.norm not in ("batch", "group"):
            raise ValueError(
                f"DiscriminatorConfig: norm must be 'batch' or 'group', got {self.norm!r}"
            )
        if self.norm == "group" and self.model_channels % GROUPS:
            raise ValueError(
                f"DiscriminatorConfig: model_channels must be a multiple of {GROUPS} with "
                f"norm 'group', got {self.model_channels}"
            )


GROUPS = 8


class Normalize(nn.Module):
    """GroupNorm without activation, from one tensor to one tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, GROUPS, 1e-5, activation="none")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[0]


class PatchDiscriminator(nn.Module):
    """4x4 convolutions with LeakyReLU(0.2); logits per patch, large for real images."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels
        layers: list[nn.Module] = [
            nn.Conv2d(config.image_channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for index in range(1, config.num_layers + 1):
            out = config.model_channels * min(2**index, 8)
            stride = 2 if index < config.num_layers else 1
            norm = nn.BatchNorm2d(out) if config.norm == "batch" else Normalize(out)
            layers += [
                nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False),
                norm,
                nn.LeakyReLU(0.2),
            ]
            width = out
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, image_channels, H, W) in [-1, 1] -> logits (N, 1, h, w), h about H / 2^num_layers.

        Raises:
            ValueError: wrong number of channels, or an image smaller than the convolutions need.
        """
        channels, smallest = self.config.image_channels, 3 * 2**self.config.num_layers
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < smallest:
            raise ValueError(
                f"image must be (N, {channels}, H, W) with sides of {smallest} or more, "
                f"got {tuple(x.shape)}; use fewer num_layers for small images"
            )
        return self.layers(x)


def _init(module: nn.Module) -> None:
    """Initialise weights from a normal distribution with std 0.02, as in pix2pix and DCGAN."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
