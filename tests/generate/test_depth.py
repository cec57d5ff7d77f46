"""Stable Diffusion 2's depth model against diffusers' StableDiffusionDepth2ImgPipeline."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.save import save
from fastdiff.generate.job import ImageToImageJob, InpaintJob, SampleSettings, TextJob, TextSettings
from fastdiff.generate.recipe import from_json, to_json
from fastdiff.generate.session import Session
from fastdiff.images import read_mask, save_png, to_pil
from tests.generate.test_text_against_diffusers import replace_draws
from tests.generate.test_unclip import initial_noise
from tests.generate.test_unclip_pictures import picture
from tests.support.diffusers_models import UNET, components, pipeline, seeded
from tests.support.drawing import images
from tests.support.peers import import_diffusers

SEED, DTYPE, SIDES = 3, torch.float64, (64, 40)
SETTINGS = SampleSettings(steps=4, guidance_scale=3.0, batch=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    root = tmp_path_factory.mktemp("depth")
    import_diffusers("StableDiffusionDepth2ImgPipeline")
    parts = components("sd2", root / "words")
    kept = ("vae", "text_encoder", "tokenizer", "scheduler")
    parts = {name: parts[name] for name in kept} | {
        "unet": seeded("UNet2DConditionModel", UNET | {"in_channels": 5}, 4)
    }
    for name in ("vae", "text_encoder", "unet"):
        parts[name].to(DTYPE)
    none = {"depth_estimator": None, "feature_extractor": None}
    pipe = pipeline("StableDiffusionDepth2ImgPipeline", parts, **none)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(root / "model")
    model = fastdiff.load(root / "model", dtype=DTYPE)
    pipe.scheduler.alphas_cumprod = Session.of(model).schedule.alphas_cumprod
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.alphas_cumprod[0]
    return pipe, model, root / "model"


def depth_map(height: int = 19, width: int = 30) -> Tensor:
    """A map of another size than the picture, in an estimator's range: (1, height, width)."""
    generator = torch.Generator().manual_seed(8)
    return 700 + 900 * torch.rand(1, height, width, generator=generator, dtype=DTYPE)


def theirs(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, given: Tensor, depth: Tensor, strength: float
) -> Tensor:
    noise = initial_noise(SEED, (4, given.shape[1] // 8, given.shape[2] // 8)).to(DTYPE)
    replace_draws(monkeypatch, pipe, noise)
    made = pipe(
        "a red cat",
        image=((given + 1) / 2)[None].to(DTYPE),
        depth_map=depth,
        negative_prompt="sky",
        strength=strength,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images[0]
    return 2 * made - 1


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_image_equals_that_of_diffusers(
    pair: Any, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, model, _ = pair
    given, depth = picture(0, *SIDES), depth_map()
    wanted = theirs(pipe, monkeypatch, given, depth, strength)
    job = ImageToImageJob(
        prompt="a red cat",
        image=given,
        depth=depth,
        strength=strength,
        seed=SEED,
        text=TextSettings(negative="sky"),
        settings=SETTINGS,
    )
    ours = images(model, [job])[0]
    assert float(ours.std()) > 0.05
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)  # the picture is in fp32
    (called,) = model.generate(
        "a red cat",
        image=given,
        depth=depth,
        strength=strength,
        seeds=SEED,
        negative="sky",
        steps=4,
        guidance_scale=3.0,
    )
    assert torch.equal(called.image, ours)


def test_files_and_pillow_images_are_maps_too(pair: Any, tmp_path: Path) -> None:
    _, model, _ = pair
    grey = ((depth_map() - 700) / 450 - 1).clamp(-1, 1).float()
    save_png(tmp_path / "depth.png", grey, {})
    asked: Any = {"prompts": "cat", "image": picture(0, *SIDES), "steps": 2, "seeds": SEED}
    made = [
        model.generate(**asked, depth=depth)[0]
        for depth in (tmp_path / "depth.png", to_pil(grey), read_mask(tmp_path / "depth.png"))
    ]
    assert all(torch.equal(each.image, made[0].image) for each in made)
    job = ImageToImageJob(image="a.png", prompt="cat", depth=str(tmp_path / "depth.png"))
    data = to_json(made[0].job)
    assert data["depth"]["path"] == str(tmp_path / "depth.png")
    assert from_json({**data, "image": {"path": "a.png"}}).depth == job.depth
    other = model.generate(**asked, depth=depth_map(30, 19))[0]
    assert float((other.image - made[0].image).abs().max()) > 0.01


def test_what_it_cannot_do_is_refused(pair: Any) -> None:
    _, model, _ = pair
    given, depth = picture(0, *SIDES), depth_map()
    mask = torch.ones(1, *SIDES)
    for job in (
        TextJob(prompt="a"),
        ImageToImageJob(prompt="a", image=given),
        InpaintJob(prompt="a", image=given, mask=mask),
    ):
        with pytest.raises(ValueError, match="reads its depth map, which fastdiff does not estim"):
            images(model, [job])
    for wrong, message in (
        (torch.ones(1, 4, 4), "must not be the same everywhere, got only 1"),
        (depth / 0, "must be finite"),
        (depth.expand(3, -1, -1), "must be .1, H, W. floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate("a", image=given, depth=wrong, steps=1)
    with pytest.raises(ValueError, match="reads no depth map, so depth has no effect"):
        fastdiff.load("digits").generate(image=torch.zeros(1, 32, 32), depth=torch.ones(1, 4, 4))


def test_it_survives_writing(pair: Any, tmp_path: Path) -> None:
    _, model, _ = pair
    asked: Any = {"prompts": "cat", "image": picture(0, *SIDES), "depth": depth_map(), "steps": 2}
    (expected,) = model.generate(**asked)
    save(model, tmp_path / "diffusers", layout="diffusers")
    (again,) = fastdiff.load(tmp_path / "diffusers", dtype=DTYPE).generate(**asked)
    assert torch.equal(again.image, expected.image)
    kind = import_diffusers("StableDiffusionDepth2ImgPipeline").StableDiffusionDepth2ImgPipeline
    none = {"depth_estimator": None, "feature_extractor": None}
    assert kind.from_pretrained(tmp_path / "diffusers", **none).unet.config.in_channels == 5
