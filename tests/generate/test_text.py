"""The text pipelines beyond what diffusers supports: seeds, callbacks, sizes, errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.scheduler import SamplerSettings
from fastdiff.data import DataConfig, open_dataset
from fastdiff.data.dataset import to_float
from fastdiff.diffusion.samplers import SamplerTable
from fastdiff.diffusion.sampling import Step
from fastdiff.generate.conditions import size_vector
from fastdiff.generate.facts import check, resolved
from fastdiff.generate.image_to_image import from_latents
from fastdiff.generate.job import (
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    Job,
    SampleSettings,
    TextJob,
    TextSettings,
    UpscaleJob,
    first_step,
    stage_seed,
)
from fastdiff.generate.session import Session
from fastdiff.generate.upscale import enlarge
from fastdiff.models.text import encode_prompt
from fastdiff.models.unet import UNet
from fastdiff.runtime.run import run as run_requests
from tests.support.diffusers_models import checkpoint, components
from tests.support.drawing import images, latents, text_jobs

QUICK = SampleSettings(steps=3, guidance_scale=3.0, batch=2)
LONG = "a photo of a red cat " * 20
PROMPTS, SEEDS = ["a cat", LONG, "a cat", "blue sky"], [5, 6, 7, 8]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(kind: str) -> Model:
        if kind not in made:
            parts = components(kind, tmp_path_factory.mktemp(kind))
            made[kind] = checkpoint(kind, parts)
        return made[kind]

    return get


@pytest.fixture
def model(models: Callable[[str], Model]) -> Model:
    return models("sd1")


def picture(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return 2 * F.interpolate(coarse, (height, width), mode="bilinear")[0] - 1


def text_to_image(model: Model, prompt: Any, seeds: Any = (0,), **options: Any) -> Tensor:
    call = {key: options.pop(key) for key in ("on_step", "progress") if key in options}
    return images(model, text_jobs(prompt, seeds, **options), **call)


def image_to_image(
    model: Model, image: Tensor, prompt: str, seeds: Any = (0,), **options: Any
) -> Tensor:
    jobs = [ImageToImageJob(image=image, prompt=prompt, seed=seed, **options) for seed in seeds]
    return images(model, jobs)


def inpaint(
    model: Model, image: Tensor, mask: Tensor, prompt: str, seeds: Any = (0,), **options: Any
) -> Tensor:
    jobs = [
        InpaintJob(image=image, mask=mask, prompt=prompt, seed=seed, **options) for seed in seeds
    ]
    return images(model, jobs)


@pytest.mark.parametrize("change", [{}, {"sampler": "dpmpp-2m-sde"}, {"guidance_interval": (1, 2)}])
@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_the_same_bits_alone_and_in_any_batch(
    models: Callable[[str], Model], kind: str, change: dict[str, Any]
) -> None:
    """Prompts of one and of two chunks in one batch do not change each other's images."""
    model, settings = models(kind), replace(QUICK, **change)
    images = text_to_image(model, PROMPTS, SEEDS, settings=settings)
    turned = text_to_image(model, PROMPTS[::-1], SEEDS[::-1], settings=replace(settings, batch=4))
    assert torch.equal(images.flip(0), turned)
    for place in (1, 2):
        alone = text_to_image(model, PROMPTS[place], SEEDS[place : place + 1], settings=settings)
        assert torch.equal(alone[0], images[place])
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_keys_values_and_embeddings_are_computed_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
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
    latents(model, text_jobs("a cat", [1, 2, 3], settings=replace(QUICK, steps=5)))
    assert sorted(calls) == [("embed", (5,)), *[("project_context", (1, 77, 32))] * 2]


def test_prompt_seed_and_settings_change_the_image(model: Model) -> None:
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


def conditions(model: Model, prompt: str, text: TextSettings) -> tuple[Any, Any]:
    job = TextJob(prompt=prompt, text=text)
    return Session.of(model).conditions.of(job, (64, 64), guided=True)


