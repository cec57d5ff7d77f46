"""The text pipelines beyond what diffusers can be asked: seeds, callbacks, sizes, refusals."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.checkpoint.scheduler import SamplerSettings
from fastdiff.data import DataConfig, open_dataset
from fastdiff.data.dataset import to_float
from fastdiff.diffusion.samplers import SamplerTable
from fastdiff.diffusion.sampling import Step
from fastdiff.generate.core import SampleSettings, stage_seeds
from fastdiff.generate.image_to_image import first_step, image_to_image, latents_to_latents
from fastdiff.generate.inpainting import inpaint
from fastdiff.generate.latent import LatentDiffusion
from fastdiff.generate.refine import refine
from fastdiff.generate.text import TEXT_SETTINGS, TextDiffusion, TextSettings, size_vector
from fastdiff.generate.text_to_image import text_to_image, text_to_latents
from fastdiff.generate.upscale import upscale
from fastdiff.models.text import encode_prompt
from fastdiff.models.unet import UNet
from tests.support.diffusers_models import checkpoint, components

QUICK = SampleSettings(steps=3, guidance_scale=3.0, batch=2)
LONG = "a photo of a red cat " * 20
PROMPTS, SEEDS = ["a cat", LONG, "a cat", "blue sky"], [5, 6, 7, 8]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TextDiffusion]:
    made: dict[str, TextDiffusion] = {}

    def get(kind: str) -> TextDiffusion:
        if kind not in made:
            parts = components(kind, tmp_path_factory.mktemp(kind))
            made[kind] = TextDiffusion(checkpoint(kind, parts))
        return made[kind]

    return get


@pytest.fixture
def model(models: Callable[[str], TextDiffusion]) -> TextDiffusion:
    return models("sd1")


def picture(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return 2 * F.interpolate(coarse, (height, width), mode="bilinear")[0] - 1


@pytest.mark.parametrize("change", [{}, {"sampler": "dpmpp-2m-sde"}, {"guidance_interval": (1, 2)}])
@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_the_same_bits_alone_and_in_any_batch(
    models: Callable[[str], TextDiffusion], kind: str, change: dict[str, Any]
) -> None:
    """Prompts of one and of two chunks beside each other: neither changes the other's image."""
    model, settings = models(kind), replace(QUICK, **change)
    images = text_to_image(model, PROMPTS, SEEDS, settings=settings)
    turned = text_to_image(model, PROMPTS[::-1], SEEDS[::-1], settings=replace(settings, batch=4))
    assert torch.equal(images.flip(0), turned)
    for place in (1, 2):
        alone = text_to_image(model, PROMPTS[place], SEEDS[place : place + 1], settings=settings)
        assert torch.equal(alone[0], images[place])
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_keys_values_and_embeddings_are_computed_once(
    model: TextDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    for name in ("embed", "project_context"):
        original = getattr(UNet, name)

        def counted(
            self: UNet, x: Tensor, *rest: Any, name: str = name, original: Any = original
        ) -> Any:
            calls.append((name, tuple(x.shape)))
            return original(self, x, *rest)

        monkeypatch.setattr(UNet, name, counted)
    text_to_latents(model, "a cat", [1, 2, 3], settings=replace(QUICK, steps=5, batch=3))
    assert sorted(calls) == [("embed", (5,)), *[("project_context", (1, 77, 32))] * 2]


def test_prompt_seed_and_settings_change_the_image(model: TextDiffusion) -> None:
    def image(prompt: str = "a red cat", seed: int = 1, **text: Any) -> Tensor:
        return text_to_image(model, prompt, [seed], text=TextSettings(**text), settings=QUICK)

    first = image()
    others = [
        image("a blue cat"),
        image("a (red:1.5) cat"),
        image(seed=2),
        image(negative="dog"),
        image(clip_skip=1),
    ]
    assert all((other - first).abs().max() > 1e-4 for other in others)
    assert torch.equal(image(negative=""), first)  # None is the empty prompt for this model
    assert torch.equal(image("a [red] cat", emphasis=False), image(r"a \[red\] cat"))


def test_zeros_or_the_empty_prompt_as_no_prompt(
    models: Callable[[str], TextDiffusion],
) -> None:
    for kind, zeros in (("xl", True), ("refiner", False), ("sd1", False)):
        model = models(kind)
        _, unconditional = model.conditions(["a cat"], (64, 64), TextSettings(), guided=True)
        assert unconditional is not None
        context = unconditional[0].context
        assert context is not None
        expected = encode_prompt(model.encoders, "").tokens
        assert torch.equal(context, torch.zeros_like(expected) if zeros else expected)


def test_the_files_say_what_no_prompt_is(tmp_path: Any) -> None:
    made = checkpoint("xl", components("xl", tmp_path))
    made.provenance["force_zeros_for_empty_prompt"] = False
    assert not TextDiffusion(made).zero_negative


def test_negative_prompts_are_filled_up(model: TextDiffusion) -> None:
    text = TextSettings(negative=LONG)
    positive, negative = model.conditions(["a cat", LONG * 2], (64, 64), text, guided=True)
    assert negative is not None
    assert [c.tokens for c in positive] == [c.tokens for c in negative] == [154, 308]


def test_strength_0_gives_the_image_through_the_autoencoder(model: TextDiffusion) -> None:
    image = picture()
    same = image_to_image(model, image, "a cat", [1, 2], strength=0, settings=QUICK)
    autoencoder = model.autoencoder
    with torch.no_grad():
        expected = autoencoder.decode(autoencoder.encode_latent(image[None])).clamp(-1, 1)
    torch.testing.assert_close(same, expected.expand(2, -1, -1, -1), rtol=1e-5, atol=1e-5)
    little, much = (
        image_to_image(model, image, "a cat", [1], strength=s, settings=replace(QUICK, steps=20))
        for s in (0.1, 0.9)
    )
    assert 0 < (little - same[:1]).std() < (much - same[:1]).std()


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(30, 0.0, 30), (30, 1.0, 0), (10, 0.7, 3), (100, 0.29, 71), (5, 0.1, 5)],
)
def test_strength_as_steps(steps: int, strength: float, first: int) -> None:
    assert first_step(steps, strength) == first


