"""Whole pipelines equal diffusers' with the same weights and the same noise.

Latents and images, to 1e-5 of their size in fp32. In fp64 to 1e-10 with DDIM, which gets our
alphas_cumprod in fp64; diffusers' Euler and DPM-Solver++ keep their coefficients and x in fp32.
The noise is ours, Philox of the seeds, handed to diffusers; its draw from the autoencoder's
posterior is set to the mode, which is what ours takes.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.model import Model
from fastdiff.generate.job import ImageToImageJob, InpaintJob, Job, SampleSettings, TextSettings
from fastdiff.generate.session import Session
from tests.support.diffusers_models import SCHEDULER, checkpoint, components, pipeline
from tests.support.drawing import images, latents, text_jobs
from tests.support.peers import import_diffusers

# diffusers hands a torch tensor to np.array; torch's tensors do not know numpy 2's `copy` yet.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
}
SETTINGS = SampleSettings(sampler="ddim", steps=5, guidance_scale=3.0, batch=4)
PROMPTS, SEEDS = ["a photo of a red cat", "blue sky", "dog"], [7, 2**40 + 1, 3]
NEGATIVE = "red dog"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CASES = [
    ("ddim", torch.float32),
    ("ddim", torch.float64),
    ("euler", torch.float32),
    ("dpmpp-2m", torch.float32),
]


class Pair:
    """One set of weights in both systems."""

    def __init__(self, kind: str, folder: Any) -> None:
        self.kind, self.parts = kind, components(kind, folder)

    def at(self, dtype: torch.dtype) -> tuple[Model, dict[str, Any]]:
        parts = dict(self.parts)
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                parts[name] = part.to(dtype)
        model = checkpoint(self.kind, parts)
        assert model.denoiser is not None
        model.denoiser.to(dtype)
        return model, parts


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    return {kind: Pair(kind, folder / kind) for kind in ("sd1", "sd2", "inpaint", "xl", "refiner")}


def noise_of(model: Model, seeds: list[int], height: int = 72, width: int = 40) -> Tensor:
    """Initial noise of our images: (N, C, h, w)."""
    session = Session.of(model)
    shape = session.facts.x_shape(height, width)
    return torch.stack([session.noise(seed, shape) for seed in seeds])


def their_scheduler(sampler: str, model: Model) -> Any:
    name, options = SAMPLERS[sampler]
    prediction = {"eps": "epsilon", "v": "v_prediction"}[model.prediction]
    kept = {
        key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")
    }
    if sampler == "ddim":
        options = {"clip_sample": False}
    scheduler = getattr(import_diffusers(name), name)(
        **kept, **options, prediction_type=prediction, timestep_spacing="trailing"
    )
    if sampler == "ddim":
        scheduler.alphas_cumprod = Session.of(model).schedule.alphas_cumprod
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def their_noise(noise: Tensor, scheduler: Any, steps: int) -> Tensor:
    """`latents=` such that diffusers starts from alpha-scaled unit noise, as ours does."""
    scheduler.set_timesteps(steps)
    start = scheduler.init_noise_sigma
    if start == 1:
        return noise
    sigma = float(scheduler.sigmas[0])
    return noise * (sigma**2 + 1) ** 0.5 / float(start)


def replace_draws(monkeypatch: pytest.MonkeyPatch, pipe: Any, noise: Tensor) -> None:
    """The pipeline's own draw is our noise; the autoencoder's posterior is at its mode."""
    module = importlib.import_module(type(pipe).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise.clone())
    posterior = importlib.import_module("diffusers.models.autoencoders.vae")
    monkeypatch.setattr(
        posterior, "randn_tensor", lambda shape, dtype=None, **_: torch.zeros(shape, dtype=dtype)
    )


def assert_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape
    error = float((ours - theirs).norm() / theirs.norm())
    assert error <= TOLERANCE[ours.dtype], f"{what}: relative error {error:.1e}"


def image(dtype: torch.dtype, *, height: int = 72, width: int = 40, seed: int = 0) -> Tensor:
    """A smooth random picture (1, 3, H, W), of 1/64ths in [-1, 1]: exact as [0, 1] in fp32 too."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator, dtype=torch.float64)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return ((2 * fine - 1) * 64).round().div(64).to(dtype)


SIZE = {"height": 72, "width": 40}  # latents of odd sides


