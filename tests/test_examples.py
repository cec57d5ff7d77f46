"""The examples run as they stand, on small random models that diffusers has saved."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.images import read_image, save_png
from tests.support.diffusers_models import save_folder

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


def test_what_to_install_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_folder("sd1", folder)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff\[diffusers\]'"):
        fastdiff.load(model)
