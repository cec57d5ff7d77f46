"""The images of a step, and the check that they have not changed since the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastdiff.training import train_autoencoder, train_diffusion
from tests.training import runs


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_other_images_than_at_the_start_are_noticed(
    images: Path, tmp_path: Path, stage: str
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    make, train = {
        "autoencoder": (runs.autoencoder_run, train_autoencoder),
        "denoiser": (runs.diffusion_run, train_diffusion),
    }[stage]
    run = make(folder, tmp_path / "run", optimization=runs.optimization(steps=1))
    train(run)  # type: ignore[operator]
    renamed = folder / "a/same-order-other-name.png"
    (folder / "a/10.png").rename(renamed)  # the last of its class: nothing changed for training
    train(run, resume=True)  # type: ignore[operator]
    shutil.copy(folder / "b/01.png", folder / "b/99.png")
    with pytest.raises(ValueError, match=r"have changed .*12 images then, 13 now"):
        train(run, resume=True)  # type: ignore[operator]
    (folder / "b/99.png").unlink()
    shutil.copy(folder / "b/01.png", folder / "a/00.png")
    with pytest.raises(ValueError, match="have changed since this run was started"):
        train(run, resume=True)  # type: ignore[operator]