def test_zeros_or_the_empty_prompt_as_no_prompt(
    models: Callable[[str], Model],
) -> None:
    for kind, zeros in (("xl", True), ("refiner", False), ("sd1", False)):
        model = models(kind)
        _, unconditional = conditions(model, "a cat", TextSettings())
        assert unconditional is not None
        context = unconditional.context
        assert context is not None
        expected = encode_prompt(model.text_encoders, "").tokens
        assert torch.equal(context, torch.zeros_like(expected) if zeros else expected)


def test_the_files_say_what_no_prompt_is(tmp_path: Any) -> None:
    made = checkpoint("xl", components("xl", tmp_path))
    made.provenance["force_zeros_for_empty_prompt"] = False
    assert not Session.of(made).conditions.zero_negative


def test_negative_prompts_are_filled_up(model: Model) -> None:
    text = TextSettings(negative=LONG)
    for prompt, tokens in (("a cat", 154), (LONG * 2, 308)):
        positive, negative = conditions(model, prompt, text)
        assert negative is not None
        assert positive.tokens == negative.tokens == tokens


def test_equal_prompts_share_their_conditions(model: Model) -> None:
    first, nothing = conditions(model, "a cat", TextSettings())
    other, same_nothing = conditions(model, "a dog", TextSettings())
    assert conditions(model, "a cat", TextSettings()) == (first, nothing)
    assert other is not first
    assert nothing is same_nothing


def test_strength_0_gives_the_image_through_the_autoencoder(model: Model) -> None:
    image = picture()
    same = image_to_image(model, image, "a cat", [1, 2], strength=0, settings=QUICK)
    autoencoder = model.autoencoder
    assert autoencoder is not None
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
def test_inpainting_keeps_what_is_not_masked(models: Callable[[str], Model], kind: str) -> None:
    model, image = models(kind), picture()
    mask = torch.zeros(64, 64)
    mask[20:41, 30] = 1  # a stroke one pixel wide, which no nearest pixel of 8 x 8 would see
    made = inpaint(model, image, mask, "a cat", [1, 2], settings=QUICK)
    changed = (made != image).any(1)
    assert not changed[:, mask == 0].any()
    assert changed[:, mask == 1].float().mean() > 0.9
    if kind == "sd1":  # latents outside the stroke's squares are the image's
        loose = inpaint(model, image, mask, "a cat", [1], paste=False, settings=QUICK)
        plain = decoded(model, encoded(model, image[None]))
        assert (loose - plain)[..., :8].abs().max() < (loose - plain)[..., 24:40].abs().max()


def test_the_image_is_kept_clean_where_a_sampler_ends_with_noise_left(tmp_path: Any) -> None:
    """As in diffusers: DDIM with set_alpha_to_one=False ends at the noise of t = 0."""
    model = checkpoint("sd1", components("sd1", tmp_path))
    model.sampler = SamplerSettings(sampler="ddim", spacing="leading", final="sigma_min")
    image, mask = picture(), torch.zeros(64, 64)
    mask[16:48, 8:24] = 1
    [z] = latents(
        model,
        [InpaintJob(image=image, mask=mask, prompt="a cat", settings=SampleSettings(steps=3))],
    )
    kept = encoded(model, image[None])[0]
    outside = F.max_pool2d(mask[None], 8)[0] == 0
    assert (
        Session.of(model)
        .table(resolved(SampleSettings(steps=3), Session.of(model).facts))
        .final_sigma
        > 0.02
    )
    torch.testing.assert_close(z[:, outside], kept[:, outside], rtol=1e-6, atol=1e-6)
    assert (z - kept)[:, ~outside].abs().max() > 0.1


def test_a_mask_of_ones_makes_everything_new(models: Callable[[str], Model]) -> None:
    model = models("sd1")
    ones = torch.ones(64, 64, dtype=torch.bool)
    new = inpaint(model, picture(), ones, "a cat", [3], settings=QUICK)
    assert torch.equal(new, text_to_image(model, "a cat", [3], settings=QUICK))


def encoded(model: Model, image: Tensor, **options: Any) -> Tensor:
    return Session.of(model).latents.encode(image, **options)


def decoded(model: Model, z: Tensor, **options: Any) -> Tensor:
    return Session.of(model).latents.decode(z, **options)


