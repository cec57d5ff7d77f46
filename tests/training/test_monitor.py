"""What a run writes about itself."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fastdiff.training import train_diffusion
from fastdiff.training.monitor import Monitor, read_log
from fastdiff.training.task import DiffusionTask
from tests.training import runs


def test_lines_after_the_checkpoint_are_replaced(images: Path, tmp_path: Path) -> None:
    """A killed run has logged more than it saved; resuming repeats those steps, not the lines."""
    run = runs.diffusion_run(images, tmp_path / "run", optimization=runs.optimization(steps=3))
    train_diffusion(run)
    expected = runs.losses(tmp_path / "run")
    with (tmp_path / "run/log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')  # cut off in the middle
    train_diffusion(run, resume=True)
    assert runs.losses(tmp_path / "run") == expected


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


def test_tensorboard_keeps_every_step_across_a_resume(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step of the checkpoint was purged with the ones after it."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = runs.with_output(runs.diffusion_run(images, tmp_path / "run"), tensorboard=True)
    with monkeypatch.context() as patch:
        runs.signal_at(patch, DiffusionTask, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_diffusion(run)
    train_diffusion(run, resume=True)
    events = loader.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_under_the_log_is_one_clear_line(tmp_path: Path) -> None:
    """Even though closing the log tries to write again."""

    def log() -> None:
        with Monitor(tmp_path, first_step=0, steps=2, tensorboard=False) as monitor:
            monitor._log.close()
            monitor._log = open("/dev/full", "w")  # noqa: SIM115, the monitor closes it
            monitor.record(1, {"loss": 0.5})

    with pytest.raises(
        OSError, match=r"^\[Errno 28\] no space left to write .*log.jsonl .*resume$"
    ):
        log()


@pytest.mark.parametrize("line", ["5", "[]", "null", '{"step": "4"}', "{}", "[" * 100_000, "\x00"])
def test_a_damaged_line_ends_the_log(tmp_path: Path, line: str) -> None:
    good = '{"step": 1, "loss": 0.5}'
    (tmp_path / "log.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}]
    (tmp_path / "log.jsonl").write_bytes(f"{good}\n".encode() + b"\xff\xfe\n")
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}]