@pytest.mark.parametrize("kind", ["sd1", "inpaint"])
def test_inpainting_keeps_what_is_not_masked(
    models: Callable[[str], TextDiffusion], kind: str
) -> None:
    model, image = models(kind), picture()
    mask = torch.zeros(64, 64)
    mask[20:41, 30] = 1  # a stroke one pixel wide, which no nearest pixel of 8 x 8 would see
    made = inpaint(model, image, mask, "a cat", [1, 2], settings=QUICK)
    changed = (made != image).any(1)
    assert not changed[:, mask == 0].any()
    assert changed[:, mask == 1].float().mean() > 0.9
    if kind == "sd1":  # latents outside the stroke's squares are the image's
        loose = inpaint(model, image, mask, "a cat", [1], paste=False, settings=QUICK)
        plain = model.core.decode(model.core.encode(image[None]))
        assert (loose - plain)[..., :8].abs().max() < (loose - plain)[..., 24:40].abs().max()


def test_a_mask_of_ones_makes_everything_new(models: Callable[[str], TextDiffusion]) -> None:
    model = models("sd1")
    ones = torch.ones(64, 64, dtype=torch.bool)
    new = inpaint(model, picture(), ones, "a cat", [3], settings=QUICK)
    assert torch.equal(new, text_to_image(model, "a cat", [3], settings=QUICK))


