"""Bits per dimension of a model of pixels, against the sum written out with torch's normals."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.cli import main
from fastdiff.data import digits_split
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.evaluation import bits_per_dimension, digits_bits
from fastdiff.generate.job import SampleSettings
from fastdiff.kernels import SAMPLER_NOISE, philox_normal
from tests.support.tiny import UNET, tiny_model, tiny_unet

SCHEDULE = ScheduleConfig(num_timesteps=20, beta_end=0.4)


def pixels(learned: bool, **changes) -> Model:
    config = replace(
        UNET,
        in_channels=1,
        out_channels=2 if learned else 1,
        learned_sigma=learned,
        num_classes=10,
        norm_groups=4,
    )
    fields = {"denoiser": tiny_unet(config), "autoencoder": None, "image_size": 8}
    return tiny_model(**{**fields, "schedule": SCHEDULE, "class_names": (), **changes})


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("spacing", [None, "5"])
def test_the_bound_is_the_sum_of_the_papers_terms(learned: bool, spacing: str | None) -> None:
    model = pixels(learned)
    network = copy.deepcopy(model.denoiser).eval()  # as it is before it is prepared
    result = digits_bits(model, count=3, settings=SampleSettings(spacing=spacing), first_seed=7)
    x0, y = (part[:3] for part in digits_split("held-out", image_size=8))
    visited = [0, 5, 10, 14, 19] if spacing else list(range(20))
    total = NoiseSchedule(SCHEDULE).alphas_cumprod[visited]
    before = torch.cat([torch.ones(1).double(), total[:-1]])
    beta = 1 - total / before
    small = beta * (1 - before) / (1 - total)
    small[0] = small[1]
    expected = torch.zeros(3, dtype=torch.float64)
    for i, t in enumerate(visited):
        n = philox_normal(torch.arange(7, 10), (1, 8, 8), step=i, stream=SAMPLER_NOISE).double()
        x = total[i].sqrt() * x0.double() + (1 - total[i]).sqrt() * n
        with torch.no_grad():
            output = network(x.float(), torch.full((3,), t), y=y).double()
        d = (x - (1 - total[i]).sqrt() * output[:, :1]) / total[i].sqrt()
        d = d.clamp(-1, 1)
        log_variance = small[i].log().expand_as(d)
        if learned:
            f = (output[:, 1:] + 1) / 2
            log_variance = f * beta[i].log() + (1 - f) * small[i].log()
        to_x0 = before[i].sqrt() * beta[i] / (1 - total[i])
        to_x = (1 - beta[i]).sqrt() * (1 - before[i]) / (1 - total[i])
        p = Normal(to_x0 * d + to_x * x, (0.5 * log_variance).exp())
        if i == 0:
            upper = torch.where(x0 > 0.99, 1.0, p.cdf(x0 + 1 / 16))
            lower = torch.where(x0 < -0.99, 0.0, p.cdf(x0 - 1 / 16))
            nats = -(upper - lower).clamp(min=1e-12).log()
        else:
            q = Normal(to_x0 * x0 + to_x * x, small[i].sqrt())
            nats = kl_divergence(q, p)
        expected += nats.mean((1, 2, 3)) / math.log(2)
    q = Normal(total[-1].sqrt() * x0.double(), (1 - total[-1]).sqrt())
    expected += kl_divergence(q, Normal(0.0, 1.0)).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(result.bound.total, expected, rtol=1e-3, atol=1e-3)
    assert result.bound.timesteps == tuple(visited)
    assert result.variance == ("learned" if learned else "fixed_small")
    assert sum(result.parts.values()) == pytest.approx(result.mean, rel=1e-9)


def test_an_image_does_not_depend_on_the_others() -> None:
    model = pixels(True)
    images, labels = (part[:70] for part in digits_split("held-out", image_size=8))
    settings = SampleSettings(spacing="2")
    whole = bits_per_dimension(model, images, labels, bin_width=0.1, settings=settings)
    last = bits_per_dimension(
        model, images[67:], labels[67:], bin_width=0.1, settings=settings, first_seed=67
    )
    torch.testing.assert_close(whole.bound.total[67:], last.bound.total, rtol=1e-5, atol=1e-5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_bundle(pixels(True), tmp_path / "model")
    out = tmp_path / "out"
    words = ["evaluate", "--model", str(tmp_path / "model"), "--bits", "--count", "4"]
    assert main([*words, "--spacing", "6", "--out", str(out), "--device", "cpu"]) == 0
    report = json.loads((out / "bits.json").read_text())
    assert f"{report['bits_per_dimension']:.3f}, standard error" in capsys.readouterr().out
    assert (report["images"], report["bin_width"], len(report["terms"])) == (4, 0.125, 6)
    whole = sum(report["terms"]) + report["prior"]
    assert report["bits_per_dimension"] == pytest.approx(whole, rel=1e-9)
    with Image.open(out / "bits.png") as curve:
        colours = {colour for _, colour in curve.convert("RGB").getcolors(1 << 24) or []}
    assert (0, 0x72, 0xB2) in colours


def test_what_has_no_bits() -> None:
    with pytest.raises(ValueError, match=r"denoises latents .* train a model without autoencoder"):
        digits_bits(tiny_model(denoiser=tiny_unet(replace(UNET, num_classes=10))))
    with pytest.raises(ValueError, match="expected a model of grey digits, got 1 channels and 4"):
        digits_bits(tiny_model())
    for settings, message in (
        (SampleSettings(steps=5, spacing="karras"), "the bound visits whole timesteps"),
        (SampleSettings(spacing="trailing"), "needs steps too"),
    ):
        with pytest.raises(ValueError, match=message):
            digits_bits(pixels(False), count=1, settings=settings)
