"""Same seed, same bits; and what the pipeline refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff.kernels
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.sampling import sample
from fastdiff.generate.core import SampleSettings
from fastdiff.generate.latent import LatentDiffusion, from_recipe
from fastdiff.images import read_recipe, save_png
from fastdiff.models.unet import UNet
from fastdiff.runtime.prepare import prepare
from tests.support.tiny import (
    SCALE_FACTOR,
    UNET,
    tiny_autoencoder,
    tiny_model,
    tiny_pixel_model,
    tiny_unet,
)

CLASSES, SEEDS = [0, 3, None, 1, 2, 3, 0], [11, 12, 13, 14, 15, 2**40 + 16, 17]
QUICK = SampleSettings(steps=3, guidance_scale=2.0)


@pytest.fixture(scope="module")
def pipeline() -> LatentDiffusion:
    return LatentDiffusion(tiny_model(stored_hash="ab" * 32, path=Path("t")))


@pytest.fixture(scope="module")
def pixel_pipeline() -> LatentDiffusion:
    unet = replace(UNET, in_channels=1, out_channels=1)
    return LatentDiffusion(tiny_pixel_model(denoiser=tiny_unet(unet), image_channels=1))


def assert_alone_equals_batch(
    pipeline: LatentDiffusion, settings: SampleSettings, places: Sequence[int] = (0, 4, 6)
) -> None:
    """Each image alone, in a batch of 7 and in the batch turned around: the same bits."""
    with fastdiff.kernels.backend("reference"):
        latents = pipeline.latents(CLASSES, SEEDS, settings)
        images = pipeline(CLASSES, SEEDS, settings)
        turned = pipeline(CLASSES[::-1], SEEDS[::-1], settings)
        assert torch.equal(images.flip(0), turned)
        for place in places:
            label, seed = CLASSES[place], SEEDS[place]
            assert torch.equal(pipeline.latents([label], [seed], settings)[0], latents[place])
            assert torch.equal(pipeline([label], [seed], settings)[0], images[place])
    assert len({image.numpy().tobytes() for image in images}) == len(SEEDS)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_same_bits_alone_and_at_any_place_of_seven(
    pipeline: LatentDiffusion, sampler: str
) -> None:
    assert_alone_equals_batch(pipeline, replace(QUICK, sampler=sampler))


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7, "guidance_scale": 4.0},
        {"guidance_interval": (1, 2)},
        {"sampler": "ddim", "eta": 1.0, "spacing": "leading"},
        {"clamp": 1.0},
        {"tile": 8},
    ],
    ids=str,
)
def test_the_same_bits_with_every_setting(
    pipeline: LatentDiffusion, change: dict[str, Any]
) -> None:
    assert_alone_equals_batch(pipeline, replace(QUICK, **change))


def test_the_same_bits_at_every_one_of_seven_places(pipeline: LatentDiffusion) -> None:
    assert_alone_equals_batch(pipeline, replace(QUICK, steps=2), range(7))


def test_the_same_bits_on_pixels(pixel_pipeline: LatentDiffusion) -> None:
    assert_alone_equals_batch(pixel_pipeline, replace(QUICK, clamp=1.0))


def test_images_at_once_do_not_matter(pipeline: LatentDiffusion) -> None:
    classes, seeds = [index % 4 for index in range(10)], list(range(10))
    whole = pipeline(classes, seeds, QUICK)
    for batch in (1, 3, 10):
        assert torch.equal(pipeline(classes, seeds, replace(QUICK, batch=batch)), whole)


def test_threads_do_not_matter_to_latents(pipeline: LatentDiffusion) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(pipeline.latents(CLASSES, SEEDS, QUICK))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_the_pipeline_is_the_sampling_loop_and_the_decoder(pipeline: LatentDiffusion) -> None:
    """Against the loop with UNet.forward and no blocks: catches a missed scale or a wrong class."""
    unet, autoencoder = pipeline.unet, pipeline.autoencoder
    assert autoencoder is not None

    table = pipeline.table(QUICK)

    def predict(x: Tensor, row: int) -> Tensor:
        steps = torch.full((3,), float(table.timesteps[row]))
        cond = unet(x, steps, y=torch.tensor([2, 0, 4]))
        if not table.guided[row]:
            return cond
        return torch.cat([unet(x, steps, y=torch.full((3,), 4)), cond])

    with torch.no_grad():
        z = sample(predict, table, (3, 8, 8), [5, 6, 7])
        expected = autoencoder.decode(z / SCALE_FACTOR).clamp(-1, 1)
    images = pipeline([2, 0, None], [5, 6, 7], QUICK)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-4)
    assert images.std() > 0.05


def test_classes_seeds_and_guidance_change_the_image(pipeline: LatentDiffusion) -> None:
    def image(label: int | None = 0, seed: int = 5, **change: Any) -> Tensor:
        return pipeline([label], [seed], replace(QUICK, **change))

    plain = image()
    for other in (image(1), image(None), image(seed=6), image(guidance_scale=3.0), image(steps=5)):
        assert (other - plain).abs().max() > 1e-4
    # Guidance of "no class" towards "no class" goes nowhere.
    none = image(None, guidance_scale=1.0)
    torch.testing.assert_close(image(None), none, rtol=1e-3, atol=1e-4)


def test_progress_counts_the_rows_of_all_images(pipeline: LatentDiffusion) -> None:
    seen: list[tuple[int, int]] = []
    settings = replace(QUICK, sampler="heun", batch=2)
    pipeline([0] * 5, list(range(5)), settings, progress=lambda *now: seen.append(now))
    rows = len(pipeline.table(settings))
    done = [*range(2, 4 * rows + 1, 2), *range(4 * rows + 1, 5 * rows + 1)]  # 2, 2 and 1 at a time
    assert seen == [(now, 5 * rows) for now in done]


def test_an_image_is_made_again_from_its_file(pipeline: LatentDiffusion, tmp_path: Any) -> None:
    settings = replace(QUICK, sampler="ddim", eta=0.5, guidance_interval=(0, 2), batch=3)
    image = pipeline([1, 2, 3], [7, 8, 9], settings)[1]
    save_png(tmp_path / "a.png", image, pipeline.recipe(2, 8, settings))
    recipe = read_recipe(tmp_path / "a.png")
    assert recipe["class_name"] == "two"
    label, seed, again = from_recipe(recipe, weights_hash=pipeline.weights_hash)
    assert torch.equal(pipeline([label], [seed], again)[0], image)
    json.dumps(recipe, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "cd" * 32}, "made by weights cdcdcdcdcdcd"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": "7"}, "seed must be a whole number"),
        ({"class": "two"}, "class must be a whole number or null"),
        ({"settings": {"steps": 0}}, "steps must be at least 1, got 0"),
        ({"settings": {"stepz": 4}}, "stepz: unknown field"),
        ({"settings": None}, "expected an object"),
    ],
)
def test_a_recipe_that_was_changed(
    pipeline: LatentDiffusion, change: dict[str, Any], message: str
) -> None:
    recipe = {**pipeline.recipe(2, 8, QUICK), **change}
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        from_recipe(recipe, weights_hash=pipeline.weights_hash)
    del recipe["seed"]
    with pytest.raises(ValueError, match="lacks 'seed'"):
        from_recipe(recipe)


@pytest.mark.parametrize(
    ("classes", "seeds", "message"),
    [
        ([4], [0], "class must be from 0 to 3, got 4"),
        ([-1], [0], "class must be from 0 to 3, got -1"),
        ([True], [0], "class must be from 0 to 3, got True"),
        ([0], [-1], "got -1"),
        ([0], [2**63], "from 0 to 2"),
        ([0], [1.5], "whole number"),
        ([0, 1], [0], "as many seeds as classes, at least one, got 1 and 2"),
        ([], [], "at least one, got 0 and 0"),
    ],
)
def test_classes_and_seeds_that_do_not_fit(
    pipeline: LatentDiffusion, classes: list[Any], seeds: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(classes, seeds, QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "magic"}, "unknown sampler 'magic'; expected one of ddpm, ddim"),
        ({"spacing": "wide"}, "unknown spacing 'wide'"),
        ({"steps": -3}, "steps must be at least 1, got -3"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"eta": -1.0}, "eta must be a number >= 0"),
        ({"clamp": 0.0}, "clamp must be positive"),
        ({"guidance_scale": math.nan}, "guidance scale must be a number"),
        ({"guidance_rescale": 2.0}, "guidance rescale must lie in"),
        ({"guidance_interval": (3, 3)}, "guidance interval must be steps"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleSettings(**change)


def test_a_model_without_classes_is_not_guided() -> None:
    unet = replace(UNET, num_classes=None, null_class=False)
    pipeline = LatentDiffusion(tiny_model(denoiser=tiny_unet(unet), class_names=()))
    with pytest.raises(ValueError, match="this model has no classes, so it cannot be guided"):
        pipeline([None], [0], QUICK)
    plain = replace(QUICK, guidance_scale=1.0)
    with pytest.raises(ValueError, match="has no classes, got class 1; give None"):
        pipeline([1], [0], plain)
    assert pipeline([None], [0], plain).isfinite().all()


def test_a_network_that_returns_nan_is_named(pipeline: LatentDiffusion) -> None:
    broken = tiny_unet()
    broken.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity at step 0"):
        LatentDiffusion(tiny_model(denoiser=broken))([0], [0], QUICK)
    decoder = tiny_autoencoder()
    decoder.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="the decoder returned NaN or infinity"):
        LatentDiffusion(tiny_model(autoencoder=decoder))([0], [0], QUICK)


def test_an_autoencoder_alone_does_not_sample() -> None:
    with pytest.raises(ValueError, match="holds an autoencoder only"):
        LatentDiffusion(tiny_model(denoiser=None, schedule=None, class_names=()))


def test_embeddings_are_computed_once_per_class(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = prepare(tiny_unet())
    calls: list[tuple[int, ...]] = []
    embed = UNet.embed

    def counted(self: UNet, t: Tensor, y: Tensor | None = None, added: Any = None) -> Tensor:
        calls.append(tuple(t.shape))
        return embed(self, t, y, added)

    monkeypatch.setattr(UNet, "embed", counted)
    pipeline = LatentDiffusion(tiny_model(denoiser=unet))
    pipeline([0, 1, 0, 1, 0], list(range(5)), replace(QUICK, steps=6))
    assert calls == [(6,)] * 3  # classes 0 and 1 and the null class, all six timesteps at once
