"""The pieces against their closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder, Posterior
from fastdiff.training import (
    EMA,
    AutoencoderLossConfig,
    DenoiserLossConfig,
    OptimizationConfig,
    adaptive_weight,
    hinge_loss,
    learning_rate,
)
from fastdiff.training.autoencoder import regularization_loss
from fastdiff.training.diffusion import DiffusionTask
from fastdiff.training.precision import check_precision, resolve_device
from fastdiff.training.trainer import tile
from tests.training import runs


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_weighted_sum_it_stands_for(warmup: bool) -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    start = layer.weight.detach().clone()
    ema = EMA(layer, decay=0.8, warmup=warmup)
    history, weights = [start], [1.0]
    for update in range(1, 41):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3, dtype=torch.float64))
        ema.update()
        # (1 + n) / (10 + n) passes 0.8 at n = 35
        decay = min(0.8, (1 + update) / (10 + update)) if warmup else 0.8
        weights = [weight * decay for weight in weights] + [1 - decay]
        history.append(layer.weight.detach().clone())
    expected = sum(weight * value for weight, value in zip(weights, history, strict=True))
    assert math.isclose(sum(weights), 1)
    torch.testing.assert_close(ema.network.weight, expected, rtol=1e-12, atol=1e-12)
    assert not ema.network.weight.requires_grad


def test_ema_copies_buffers() -> None:
    norm = nn.BatchNorm1d(2)
    ema = EMA(norm, decay=0.99, warmup=False)
    norm(torch.randn(8, 2) + 5)
    ema.update()
    torch.testing.assert_close(ema.network.running_mean, norm.running_mean)
    assert not ema.network.training


def test_learning_rate_at_its_corners() -> None:
    config = OptimizationConfig(
        steps=110,
        batch_size=1,
        learning_rate=1.0,
        final_learning_rate=0.2,
        warmup_steps=10,
        decay="cosine",
    )
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)  # half way down: the mean of both ends
    assert rates[35] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)  # cos(pi / 4)
    assert rates[110] == pytest.approx(0.2)
    constant = OptimizationConfig(steps=10, batch_size=1, learning_rate=0.5)
    assert {learning_rate(step, constant) for step in range(10)} == {0.5}


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0, 3.0])
    # max(0, 1 - real) = 0, .5, 2; max(0, 1 + fake) = 0, 1, 2, 4
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * (2.5 / 3 + 7 / 4))


def test_adaptive_weight_equals_the_gradients_by_hand() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.randn(5, 2, dtype=torch.float64)
    a = torch.randn(2, dtype=torch.float64)
    out = layer(x)
    restored, verdict = (out - y).square().mean(), -(torch.tanh(out) @ a).mean()
    by_restored = 2 / 10 * (out - y).T @ x
    by_verdict = -(a * (1 - torch.tanh(out).square())).T @ x / 5
    expected = by_restored.norm() / (by_verdict.norm() + 1e-4)
    weight = adaptive_weight(restored, verdict, layer.weight)
    torch.testing.assert_close(weight, expected.detach(), rtol=1e-12, atol=0)
    scaled = adaptive_weight(restored, verdict, layer.weight, scale=1024)
    torch.testing.assert_close(scaled, weight, rtol=1e-12, atol=0)
    assert not weight.requires_grad
    assert float(adaptive_weight(restored, verdict * 1e-30, layer.weight)) <= 1e4
    assert layer.weight.grad is None  # measuring leaves no gradient behind


def test_kl_has_latent_diffusions_balance() -> None:
    """LDM: sum |x - y| / N + 1e-6 * sum KL / N; ours is that over the number of pixel values."""
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64).unbind(0)
    loss, logged = regularization_loss(
        Posterior(mean, logvar), values=48, config=AutoencoderLossConfig(kl_weight=1e-2)
    )
    normal = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(loss, (1e-2 * kl.sum() / 3 / 48).to(loss.dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(logged["kl"], (kl.sum() / 3).to(loss.dtype), rtol=1e-5, atol=0)


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

    monkeypatch.setattr(task.unet, "forward", answer_known)
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


def test_class_dropout_has_its_rate_and_the_scale_factor_unit_variance(tmp_path: Path) -> None:
    images = runs.image_folder(tmp_path / "images", count=12)
    autoencoder = Autoencoder(runs.autoencoder_model())
    from fastdiff.checkpoint.layouts.bundle import ModelConfig, save_bundle

    config = ModelConfig(image_size=16, image_channels=1, autoencoder=runs.autoencoder_model())
    save_bundle(tmp_path / "first", config, autoencoder=autoencoder)
    base = runs.diffusion_run(images, tmp_path / "run")
    for views in (0, 2):
        run = runs.diffusion_run(
            images,
            tmp_path / "run",
            autoencoder=str(tmp_path / "first"),
            model=runs.denoiser_model(2),
            class_dropout=0.25,
            latent_views=views,
            data=runs.autoencoder_run(images, tmp_path).data,
            optimization=runs.optimization(batch_size=24),
        )
        task = DiffusionTask(run)
        assert float(task.batch(0)["x0"].std()) == pytest.approx(1.0, abs=1e-5)
        labels = torch.cat([task.batch(step)["y"] for step in range(20)])
        assert 0.18 < float((labels == 2).double().mean()) < 0.32
        if views:  # encoded before or during training: the same latents in the first epochs
            reference = task.latents(0)[0]
        else:
            expected = task.latents(0)[0]
    torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-5)
    assert base.model.in_channels == 1


def test_precisions_a_device_cannot_do_are_errors() -> None:
    with pytest.raises(ValueError, match="'fp16' needs a CUDA device, got 'cpu'"):
        check_precision("fp16", torch.device("cpu"))
    check_precision("bf16", torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot be used"):
        resolve_device("cuda:77")


def test_tile_puts_each_image_in_its_place() -> None:
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 3)
    sheet = tile(images, columns=3)
    assert sheet.shape == (1, 4, 9)
    expected = torch.tensor([[0, 0.25, 0.5], [0.75, 1.0, 0.0]])  # row-major, the empty place black
    torch.testing.assert_close(sheet[0, ::2, ::3], expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"accumulate": 3},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"final_learning_rate": 1.0},
        {"ema_decay": 1.0},
        {"clip_norm": -1.0},
        {"warmup_steps": -1},
        {"decay": "linear"},
        {"precision": "fp8"},
    ],
)
def test_impossible_optimization_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        OptimizationConfig(**{"steps": 4, "batch_size": 4, **changes})  # type: ignore[arg-type]
