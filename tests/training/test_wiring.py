"""That every setting of a run reaches the arithmetic: steps and losses by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.generate.core import SampleSettings
from fastdiff.generate.latent import LatentDiffusion
from fastdiff.models.autoencoder import Quantized
from fastdiff.training import (
    AutoencoderLossConfig,
    PreviewConfig,
    adaptive_weight,
    train_autoencoder,
    train_diffusion,
)
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.diffusion import DiffusionTask
from fastdiff.training.trainer import Trainer, fit, open_run
from tests.training import runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.image_folder(tmp_path_factory.mktemp("images"))


def test_three_steps_equal_adamw_by_hand(images: Path, tmp_path: Path) -> None:
    """Warm-up, clipping, both moments, decoupled weight decay, averaged weights."""
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        model=runs.denoiser_model(dropout=0.0),
        optimization=runs.optimization(
            learning_rate=3e-3,
            warmup_steps=3,
            beta1=0.7,
            beta2=0.8,
            weight_decay=0.5,
            clip_norm=0.05,
            ema_decay=0.15,
        ),
    )
    trainer = Trainer(DiffusionTask(run), run)
    task = DiffusionTask(run)
    weights = list(task.unet.parameters())
    shadow = [weight.detach().clone() for weight in weights]
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    clipped = 0
    for step in range(3):
        trainer.step()
        loss = task.losses(task.batch(step), step)[0]["unet"]
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        clipped += int(norm > 0.05)
        rate = 3e-3 * (step + 1) / 3
        decay = min(0.15, (2 + step) / (11 + step))
        with torch.no_grad():
            for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                g = gradient * min(1.0, 0.05 / float(norm))
                first[index] = 0.7 * first[index] + 0.3 * g
                second[index] = 0.8 * second[index] + 0.2 * g.square()
                mean = first[index] / (1 - 0.7 ** (step + 1))
                square = second[index] / (1 - 0.8 ** (step + 1))
                weight.mul_(1 - rate * 0.5).sub_(rate * mean / (square.sqrt() + 1e-8))
                shadow[index] = decay * shadow[index] + (1 - decay) * weight
    assert clipped
    moved = trainer.parameters["unet"]
    averaged = list(trainer.ema.network.parameters())
    for ours, expected in ((moved, weights), (averaged, shadow)):
        for one, other in zip(ours, expected, strict=True):
            # a gradient near the 1e-8 of AdamW turns rounding into a part of a step of 3e-3
            torch.testing.assert_close(one, other, rtol=1e-4, atol=3e-5)


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


def test_previews_show_what_the_exported_bundle_samples(images: Path, tmp_path: Path) -> None:
    """Training and pipeline have code of their own for sampling: scale, guidance, null class."""
    first = runs.autoencoder_run(images, tmp_path / "first", optimization=runs.optimization())
    train_autoencoder(first)
    run = runs.diffusion_run(
        images,
        tmp_path / "second",
        data=first.data,
        prediction="eps",
        autoencoder=str(tmp_path / "first"),
        model=runs.denoiser_model(2),
        preview=PreviewConfig(count=4, steps=3, guidance_scale=3.0),
        optimization=runs.optimization(steps=30, learning_rate=1e-2, ema_decay=0.0),
    )
    task = DiffusionTask(run)
    open_run(run, resume=False)
    fit(task, dataclasses.replace(run), resume=False)
    labels = torch.tensor([0, 1, 1])
    preview = task.sample(task.unet.eval(), torch.tensor([0, 1, 7]), labels)
    pipeline = LatentDiffusion.from_bundle(load_bundle(tmp_path / "second"))
    settings = SampleSettings(sampler="ddim", steps=3, guidance_scale=3.0)
    sampled = pipeline([0, 1, 1], [0, 1, 7], settings)
    torch.testing.assert_close(preview, sampled.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    unguided = pipeline([0, 1, 1], [0, 1, 7], dataclasses.replace(settings, guidance_scale=1.0))
    assert (unguided - sampled).abs().max() > 1e-3, "guidance did nothing: the test sees nothing"


def test_dropout_and_dropped_classes_are_drawn_anew_for_every_step_and_piece(
    images: Path, tmp_path: Path
) -> None:
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        class_dropout=0.5,
        optimization=runs.optimization(batch_size=32, accumulate=2),
    )
    trainer = Trainer(DiffusionTask(run), run)
    task, seen = trainer.task, []
    losses = task.losses

    def note(part: dict[str, torch.Tensor], step: int) -> object:
        seen.append(torch.random.get_rng_state())  # what the dropout layers will draw from
        return losses(part, step)

    task.losses = note  # type: ignore[method-assign, assignment]
    trainer.step()
    trainer.step()
    assert len({state.numpy().tobytes() for state in seen}) == 4
    dropped = [task.batch(step)["y"] == 2 for step in range(3)]
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(dropped[1], task.batch(1)["y"] == 2)


def test_sheets_show_the_averaged_weights(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(
        images, tmp_path / "run", optimization=runs.optimization(steps=3, ema_decay=0.9)
    )
    task = DiffusionTask(run)
    shown = []
    preview = task.preview
    task.preview = lambda network: shown.append(network) or preview(network)  # type: ignore
    open_run(run, resume=False)
    fit(task, run, resume=False)
    exported = load_bundle(tmp_path / "run").unet
    assert exported is not None
    assert len(shown) == 1
    assert not shown[0].training
    for name, value in exported.state_dict().items():
        assert torch.equal(value, shown[0].state_dict()[name])
    assert not torch.equal(shown[0].conv_out.weight, task.unet.conv_out.weight)


def test_resuming_on_another_first_stage_is_refused(images: Path, tmp_path: Path) -> None:
    short = runs.optimization(steps=1)
    first = runs.autoencoder_run(images, tmp_path / "first", optimization=short)
    train_autoencoder(first)
    run = runs.diffusion_run(
        images,
        tmp_path / "second",
        data=first.data,
        autoencoder=str(tmp_path / "first"),
        model=runs.denoiser_model(2),
        optimization=short,
    )
    train_diffusion(run)
    other = runs.with_output(dataclasses.replace(first, seed=1), folder=str(tmp_path / "other"))
    train_autoencoder(other)
    (tmp_path / "first").rename(tmp_path / "away")
    (tmp_path / "other").rename(tmp_path / "first")
    with pytest.raises(ValueError, match=r"autoencoder in .* has changed since"):
        train_diffusion(run, resume=True)
