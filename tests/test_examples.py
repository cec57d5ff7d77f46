"""The examples run unchanged, on small random models saved by diffusers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.images import read_image, read_recipe, save_png
from fastdiff.training import TRAINING_PRESETS
from fastdiff.training.monitor import read_log
from tests.support.diffusers_models import save_folder
from tests.test_docs import small_run

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def test_text_to_image(folder: Path) -> None:
    example("text_to_image")(str(save_folder("sd1", folder)), "a (red:1.2) cat", steps=3)
    assert read_image(folder / "cat.png").shape == (3, 64, 64)
    assert read_image(folder / "preview.png").shape == (3, 8, 8)


def test_image_to_image_and_inpainting(folder: Path) -> None:
    photo = torch.rand(3, 80, 100) * 2 - 1
    save_png(folder / "photo.png", photo)
    model = save_folder("sd1", folder)
    run = example("image_to_image_and_inpainting")
    run(str(model), str(folder / "photo.png"), "a cat", size=64, steps=3)
    original = read_image(folder / "photo.png", height=64, width=64)
    middle, whole = (read_image(folder / name) for name in ("middle.png", "winter.png"))
    same = (middle - original).abs().amax(0) < 1e-6
    assert same[:16].all()
    assert same[:, :16].all()
    assert not same[16:48, 16:48].all()
    assert (whole - original).abs().mean() > 0.01


def test_sdxl_with_refiner(folder: Path) -> None:
    base, refiner = save_folder("xl", folder), save_folder("refiner", folder)
    example("sdxl_with_refiner")(str(base), str(refiner), "a cat", size=64, steps=5)
    assert read_image(folder / "fox.png").shape == (3, 64, 64)


@pytest.mark.slow
def test_training_goes_on_and_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (folder / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        photo = torch.rand(3, 40, 32) * 2 - 1
        save_png(folder / "photos" / "ab"[number % 2] / f"{number}.png", photo)
    monkeypatch.setitem(TRAINING_PRESETS, "digits-diffusion", small_run())
    run = example("train_on_your_images")
    run("photos", "runs/photos", steps=2)
    assert read_image(folder / "sample.png").shape == (3, 32, 32)
    run("photos", "runs/photos", steps=3)
    steps = [line["step"] for line in read_log(folder / "runs/photos")]
    assert steps[-1] == 3
    assert fastdiff.load("runs/photos").class_names == ("a", "b")


@pytest.mark.slow
def test_the_notebook_runs_and_carries_no_outputs(folder: Path) -> None:
    """Cell after cell; the last expression of a cell, which a notebook shows, too."""
    notebook = json.loads((EXAMPLES / "first_pictures.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        exec(compile("".join(cell["source"]), "first_pictures.ipynb", "exec"), names)
    assert read_recipe(folder / "three.png")["job"]["label"] == 3
    kept, original = names["repainted"].tensor[0, :, :16], names["images"].tensor[0, :, :16]
    assert torch.equal(kept, original)
    assert len(names["frames"]) == 5
    assert names["report"].pairs == 1


def test_what_to_install_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_folder("sd1", folder)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff\[diffusers\]'"):
        fastdiff.load(model)


@pytest.mark.parametrize("which", ["swiss-roll", "heartbeat"])
def test_dpm(folder: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred steps already tell the heartbeat from 20 fair coins, and the roll from noise."""
    pytest.importorskip("matplotlib")
    run = example("dpm")
    monkeypatch.setitem(run.__globals__, "SHOWN", 50)
    monkeypatch.setitem(run.__globals__, "BATCH", 128)
    bits = run(which, str(folder / "dpm.png"), steps=100)
    assert bits < (5 if which == "heartbeat" else 30)  # 83 and 1,432 before the training
    assert bits > (2 if which == "heartbeat" else -10), "below the entropy"
    assert read_image(folder / "dpm.png").shape == (3, 676, 1300)


def test_train_with_rewards(folder: Path) -> None:
    before, after = example("train_with_rewards")(str(folder / "thin.png"), rounds=2, count=10)
    assert after < before - 0.01  # it rises if the sign of the reward is turned
    assert read_image(folder / "thin.png").shape == (3, 64, 320)


def test_ddpm_on_one_screen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    run = example("ddpm_on_one_screen")
    monkeypatch.setitem(run.__globals__, "T", 20)
    monkeypatch.setitem(run.__globals__, "BATCH", 32)
    before, after = run(str(folder / "digits.png"), steps=30)
    assert after < 0.6 * before
    assert read_image(folder / "digits.png").shape == (3, 64, 64)
    lines = (EXAMPLES / "ddpm_on_one_screen.py").read_text().splitlines()
    assert len(lines) <= 60, "one screen"
