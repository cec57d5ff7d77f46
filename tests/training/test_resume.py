"""Runs that were stopped, killed or started by an older version resume bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.files import locked_folder
from fastdiff.training import DiffusionRun, train_autoencoder, train_diffusion
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.task import DiffusionTask
from tests.training import runs

INTERRUPTED = Path(__file__).parent / "interrupted"


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoder_resumes_bit_for_bit_after_sigterm(
    images: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.autoencoder_run(images, tmp_path / "whole", kind)
    train_autoencoder(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        runs.signal_at(patch, AutoencoderTask, 3, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            train_autoencoder(cut)
    assert stopped.value.code == 143
    # the current step is finished and saved, and the bundle exists
    assert (tmp_path / "cut/checkpoints/latest").read_text().strip() == "step_00000004"
    assert load_bundle(tmp_path / "cut").provenance["facts"]["steps"] == 4
    train_autoencoder(cut, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("kind", ["pixels", "pixels, channels_last", "latents"])
def test_denoiser_resumes_bit_for_bit_after_ctrl_c(
    images: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """channels_last: the moments come back in the layout of their weights, not of the file."""
    latent = kind == "latents"
    whole = runs.diffusion_run(images, tmp_path / "whole")
    whole = runs.with_optimization(whole, channels_last=kind.endswith("channels_last"))
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
        runs.signal_at(patch, DiffusionTask, 2, signal.SIGINT)
        with pytest.raises(SystemExit) as stopped:
            train_diffusion(cut)
    assert stopped.value.code == 130
    train_diffusion(cut, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    bundle = load_bundle(tmp_path / "cut/model")
    assert bundle.class_names == ("a", "b")
    assert (bundle.autoencoder is not None) == latent
    assert bundle.denoiser is not None
    average = runs.final_tensors(tmp_path / "cut")
    for name, value in bundle.denoiser.state_dict().items():
        assert torch.equal(value, average[f"ema.safetensors:{name}"]), "the average is exported"


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
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    names = sorted(path.name for path in root.iterdir())
    assert names == ["latest", "step_00000004", "step_00000006"], "the unfinished one is gone"


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


def test_a_finished_run_goes_on_to_more_steps(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if it had been asked for them in the first place, where the learning rate is constant."""
    whole = runs.diffusion_run(
        images, tmp_path / "whole", optimization=runs.optimization(steps=6, decay="constant")
    )
    train_diffusion(whole)
    short = runs.with_output(whole, folder=str(tmp_path / "cut"))
    train_diffusion(runs.with_optimization(short, steps=3))
    capsys.readouterr()
    train_diffusion(short, resume=True)
    assert "optimization.steps: 3 before, 6 now\n" in capsys.readouterr().out
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "cut/config.json").read_text())["optimization"]["steps"] == 6
    with pytest.raises(ValueError, match="already been trained for 6 steps, more than the 5"):
        train_diffusion(runs.with_optimization(short, steps=5), resume=True)


def test_a_schedule_that_changes_is_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cosine that was at its end has half of its height again."""
    run = runs.diffusion_run(
        images, tmp_path / "run", optimization=runs.optimization(steps=2, warmup_steps=0)
    )
    train_diffusion(run)
    train_diffusion(runs.with_optimization(run, steps=4), resume=True)
    assert "the learning rate of the next step changes from 0 to 0.0005" in capsys.readouterr().out


def test_a_folder_takes_one_training_at_a_time(images: Path, tmp_path: Path) -> None:
    """Not even --resume next to a running one; a killed process leaves no lock behind."""
    run = runs.diffusion_run(images, tmp_path / "run", optimization=runs.optimization(steps=1))
    code = (
        "import sys, time, pathlib; from fastdiff.files import locked_folder\n"
        "with locked_folder(pathlib.Path(sys.argv[1]), what='waits'):\n"
        "    print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=r"another process is training in .*run; wait for it"):
            train_diffusion(run)
        assert not (tmp_path / "run/config.json").exists()
        other.kill()
    train_diffusion(run)
    with (
        locked_folder(tmp_path / "run", what="is training"),
        pytest.raises(ValueError, match="another process is training"),
    ):
        train_diffusion(run, resume=True)


def test_a_run_that_an_older_version_left_unfinished_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """interrupted/ was written by commit 9d6bd7a: a denoiser on latents, stopped after step 3 of 6.

    whole.jsonl is what that commit logged without the stop. On the machine that wrote it all
    numbers are equal to the last bit; elsewhere convolutions round differently.
    """
    shutil.copytree(INTERRUPTED, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    before = json.loads(Path("cut/checkpoints/step_00000003/state.json").read_text())
    old = runs.final_tensors(Path("cut"))
    run = DiffusionRun.from_json(json.loads(Path("cut/config.json").read_text()))
    train_diffusion(run, resume=True)

    logged = runs.losses(Path("cut"))
    expected = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged] == [2, 4, 6]
    for ours, theirs in zip(logged, expected, strict=True):
        for name in ("loss", "grad_norm/unet", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["step"], name)
    after = json.loads(Path("cut/checkpoints/step_00000006/state.json").read_text())
    assert after.keys() == before.keys()
    assert after["task"] == before["task"]
    new = runs.final_tensors(Path("cut"))
    stored = {name for name in old if not name.startswith(("autoencoder", "unet"))}
    assert stored == {name for name in new if not name.startswith(("autoencoder", "unet"))}
    moved = [name for name in stored if name.startswith("networks") and "weight" in name]
    assert any(not torch.equal(new[name], old[name]) for name in moved)
