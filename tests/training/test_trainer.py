"""The loop: exact resume, accumulation, interruption, full disks, and what lies in the folder."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.training import EMA, describe, interrupts, train_autoencoder, train_diffusion
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.diffusion import DiffusionTask
from fastdiff.training.trainer import Trainer
from tests.training import runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def signal_at(monkeypatch: pytest.MonkeyPatch, task: type, step: int, number: int) -> None:
    """Send this process a signal while `task` makes the batch of `step`."""
    batch = task.batch

    def interrupted(self: Any, at: int) -> Any:
        if at == step:
            os.kill(os.getpid(), number)
        return batch(self, at)

    monkeypatch.setattr(task, "batch", interrupted)


def assert_same_run(first: Path, second: Path) -> None:
    """Losses, weights, moments, averages and samples are equal bit for bit."""
    assert runs.losses(first) == runs.losses(second)
    ours, theirs = runs.final_tensors(first), runs.final_tensors(second)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizers") for name in ours)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert len(runs.sheets(first)) == 2
    assert runs.sheets(first) == runs.sheets(second)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoder_resumes_bit_for_bit_after_sigterm(
    images: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.autoencoder_run(images, tmp_path / "whole", kind)
    train_autoencoder(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        signal_at(patch, AutoencoderTask, 3, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            train_autoencoder(cut)
    assert stopped.value.code == 143
    # the step at hand is finished and saved, and the bundle is there
    assert (tmp_path / "cut/checkpoints/latest").read_text().strip() == "step_00000004"
    assert load_bundle(tmp_path / "cut").provenance["steps"] == 4
    train_autoencoder(cut, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("latent", [False, True])
def test_denoiser_resumes_bit_for_bit_after_ctrl_c(
    images: Path, tmp_path: Path, latent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.diffusion_run(images, tmp_path / "whole")
    if latent:
        first = runs.autoencoder_run(images, tmp_path / "first")
        train_autoencoder(runs.with_optimization(first, steps=2))
        whole = dataclasses.replace(
            whole,
            data=first.data,
            autoencoder=str(tmp_path / "first"),
            model=runs.denoiser_model(2),
        )
    # log_every 4 with a stop after 3: the means of a half-finished window are carried over
    whole = runs.with_output(whole, log_every=4)
    train_diffusion(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        signal_at(patch, DiffusionTask, 2, signal.SIGINT)
        with pytest.raises(SystemExit) as stopped:
            train_diffusion(cut)
    assert stopped.value.code == 130
    train_diffusion(cut, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    bundle = load_bundle(tmp_path / "cut/model")
    assert bundle.config.class_names == ("a", "b")
    assert (bundle.autoencoder is not None) == latent
    assert bundle.unet is not None
    average = runs.final_tensors(tmp_path / "cut")
    for name, value in bundle.unet.state_dict().items():
        assert torch.equal(value, average[f"ema.safetensors:{name}"]), "the average is exported"


def test_lines_after_the_checkpoint_are_replaced(images: Path, tmp_path: Path) -> None:
    """A killed run has logged more than it saved; resuming repeats those steps, not the lines."""
    run = runs.diffusion_run(images, tmp_path / "run", optimization=runs.optimization(steps=3))
    train_diffusion(run)
    expected = runs.losses(tmp_path / "run")
    with (tmp_path / "run/log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')  # cut off in the middle
    train_diffusion(run, resume=True)
    assert runs.losses(tmp_path / "run") == expected


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


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    script = f"""
import os, runpy, signal
Interrupts = runpy.run_path({interrupts.__file__!r})["Interrupts"]
with Interrupts() as caught:
    os.kill(os.getpid(), signal.SIGTERM)
    assert (caught.received, caught.exit_code) == (15, 143)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "first\n"
    assert done.returncode == -signal.SIGINT