@pytest.mark.parametrize("via", ["latent", "image"])
def test_a_second_pass_at_a_larger_size(model: Model, via: Any) -> None:
    """ "Hires fix": the first pass's latents, enlarged, and its own noise for the second."""
    z = latents(model, text_jobs("a cat", [1, 2], settings=QUICK))

    def larger(strength: float, seeds: Any = (1, 2)) -> Tensor:
        call = {"upscale": 1.5, "upscale_via": via, "upscale_strength": strength}
        return text_to_image(model, "a cat", seeds, settings=QUICK, **call)

    large, none = larger(0.5), larger(0)
    assert large.shape == (2, 3, 96, 96)
    if via == "latent":
        expected = decoded(model, F.interpolate(z, (12, 12), mode="bicubic"))
    else:
        image = F.interpolate(decoded(model, z), (96, 96), mode="bicubic", antialias=True)
        expected = decoded(model, encoded(model, image.clamp(-1, 1)))
    torch.testing.assert_close(none, expected, rtol=1e-5, atol=1e-5)
    assert (large - none).abs().max() > 0.01
    assert torch.equal(larger(0.5, [2])[0], large[1])
    if via == "latent":  # with the seed of the first pass its noise would come again
        session, job = Session.of(model), check_text(model, "a cat", 1)
        for seed, same in ((1, False), (stage_seed(1, "upscale"), True)):
            start = enlarge(session, z[0], 1.5, via, 0)
            now = from_latents(session, job, start, strength=0.5, seed=seed)
            assert now.request is not None
            [result] = run_requests(session.network, [now.request])
            found = decoded(model, result.x[None])[0]
            assert torch.equal(found, large[0]) == same


def check_text(model: Model, prompt: str, seed: int) -> Job:
    return check(TextJob(prompt=prompt, seed=seed, settings=QUICK), Session.of(model).facts)


@pytest.mark.parametrize("via", ["latent", "image"])
def test_a_picture_is_enlarged_as_an_image_of_a_first_pass_is(model: Model, via: Any) -> None:
    image = picture()
    job = UpscaleJob(
        image=image, prompt="a cat", seed=3, scale=1.5, via=via, strength=0.5, settings=QUICK
    )
    [made] = images(model, [job])
    session = Session.of(model)
    start = enlarge(session, encoded(model, image[None])[0], 1.5, via, 0)
    assert made.shape == (3, 96, 96)
    kept = images(model, [replace(job, strength=0.0)])
    torch.testing.assert_close(kept, decoded(model, start[None]), rtol=1e-5, atol=1e-5)
    assert (made - kept[0]).abs().max() > 0.01


