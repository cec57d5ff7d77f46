"""Super-resolution on latents against diffusers: Stable Diffusion's x4-upscaler, and LDM's."""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.save import save
from fastdiff.generate.job import (
    ClassJob,
    ImageToImageJob,
    SampleSettings,
    TextJob,
    TextSettings,
    stage_seed,
)
from fastdiff.generate.session import Session
from fastdiff.images import save_png, to_pil
from tests.generate.test_unclip import edited, initial_noise
from tests.generate.test_unclip_pictures import picture
from tests.models.test_against_diffusers import randn
from tests.support.diffusers_models import (
    SCHEDULER,
    UNET,
    VAE,
    pipeline,
    seeded,
    text_encoder,
    tokenizer,
)
from tests.support.drawing import images
from tests.support.peers import import_diffusers

SEED, DTYPE, STEPS, SIDES = 5, torch.float64, 4, (8, 12)
X4_UNET = UNET | {
    "in_channels": 7,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "use_linear_projection": True,
    "only_cross_attention": (True, False),
    "num_class_embeds": 400,
}
THREE_LEVELS = {
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
LDM_UNET = {
    "sample_size": 8,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SETTINGS = SampleSettings(steps=STEPS, guidance_scale=3.0, batch=2)

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def saved(pipe: Any, folder: Path) -> Any:
    """The pipeline's folder, loaded, with the pipeline's schedule in fp64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(folder)
    model = fastdiff.load(folder, dtype=DTYPE)
    pipe.scheduler.alphas_cumprod = Session.of(model).schedule.alphas_cumprod
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.alphas_cumprod[0]
    return model


@pytest.fixture(scope="module")
def x4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    root = tmp_path_factory.mktemp("x4")
    diffusers = import_diffusers("StableDiffusionUpscalePipeline", "DDPMScheduler", "DDIMScheduler")
    words = tokenizer(root / "words", pad_token="!")
    parts = {
        "unet": seeded("UNet2DConditionModel", X4_UNET, 4).to(DTYPE),
        "vae": seeded("AutoencoderKL", VAE | THREE_LEVELS | {"scaling_factor": 0.08333}, 2).to(
            DTYPE
        ),
        "text_encoder": text_encoder(words).to(DTYPE),
        "tokenizer": words,
        "scheduler": diffusers.DDIMScheduler(**SCHEDULER, prediction_type="v_prediction"),
        "low_res_scheduler": diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
    }
    pipe = pipeline("StableDiffusionUpscalePipeline", parts)
    return pipe, saved(pipe, root / "model"), root / "model"


@pytest.fixture(scope="module")
def ldm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    root = tmp_path_factory.mktemp("ldm")
    diffusers = import_diffusers("LDMSuperResolutionPipeline", "DDIMScheduler")
    first = VAE | THREE_LEVELS | {"latent_channels": 3, "num_vq_embeddings": 64}
    parts = {
        "unet": seeded("UNet2DModel", LDM_UNET, 4).to(DTYPE),
        "vqvae": seeded("VQModel", first, 2).to(DTYPE),
        "scheduler": diffusers.DDIMScheduler(**SCHEDULER),
    }
    codes = parts["vqvae"].quantize.embedding.weight
    codes.copy_(randn(*codes.shape, dtype=DTYPE))  # of the size of latents: their scale counts
    pipe = pipeline("LDMSuperResolutionPipeline", parts)
    return pipe, saved(pipe, root / "model"), root / "model"


def noised_by_us(pipe: Any, monkeypatch: pytest.MonkeyPatch, *draws: Tensor) -> None:
    """Make diffusers' pipeline draw these."""
    module = importlib.import_module(type(pipe).__module__)
    left = iter(draws)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(left).to(DTYPE))


def of_x4(pipe: Any, monkeypatch: pytest.MonkeyPatch, given: Tensor, **options: Any) -> Tensor:
    """diffusers' image from our noise: (3, 4 h, 4 w) in [-1, 1]."""
    noised_by_us(pipe, monkeypatch, initial_noise(stage_seed(SEED, "image noise"), given.shape))
    made = pipe(
        image=given[None].to(DTYPE),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=initial_noise(SEED, (4, *given.shape[1:])).to(DTYPE),
        output_type="pt",
        **options,
    ).images[0]
    return 2 * made - 1


def assert_same(ours: Tensor, wanted: Tensor, atol: float) -> None:
    assert ours.shape == (3, 4 * SIDES[0], 4 * SIDES[1])
    assert float(ours.std()) > 0.05
    torch.testing.assert_close(ours, wanted.double(), rtol=0, atol=atol)


@pytest.mark.parametrize(("prompt", "level"), [("a red cat", 20), ("", 0), ("dog", 350)])
def test_the_x4_upscaler_equals_that_of_diffusers(
    x4: Any, prompt: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, model, _ = x4
    given = picture(0, *SIDES)
    asked = {"prompt": prompt, "negative_prompt": "sky", "noise_level": level}
    wanted = of_x4(pipe, monkeypatch, given, **asked)
    text = TextSettings(image_noise=level, negative="sky")
    job = TextJob(prompt=prompt, image=given, seed=SEED, text=text, settings=SETTINGS)
    assert_same(images(model, [job])[0], wanted, 1e-5)  # the picture's schedule is in fp32


def test_one_call_takes_the_size_and_the_defaults(
    x4: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, model, _ = x4
    given = picture(1, *SIDES)
    wanted = of_x4(pipe, monkeypatch, given, prompt="cat", noise_level=20)
    save_png(tmp_path / "small.png", given, {})
    for source in (given, to_pil(given), tmp_path / "small.png"):
        (made,) = model.generate("cat", image=source, seeds=SEED, steps=STEPS, guidance_scale=3.0)
        assert_same(made.image, wanted, 1e-5)
        assert made.job.text.image_noise == 20
    (plain,) = model.generate("cat", image=given, steps=1)
    assert plain.job.settings.guidance_scale == 9
    asked: Any = {"height": 64, "steps": 1}  # pictures are resized to a quarter of it
    (larger,) = model.generate("cat", image=tmp_path / "small.png", **asked)
    assert larger.image.shape == (3, 64, 96)
    (same,) = model.generate("cat", image=to_pil(given), **asked)
    assert torch.equal(same.image, larger.image)


def test_jobs_of_different_levels_share_a_batch(x4: Any) -> None:
    _, model, _ = x4
    jobs = [
        TextJob(
            prompt="cat",
            image=picture(0, *SIDES),
            seed=SEED,
            text=TextSettings(image_noise=level),
            settings=SETTINGS,
        )
        for level in (0, 300)
    ]
    together = images(model, jobs)
    for job, image in zip(jobs, together, strict=True):
        assert torch.equal(images(model, [job])[0], image)
    assert float((together[0] - together[1]).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (TextJob(prompt="a"), "enlarges a small image, and none was given"),
        (ImageToImageJob(image=picture(0, *SIDES), prompt="a"), "enlarges a small image"),
        (
            TextJob(prompt="a", image=picture(0, *SIDES), text=TextSettings(image_noise=351)),
            "image_noise must be 0 to 350, got 351",
        ),
        (TextJob(prompt="a", image=picture(0, *SIDES), upscale=2.0), "leave upscale out"),
        (
            TextJob(prompt="a", image=picture(0, *SIDES), height=64, width=64),
            "height and width resize files only",
        ),
    ],
)
def test_what_the_x4_upscaler_cannot_do_is_refused(x4: Any, job: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(x4[1], [job])


def test_it_is_not_written(x4: Any, tmp_path: Path) -> None:
    for layout in ("diffusers", "bundle"):
        with pytest.raises(ValueError, match="reads a noised picture, whose noise levels"):
            save(x4[1], tmp_path / "copy", layout=layout)


def test_its_unet_alone_is_written_and_does_not_sample(x4: Any, tmp_path: Path) -> None:
    whole = x4[2]
    unet = fastdiff.load(whole / "unet", dtype=DTYPE)
    save(unet, tmp_path / "copy", layout="diffusers")
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["only_cross_attention"] == [True, False]
    again = fastdiff.load(tmp_path / "copy", dtype=DTYPE)
    assert again.denoiser.config == unet.denoiser.config
    folder = shutil.copytree(whole, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    del index["low_res_scheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks low_res_scheduler"):
        fastdiff.load(folder)
    index["_class_name"] = "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="reads a label beside the text"):
        fastdiff.load(folder).generate("a", image=picture(0, *SIDES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only_cross_attention": True}, "only_cross_attention must be given per level"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention must be absent"),
        ({"num_class_embeds": 350}, "num_class_embeds must be above 350"),
    ],
)
def test_unets_that_do_not_fit_are_refused(
    x4: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = edited(x4[2], tmp_path / "edited", "unet", **change)
    if "num_class_embeds" in change:
        unet = seeded("UNet2DConditionModel", X4_UNET | change, 4)
        unet.save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=message):
        fastdiff.load(folder)


def test_ldm_super_resolution_equals_that_of_diffusers(
    ldm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, model, _ = ldm
    given = picture(2, *SIDES)
    noised_by_us(pipe, monkeypatch, initial_noise(SEED, (3, *SIDES)))
    wanted = pipe(image=given[None], num_inference_steps=STEPS, output_type="pt").images[0]
    (made,) = model.generate(image=given, seeds=SEED, steps=STEPS)
    assert isinstance(made.job, ClassJob)
    assert_same(made.image, 2 * wanted - 1, 1e-9)


def test_ldm_super_resolution_survives_writing(ldm: Any, tmp_path: Path) -> None:
    _, model, _ = ldm
    job = ClassJob(image=picture(2, *SIDES), seed=SEED, settings=SampleSettings(steps=2))
    expected = images(model, [job])
    for layout in ("diffusers", "bundle"):
        save(model, tmp_path / layout, layout=layout)
        again = fastdiff.load(tmp_path / layout, dtype=DTYPE)
        assert torch.equal(images(again, [job]), expected)
