"""IDDPM's resampler of timesteps against the original's rule, and its state through a stop."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.training import DenoiserLossConfig, PreviewConfig, train_diffusion
from fastdiff.training.resampler import HISTORY, UNIFORM, SecondMomentResampler
from fastdiff.training.task import DiffusionTask
from tests.training import runs

TOTAL = 6


def filled() -> tuple[SecondMomentResampler, np.ndarray]:
    """With more losses than it keeps, and for each timestep the last ten of them."""
    resampler, source = SecondMomentResampler(TOTAL), np.random.default_rng(0)
    seen: list[list[float]] = [[] for _ in range(TOTAL)]
    for _ in range(40):
        t = source.integers(TOTAL, size=8)
        losses = source.gamma(2.0, 10.0 ** (1 - t))
        resampler.update(torch.from_numpy(t), torch.from_numpy(losses))
        for index, loss in zip(t, losses, strict=True):
            seen[index].append(float(loss))
    assert min(map(len, seen)) > HISTORY
    return resampler, np.array([losses[-HISTORY:] for losses in seen])


def test_probabilities_are_the_originals() -> None:
    """LossSecondMomentResampler.weights: the root mean square of the last ten losses of each
    timestep, 0.001 of it spread evenly."""
    resampler, last = filled()
    weights = np.sqrt(np.mean(last**2, axis=-1))
    weights /= weights.sum()
    expected = weights * (1 - 0.001) + 0.001 / TOTAL
    np.testing.assert_allclose(resampler.probabilities().numpy(), expected, rtol=1e-12)
    assert (HISTORY, UNIFORM) == (10, 0.001)


def test_all_timesteps_are_equal_until_each_has_ten_losses() -> None:
    resampler = SecondMomentResampler(3)
    even = torch.full((3,), 1 / 3, dtype=torch.float64)
    resampler.update(torch.arange(3).repeat(9), torch.arange(27.0))
    resampler.update(torch.tensor([0, 1]), torch.tensor([5.0, 5.0]))
    assert torch.equal(resampler.probabilities(), even)
    resampler.update(torch.tensor([2]), torch.tensor([float("nan")]))  # a skipped step of fp16
    assert torch.equal(resampler.probabilities(), even)
    resampler.update(torch.tensor([2]), torch.tensor([100.0]))
    assert resampler.probabilities().argmax() == 2
    zeros = SecondMomentResampler(3)
    zeros.update(torch.arange(3).repeat(10), torch.zeros(30))
    assert torch.equal(zeros.probabilities(), even)


def test_the_weighted_mean_is_unbiased_and_less_noisy() -> None:
    """Over the drawn timesteps E[w L] is the unweighted mean, and Var[w L] is what the rule gives:
    near 0 if losses stay as recorded, where uniform draws have more than the mean squared."""
    resampler, last = filled()
    losses = torch.from_numpy(last.mean(1))
    p = resampler.probabilities()
    t, weight = resampler.draw(200_000, torch.Generator().manual_seed(0))
    drawn = torch.bincount(t, minlength=TOTAL).double() / len(t)
    assert (drawn - p).abs().max() < 5 * (0.25 / len(t)) ** 0.5
    torch.testing.assert_close(weight.double(), 1 / (TOTAL * p[t]), rtol=1e-6, atol=0)
    weighted = losses / (TOTAL * p)
    mean = losses.mean()
    assert float((p * weighted).sum()) == pytest.approx(float(mean), rel=1e-12)
    noise = float((p * weighted.square()).sum() - mean**2)
    even = float(losses.square().mean() - mean**2)
    assert even > float(mean) ** 2
    assert noise < 0.1 * even


def run_of(images: Path, folder: Path, **changes):
    return runs.diffusion_run(
        images,
        folder,
        model=runs.denoiser_model(out_channels=2, learned_sigma=True),
        prediction="eps",
        schedule=ScheduleConfig(num_timesteps=2, beta_end=0.5),
        loss=DenoiserLossConfig(timesteps="second-moment", weighting="bound"),
        optimization=runs.optimization(steps=18),
        preview=PreviewConfig(count=4, steps=2),
        **changes,
    )


def test_a_run_resumes_bit_for_bit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the probabilities have become uneven: they are what they were."""
    whole = runs.with_output(run_of(images, tmp_path / "whole"), preview_every=9)
    train_diffusion(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        runs.signal_at(patch, DiffusionTask, 13, signal.SIGINT)
        with pytest.raises(SystemExit):
            train_diffusion(cut)
    tensors = runs.final_tensors(tmp_path / "cut")
    stopped = SecondMomentResampler(2)
    stopped.load(
        {n.removeprefix("task.safetensors:"): t for n, t in tensors.items() if n[:4] == "task"}
    )
    assert (stopped.counts == HISTORY).all()
    assert stopped.probabilities()[0] != stopped.probabilities()[1]
    train_diffusion(cut, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(ValueError, match="losses of 2 timesteps, expected 3; resume with"):
        SecondMomentResampler(3).load(stopped.tensors())


def test_the_bound_alone_trains_prediction_and_variance(images: Path, tmp_path: Path) -> None:
    """L_vlb: gradients reach both halves of the output; L_hybrid's bound only the second."""
    run = run_of(images, tmp_path / "run")
    reached = {}
    for weighting, weight in (("bound", 1e-3), ("simple", 1e3)):
        loss = DenoiserLossConfig(weighting=weighting, bound_weight=weight)
        task = DiffusionTask(replace(run, loss=loss))
        batch = task.batch(0)
        output = torch.randn(4, 2, 8, 8, requires_grad=True)
        x = task.objective.schedule.add_noise(batch["x0"], batch["noise"], batch["t"])
        losses = task.objective.losses(output, x, batch["x0"], batch["noise"], batch["t"])
        losses.sum().backward()
        assert output.grad is not None
        simple = (output[:, :1] - batch["noise"]).square().mean((1, 2, 3)).sum()
        (plain,) = torch.autograd.grad(simple, output)
        reached[weighting] = (output.grad - plain)[:, :1].abs().max()
        assert output.grad[:, 1:].abs().max() > 0
    assert reached["simple"] < 1e-6, "the bound of L_hybrid must not move the prediction"
    assert reached["bound"] > 1e-3
    plain_model = runs.denoiser_model()
    with pytest.raises(ValueError, match=r"'bound' .* needs a model with learned_sigma=True"):
        replace(run, model=plain_model, loss=DenoiserLossConfig(weighting="bound"))
