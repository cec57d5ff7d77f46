"""The patch discriminator and the perceptual distances."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from fastdiff.models.perceptual import LPIPS, LocalFeatureLoss, derivative_filters


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_judges_its_patch_and_nothing_else(layers: int, patch: int) -> None:
    """Receptive fields of Isola et al. 2017, appendix: 16, 34 (not listed there) and 70 pixels."""
    torch.manual_seed(0)
    config = DiscriminatorConfig(image_channels=1, model_channels=8, num_layers=layers)
    model = PatchDiscriminator(config).double().eval()
    x = randn(1, 1, 96, 96).requires_grad_()
    logits = model(x)
    middle = logits.shape[2] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    rows = gradient[0, 0].any(1).nonzero()
    assert rows[-1] - rows[0] + 1 == patch


def test_discriminator_is_the_published_one() -> None:
    """2,768,705 parameters: what pix2pix prints for its pairs of RGB images, 70x70 patches."""
    model = PatchDiscriminator(DiscriminatorConfig(image_channels=6))
    assert sum(p.numel() for p in model.parameters()) == 2_768_705
    deep = PatchDiscriminator(DiscriminatorConfig(model_channels=8, num_layers=5))
    widths = [layer.out_channels for layer in deep.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [8, 16, 32, 64, 64, 64, 1]  # eight times the first at most
    slopes = [layer.negative_slope for layer in model.layers if isinstance(layer, nn.LeakyReLU)]
    assert slopes == [0.2] * 4


def test_discriminator_groups_do_not_mix_samples_and_errors_are_clear() -> None:
    config = DiscriminatorConfig(image_channels=1, model_channels=8, num_layers=1, norm="group")
    model = PatchDiscriminator(config).double()
    x = randn(3, 1, 12, 12)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"image must be \(N, 1, H, W\) with sides of 6 or more"):
        model(x[:, :, :5])


def vgg16() -> nn.Sequential:
    """torchvision's `features`, laid out by its published configuration D, up to relu5_3."""
    layers: list[nn.Module] = []
    width = 3
    for out in (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3):
        if isinstance(out, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
    return nn.Sequential(*layers)


def test_lpips_from_files_is_the_papers_formula(tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = vgg16()
    for layer in features:
        if isinstance(layer, nn.Conv2d):  # PyTorch's own start lets the features fade to nothing
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    linear = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    save_file(state | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg16.safetensors")
    lins = {f"lin{i}.model.1.weight": w for i, w in enumerate(linear)}
    torch.save(lins, tmp_path / "vgg.pth")
    model = LPIPS.from_files(tmp_path / "vgg16.safetensors", tmp_path / "vgg.pth")

    x, y = randn(2, 3, 32, 16, dtype=torch.float32), randn(2, 3, 32, 16, seed=1).float()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = torch.zeros(2)
    with torch.no_grad():
        # ImageNet's statistics are of images in [0, 1]
        a, b = ((((i + 1) / 2) - mean.view(3, 1, 1)) / std.view(3, 1, 1) for i in (x, y))
        for index, layer in enumerate(features):
            a, b = layer(a), layer(b)
            if index in (3, 8, 15, 22, 29):
                unit_a, unit_b = F.normalize(a, dim=1), F.normalize(b, dim=1)
                weighted = F.conv2d((unit_a - unit_b).square(), linear.pop(0))
                expected += weighted.mean((1, 2, 3))
        torch.testing.assert_close(model(x, y), expected, rtol=1e-4, atol=0)
        assert expected.min() > 0.1
        assert not model(x, x).any()

    with pytest.raises(ValueError, match=r"weights\.0 is missing; weights\.1 is missing"):
        LPIPS.from_files(tmp_path / "vgg16.safetensors")
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Path, protocol=2))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    for name in ("bad.pth", "cut.safetensors"):
        with pytest.raises(ValueError, match="cannot be read"):
            LPIPS.from_files(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        LPIPS.from_files(tmp_path / "absent.pth")


def test_derivative_filters_differentiate() -> None:
    """Zero on a constant, and only the right ones answer to a slope, a bowl and a saddle."""
    bank = derivative_filters().double()
    axis = torch.arange(-3, 4, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    answers = {
        "constant": (torch.ones_like(x), []),
        "x": (x, [0]),
        "y": (y, [1]),
        "x^2 - y^2": (x**2 - y**2, [2, 3]),
        "xy": (x * y, [4]),
    }
    for name, (image, expected) in answers.items():
        response = (bank[:, 0] * image).sum((1, 2))
        assert response.abs().gt(1e-5).nonzero().flatten().tolist() == expected, name
    torch.testing.assert_close(bank.square().sum((1, 2, 3)), torch.ones(5).double())


def test_local_feature_loss_sees_structure_not_brightness() -> None:
    loss = LocalFeatureLoss().double()
    x = randn(2, 1, 32, 32).clamp(-1, 1)
    assert not loss(x, x).any()
    torch.testing.assert_close(loss(x, x + 0.3), torch.zeros(2).double(), rtol=0, atol=1e-9)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    more = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    assert (loss(x, blurred) > 0.05).all()
    assert (loss(x, more) > loss(x, blurred)).all()
    assert (loss(x, -x) <= 4).all()
    torch.testing.assert_close(loss(x, more), loss(more, x))


def test_local_feature_loss_is_the_mean_over_its_scales() -> None:
    x, y = randn(2, 1, 32, 32).clamp(-1, 1), randn(2, 1, 32, 32, seed=3).clamp(-1, 1)
    one, three = (LocalFeatureLoss(scales=scales).double() for scales in (1, 3))
    pooled = [(F.avg_pool2d(x, 2**i), F.avg_pool2d(y, 2**i)) for i in range(3)]
    expected = torch.stack([one(a, b) for a, b in pooled]).mean(0)
    torch.testing.assert_close(three(x, y), expected)


def test_local_feature_loss_has_gradients_on_flat_images() -> None:
    flat = torch.zeros(1, 1, 16, 16, requires_grad=True)
    LocalFeatureLoss()(flat, randn(1, 1, 16, 16).float()).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()
    assert flat.grad.any()


def test_images_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="images must both be"):
        LocalFeatureLoss()(torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8))
