"""Training on two ranks, which torchrun starts: the weights of one process, interruptions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.training import train_autoencoder, train_diffusion
from fastdiff.training.ranks import Ranks, joined
from tests.training import runs

SCRIPT = """
import os, signal, sys
from pathlib import Path
from fastdiff.training import task, train_autoencoder, train_diffusion
from fastdiff.training.ranks import joined
from tests.training.test_ranks import autoencoder, denoiser

folder = Path(sys.argv[1])
images = folder / "images"
with joined("cpu") as ranks:
    train_diffusion(denoiser(images, folder / "denoiser"))
    train_autoencoder(autoencoder(images, folder / "autoencoder"))
    batch = task.DiffusionTask.batch

    def interrupted(self, step, rows=None):
        if step == 2 and ranks.rank == 1:  # a signal that reaches one rank only
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, rows)

    task.DiffusionTask.batch = interrupted
    cut = denoiser(images, folder / "cut")
    try:
        train_diffusion(cut)
    except SystemExit as stop:
        print(f"rank {ranks.rank} stopped with {stop.code}", flush=True)
    task.DiffusionTask.batch = batch
    train_diffusion(cut, resume=True)
"""


def denoiser(images: Path, folder: Path, accumulate: int = 1) -> runs.DiffusionRun:
    """With all that could depend on a row's place: dropout, augmentation, drawn timesteps."""
    return runs.diffusion_run(
        images,
        folder,
        loss=runs.DenoiserLossConfig(timesteps="second-moment"),
        optimization=runs.optimization(accumulate=accumulate),
    )


def autoencoder(images: Path, folder: Path, accumulate: int = 1) -> runs.AutoencoderRun:
    return runs.autoencoder_run(
        images, folder, optimization=runs.optimization(steps=4, accumulate=accumulate)
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the runs of two ranks, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    runs.image_folder(folder / "images")
    (folder / "script.py").write_text(SCRIPT)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *words, str(folder / "script.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


def newest(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: weights, averages, moments, histories."""
    root = folder / "checkpoints"
    checkpoint = root / (root / "latest").read_text().strip()
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) >= 3
    return {f"{f.stem}/{k}": v for f in files for k, v in runs.load_file(f).items()}


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = newest(one), newest(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.slow
def test_two_ranks_make_the_run_of_one_process(both: tuple[Path, str], tmp_path: Path) -> None:
    """Bit for bit, if one process takes the ranks' shares as accumulated parts: a sum of two
    gradients has only one order."""
    folder, out = both
    images = folder / "images"
    train_diffusion(denoiser(images, tmp_path / "denoiser", accumulate=2))
    train_autoencoder(autoencoder(images, tmp_path / "autoencoder", accumulate=2))
    for name in ("denoiser", "autoencoder"):
        assert_same(folder / name, tmp_path / name)
    assert any("task/" in name for name in newest(folder / "denoiser"))  # losses of both ranks
    for mine, theirs in zip(
        runs.losses(folder / "denoiser"), runs.losses(tmp_path / "denoiser"), strict=True
    ):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert out.count("2 ranks, 2 images each") == 4


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_the_run_resumes(both: tuple[Path, str]) -> None:
    folder, out = both
    assert "rank 0 stopped with 143" in out
    assert "rank 1 stopped with 143" in out
    assert "stopped at step 3; resume to continue" in out
    assert_same(folder / "cut", folder / "denoiser")


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_alone(
    both: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = both
    longer = runs.with_optimization(denoiser(folder / "images", folder / "denoiser"), steps=7)
    train_diffusion(longer, resume=True)
    assert "the checkpoint is of 2 ranks, this run has 1" in capsys.readouterr().out


def test_ranks_share_each_part_of_a_batch() -> None:
    assert Ranks().rows(12, 2) is None
    shares = [Ranks(rank, 3).rows(12, 2) for rank in range(3)]
    assert [share.tolist() for share in shares if share is not None] == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="got 12, 2 and 4; choose a batch_size of 8 times"):
        Ranks(0, 4).rows(12, 2)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"has 2 GPUs.*--nproc-per-node 2"), joined("cuda"):
        pass
