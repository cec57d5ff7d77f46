"""Augmentation: known transforms move pixels correctly, and depend on (seed, epoch, index) only."""

from __future__ import annotations

import pytest
import torch

from fastdiff.data import AugmentConfig
from fastdiff.data.augment import augment, uniforms

ALL = AugmentConfig(shift=2, rotation=15, scale=0.1, shear=8, flip=True)


def blobs(count: int = 6, size: int = 16) -> torch.Tensor:
    """(count, 1, size, size) smooth random images in [-1, 1]."""
    source = torch.Generator().manual_seed(0)
    small = torch.rand((count, 1, 4, 4), generator=source) * 2 - 1
    return torch.nn.functional.interpolate(small, (size, size), mode="bilinear")


def test_each_image_depends_on_seed_epoch_and_index_only() -> None:
    images = blobs()
    indices = torch.arange(6) + 10
    epochs = torch.tensor([0, 0, 1, 1, 2, 5])
    together = augment(images, indices, epochs, seed=7, config=ALL)
    for row in range(6):
        alone = augment(
            images[row : row + 1], indices[row : row + 1], epochs[row : row + 1], seed=7, config=ALL
        )
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)
    for other in (
        augment(images, indices, epochs, seed=8, config=ALL),
        augment(images, indices, epochs + 1, seed=7, config=ALL),
        augment(images, indices + 1, epochs, seed=7, config=ALL),
    ):
        assert ((other - together).flatten(1).abs().amax(1) > 0.01).all()


def test_moments_of_a_bright_square_move_as_asked() -> None:
    size = 64
    image = torch.full((1, 1, size, size), -1.0)
    image[..., 24:40, 20:44] = 1.0  # 24 wide, 16 high, centred
    count = 256
    images = image.expand(count, -1, -1, -1)
    axis = torch.arange(size) + 0.5 - size / 2

    def moments(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mass = (batch[:, 0] + 1) / 2
        total = mass.sum((1, 2))
        x = (mass.sum(1) * axis).sum(1) / total
        y = (mass.sum(2) * axis).sum(1) / total
        return total, x, y

    def run(config: AugmentConfig) -> torch.Tensor:
        return augment(
            images, torch.arange(count), torch.zeros(count).long(), seed=0, config=config
        )

    u = uniforms(torch.arange(count), torch.zeros(count).long(), seed=0)
    total, x, y = moments(run(AugmentConfig(shift=5)))
    torch.testing.assert_close(x, (2 * u[:, 4] - 1) * 5, atol=0.05, rtol=0)
    torch.testing.assert_close(y, (2 * u[:, 5] - 1) * 5, atol=0.05, rtol=0)
    torch.testing.assert_close(total, torch.full((count,), 384.0), rtol=0.02, atol=0)

    total, x, y = moments(run(AugmentConfig(scale=0.2)))
    area = (1 + (2 * u[:, 2] - 1) * 0.2) * (1 + (2 * u[:, 3] - 1) * 0.2)
    torch.testing.assert_close(total, 384 * area, rtol=0.03, atol=0)
    assert x.abs().max() < 0.1

    for config in (AugmentConfig(rotation=30), AugmentConfig(shear=20)):  # both keep the area
        total, x, y = moments(run(config))
        torch.testing.assert_close(total, torch.full((count,), 384.0), rtol=0.03, atol=0)
        assert max(float(x.abs().max()), float(y.abs().max())) < 0.1
    turned = (run(AugmentConfig(rotation=30))[:, 0] + 1) / 2
    cross = (turned * axis[None, :, None] * axis[None, None, :]).sum((1, 2)) / turned.sum((1, 2))
    angle = torch.deg2rad((2 * u[:, 0] - 1) * 30)  # covariance of a turned 24 x 16 rectangle
    expected = (24**2 - 16**2) / 12 / 2 * torch.sin(2 * angle)
    assert min((cross - expected).abs().max(), (cross + expected).abs().max()) < 0.6


def test_flip_mirrors_about_half_and_probability_leaves_the_rest_untouched() -> None:
    images = blobs(1).expand(400, -1, -1, -1)
    indices, epochs = torch.arange(400), torch.zeros(400).long()
    flipped = augment(images, indices, epochs, seed=1, config=AugmentConfig(flip=True))
    mirrored = (flipped - images.flip(-1)).flatten(1).abs().amax(1) < 1e-4
    same = (flipped - images).flatten(1).abs().amax(1) < 1e-4
    assert (mirrored ^ same).all()
    assert 150 < int(mirrored.sum()) < 250
    config = AugmentConfig(shift=3, probability=0.25)
    moved = augment(images, indices, epochs, seed=1, config=config)
    untouched = (moved == images).flatten(1).all(1)
    assert 250 < int(untouched.sum()) < 350


def test_uniforms_are_uniform_and_independent() -> None:
    u = uniforms(torch.arange(20_000), torch.zeros(20_000).long(), seed=5)
    assert ((u >= 0) & (u < 1)).all()
    torch.testing.assert_close(u.mean(0), torch.full((8,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(u.var(0), torch.full((8,), 1 / 12), atol=0.003, rtol=0)
    correlation = torch.corrcoef(u.T) - torch.eye(8)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize(
    "changes",
    [{"shift": -1}, {"scale": 1.0}, {"rotation": 181}, {"shear": 90}, {"probability": 1.5}],
)
def test_impossible_ranges_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="augment"):
        AugmentConfig(**changes)  # type: ignore[arg-type]