def theirs(pipe: Any, settings: SampleSettings, prompt: Any, **call: Any) -> tuple[Tensor, Tensor]:
    """diffusers' last latents, and its images in [-1, 1]."""
    last: dict[str, Tensor] = {}

    def keep(_: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(tensors)
        return {}

    images = pipe(
        prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        output_type="pt",
        callback_on_step_end=keep,
        **call,
    ).images
    return last["latents"], 2 * images - 1


def assert_both_equal(model: Model, jobs: list[Job], expected: tuple[Tensor, Tensor]) -> None:
    assert_equal(latents(model, jobs), expected[0], "latents")
    made = images(model, jobs)
    assert_equal(made, expected[1], "images")
    assert made.std() > 0.05


@pytest.mark.parametrize(("sampler", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_text_to_image(pairs: dict[str, Pair], kind: str, sampler: str, dtype: torch.dtype) -> None:
    model, parts = pairs[kind].at(dtype)
    scheduler = their_scheduler(sampler, model)
    pipe = pipeline("StableDiffusionPipeline", parts | {"scheduler": scheduler})
    settings = replace(SETTINGS, sampler=sampler)
    noise = noise_of(model, SEEDS)
    expected = theirs(
        pipe,
        settings,
        PROMPTS,
        negative_prompt=[NEGATIVE] * 3,
        latents=their_noise(noise, scheduler, settings.steps),
        **SIZE,
    )
    call: dict[str, Any] = {"text": TextSettings(negative=NEGATIVE), "settings": settings, **SIZE}
    assert_both_equal(model, text_jobs(PROMPTS, SEEDS, **call), expected)


def test_guidance_rescale(pairs: dict[str, Pair]) -> None:
    model, parts = pairs["sd1"].at(torch.float64)
    pipe = pipeline(
        "StableDiffusionPipeline", parts | {"scheduler": their_scheduler("ddim", model)}
    )
    settings = replace(SETTINGS, steps=4, guidance_scale=5.0, guidance_rescale=0.7)
    noise = noise_of(model, [1], 64, 64)
    expected = theirs(pipe, settings, "a cat", guidance_rescale=0.7, latents=noise)
    assert_both_equal(model, text_jobs("a cat", [1], settings=settings), expected)


@pytest.mark.parametrize(("sampler", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image(
    pairs: dict[str, Pair],
    sampler: str,
    dtype: torch.dtype,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, parts = pairs["sd1"].at(dtype)
    scheduler = their_scheduler(sampler, model)
    pipe = pipeline("StableDiffusionImg2ImgPipeline", parts | {"scheduler": scheduler})
    settings = replace(SETTINGS, sampler=sampler)
    replace_draws(monkeypatch, pipe, noise_of(model, SEEDS))
    given = image(dtype)
    many = ((given + 1) / 2).expand(3, -1, -1, -1)
    expected = theirs(pipe, settings, PROMPTS, image=many, strength=strength)
    jobs: list[Job] = [
        ImageToImageJob(image=given, prompt=prompt, seed=seed, strength=strength, settings=settings)
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert_both_equal(model, jobs, expected)


INPAINTING = [
    (kind, strength, *case)
    for kind, strength in (("sd1", 1.0), ("sd1", 0.6), ("inpaint", 1.0))
    for case in CASES
    # diffusers' Euler starts "pure noise" from a little less, and then holds the image with that
    if (kind, strength, case[0]) != ("sd1", 1.0, "euler")
]


@pytest.mark.parametrize(("kind", "strength", "sampler", "dtype"), INPAINTING, ids=str)
def test_inpainting(
    pairs: dict[str, Pair],
    kind: str,
    strength: float,
    sampler: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, parts = pairs[kind].at(dtype)
    scheduler = their_scheduler(sampler, model)
    pipe = pipeline("StableDiffusionInpaintPipeline", parts | {"scheduler": scheduler})
    settings = replace(SETTINGS, sampler=sampler)
    noise = noise_of(model, SEEDS)
    if strength == 1:
        noise = their_noise(noise, scheduler, settings.steps)
    replace_draws(monkeypatch, pipe, noise)
    given, mask = image(dtype), torch.zeros(1, 1, 72, 40, dtype=dtype)
    if kind == "inpaint":
        mask[:, :, 3:20, 5:19] = 1
    else:  # whole latent pixels: diffusers takes the nearest pixel of each, and ours any
        mask[:, :, 16:48, 8:24] = 1
    expected = theirs(
        pipe,
        settings,
        PROMPTS,
        image=((given + 1) / 2).float().expand(3, -1, -1, -1),
        mask_image=mask.float().expand(3, -1, -1, -1),
        strength=strength,
        **SIZE,
    )
    jobs: list[Job] = [
        InpaintJob(
            image=given,
            mask=mask,
            prompt=prompt,
            seed=seed,
            strength=strength,
            paste=False,
            settings=settings,
        )
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert_both_equal(model, jobs, expected)


@pytest.mark.parametrize(("sampler", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("negative", [NEGATIVE, None], ids=["negative", "zeros"])
def test_xl(pairs: dict[str, Pair], sampler: str, dtype: torch.dtype, negative: str | None) -> None:
    model, parts = pairs["xl"].at(dtype)
    scheduler = their_scheduler(sampler, model)
    pipe = pipeline("StableDiffusionXLPipeline", parts | {"scheduler": scheduler})
    settings = replace(SETTINGS, sampler=sampler)
    noise = noise_of(model, SEEDS)
    expected = theirs(
        pipe,
        settings,
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * 3,
        latents=their_noise(noise, scheduler, settings.steps),
        original_size=(512, 384),
        crops_coords_top_left=(8, 16),
        target_size=(96, 80),
        **SIZE,
    )
    text = TextSettings(
        negative=negative, original_size=(512, 384), crop=(8, 16), target_size=(96, 80)
    )
    jobs = text_jobs(PROMPTS, SEEDS, text=text, settings=settings, **SIZE)
    assert_both_equal(model, jobs, expected)


@pytest.mark.parametrize(("sampler", "dtype"), CASES, ids=str)
def test_xl_with_refiner(pairs: dict[str, Pair], sampler: str, dtype: torch.dtype) -> None:
    """Five steps, since diffusers' DDIM steps to another timestep where they do not divide 1000."""
    base, base_parts = pairs["xl"].at(dtype)
    refiner, refiner_parts = pairs["refiner"].at(dtype)
    scheduler = their_scheduler(sampler, base)
    first = pipeline("StableDiffusionXLPipeline", base_parts | {"scheduler": scheduler})
    second = pipeline(
        "StableDiffusionXLImg2ImgPipeline",
        refiner_parts | {"scheduler": their_scheduler(sampler, refiner)},
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    settings = replace(SETTINGS, sampler=sampler)
    noise = noise_of(base, SEEDS)
    negative = [NEGATIVE] * 3
    handed, _ = theirs(
        first,
        settings,
        PROMPTS,
        negative_prompt=negative,
        latents=their_noise(noise, scheduler, settings.steps),
        denoising_end=0.6,
        **SIZE,
    )
    _, expected = theirs(
        second, settings, PROMPTS, negative_prompt=negative, image=handed, denoising_start=0.6
    )
    text = TextSettings(negative=NEGATIVE)
    jobs = text_jobs(PROMPTS, SEEDS, switch=0.6, text=text, settings=settings, **SIZE)
    assert_equal(images(base, jobs, refiner=refiner), expected, "images")


DEFAULTS = {  # what published folders say: SD 1, 2, XL; and others
    "PNDMScheduler": ("sd1", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "DDIMScheduler": ("sd2", {"clip_sample": False, "set_alpha_to_one": False}),
    "EulerDiscreteScheduler": ("sd1", {"timestep_spacing": "leading"}),
    "DPMSolverMultistepScheduler": ("sd1", {"timestep_spacing": "leading"}),
    "zero SNR": (
        "sd2",
        {
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
        },
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_folders_own_sampler_is_the_default(
    pairs: dict[str, Pair], name: str, tmp_path: Any
) -> None:
    """With `load(folder)` alone, as diffusers' `from_pretrained(folder)(prompt)` samples."""
    kind, options = DEFAULTS[name]
    class_name = "DDIMScheduler" if name == "zero SNR" else name
    kept = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    scheduler = getattr(import_diffusers(class_name), class_name)(
        **kept,
        **options,
        steps_offset=1,
        prediction_type="v_prediction" if kind == "sd2" else "epsilon",
    )
    parts = pairs[kind].at(torch.float32)[1] | {"scheduler": scheduler}
    pipe = pipeline("StableDiffusionPipeline", parts)
    pipe.save_pretrained(tmp_path)
    model = fastdiff.load(tmp_path)
    settings = SampleSettings(steps=10)
    noise = noise_of(model, [7], 64, 64)
    start = their_noise(noise, scheduler, 10)
    expected = theirs(pipe, replace(settings, guidance_scale=7.5), ["a red cat"], latents=start)
    jobs = text_jobs(["a red cat"], [7], settings=settings)
    assert_both_equal(model, jobs, expected)
    other = text_jobs(["a red cat"], [7], settings=replace(settings, sampler="ddpm"))
    z = latents(model, jobs)
    assert (latents(model, other) - z).norm() > 0.01 * z.norm()