def test_a_full_disk_leaves_the_checkpoint_before_it(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(images, tmp_path / "run")
    trainer = Trainer(DiffusionTask(run), run)
    root = tmp_path / "run/checkpoints"
    trainer.step()
    trainer.save(root)
    good = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    trainer.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights are larger
    try:
        with pytest.raises(OSError, match=r"no space left to write .*step_00000002"):
            trainer.save(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == good
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["step_00000001"]
    fresh = Trainer(DiffusionTask(run), run)
    fresh.load(root / "step_00000001")
    assert fresh.done == 1


def test_only_the_newest_checkpoints_are_kept(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(images, tmp_path / "run")
    train_diffusion(runs.with_output(run, save_every=2, keep=2, preview_every=0))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000006"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "log.jsonl",
        "checkpoints",
        "model",
    }


def test_resuming_with_another_config_names_every_difference(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(images, tmp_path / "run", optimization=runs.optimization(steps=1))
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train_diffusion(run, resume=True)
    train_diffusion(run)
    with pytest.raises(ValueError, match="already holds a run"):
        train_diffusion(run)
    other = runs.with_optimization(dataclasses.replace(run, prediction="eps"), learning_rate=2e-3)
    with pytest.raises(ValueError, match="another config") as error:
        train_diffusion(other, resume=True)
    message = str(error.value)
    assert "optimization.learning_rate: 0.001 there, 0.002 now" in message
    assert "prediction: 'v' there, 'eps' now" in message
    assert message.count(" there, ") == 2
    (tmp_path / "run").rename(tmp_path / "moved")  # a folder may move
    train_diffusion(runs.with_output(run, folder=str(tmp_path / "moved")), resume=True)


def test_damaged_checkpoints_are_named(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(images, tmp_path / "run", optimization=runs.optimization(steps=1))
    train_diffusion(run)
    weights = tmp_path / "run/checkpoints/step_00000001/networks.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="step_00000001 cannot be read"):
        train_diffusion(run, resume=True)


def test_models_that_do_not_fit_the_data_are_refused(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(images, tmp_path / "run")
    for changes, message in (
        ({"model": runs.denoiser_model(3)}, "3 channels, the data has 1"),
        ({"model": runs.denoiser_model(num_classes=7)}, "7 classes, the data has 2"),
        ({"data": dataclasses.replace(run.data, image_size=9)}, "multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train_diffusion(dataclasses.replace(run, **changes))
    assert not (tmp_path / "run").exists(), "a mistake leaves no folder behind"


def test_describe_shows_the_config_and_counts(images: Path, tmp_path: Path) -> None:
    run = runs.autoencoder_run(images, tmp_path / "run")
    text = describe(run)
    config = json.loads(text[: text.index("\n\n")])
    assert config["optimization"]["learning_rate"] == 1e-3
    count = sum(p.numel() for p in AutoencoderTask(run).networks["discriminator"].parameters())
    assert f"discriminator: {count:,} parameters" in text
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_scalars_and_sheets(images: Path, tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = runs.with_output(
        runs.diffusion_run(images, tmp_path / "run", optimization=runs.optimization(steps=3)),
        tensorboard=True,
    )
    train_diffusion(run)
    events = loader.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    logged = [record["loss"] for record in runs.losses(tmp_path / "run")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(logged, rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [3]


KILLED = """
import os, signal, sys
from pathlib import Path
from fastdiff import files
from fastdiff.training import train_diffusion
from tests.training import runs
folder, call = Path(sys.argv[1]), int(sys.argv[2])
seen, real = [], files._sync
def killing(path):
    if path.name == "optimizers.safetensors":
        seen.append(path)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
    real(path)
files._sync = killing
run = runs.diffusion_run(folder / "images", folder / "cut")
train_diffusion(runs.with_output(run, save_every=2))
"""


def test_kill_9_in_the_middle_of_a_save_resumes_bit_for_bit(tmp_path: Path) -> None:
    images = runs.image_folder(tmp_path / "images")
    whole = runs.with_output(runs.diffusion_run(images, tmp_path / "whole"), save_every=2)
    train_diffusion(whole)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    root = tmp_path / "cut/checkpoints"
    assert (root / "latest").read_text().strip() == "step_00000002", "killed while saving step 4"
    assert [path for path in root.iterdir() if path.name.startswith(".step_00000004.")]
    train_diffusion(
        runs.with_output(whole, folder=str(tmp_path / "cut")),
        resume=True,
    )
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    names = sorted(path.name for path in root.iterdir())
    assert names == ["latest", "step_00000004", "step_00000006"], "the unfinished one is gone"


def test_useless_weights_do_not_replace_a_good_checkpoint(images: Path, tmp_path: Path) -> None:
    """The loss was finite, the update was not."""
    run = runs.with_output(runs.diffusion_run(images, tmp_path / "run"), keep=1)
    trainer = Trainer(DiffusionTask(run), run)
    root = tmp_path / "run/checkpoints"
    trainer.step()
    trainer.save(root)
    trainer.step()
    trainer.parameters["unet"][3].data[0] = float("inf")
    with pytest.raises(ValueError, match=r"^step 2: 1 weights are not finite \(unet/.*lower"):
        trainer.save(root)
    assert (root / "latest").read_text().strip() == "step_00000001"
    Trainer(DiffusionTask(run), run).load(root / "step_00000001")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", b"[]", "expected format"),
        ("state.json", b"{", "cannot be read"),
        ("state.json", b'{"format": "fastdiff training state 1"}', "does not fit this run"),
        ("networks.safetensors", b"", "cannot be read"),
        ("optimizers.safetensors", None, "cannot be read"),
        ("networks.safetensors", "ema.safetensors", "does not fit this run"),
    ],
)
def test_every_damage_to_a_checkpoint_is_one_line_with_a_way_out(
    images: Path, tmp_path: Path, file: str, content: bytes | str | None, message: str
) -> None:
    run = runs.diffusion_run(images, tmp_path / "run")
    trainer = Trainer(DiffusionTask(run), run)
    root = tmp_path / "run/checkpoints"
    trainer.step()
    trainer.save(root)
    path = root / "step_00000001" / file
    if content is None:
        path.unlink()
    else:
        new = content if isinstance(content, bytes) else (path.parent / content).read_bytes()
        path.write_bytes(new)
    with pytest.raises(ValueError, match=message) as error:
        Trainer(DiffusionTask(run), run).load(root / "step_00000001")
    assert "\n" not in str(error.value)
    assert "older one's name" in str(error.value)
