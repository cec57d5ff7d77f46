"""unCLIP's variations, interpolations and text differences, against diffusers' decoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.generate.job import InterpolationJob, SampleSettings, TextJob, stage_seed
from fastdiff.generate.recipe import from_json, to_json
from fastdiff.images import save_png, to_pil
from tests.generate.test_unclip import (
    edited,
    hand_over,
    noises,
    starts,
    with_our_schedule,
)
from tests.support.drawing import images
from tests.support.unclip_models import LARGE, SMALL, variation

SETTINGS = SampleSettings(steps=3, guidance_scale=2.5, upsampler_steps=3, batch=4)
SEED, DTYPE = 11, torch.float64
"""In fp32 a rounding of the first step's prediction, at t = 999, is 20,000 times as large in x0."""


def picture(seed: int, height: int = 20, width: int = 31) -> Tensor:
    """A picture of 8 bits per channel: (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (3, height, width), generator=generator)
    return levels / 127.5 - 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    place = tmp_path_factory.mktemp("variations") / "karlo"
    pipe = variation(place, DTYPE)
    model = fastdiff.load(place, dtype=DTYPE)
    with_our_schedule(pipe, model)
    return pipe, model, place


def theirs(pipe: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Tensor:
    """diffusers' image from our noise: (3, H, W) in [-1, 1]."""
    draws = [
        *noises(SEED, (3, SMALL, SMALL), 2, DTYPE),
        *noises(stage_seed(SEED, "superresolution"), (3, LARGE, LARGE), 2, DTYPE),
    ]
    hand_over(monkeypatch, iter(draws))
    start = {k: v for k, v in starts(SEED, DTYPE).items() if k != "prior_latents"}
    made = pipe(
        **given,
        **start,
        decoder_num_inference_steps=3,
        super_res_num_inference_steps=3,
        decoder_guidance_scale=2.5,
        output_type="np",
    ).images[0]
    return torch.from_numpy(made).double().permute(2, 0, 1) * 2 - 1


def assert_same(ours: Tensor, wanted: Tensor) -> None:
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)  # diffusers rounds to fp32


def embedding(pipe: Any, image: Tensor) -> np.ndarray:
    """CLIP's embedding of a picture by transformers, fp64."""
    pixels = pipe.feature_extractor(images=to_pil(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        return pipe.image_encoder(pixels.to(DTYPE)).image_embeds[0].numpy()


def turned(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """Turn a by a share of its angle to b, in the plane of both; the length goes linearly in the
    coordinates along a and b."""
    theta = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - share) * theta) * a + np.sin(share * theta) * b) / np.sin(theta)


def as_given(vector: np.ndarray) -> dict[str, Tensor]:
    return {"image_embeddings": torch.from_numpy(vector)[None]}


