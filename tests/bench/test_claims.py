"""What papers claim: the pages follow from the records, and the measurements from formulas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the judge needs fastdiff[train]")
pytest.importorskip("torchmetrics", reason="the judge needs fastdiff[train]")

from benchmarks import quality
from benchmarks.claims import __main__ as claims
from benchmarks.claims import few_steps, guidance, inversion, resampling
from benchmarks.claims.claim import shown, verdict
from benchmarks.judging import SmallSets
from fastdiff.diffusion.samplers import SAMPLERS, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.evaluation import digits_reference


def test_the_page_follows_from_the_records() -> None:
    assert claims.PAGE.read_text() == claims.page(claims.records())
    for name in claims.records():
        if claims.CLAIMS[name].draw is not None:
            assert (claims.PICTURES / f"claim-{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ((1.0, 1.1, 0.9), (2.0, 2.2, 1.8), "**Holds**: with every seed, and by 5.0 times"),
        ((1.0, 1.1, 0.9), (1.05, 1.15, 0.95), "**Not shown**: .* 0.5 times .*, and has the right"),
        ((1.0, 1.1, 0.9), (3.0, 1.0, 2.0), "**Not shown**: .*, but does not have the right sign"),
        ((2.0, 2.1, 1.9), (1.0, 1.1, 0.9), "**Does not hold here.**"),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), "**Does not hold here.**"),
    ],
)
def test_verdicts(better: Any, worse: Any, expected: str) -> None:
    """The spread is the standard deviation over the seeds, 0.1 and 0.2 in the first row."""
    pattern = expected.replace("**", r"\*\*")
    assert re.match(pattern, verdict(better, worse))


def test_a_mean_and_its_spread() -> None:
    assert shown([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"


def test_small_sets_of_real_images_are_the_floor() -> None:
    """The held-out images that the floor is of score 1, and noise is far away."""
    sets = SmallSets(12)
    reference = digits_reference()
    labels = reference.held_out_labels
    first = {digit: torch.nonzero(labels == digit).flatten()[:12].tolist() for digit in range(10)}
    order = [first[label].pop(0) for label in sets.labels]
    images = reference.held_out_images[order]
    score = sets.score(images)
    assert score.frechet == pytest.approx(1, rel=1e-6)
    assert score.accuracy > 0.95
    assert sets.score(images.roll(1, 0)).accuracy < 0.1
    assert sets.score(torch.rand_like(images) * 2 - 1).frechet > 10
    with pytest.raises(ValueError, match="expected 120 images, got 119"):
        sets.score(images[:-1])
    with pytest.raises(ValueError, match="per_class must be from 1 to 3"):
        SmallSets(99)


def test_the_best_estimate_of_a_mixture() -> None:
    """Far from all other centres it is that of one Gaussian, and on the middle between two centres
    it lies in the middle."""
    centres = torch.tensor([[0.0, 0.0], [40.0, 0.0]], dtype=torch.float64)
    x, alpha, sigma = torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.8, 0.6
    gain = alpha * inversion.WIDTH**2 / ((alpha * inversion.WIDTH) ** 2 + sigma**2)
    torch.testing.assert_close(inversion.best_x0(x, alpha, sigma, centres), gain * x)
    middle = torch.tensor([[alpha * 20.0, 0.0]], dtype=torch.float64)
    found = inversion.best_x0(middle, alpha, sigma, centres)
    torch.testing.assert_close(found, torch.tensor([[20.0, 0.0]], dtype=torch.float64))


def test_orders() -> None:
    assert inversion.orders({"10": [8.0, 1.0], "20": [4.0, 0.25]}) == {"20": [1.0, 2.0]}


def test_a_missing_classifier_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claims.main(["guidance", "--runs", str(tmp_path)]) == 2
    assert "--train tiny-classifier --runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        claims.main(["none"])
    assert "expected some of likelihood, guidance" in capsys.readouterr().err


def test_a_gradient_is_that_of_the_loss() -> None:
    """It goes uphill: a step along it raises the loss by its squared length, to first order."""
    from benchmarks.claims.small import small_run
    from fastdiff.training.task import DiffusionTask

    run = small_run(Path("unused"), steps=1, seed=0, learned=True, weighting="bound")
    task = DiffusionTask(run)
    task.denoiser.double()
    batch = {
        key: value[:4].double() if value.is_floating_point() else value[:4]
        for key, value in task.batch(0).items()
    }
    task.batch = lambda step: batch  # type: ignore[method-assign]
    g = resampling.gradient(task, 0)
    before = task.losses(batch, 0)[0]["unet"].item()
    length, start = 1e-4 / float(g.norm()), 0
    with torch.no_grad():
        for parameter in task.denoiser.parameters():
            part = g[start : start + parameter.numel()]
            parameter.add_(length * part.reshape(parameter.shape))
            start += parameter.numel()
    after = task.losses(batch, 0)[0]["unet"].item()
    assert (after - before) / length == pytest.approx(float(g.square().sum()), rel=0.02)


def test_plans_take_no_more_evaluations_than_asked() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    for name in SAMPLERS:
        plan = quality.plan(lambda steps, name=name: build_table(name, schedule, steps))
        for most, (steps, table) in zip(quality.EVALUATIONS, plan, strict=True):
            assert len(table) <= most < len(build_table(name, schedule, steps + 1))


def test_the_chart_follows_from_the_record(tmp_path: Path) -> None:
    """Equal samples share a line, and every sampler is in the table or named as missing."""
    pytest.importorskip("matplotlib")
    points = [
        {"evaluations": n, "steps": n, "accuracy": 0.9, "frechet": 2.0} for n in quality.EVALUATIONS
    ]
    other = [{**point, "frechet": 3.0} for point in points]
    samplers = {"ddim": points, "euler": points, "heun": other, "lcm": points}
    record = {"samplers": samplers, "weights": "f" * 64, "images": 100}
    record |= {"command": "command", "commit": "abc", "date": "today"}
    text = quality.page(record)
    assert "| ddim = euler | 2.00, 90% (5) | 2.00, 90% (10) |" in text
    assert "| heun | 3.00, 90% (5) |" in text
    assert "Not measured yet: ddpm, flow-euler" in text
    quality.draw(record, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not quality.RECORD.exists(), reason="the chart is not measured yet")
def test_the_page_of_quality_follows_from_its_record() -> None:
    assert quality.PAGE.read_text() == quality.page(json.loads(quality.RECORD.read_text()))


@pytest.mark.slow
def test_distances_and_guidance_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many steps as the reference DDIM is the reference."""
    monkeypatch.setattr(few_steps, "FEW", 4)
    monkeypatch.setattr(few_steps, "MANY", 4)
    monkeypatch.setattr(few_steps, "IMAGES", 2)
    found = few_steps.measure(Path(), lambda done, total: None)
    assert found["distance"]["DDIM"] == [0.0, 0.0, 0.0]
    assert min(found["distance"]["FastDPM-VAR, linear"]) > 0.01
    assert "than FastDPM-VAR, linear: **Holds**" in few_steps.section(found)


def test_the_curve_of_guidance_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    point = {"accuracy": [0.9, 0.91, 0.92], "frechet": [1.0, 1.1, 1.2]}
    better = {"accuracy": [0.99, 1.0, 1.0], "frechet": [2.0, 2.1, 2.2]}
    curves = {
        "classifier_free": [{"scale": 1.0, **point}, {"scale": 2.0, **better}],
        "with_class": [{"scale": 2.0, **point}],
        "without_class": [{"scale": 0.0, **point}, {"scale": 3.0, **better}],
    }
    found = {"curves": curves, "seeds": [0, 1, 2], "images": 120, "sampler": "ddim", "steps": 10}
    text = guidance.section(found)
    assert "- classifier-free, scale 2: **Holds**" in text
    assert "- classifier, denoiser with class, scale 2: **Does not hold here.**" in text
    assert "| classifier-free | 2 | 99.7 ± 0.6 | 2.10 ± 0.10 |" in text
    guidance.draw(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
