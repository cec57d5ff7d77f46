"""The first stage's losses against their closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastdiff.models.autoencoder import Posterior, Quantized
from fastdiff.training import AutoencoderLossConfig, adaptive_weight, hinge_loss
from fastdiff.training.autoencoder import AutoencoderTask, regularization_loss
from fastdiff.training.trainer import Trainer
from tests.training import runs


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


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_first_stages_losses_are_their_weighted_sum(
    images: Path, tmp_path: Path, kind: str
) -> None:
    """LDM appendix G; VQGAN eq. 4 to 7; every weight differs from its default and from 1."""
    weights = AutoencoderLossConfig(
        perceptual_weight=0.3,
        kl_weight=20.0,
        codebook_weight=0.7,
        commitment=0.4,
        adversarial_weight=0.2,
        adversarial_start=5,
    )
    task = AutoencoderTask(runs.autoencoder_run(images, tmp_path / "run", kind, loss=weights))
    part = task.batch(0)
    for step in (4, 5):  # the last step without, the first with the discriminator
        losses, _ = task.losses(part, step)
        reconstruction, latent = task.autoencoder(part["images"], part["noise"])
        restored = (reconstruction - part["images"]).abs().mean()
        restored = restored + 0.3 * task.perceptual(reconstruction, part["images"]).mean()
        if isinstance(latent, Quantized):
            expected = restored + 0.7 * latent.loss(0.4)
        else:
            expected = restored + 20.0 * latent.kl().mean() / (16 * 16)
        if step < 5:
            assert set(losses) == {"autoencoder"}
        else:
            discriminator = task.networks["discriminator"]
            verdict = -discriminator(reconstruction).mean()
            balance = adaptive_weight(restored, verdict, task.autoencoder.last_layer)
            expected = expected + 0.2 * balance * verdict
            real, fake = discriminator(part["images"]), discriminator(reconstruction.detach())
            hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
            torch.testing.assert_close(losses["discriminator"], hinge)
            network = list(task.autoencoder.parameters())
            unused = torch.autograd.grad(losses["discriminator"], network, allow_unused=True)
            assert all(gradient is None for gradient in unused)
        torch.testing.assert_close(losses["autoencoder"], expected)


def test_the_discriminator_waits_and_the_autoencoders_loss_does_not_move_it(
    images: Path, tmp_path: Path
) -> None:
    run = runs.autoencoder_run(images, tmp_path / "run")  # starts after 2 steps
    trainer = Trainer(AutoencoderTask(run), run)
    discriminator = trainer.task.networks["discriminator"]
    before = [parameter.detach().clone() for parameter in discriminator.parameters()]

    def moved() -> bool:
        pairs = zip(before, discriminator.parameters(), strict=True)
        return any(not torch.equal(old, new) for old, new in pairs)

    trainer.step()
    trainer.step()
    assert not moved()
    losses, _ = trainer.task.losses(trainer.task.batch(2), 2)
    torch.autograd.backward(losses["autoencoder"], inputs=trainer.parameters["autoencoder"])
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    trainer.step()
    assert moved()