def test_a_variation_equals_that_of_diffusers(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, model, _ = pair
    given = picture(0)
    wanted = theirs(pipe, monkeypatch, image=to_pil(given))
    (ours,) = images(model, [TextJob(prompt="", image=given, seed=SEED, settings=SETTINGS)])
    assert_same(ours, wanted)
    (called,) = model.generate(
        image=to_pil(given), seeds=SEED, steps=3, guidance_scale=2.5, upsampler_steps=3
    )
    assert torch.equal(called.image, ours)
    other = images(model, [TextJob(prompt="", image=picture(1), seed=SEED, settings=SETTINGS)])
    assert not torch.equal(other[0], ours)


@pytest.mark.parametrize(("height", "width"), [(20, 31), (13, 13), (40, 9), (7, 8)])
def test_a_picture_is_seen_as_transformers_prepares_it(pair: Any, height: int, width: int) -> None:
    pipe, model, _ = pair
    given = picture(2, height, width)
    wanted = pipe.feature_extractor(images=to_pil(given), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(model.image_encoder.seen(given), wanted, rtol=0, atol=1e-6)


def test_between_two_pictures_the_embedding_turns(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ramesh et al. 2022, section 3.2; on the way the distance to the second picture falls."""
    pipe, model, _ = pair
    one, two = picture(0), picture(1)
    ends = embedding(pipe, one), embedding(pipe, two)

    def frame(at: float) -> InterpolationJob:
        return InterpolationJob(image=one, to_image=two, at=at, seed=SEED, settings=SETTINGS)

    (ours,) = images(model, [frame(0.25)])
    assert_same(ours, theirs(pipe, monkeypatch, **as_given(turned(*ends, 0.25))))
    for at, end in ((0.0, one), (1.0, two)):
        alone = TextJob(prompt="", image=end, seed=SEED, settings=SETTINGS)
        assert torch.equal(images(model, [frame(at)]), images(model, [alone]))
    walk = [turned(*ends, at) for at in np.linspace(0, 1, 9)]
    away = [float(np.linalg.norm(z - ends[1])) for z in walk]
    assert away == sorted(away, reverse=True)
    called = model.generate(
        image=one,
        to_image=two,
        frames=5,
        seeds=SEED,
        steps=3,
        guidance_scale=2.5,
        upsampler_steps=3,
    )
    assert torch.equal(called.tensor[1], ours)


@pytest.mark.parametrize("at", [0.5, 1.0])
def test_a_text_difference_turns_a_picture(
    pair: Any, at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 3.3: z = slerp(z_i, norm(z_t - z_t0), theta), theta up to 0.5."""
    pipe, model, _ = pair
    given = picture(0)
    texts = []
    for words in ("ab", "c d"):
        ids = pipe.tokenizer([words], padding="max_length", max_length=16, return_tensors="pt")
        texts.append(pipe.text_encoder(ids.input_ids).text_embeds[0].detach().double().numpy())
    z, difference = embedding(pipe, given), texts[1] - texts[0]
    difference *= np.linalg.norm(z) / np.linalg.norm(difference)
    wanted = theirs(pipe, monkeypatch, **as_given(turned(z, difference, 0.5 * at)))
    job = InterpolationJob(
        image=given, prompt="ab", to_prompt="c d", at=at, seed=SEED, settings=SETTINGS
    )
    assert_same(images(model, [job])[0], wanted)


def test_recipes_and_commands_take_pictures(
    pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastdiff.cli import main

    *_, folder = pair
    for number in range(2):
        save_png(tmp_path / f"{number}.png", picture(number))
    one, two = (str(tmp_path / f"{number}.png") for number in range(2))
    job = InterpolationJob(image=one, to_image=two, at=0.5)
    assert from_json(to_json(job)) == job
    assert "to_image" not in to_json(InterpolationJob(to_seed=1))
    few = f"--steps 2 --upsampler-steps 2 --model {folder} --out {tmp_path / 'out'}".split()
    assert main(["txt2img", "", "--image", one, *few]) == 0, capsys.readouterr().err
    words = ["interpolate", "--image", one, "--to-image", two, "--frames", "3", *few]
    assert main(words) == 0, capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "out").glob("*frame*.png"))
    assert names == [f"0-to-1-frame{number}.png" for number in range(3)]
    again = ["interpolate", "--like", str(tmp_path / "out" / names[1]), "--out", str(tmp_path)]
    assert main(again) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (TextJob(prompt="a"), "makes variations of a picture, and none was given"),
        (TextJob(prompt="a", image="none.png"), "none.png"),
        (InterpolationJob(prompt="a", to_prompt="b"), "none was given"),
        (InterpolationJob(image=picture(0), prompt="a", to_prompt="a"), "must differ, got 'a'"),
    ],
)
def test_what_it_cannot_do_is_refused(pair: Any, job: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        images(pair[1], [job])


def test_pictures_without_an_image_encoder_are_refused() -> None:
    digits = fastdiff.load("digits")
    with pytest.raises(ValueError, match="has no image encoder, so image has no effect"):
        images(digits, [InterpolationJob(image=torch.zeros(3, 8, 8), to_seed=1)])
    with pytest.raises(ValueError, match="to_image needs image"):
        InterpolationJob(to_image="a.png")
    with pytest.raises(ValueError, match="image must be a file or a tensor, got int"):
        InterpolationJob(image=3, to_seed=1)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("feature_extractor", {"resample": 2}, "resample must be 3, got 2"),
        ("feature_extractor", {"do_normalize": False}, "do_normalize must be True"),
        ("feature_extractor", {"crop_size": 16}, "crop_size must be 12"),
        ("feature_extractor", {"image_mean": [0.5]}, "image_mean must be three numbers"),
        ("image_encoder", {"architectures": ["CLIPModel"]}, "architectures must be CLIPVision"),
        ("image_encoder", {"patch_size": 6}, "these are not the weights"),
    ],
)
def test_image_encoders_that_we_lack_are_refused(
    pair: Any, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fastdiff.load(edited(pair[2], tmp_path / "edited", part, **change))


def test_how_a_picture_is_seen_is_part_of_the_hash(pair: Any, tmp_path: Path) -> None:
    *_, model, folder = pair
    other = edited(folder, tmp_path / "edited", "feature_extractor", image_mean=[0.5, 0.5, 0.5])
    assert fastdiff.load(other, dtype=DTYPE).weights_hash != model.weights_hash
    shutil.copytree(folder, tmp_path / "same")
    assert fastdiff.load(tmp_path / "same", dtype=DTYPE).weights_hash == model.weights_hash
