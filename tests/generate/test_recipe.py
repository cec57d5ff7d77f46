"""Recipes are read back to the job that made the image, those of version 1 too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.cli import main
from fastdiff.generate.job import (
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    Job,
    SampleSettings,
    TextJob,
    TextSettings,
    UpscaleJob,
)
from fastdiff.generate.model import with_generate
from fastdiff.generate.recipe import from_json, read, to_json
from fastdiff.images import read_recipe, save_png
from tests.support.tiny import tiny_model

OLD = Path(__file__).parent / "version1"
"""Written by commit 9d6bd7a: a digit, and recipes of txt2img (t), with a refiner (x), img2img (i)
and inpaint (p)."""


def test_an_image_is_made_again_from_its_file(tmp_path: Path) -> None:
    model = with_generate(tiny_model(stored_hash="ab" * 32))
    call: dict[str, Any] = {"sampler": "ddim", "eta": 0.5, "guidance_interval": (0, 2), "steps": 3}
    made = model.generate(classes=["one", 2, None], seeds=[7, 8, 9], **call)
    made[1].save(tmp_path / "a.png")
    data = read_recipe(tmp_path / "a.png")
    json.dumps(data, allow_nan=False)
    assert data["class_name"] == "two"
    assert data["weights"] == "ab" * 32
    recipe = read(data)
    assert recipe.job == made[1].job
    [again] = fastdiff.generate(model, [recipe.job])
    assert torch.equal(again.image, made[1].image)
    assert again.recipe == data


JOBS: list[Job] = [
    ClassJob(label="seven", seed=2**63 - 1, variation_seed=3, variation=0.25),
    ClassJob(settings=SampleSettings(sampler="ddim", steps=3, guidance_interval=(1, 2), tile=0)),
    TextJob(prompt="猫", upscale=1.5, text=TextSettings(negative="x", crop=(1, 2))),
    ImageToImageJob(image="a.png", prompt="cat", strength=0.1, height=64),
    InpaintJob(image="a.png", mask="b.png", label=3, paste=False),
    UpscaleJob(image="a.png", prompt="cat", scale=3, via="image"),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_jobs_are_json(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        save_png(name, torch.zeros(3, 8, 8))
    data = json.loads(json.dumps(to_json(job), allow_nan=False))
    assert from_json(data) == job
    assert "batch" not in data["settings"]
    with pytest.raises(ValueError, match="unknown field"):
        from_json({**data, "colour": 1})


def test_a_picture_given_as_pixels_cannot_be_found_again() -> None:
    data = to_json(ImageToImageJob(image=torch.zeros(3, 8, 8), prompt="cat"))
    assert data["image"]["path"] is None
    assert len(data["image"]["sha256"]) == 64
    with pytest.raises(ValueError, match="the image was given as pixels"):
        from_json(data)


def old(name: str) -> dict[str, Any]:
    recipes: dict[str, Any] = json.loads((OLD / "recipes.json").read_text())
    recipe: dict[str, Any] = recipes[name]
    return recipe


def test_text_recipes_of_version_1() -> None:
    upscaled = read(old("t"))
    assert (upscaled.version, upscaled.model, upscaled.device) == (1, "m/sd1", "cpu")
    job = upscaled.job
    assert isinstance(job, TextJob)
    assert (job.prompt, job.height, job.upscale) == ("a (red:1.2) cat", 64, 1.5)
    assert job.text.negative == "dog"
    assert (job.settings.sampler, job.settings.steps, job.settings.tile) == ("checkpoint", 3, 128)
    refined = read(old("x"))
    assert isinstance(refined.job, TextJob)
    assert refined.job.switch == 0.5
    assert refined.refiner is not None
    assert refined.refiner["path"] == "m/refiner"
    edited = read(old("i")).job
    assert isinstance(edited, ImageToImageJob)
    assert (edited.image, edited.strength, edited.height) == ("photo.png", 0.7, 64)
    painted = read(old("p")).job
    assert isinstance(painted, InpaintJob)
    assert (painted.image, painted.mask, painted.paste) == ("photo.png", "mask.png", True)


def test_a_picture_of_version_1_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped digits; guided, so that its rows share blocks with no other kind."""
    monkeypatch.chdir(tmp_path)
    path = OLD / "3-seed5.png"
    data = read_recipe(path)
    assert "recipe" not in data
    recipe = read(data)
    assert recipe.job == ClassJob(
        label=3,
        seed=5,
        settings=SampleSettings(sampler="ddim", steps=8, guidance_scale=2.0, tile=96),
    )
    code = main(["sample", "--like", str(path), "--device", "cpu"])
    out = " ".join(capsys.readouterr().out.split())
    with Image.open(path) as then, Image.open("out/3-seed5-again.png") as now:
        differs = max(abs(a - b) for a, b in zip(then.tobytes(), now.tobytes(), strict=True))
    # Bit for bit on the kind of CPU that made it; on another it says what differs.
    if differs == 0:
        assert (code, "identical to" in out) == (0, True)
    else:
        assert differs <= 2
        assert "recipe version 1" in out or "NOT identical" in out
    assert read_recipe("out/3-seed5-again.png")["recipe"] == 3


def test_other_pixels_of_version_1_are_told_from_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Image.open(OLD / "3-seed5.png") as file:
        pixels = file.point(lambda value: min(value + 40, 255))
    save_png("other.png", pixels, read_recipe(OLD / "3-seed5.png"))
    code = main(["sample", "--like", "other.png", "--device", "cpu"])
    out = " ".join(capsys.readouterr().out.split())
    assert code == 1
    assert "NOT identical to other.png" in out
    assert "recipe version 1: since then" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": "7"}, "seed: expected int"),
        ({"class": 1.5}, "label"),
        ({"settings": {"steps": 0}}, "steps must be at least 1, got 0"),
        ({"settings": {"stepz": 4}}, "stepz: unknown field"),
        ({"settings": None}, "settings must be an object"),
        ({"pipeline": "film"}, "unknown pipeline 'film'"),
        ({"recipe": 9}, "recipe version must be at most 3"),
        ({"seeds": [1]}, "it belongs to a contact sheet"),
        ({"dtype": []}, "dtype must be text"),
    ],
)
def test_a_recipe_that_was_changed(change: dict[str, Any], message: str) -> None:
    recipe = {**read_recipe(OLD / "3-seed5.png"), **change}
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        read(recipe)
    del recipe["weights"]
    with pytest.raises(ValueError, match=r"lacks 'weights'|must be at most|contact sheet"):
        read(recipe)
