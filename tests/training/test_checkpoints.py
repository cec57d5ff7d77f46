"""Checkpoints are complete or absent, and damage is named."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from fastdiff.training import checkpoints, train_diffusion
from fastdiff.training.task import DiffusionTask
from fastdiff.training.trainer import Trainer
from tests.training import runs


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
        ".lock",
        "config.json",
        "log.jsonl",
        "checkpoints",
        "model",
    }


def test_the_newest_checkpoint_is_never_deleted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 4's folder was renamed and before `latest` named it; then resumed, and
    stopped at step 3, before the one that nothing names."""
    run = runs.diffusion_run(images, tmp_path / "run")
    run = runs.with_output(run, save_every=2, keep=1)
    root, real = tmp_path / "run/checkpoints", checkpoints.write_text

    def killed(path: Path, text: str) -> None:
        if "step_00000004" in text:
            raise KeyboardInterrupt
        real(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(run)
    assert (root / "step_00000004").is_dir()
    assert (root / "latest").read_text() == "step_00000002\n"
    with monkeypatch.context() as patch:
        runs.signal_at(patch, DiffusionTask, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_diffusion(run, resume=True)
    assert checkpoints.latest_checkpoint(root) == root / "step_00000003"
    train_diffusion(run, resume=True)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000006"]
    train_diffusion(runs.with_output(run, folder=str(tmp_path / "whole")))
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_old_checkpoints_of_a_killed_run_are_deleted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its last save, after `latest` named it and before the older one was deleted."""
    run = runs.with_output(
        runs.diffusion_run(images, tmp_path / "run"), save_every=4, keep=1, preview_every=0
    )

    def killed(*_: object) -> None:
        if (root / "step_00000006").is_dir():
            raise KeyboardInterrupt

    root = tmp_path / "run/checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "delete_old", killed)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(run)
    assert {path.name for path in root.iterdir()} == {"latest", "step_00000004", "step_00000006"}
    train_diffusion(run, resume=True)
    assert {path.name for path in root.iterdir()} == {"latest", "step_00000006"}


def test_damaged_checkpoints_are_named(images: Path, tmp_path: Path) -> None:
    run = runs.diffusion_run(images, tmp_path / "run", optimization=runs.optimization(steps=1))
    train_diffusion(run)
    weights = tmp_path / "run/checkpoints/step_00000001/networks.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*step_00000001"):
        train_diffusion(run, resume=True)


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
        ("state.json", b"{", "cannot read checkpoint"),
        ("state.json", b'{"format": "fastdiff training state 1"}', "does not fit this run"),
        ("networks.safetensors", b"", "cannot read checkpoint"),
        ("optimizers.safetensors", None, "cannot read checkpoint"),
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