@pytest.mark.parametrize("via", ["latent", "image"])
def test_upscale(model: TextDiffusion, via: Any) -> None:
    z = text_to_latents(model, "a cat", [1, 2], settings=QUICK)
    large = upscale(model, z, "a cat", [1, 2], scale=1.5, via=via, strength=0.5, settings=QUICK)
    assert large.shape == (2, 3, 96, 96)
    none = upscale(model, z, "a cat", [1, 2], scale=1.5, via=via, strength=0, settings=QUICK)
    if via == "latent":
        expected = model.core.decode(F.interpolate(z, (12, 12), mode="bicubic"))
    else:
        image = F.interpolate(model.core.decode(z), (96, 96), mode="bicubic", antialias=True).clamp(
            -1, 1
        )
        expected = model.core.decode(model.core.encode(image))
    torch.testing.assert_close(none, expected, rtol=1e-5, atol=1e-5)
    assert (large - none).abs().max() > 0.01
    if via == "latent":  # with the seeds of the first pass its noise would come again
        enlarged = F.interpolate(z, (12, 12), mode="bicubic")
        same = latents_to_latents(model, enlarged, "a cat", [1, 2], strength=0.5, settings=QUICK)
        assert (model.core.decode(same) - large).abs().max() > 0.01
    alone = upscale(model, z[1:], "a cat", [2], scale=1.5, via=via, strength=0.5, settings=QUICK)
    assert torch.equal(alone[0], large[1])


