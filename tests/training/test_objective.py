"""The loss of one batch against the papers, in fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.training import DenoiserLossConfig
from fastdiff.training.task import DiffusionTask
from tests.training import runs


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("weighting", ["simple", "min-snr"])
def test_denoiser_loss_is_the_papers(
    tmp_path: Path, prediction: str, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDPM eq. 14 and Hang et al. eq. 6 in fp64, with a network that returns a known tensor."""
    images = runs.image_folder(tmp_path / "images", count=4)
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        prediction=prediction,
        loss=DenoiserLossConfig(weighting=weighting, min_snr_gamma=3.0),  # type: ignore[arg-type]
        schedule=ScheduleConfig(kind="linear"),
    )
    task = DiffusionTask(run)
    batch = {name: value[:3] for name, value in task.batch(0).items()}
    batch["x0"], batch["noise"] = batch["x0"].double(), batch["noise"].double()
    batch["t"] = torch.tensor([3, 400, 999])
    answer = torch.randn(batch["x0"].shape, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}

    def answer_known(x: torch.Tensor, t: torch.Tensor, **_: object) -> torch.Tensor:
        seen["x"] = x
        return answer

    monkeypatch.setattr(task.denoiser, "forward", answer_known)
    losses, _ = task.losses(batch, 0)

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a = (1 - betas).cumprod(0)[batch["t"]].reshape(3, 1, 1, 1)
    x0, noise = batch["x0"], batch["noise"]
    torch.testing.assert_close(seen["x"], a.sqrt() * x0 + (1 - a).sqrt() * noise)
    wanted = {"eps": noise, "x0": x0, "v": a.sqrt() * noise - (1 - a).sqrt() * x0}[prediction]
    errors = (answer - wanted).square().mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    if weighting == "min-snr":
        clipped = snr.clamp(max=3.0)
        errors = (
            errors * {"eps": clipped / snr, "x0": clipped, "v": clipped / (snr + 1)}[prediction]
        )
    torch.testing.assert_close(losses["unet"], errors.mean(), rtol=1e-10, atol=0)


def test_the_bound_of_a_learned_variance_is_the_papers(images: Path, tmp_path: Path) -> None:
    """IDDPM eq. 4 and 16: 0.001 * T * KL(q(x_{t-1} | x_t, x0) || p), bits per dimension."""
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        model=runs.denoiser_model(out_channels=2, learned_sigma=True, dropout=0.0),
        prediction="eps",
        loss=DenoiserLossConfig(),
    )
    task = DiffusionTask(run)
    part = {name: value[:2] for name, value in task.batch(0).items()}
    part["x0"], part["noise"] = part["x0"].double(), part["noise"].double()
    part["t"] = torch.tensor([5, 700])
    answer = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    task.denoiser.forward = lambda x, t, **_: answer  # type: ignore[method-assign]
    total = float(task.losses(part, 0)[0]["unet"])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    cumulative = (1 - betas).cumprod(0)
    expected = float((answer[:, :1] - part["noise"]).square().mean())
    for row, t in enumerate((5, 700)):
        a, before, beta = cumulative[t], cumulative[t - 1], betas[t]
        x0, noise = part["x0"][row], part["noise"][row]
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        guess = (x - (1 - a).sqrt() * answer[row, :1]) / a.sqrt()
        c0, cx = before.sqrt() * beta / (1 - a), (1 - beta).sqrt() * (1 - before) / (1 - a)
        tilde = beta * (1 - before) / (1 - a)
        share = (answer[row, 1:] + 1) / 2
        std = (0.5 * (share * beta.log() + (1 - share) * tilde.log())).exp()
        q = torch.distributions.Normal(c0 * x0 + cx * x, tilde.sqrt())
        p = torch.distributions.Normal(c0 * guess + cx * x, std)
        bits = torch.distributions.kl_divergence(q, p).mean() / np.log(2)
        expected += 1e-3 * 1000 * float(bits) / 2
    assert total == pytest.approx(expected, rel=1e-5)


def test_timesteps_are_uniform_stratified_or_logit_normal(tmp_path: Path) -> None:
    images = runs.image_folder(tmp_path / "images", count=4)

    def drawn(kind: str) -> torch.Tensor:
        run = runs.diffusion_run(
            images,
            tmp_path / "run",
            optimization=runs.optimization(batch_size=50),
            loss=DenoiserLossConfig(timesteps=kind, logit_mean=0.5),  # type: ignore[arg-type]
        )
        task = DiffusionTask(run)
        return torch.stack([task.timesteps(step) for step in range(400)])

    uniform, stratified = drawn("uniform"), drawn("stratified")
    for t in (uniform, stratified):
        assert t.dtype == torch.int64
        assert (int(t.min()), int(t.max())) == (0, 999)
        torch.testing.assert_close(t.double().mean(), torch.tensor(499.5).double(), atol=8, rtol=0)
        assert torch.histc(t.float(), 10).std() < 120  # 2,000 expected in each
    per_bin = torch.stack([torch.histc(row.float(), 50, 0, 1000) for row in stratified])
    assert per_bin.max() <= 2, "a stratified batch has one timestep per stratum"
    assert not torch.equal(stratified[0], stratified[0].sort().values)
    logits = torch.logit(drawn("logit-normal") / 999)
    torch.testing.assert_close(logits.mean(), torch.tensor(0.5).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(logits.std(), torch.tensor(1.0).double(), atol=0.03, rtol=0)
