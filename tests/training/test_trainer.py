"""The loop: AdamW by hand, accumulation, precision, and losses that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.training import EMA, train_diffusion
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.task import DiffusionTask
from fastdiff.training.trainer import Trainer, fit, open_run
from tests.training import runs


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
    weights = list(task.denoiser.parameters())
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


def test_accumulation_gives_the_big_batchs_loss_and_gradient(images: Path, tmp_path: Path) -> None:
    results = []
    for pieces in (1, 2, 4):
        run = runs.diffusion_run(
            images,
            tmp_path / str(pieces),
            model=runs.denoiser_model(dropout=0.0),
            optimization=runs.optimization(batch_size=8, accumulate=pieces, clip_norm=0.0),
        )
        trainer = Trainer(DiffusionTask(run), run)
        trainer.task.networks["unet"].double()
        trainer.ema = EMA(trainer.task.networks["unet"], decay=0.9, warmup=True)
        for parameter in trainer.parameters["unet"]:  # a zero output layer would hide the others
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        draw = trainer.task.batch
        trainer.task.batch = lambda step, draw=draw: {  # type: ignore[method-assign]
            name: value.double() if value.is_floating_point() else value
            for name, value in draw(step).items()
        }
        trainer.step()
        trainer.settle()
        results.append(trainer.take_means())
    for other in results[1:]:
        assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
        assert other["grad_norm/unet"] == pytest.approx(results[0]["grad_norm/unet"], rel=1e-6)


@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
def test_gradient_checkpointing_and_bf16_train_the_same_thing(
    images: Path, tmp_path: Path, stage: str
) -> None:
    means = {}
    for name, changes in (
        ("plain", {}),
        ("checkpointed", {"gradient_checkpointing": True, "channels_last": True}),
        ("bf16", {"precision": "bf16"}),
    ):
        make, task = (
            (runs.autoencoder_run, AutoencoderTask)
            if stage == "autoencoder"
            else (runs.diffusion_run, DiffusionTask)
        )
        run = runs.with_optimization(make(images, tmp_path / name), **changes)  # type: ignore[operator]
        trainer = Trainer(task(run), run)  # type: ignore[arg-type]
        trainer.step()
        trainer.step()
        trainer.settle()
        means[name] = trainer.take_means()
    norm = f"grad_norm/{stage}"
    assert means["checkpointed"]["loss"] == pytest.approx(means["plain"]["loss"], rel=1e-4)
    assert means["checkpointed"][norm] == pytest.approx(means["plain"][norm], rel=1e-3)
    assert means["bf16"]["loss"] == pytest.approx(means["plain"]["loss"], rel=0.03)
    assert means["bf16"]["loss"] != means["plain"]["loss"], "nothing ran in bf16"


def test_a_loss_that_is_not_finite_names_the_step(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = DiffusionTask.batch

    def poisoned(self: Any, step: int) -> Any:
        made = batch(self, step)
        return {**made, "x0": made["x0"] * (float("nan") if step == 3 else 1)}

    monkeypatch.setattr(DiffusionTask, "batch", poisoned)
    run = runs.with_output(runs.diffusion_run(images, tmp_path / "run"), save_every=1)
    with pytest.raises(ValueError, match=r"^step 4: not finite: .*'loss': nan"):
        train_diffusion(run)
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_00000003"


def test_fp16_skips_overflows_but_not_for_ever(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(images, tmp_path / "run")
    trainer = Trainer(DiffusionTask(run), run)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)  # as for fp16 on CUDA
    weight = trainer.parameters["unet"][-1]  # the others wait behind a zero layer
    before = weight.detach().clone()
    draw = trainer.task.batch
    poison = {"on": True}
    trainer.task.batch = lambda step: {  # type: ignore[method-assign]
        name: value * float("inf") if poison["on"] and name == "noise" else value
        for name, value in draw(step).items()
    }
    scale = trainer.scaler.get_scale()
    trainer.step()
    trainer.settle()
    assert torch.equal(weight, before), "the overflowing step was applied"
    assert trainer.scaler.get_scale() < scale
    assert trainer.take_means() == {}
    poison["on"] = False
    trainer.step()
    trainer.settle()
    assert not torch.equal(weight, before)
    trainer._skipped = 49
    poison["on"] = True
    trainer.step()
    with pytest.raises(ValueError, match="step 3: not finite"):
        trainer.settle()


def test_clipping_is_of_the_gradient_and_not_of_the_scaled_loss(
    images: Path, tmp_path: Path
) -> None:
    """With fp16's loss scale the norm and the step are those of a run without one."""
    run = runs.diffusion_run(
        images, tmp_path / "run", optimization=runs.optimization(clip_norm=1e-6, warmup_steps=0)
    )
    plain, scaled = (Trainer(DiffusionTask(run), run) for _ in range(2))
    scaled.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**16)
    norms = []
    for trainer in (plain, scaled):
        trainer.step()
        trainer.settle()
        norms.append(trainer.take_means()["grad_norm/unet"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    for ours, theirs in zip(scaled.parameters["unet"], plain.parameters["unet"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_sheets_show_the_averaged_weights(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(
        images, tmp_path / "run", optimization=runs.optimization(steps=3, ema_decay=0.9)
    )
    task = DiffusionTask(run)
    shown = []
    preview = task.preview
    task.preview = lambda network, step: shown.append(network) or preview(network, step)  # type: ignore
    open_run(run, resume=False)
    fit(task, run, resume=False)
    exported = load_bundle(tmp_path / "run").denoiser
    assert exported is not None
    assert len(shown) == 1
    assert not shown[0].training
    for name, value in exported.state_dict().items():
        assert torch.equal(value, shown[0].state_dict()[name])
    assert not torch.equal(shown[0].conv_out.weight, task.denoiser.conv_out.weight)
