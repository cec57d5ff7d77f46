"""FID, KID, IS, precision and recall on a stand-in for Inception, against their formulas."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from fastdiff.cli import main
from fastdiff.evaluation.distances import inception_score, kernel_distance
from fastdiff.evaluation.inception import (
    inception_features,
    inception_scores,
    load_inception,
)

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")


class Features(nn.Module):
    """Six fixed nonlinear features of the pixels, and four logits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(3 * 16, 6, generator=generator) / 7)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh((images.flatten(1).float() / 127.5 - 1) @ self.weight)
        return features, 3 * features[:, :4]


class Alone(Features):
    """The features without the logits."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[0]


def pictures(count: int, seed: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, 4, 4, generator=generator) * 2 - 1 + 0.1 * (seed % 3)


def features_of(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """As the definition says: round to 8 bits, repeat grey, call the network."""
    levels = (((images.clamp(-1, 1) + 1) * 127.5).round()).to(torch.uint8)
    features, logits = Features()(levels.expand(-1, 3, -1, -1))
    return features.double().numpy(), logits.double().numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_every_metric_is_its_formula(channels: int) -> None:
    real, images = pictures(60, 1, channels), pictures(50, 2, channels)
    found = inception_scores(real, images, Features())
    (a, _), (b, logits) = features_of(real), features_of(images)
    assert (found.count, found.real_count, found.feature_dim) == (50, 60, 6)

    s, t = np.cov(a.T), np.cov(b.T)
    gap = a.mean(0) - b.mean(0)
    fid = gap @ gap + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert found.fid == pytest.approx(fid, rel=1e-6)

    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = torch.randperm(50).numpy()
    splits = [p[part] for part in np.split(order, 5)]  # ten images each
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in splits]
    assert found.inception_score == pytest.approx(np.mean(scores), rel=1e-9)

    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [np.sort(np.linalg.norm(manifold - m, axis=1))[3] for m in manifold]
        balls = list(zip(manifold, radii, strict=True))
        hits = [any(np.linalg.norm(x - m) <= r for m, r in balls) for x in points]
        return float(np.mean(hits))

    assert found.precision == pytest.approx(inside(b, a))
    assert found.recall == pytest.approx(inside(a, b))
    assert found.precision > 0
    state = torch.random.get_rng_state()
    assert inception_scores(real, images, Features()) == found
    assert torch.equal(torch.random.get_rng_state(), state)


def test_kid_of_whole_sets_is_the_unbiased_estimate() -> None:
    """Binkowski et al. 2018, eq. 4; with subsets, its mean over them is near it."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(40, 5)), generator.normal(0.4, size=(40, 5))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 5 + 1) ** 3)

    n = range(40)
    same = [[kernel(x[i], x[j]) for i in n for j in n if i != j] for x in (a, b)]
    cross = [kernel(x, y) for x in a for y in b]
    expected = sum(map(np.mean, same)) - 2 * np.mean(cross)
    mean, deviation = kernel_distance(a, b)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert deviation == 0
    mean, deviation = kernel_distance(a, b, subset_size=20)
    assert deviation > 0
    assert abs(mean - expected) < 3 * deviation / math.sqrt(100) + 0.05 * abs(expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("count", "expected"), [(8, 1.0), (200, 1.0), (8, 4.0), (200, 4.0)])
def test_inception_score_of_certain_classes(count: int, expected: float) -> None:
    """1 if all images are of one class, K if they are evenly of K."""
    places = np.arange(count) % int(expected)
    logits = np.full((count, 4), -200.0)
    logits[np.arange(count), places] = 200.0
    tolerance = 1e-9 if count == 8 or expected == 1 else 0.15  # splits are drawn, not balanced
    assert inception_score(logits) == pytest.approx(expected, rel=tolerance)


def test_a_network_without_logits() -> None:
    found = inception_scores(pictures(20, 1), pictures(20, 2), Alone())
    assert found.inception_score is None
    assert found.kid_deviation == 0


class Probabilities(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float().softmax(1)


class Maps(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class Infinite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 0


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Probabilities(), r"returned probabilities, .* give module:function"),
        (Maps(), r"must return features \(8, D\) .* got \(8, 3, 4, 4\); wrap it"),
        (Infinite(), r"NaN or infinity; check"),
    ],
)
def test_what_is_no_feature(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_features(network, pictures(8, 1))


def test_too_few_images_and_channels() -> None:
    with pytest.raises(ValueError, match="at least 4 images each, got 9 and 3"):
        inception_scores(pictures(9, 1), pictures(3, 1), Features())
    with pytest.raises(ValueError, match=r"\(N, 1 or 3, H, W\), got \(9, 2, 4, 4\)"):
        inception_features(Features(), torch.zeros(9, 2, 4, 4))


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
def test_a_torchscript_file_as_the_error_advises(tmp_path: Path) -> None:
    path = tmp_path / "network.pt"
    torch.save(Features().state_dict(), path)
    with pytest.raises(ValueError, match=r"is not a TorchScript file; write one with torch.jit.tr"):
        load_inception(str(path))
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    torch.jit.trace(Features(), images).save(path)
    network = load_inception(str(path))
    given, expected = (inception_features(n, pictures(8, 1)) for n in (network, Features()))
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_function_of_a_module_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = (
        "import torch\ndef network():\n    return torch.nn.Flatten()\ndef other():\n    return 3\n"
    )
    (tmp_path / "own_inception.py").write_text(source + "value = 1\n")
    (tmp_path / "own_broken.py").write_text("import a_module_that_is_missing\n")
    before = list(sys.path)
    network = load_inception("own_inception:network")
    assert isinstance(network, nn.Flatten)
    assert not network.training
    for place, message in {
        "own_inception:none": "has no function none; name one",
        "own_inception:value": "has no function value; name one",
        "own_inception:other": r"a torch.nn.Module, got int; name",
        "own_lost:network": "no module own_lost; start fastdiff in its folder, or set PYTHONPATH",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_inception(place)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        load_inception("own_broken:network")
    for lost in ("lost.pt", "lost", "C:lost.pt"):
        with pytest.raises(FileNotFoundError, match="give a TorchScript file, or module:function"):
            load_inception(lost)
    assert sys.path == before


def test_the_command_fails_before_it_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--inception", "lost.pt"]) == 2
    assert "no Inception network at lost.pt" in capsys.readouterr().err
    assert main(["evaluate", "--inception", "lost.pt", "--bits"]) == 2
    assert "does not go with --bits" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mean_rows.py").write_text(
        "import torch\n"
        "class Rows(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        return images[:, 0].float().mean(2)\n"
        "network = Rows\n"
    )
    options = ["--count", "360", "--steps", "1", "--inception", "mean_rows:network"]
    assert main(["evaluate", *options, "--out", "found"]) in (0, 1)
    assert "FID" in capsys.readouterr().out
    assert "| KID |" in (tmp_path / "found/results.md").read_text()
