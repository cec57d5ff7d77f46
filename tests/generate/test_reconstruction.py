"""Images through the autoencoder and back, and the measured loss."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.generate.reconstruction import psnr, reconstruct, ssim
from tests.support.tiny import tiny_autoencoder


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_is_the_autoencoder_called_plainly() -> None:
    autoencoder, x = tiny_autoencoder(), images()
    result = reconstruct(autoencoder, x, batch=2)
    with torch.no_grad():
        expected = autoencoder.decode(autoencoder.encode_latent(x)).clamp(-1, 1)
    torch.testing.assert_close(result.images, expected, rtol=1e-4, atol=1e-4)
    error = (expected.double() - x.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(result.psnr, 10 * torch.log10(4 / error), rtol=1e-3, atol=1e-3)
    assert result.latent_shape == (3, 8, 8)


def test_psnr_of_a_known_error() -> None:
    x = torch.zeros(2, 1, 4, 4)
    found = psnr(x + torch.tensor([0.2, 0.0]).reshape(2, 1, 1, 1), x)
    assert math.isclose(found[0], 20.0, rel_tol=1e-6)  # 10 log10(4 / 0.04)
    assert found[1] == math.inf


def test_ssim_of_flat_images_is_the_formula() -> None:
    """Wang et al. 2004, eq. 13, without variance: (2ab + c1) / (a² + b² + c1), c1 = (0.01 * 2)²."""
    pytest.importorskip("torchmetrics", reason="SSIM needs fastdiff[train]")
    a, b, c1 = 0.1, 0.3, 0.0004
    flat = torch.ones(2, 1, 16, 16, dtype=torch.float64)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(a * flat, b * flat).tolist() == pytest.approx([expected] * 2)
    torch.testing.assert_close(ssim(images(), images()), torch.ones(5, dtype=torch.float64))


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        reconstruct(tiny_autoencoder(), images(0))