def test_no_number_of_the_first_pass_recurs() -> None:
    seeds = stage_seeds(range(1000), "upscale")
    assert len({*seeds, *stage_seeds(range(1000), "refine"), *range(1000)}) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_callbacks_see_every_step(model: TextDiffusion) -> None:
    steps: list[Step] = []
    seen: list[tuple[int, int]] = []
    settings = replace(QUICK, sampler="heun")

    def on_step(step: Step) -> None:
        steps.append(replace(step, x=step.x.clone()))

    z = text_to_latents(
        model,
        "a cat",
        [1, 2, 3],
        settings=settings,
        on_step=on_step,
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = 2 * 3 - 1
    counts = [*range(2, 2 * rows + 1, 2), *range(2 * rows + 1, 3 * rows + 1)]  # two, then one
    assert seen == [(done, 3 * rows) for done in counts]
    assert [step.done for step in steps] == counts
    assert [list(step.samples) for step in steps] == [[0, 1]] * rows + [[2]] * rows
    assert torch.equal(steps[rows - 1].x, z[:2])
    # the last row goes to the clean estimate itself
    torch.testing.assert_close(steps[rows - 1].denoised, z[:2], rtol=1e-4, atol=1e-4)


def test_an_exception_of_a_callback_ends_the_sampling(model: TextDiffusion) -> None:
    def stop(step: Step) -> None:
        if step.done == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        text_to_image(model, "a cat", settings=QUICK, on_step=stop)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_previews_look_like_the_image() -> None:
    """With the trained autoencoder that ships: held-out digits, encoded."""
    digits = LatentDiffusion(load_bundle("digits")).core
    images = to_float(open_dataset(DataConfig(split="held-out", image_size=32)).images[:16])
    preview = digits.preview(digits.encode(images))
    small = F.interpolate(images, preview.shape[2:], mode="area")
    assert preview.shape == small.shape
    assert correlation(preview, small) > 0.9
    assert correlation(preview, small.flip(0)) < 0.6


def test_large_images_go_in_tiles(model: TextDiffusion) -> None:
    image = picture(96, 128)
    tiled = model.core.encode(image[None], tile=8)
    whole = model.core.encode(image[None])
    direct = model.autoencoder.encode_tiled(image[None], 8, 2) * model.core.scale_factor
    torch.testing.assert_close(tiled, direct, rtol=1e-5, atol=1e-5)
    assert (tiled - whole).abs().max() > 0
    assert correlation(tiled, whole) > 0.8
    decoded = model.core.decode(whole, tile=8)
    expected = model.autoencoder.decode_tiled(whole / model.core.scale_factor, 8, 2).clamp(-1, 1)
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    assert (decoded - model.core.decode(whole)).abs().max() > 0
    through = image_to_image(model, image, "a cat", strength=0, settings=replace(QUICK, tile=8))
    torch.testing.assert_close(through, model.core.decode(tiled, tile=8))


def test_the_autoencoder_stays_in_fp32_beside_fp16(tmp_path: Any) -> None:
    model = TextDiffusion(checkpoint("sd1", components("sd1", tmp_path)), dtype=torch.float16)
    assert {p.dtype for p in model.autoencoder.parameters()} == {torch.float32}
    assert {p.dtype for p in model.unet.parameters()} == {torch.float16}
    assert model.core.sample_dtype == torch.float32


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


def test_sizes_that_do_not_fit(model: TextDiffusion) -> None:
    with refused(r"multiples of 8, got 60 x 64 \(width x height\); .* are 56 x 64 or 64 x 64"):
        text_to_image(model, "a cat", height=64, width=60)
    with refused("got 0 x 64"):
        text_to_image(model, "a cat", height=64, width=0)
    with refused("got 1 x 1 .* nearest sizes are 8 x 8"):
        image_to_image(model, torch.zeros(3, 1, 1), "a cat")
    with refused("got 65 x 63 .* are 64 x 56 or 72 x 64"):
        image_to_image(model, torch.zeros(3, 63, 65), "a cat")
    unsized = replace(model.checkpoint, image_size=None)
    with refused("does not say for which size it was trained"):
        text_to_image(TextDiffusion(unsized), "a cat", height=64)


def test_images_and_masks_that_do_not_fit(model: TextDiffusion) -> None:
    image = picture()
    for wrong in (torch.zeros(1, 64, 64), torch.zeros(64, 64), torch.zeros(3, 64, 64).byte()):
        with refused(r"image must be \(3, H, W\) floating point in \[-1, 1\], got"):
            image_to_image(model, wrong, "a cat")
    with refused("pixels must lie in .* got 0 to 255"):
        image_to_image(model, torch.linspace(0, 255, 3 * 4096).reshape(3, 64, 64), "a cat")
    with refused("pixels must lie in"):
        image_to_image(model, torch.full((3, 64, 64), float("nan")), "a cat")
    with refused("one image, or one per seed, got 2 for 3 seeds"):
        image_to_image(model, torch.zeros(2, 3, 64, 64), "a cat", [1, 2, 3])
    with refused(r"strength must lie in \[0, 1\], got 1.2"):
        image_to_image(model, image, "a cat", strength=1.2)
    with refused(r"mask must be \(1, 64, 64\), as large as the image, got \(32, 64\)"):
        inpaint(model, image, torch.ones(32, 64), "a cat")
    with refused(r"got \(3, 64, 64\); resize it, and give it one channel"):
        inpaint(model, image, torch.ones(3, 64, 64), "a cat")
    with refused("the mask is empty"):
        inpaint(model, image, torch.zeros(64, 64), "a cat")
    with refused("scale must lie in 1 to 16, got 0.5"):
        upscale(model, torch.zeros(1, 4, 8, 8), "a cat", scale=0.5)
    with refused("unknown way 'pixels'; expected one of latent, image"):
        upscale(model, torch.zeros(1, 4, 8, 8), "a cat", via="pixels")  # type: ignore[arg-type]


def test_prompts_and_seeds_that_do_not_fit(model: TextDiffusion) -> None:
    for seeds, message in (
        ([], "at least one seed, got none"),
        ([-1], "from 0 to 2"),
        ([1.5], "whole number"),
    ):
        with refused(message):
            text_to_image(model, "a cat", seeds)
    with refused("2 prompts and 3 seeds"):
        text_to_image(model, ["a", "b"], [1, 2, 3])
    with refused("may have 4,800 tokens, got 10,000"):
        text_to_image(model, "cat " * 10_000)


def test_models_that_do_not_fit(models: Callable[[str], TextDiffusion], tmp_path: Any) -> None:
    made = checkpoint("sd1", components("sd1", tmp_path))
    xl = models("xl").checkpoint
    for change, message in (
        ({"denoiser": None}, "got one without denoiser"),
        ({"autoencoder": None}, "got one without autoencoder"),
        ({"text_encoders": ()}, "has no text encoder"),
        ({"text_encoders": xl.text_encoders}, "32 wide and the text encoders make 56"),
    ):
        with refused(message):
            TextDiffusion(replace(made, **change))
    with refused("this denoiser reads 9 channels, 4 of latents"):
        text_to_image(models("inpaint"), "a cat", settings=QUICK)
    with refused("must share latent channels, scale factor and schedule"):
        refine(models("sd1"), models("refiner"), "a cat", settings=QUICK)
    for switch in (0.0, 1.0):
        with refused("switch must leave steps to the base and to the refiner"):
            refine(models("xl"), models("refiner"), "a cat", switch=switch, settings=QUICK)
    with refused("needs a pooled text vector"):
        encoders = tuple(replace(encoder, pooled=False) for encoder in xl.text_encoders)
        text_to_image(TextDiffusion(replace(xl, text_encoders=encoders)), "a cat")
    with refused("added condition is 30 wide, got 16 of pooled text and 14 left"):
        size_vector(torch.zeros(1, 16), 30, {6: (0,) * 6, 5: (0,) * 5})


def test_a_recipe_is_json(model: TextDiffusion) -> None:
    recipe = model.recipe("猫", 3, TextSettings(negative="x"), QUICK, height=64)
    again = json.loads(json.dumps(recipe))
    assert again["prompt"] == "猫"
    assert again["text"]["negative"] == "x"
    assert again["settings"]["steps"] == 3
    assert "batch" not in again["settings"]


def test_where_the_files_name_a_sampler_that_we_lack(tmp_path: Any) -> None:
    made = checkpoint("sd1", components("sd1", tmp_path))
    silent = TextDiffusion(made)
    assert silent.core.sampling(TEXT_SETTINGS) == ("dpmpp-2m", {})
    made.provenance["no_sampler"] = "fastdiff has no sampler like UniPCMultistepScheduler"
    with pytest.warns(UserWarning, match="no sampler like UniPC.*; dpmpp-2m is used instead"):
        TextDiffusion(made).core.table(TEXT_SETTINGS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            TextDiffusion(made).core.table(TEXT_SETTINGS)
            TextDiffusion(made).core.sampling(TEXT_SETTINGS)
    assert len(told) == 1


def test_the_files_sampler_and_what_is_asked(tmp_path: Any) -> None:
    made = checkpoint("sd1", components("sd1", tmp_path))
    made.sampler = SamplerSettings(sampler="ddim", spacing="leading", steps_offset=1, clamp=3.0)
    model = TextDiffusion(made)

    def table(**change: Any) -> SamplerTable:
        return model.core.table(replace(TEXT_SETTINGS, steps=10, **change))

    plain = table()
    assert (plain.name, plain.timesteps.tolist()) == (
        "ddim",
        [100.0 * i + 1 for i in range(9, -1, -1)],
    )
    assert plain.column("CLAMP").tolist() == [3.0] * 10
    assert table(clamp=1.0).column("CLAMP").tolist() == [1.0] * 10
    assert table(spacing="trailing").timesteps.tolist()[0] == 999
    assert table(eta=1.0).column("S").abs().max() > 0
    asked = table(sampler="ddim")
    assert asked.timesteps.tolist()[0] == 999
    assert asked.column("CLAMP").isinf().all()
    recipe = model.recipe("a cat", 0, TextSettings(), TEXT_SETTINGS)
    assert recipe["sampler"]["steps_offset"] == 1
    assert json.loads(json.dumps(recipe)) == recipe


def test_the_refiner_goes_along_the_bases_table(tmp_path: Any) -> None:
    base, refiner = (
        checkpoint(kind, components(kind, tmp_path / kind)) for kind in ("xl", "refiner")
    )
    base.sampler = SamplerSettings(sampler="euler", spacing="leading", steps_offset=1)
    refiner.sampler = SamplerSettings(sampler="ddpm", variance="fixed_small")
    settings = replace(TEXT_SETTINGS, steps=5)
    call = {"settings": settings, "height": 64, "width": 64}
    made = refine(TextDiffusion(base), TextDiffusion(refiner), "a cat", **call)
    refiner.sampler = base.sampler
    same = refine(TextDiffusion(base), TextDiffusion(refiner), "a cat", **call)
    assert torch.equal(made, same)