def test_no_number_of_the_first_pass_recurs() -> None:
    seeds = [stage_seed(seed, "upscale") for seed in range(1000)]
    refined = [stage_seed(seed, "refine") for seed in range(1000)]
    assert len({*seeds, *refined, *range(1000)}) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_callbacks_see_every_evaluation(model: Model) -> None:
    steps: list[Step] = []
    seen: list[tuple[int, int]] = []
    settings = replace(QUICK, sampler="heun")

    def on_step(step: Step) -> None:
        steps.append(replace(step, x=step.x.clone()))

    jobs = text_jobs("a cat", [1, 2, 3], settings=settings)
    images(
        model,
        jobs,
        on_step=on_step,
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = 2 * 3 - 1
    counts = [*range(2, 2 * rows + 1, 2), *range(2 * rows + 1, 3 * rows + 1)]
    assert seen == [(done, 3 * rows) for done in counts]
    assert [step.done for step in steps] == counts
    assert [list(step.samples) for step in steps] == [[0, 1]] * rows + [[2]] * rows
    z = latents(model, jobs)
    assert torch.equal(steps[rows - 1].x, z[:2])
    # the last row goes to the clean estimate itself
    torch.testing.assert_close(steps[rows - 1].denoised, z[:2], rtol=1e-4, atol=1e-4)


def test_an_exception_of_a_callback_ends_the_sampling(model: Model) -> None:
    def stop(step: Step) -> None:
        if step.done >= 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        text_to_image(model, "a cat", settings=QUICK, on_step=stop)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_previews_look_like_the_image() -> None:
    """With the trained autoencoder that ships: held-out digits, encoded."""
    digits = Session.of(fastdiff.load("digits")).latents
    given = to_float(open_dataset(DataConfig(split="held-out", image_size=32)).images[:16])
    preview = digits.preview(digits.encode(given))
    small = F.interpolate(given, preview.shape[2:], mode="area")
    assert preview.shape == small.shape
    assert correlation(preview, small) > 0.9
    assert correlation(preview, small.flip(0)) < 0.6


def test_large_images_go_in_tiles(model: Model) -> None:
    image = picture(96, 128)
    assert model.autoencoder is not None
    tiled = encoded(model, image[None], tile=8)
    whole = encoded(model, image[None])
    direct = model.autoencoder.encode_tiled(image[None], 8, 2) * model.scale_factor
    torch.testing.assert_close(tiled, direct, rtol=1e-5, atol=1e-5)
    assert (tiled - whole).abs().max() > 0
    assert correlation(tiled, whole) > 0.8
    pieces = decoded(model, whole, tile=8)
    expected = model.autoencoder.decode_tiled(whole / model.scale_factor, 8, 2).clamp(-1, 1)
    torch.testing.assert_close(pieces, expected, rtol=1e-5, atol=1e-5)
    assert (pieces - decoded(model, whole)).abs().max() > 0
    through = image_to_image(model, image, "a cat", strength=0, settings=replace(QUICK, tile=8))
    torch.testing.assert_close(through, decoded(model, tiled, tile=8))


def test_the_autoencoder_stays_in_fp32_beside_fp16(tmp_path: Any) -> None:
    model = checkpoint("sd1", components("sd1", tmp_path))
    for module in model.modules.values():
        module.half()
    session = Session.of(model)
    assert session.latents.sample_dtype == torch.float32
    assert model.autoencoder is not None
    assert {p.dtype for p in model.autoencoder.parameters()} == {torch.float32}
    assert {p.dtype for p in session.network.parameters()} == {torch.float16}


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


def test_sizes_that_do_not_fit(model: Model) -> None:
    with refused(r"multiples of 8, got 60 x 64 \(width x height\); .* are 56 x 64 or 64 x 64"):
        text_to_image(model, "a cat", height=64, width=60)
    with refused("got 0 x 64"):
        text_to_image(model, "a cat", height=64, width=0)
    with refused("got 1 x 1 .* nearest sizes are 8 x 8"):
        image_to_image(model, torch.zeros(3, 1, 1), "a cat")
    with refused("got 65 x 63 .* are 64 x 56 or 72 x 64"):
        image_to_image(model, torch.zeros(3, 63, 65), "a cat")
    unsized = replace(model, image_size=None)
    with refused("does not say which size it was trained on"):
        text_to_image(unsized, "a cat", height=64)


def test_pictures_are_made_to_fit_where_that_is_asked_for(model: Model) -> None:
    """As if the user had cropped or resized them; the mask goes with its picture."""
    whole = picture(70, 83, seed=3)
    cropped = whole[:, 3:67, 1:81]  # 64 x 80, around the centre
    size = (72, 80)
    resized = F.interpolate(whole[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    options: dict[str, Any] = {"settings": QUICK, "strength": 0.7}
    for fit, made in (("crop", cropped), ("resize", resized)):
        expected = image_to_image(model, made, "a cat", **options)
        assert torch.equal(image_to_image(model, whole, "a cat", fit=fit, **options), expected)
        [larger] = images(
            model, [UpscaleJob(image=whole, prompt="a", scale=1, fit=fit, settings=QUICK)]
        )
        assert larger.shape == made.shape
        mask = torch.zeros(1, 70, 83)
        mask[:, 20:50, 30:60] = 1
        fitting = mask[:, 3:67, 1:81] if fit == "crop" else None
        if fitting is None:
            fitting = F.interpolate(mask[None], size, mode="nearest-exact")[0]
        expected = inpaint(model, made, fitting, "a cat", **options)
        assert torch.equal(inpaint(model, whole, mask, "a cat", fit=fit, **options), expected)
    assert torch.equal(
        image_to_image(model, cropped, "a cat", fit="resize", **options),
        image_to_image(model, cropped, "a cat", **options),
    )
    with refused(r"nearest sizes are 80 x 64 or 88 x 72, or set fit \(--fit\) to crop or resize"):
        image_to_image(model, whole, "a cat", **options)
    edge = torch.zeros(1, 70, 83)
    edge[:, :2] = 1
    with refused("removes the whole mask; use fit='resize'"):
        inpaint(model, whole, edge, "a cat", fit="crop", **options)
    with refused("got 4 x 4 .* nearest sizes are 8 x 8"):
        image_to_image(model, torch.zeros(3, 4, 4), "a cat", fit="crop")
    with refused("unknown fit 'stretch'; expected one of crop, resize"):
        ImageToImageJob(image=whole, prompt="a", fit="stretch")  # type: ignore[arg-type]


def test_images_and_masks_that_do_not_fit(model: Model) -> None:
    image = picture()
    for wrong in (torch.zeros(1, 64, 64), torch.zeros(64, 64), torch.zeros(3, 64, 64).byte()):
        with refused(r"image must be \(3, H, W\) floating point in \[-1, 1\], got"):
            image_to_image(model, wrong, "a cat")
    with refused("pixels must lie in .* got 0 to 255"):
        image_to_image(model, torch.linspace(0, 255, 3 * 4096).reshape(3, 64, 64), "a cat")
    with refused("pixels must lie in"):
        image_to_image(model, torch.full((3, 64, 64), float("nan")), "a cat")
    with refused(r"strength must be in \[0, 1\], got 1.2"):
        image_to_image(model, image, "a cat", strength=1.2)
    with refused(r"mask must be \(1, 64, 64\), the size of the image, got \(32, 64\)"):
        inpaint(model, image, torch.ones(32, 64), "a cat")
    with refused(r"got \(3, 64, 64\); resize it, or reduce it to one channel"):
        inpaint(model, image, torch.ones(3, 64, 64), "a cat")
    with refused("the mask is all zeros"):
        inpaint(model, image, torch.zeros(64, 64), "a cat")
    with refused("scale must be in \\[1, 16\\], got 0.5"):
        UpscaleJob(image=image, prompt="a cat", scale=0.5)
    with refused("unknown way to enlarge 'pixels'; expected one of latent, image"):
        UpscaleJob(image=image, prompt="a cat", via="pixels")  # type: ignore[arg-type]


def test_prompts_and_seeds_that_do_not_fit(model: Model) -> None:
    for seeds, message in (
        ([-1], "from 0 to 2"),
        ([1.5], "whole number"),
    ):
        with refused(message):
            text_to_image(model, "a cat", seeds)
    with refused("may have at most 4,800 tokens, got 10,000"):
        text_to_image(model, "cat " * 10_000)


def test_syntax_that_is_not_supported_is_refused_before_a_model_is_there() -> None:
    image = torch.zeros(3, 8, 8)
    makers: dict[str, Callable[..., Job]] = {
        "txt2img": TextJob,
        "img2img": lambda **o: ImageToImageJob(image=image, **o),
        "inpaint": lambda **o: InpaintJob(image=image, mask=image[:1], **o),
        "upscale": lambda **o: UpscaleJob(image=image, **o),
        "interpolate": lambda **o: InterpolationJob(to_seed=1, **o),
    }
    for make in makers.values():
        with refused(r"prompt syntax '<lora:x:1>' is not supported"):
            make(prompt="a cat <lora:x:1>")
        make(prompt="a cat <lora:x:1>", text=TextSettings(emphasis=False))
        make(prompt=r"a cat \<lora:x:1>")
    with refused(r"prompt syntax '\[a:b:0.5\]' is not supported"):
        InterpolationJob(prompt="a", to_prompt="[a:b:0.5]")
    with refused(r"prompt syntax 'AND' is not supported"):
        TextSettings(negative="a AND b")
    TextSettings(negative="a AND b", emphasis=False)


def test_a_break_is_another_image_than_its_word(model: Model) -> None:
    first = text_to_image(model, "a cat BREAK blue sky", settings=QUICK)
    word = text_to_image(model, r"a cat \BREAK blue sky", settings=QUICK)
    assert not torch.equal(first, word)
    together = text_to_image(model, ["a cat", "a cat BREAK blue sky"], [5, 0], settings=QUICK)
    assert torch.equal(together[1], first[0])


def refined(base: Model, refiner: Model, **options: Any) -> Tensor:
    return images(base, text_jobs("a cat", [0], **options), refiner=refiner)


def test_models_that_do_not_fit(models: Callable[[str], Model], tmp_path: Any) -> None:
    made = checkpoint("sd1", components("sd1", tmp_path))
    xl = models("xl")
    for change, message in (
        ({"denoiser": None}, "contains only an autoencoder"),
        ({"schedule": None}, "does not say which noise schedule"),
        ({"autoencoder": None}, "got one without an autoencoder"),
        ({"text_encoders": ()}, "has no text encoder"),
        ({"text_encoders": xl.text_encoders}, "width 32, the text encoders produce 56"),
    ):
        with refused(message):
            text_to_image(replace(made, **change), "a cat")
    with refused("this denoiser reads 9 channels: 4 of latents"):
        text_to_image(models("inpaint"), "a cat", settings=QUICK)
    with refused("must share latent channels, scale factor and schedule"):
        refined(models("sd1"), models("refiner"), settings=QUICK)
    for switch in (0.0, 1.0):
        with refused("switch must leave steps for both the base and the refiner"):
            refined(models("xl"), models("refiner"), switch=switch, settings=QUICK)
    with refused("needs a pooled text vector"):
        encoders = tuple(replace(encoder, pooled=False) for encoder in xl.text_encoders)
        text_to_image(replace(xl, text_encoders=encoders), "a cat")
    with refused("added condition has 30 channels, got 16 of pooled text, which leaves 14"):
        size_vector(torch.zeros(1, 16), 30, {6: (0,) * 6, 5: (0,) * 5})


def test_where_the_files_name_a_sampler_that_we_lack(tmp_path: Any) -> None:
    made = checkpoint("sd1", components("sd1", tmp_path))
    asked = resolved(SampleSettings(sampler="checkpoint"), Session.of(made).facts)
    assert Session.of(made).sampling(asked) == ("dpmpp-2m", {})
    made.provenance = {"no_sampler": "fastdiff has no sampler like UniPCMultistepScheduler"}
    session = Session.of(made)
    assert resolved(SampleSettings(), session.facts).sampler == "checkpoint"
    with pytest.warns(UserWarning, match="no sampler like UniPC.*; using dpmpp-2m instead"):
        session.table(asked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            Session.of(made).table(replace(asked, steps=7))
            Session.of(made).sampling(asked)
    assert len(caught) == 1


def test_the_files_sampler_and_what_is_asked(tmp_path: Any) -> None:
    made = checkpoint("sd1", components("sd1", tmp_path))
    made.sampler = SamplerSettings(sampler="ddim", spacing="leading", steps_offset=1, clamp=3.0)
    session = Session.of(made)

    def table(**change: Any) -> SamplerTable:
        return session.table(resolved(SampleSettings(steps=10, **change), session.facts))

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


def test_the_refiner_goes_along_the_bases_table(tmp_path: Any) -> None:
    base, refiner = (
        checkpoint(kind, components(kind, tmp_path / kind)) for kind in ("xl", "refiner")
    )
    base.sampler = SamplerSettings(sampler="euler", spacing="leading", steps_offset=1)
    refiner.sampler = SamplerSettings(sampler="ddpm", variance="fixed_small")
    call: dict[str, Any] = {"settings": SampleSettings(steps=5), "height": 64, "width": 64}
    made = refined(base, refiner, **call)
    refiner.sampler = base.sampler
    assert torch.equal(made, refined(base, refiner, **call))
