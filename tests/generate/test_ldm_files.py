"""LDM's further models from CompVis' files, sampled as CompVis' scripts do, with diffusers' parts:
inpainting_big, and bsr_sr (super-resolution)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.save import save
from fastdiff.generate.job import InpaintJob, SampleSettings
from fastdiff.generate.session import Session
from fastdiff.images import to_pil
from tests.checkpoint.pipelines import LDM
from tests.checkpoint.test_open import compvis_options, compvis_state
from tests.generate.test_unclip import initial_noise
from tests.generate.test_unclip_pictures import picture
from tests.models.test_against_diffusers import VAE, peer_model
from tests.support.drawing import images
from tests.support.peers import import_diffusers

SEED, DTYPE, STEPS, SIDES = 7, torch.float64, 4, (32, 48)
SETTINGS: dict[str, Any] = {"sampler": "ddim", "steps": STEPS, "spacing": "leading"}


def opened(path: Path, channels: int) -> tuple[Any, dict[str, Any]]:
    """A file of LDM's whose U-Net reads so many channels, and diffusers' models in it."""
    models = {
        "vqvae": peer_model("VQModel", {**VAE, "num_vq_embeddings": 64}, DTYPE),
        "unet": peer_model("UNet2DModel", {**LDM, "in_channels": channels}, DTYPE),
    }
    state = compvis_state("ldm", models)
    if channels == 7:  # the first stage is the conditioner too, saved under a second name
        first = {k: v for k, v in state.items() if k.startswith("first_stage_model.")}
        state |= {k.replace("first_stage", "cond_stage"): v for k, v in first.items()}
    torch.save(state, path)
    return fastdiff.load(path, dtype=DTYPE, **compvis_options("ldm")), models


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    return opened(tmp_path_factory.mktemp("big") / "last.ckpt", 7)


@torch.no_grad()
def sampled(model: Any, models: dict[str, Any], condition: Tensor, shape: Any) -> Tensor:
    """diffusers' DDIM on [x, condition], and the decoded image: (3, H, W) in [-1, 1]."""
    scheduler = import_diffusers("DDIMScheduler").DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.alphas_cumprod = Session.of(model).schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=DTYPE)
    scheduler.set_timesteps(STEPS)
    x = initial_noise(SEED, shape).to(DTYPE)
    for t in scheduler.timesteps:
        predicted = models["unet"](torch.cat([x, condition], dim=1), t).sample
        x = scheduler.step(predicted, t, x).prev_sample
    return models["vqvae"].decode(x).sample[0].clamp(-1, 1)


def mask_of(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, height, width, dtype=DTYPE)
    mask[:, 5:21, 9:30] = 1
    return mask


@torch.no_grad()
def inpainted(model: Any, models: dict[str, Any], image: Tensor, mask: Tensor) -> Tensor:
    """CompVis' scripts/inpaint.py: the image is masked in [0, 1], and all goes to [-1, 1]."""
    masked = 2 * ((1 - mask) * (image + 1) / 2) - 1
    latents = models["vqvae"].encode(masked[None]).latents
    small = F.interpolate(2 * mask[None] - 1, latents.shape[2:])
    condition = torch.cat([latents, small], dim=1)
    return sampled(model, models, condition, latents.shape[1:])


@pytest.mark.parametrize("paste", [False, True])
def test_inpainting_big_equals_the_authors_script(inpainting: Any, paste: bool) -> None:
    model, models = inpainting
    image, mask = picture(3, *SIDES).to(DTYPE), mask_of(*SIDES)
    wanted = inpainted(model, models, image, mask)
    if paste:
        wanted = (1 - mask) * image + mask * wanted
    settings = SampleSettings(**SETTINGS)
    job = InpaintJob(image=image, mask=mask, seed=SEED, paste=paste, settings=settings)
    ours = images(model, [job])[0]
    assert float(ours.std()) > 0.05
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-9)


def test_one_call_inpaints(inpainting: Any, tmp_path: Path) -> None:
    model, models = inpainting
    image, mask = picture(3, *SIDES), mask_of(*SIDES).float()
    given = to_pil(image), to_pil(mask * 2 - 1)
    (made,) = model.generate(image=given[0], mask=given[1], seeds=SEED, paste=False, **SETTINGS)
    wanted = inpainted(model, models, image.to(DTYPE), mask.to(DTYPE))
    torch.testing.assert_close(made.image, wanted, rtol=0, atol=1e-5)  # the picture is in fp32
    with pytest.raises(ValueError, match="reads 7 channels: 3 of latents, a mask and the image"):
        model.generate(seeds=SEED, steps=1)
    with pytest.raises(ValueError, match=r"no pipeline .* reads 7 channels and predicts 3"):
        save(model, tmp_path / "copy", layout="diffusers")
    with pytest.raises(ValueError, match="cannot be guided; set guidance_scale=1"):
        model.generate(image=image, mask=mask, guidance_scale=2.0)


def test_super_resolution_from_a_file(tmp_path: Path) -> None:
    model, models = opened(tmp_path / "last.ckpt", 6)
    small = picture(4, 8, 12)
    wanted = sampled(model, models, small[None].to(DTYPE), (3, 8, 12))
    (made,) = model.generate(image=small, seeds=SEED, **SETTINGS)
    assert made.image.shape == (3, 16, 24)  # a first stage of two levels
    torch.testing.assert_close(made.image, wanted, rtol=0, atol=1e-5)  # the picture is in fp32
    save(model, tmp_path / "folder", layout="diffusers")
    again = fastdiff.load(tmp_path / "folder", dtype=DTYPE)
    assert again.provenance["pipeline"] == "LDMSuperResolutionPipeline"
    (same,) = again.generate(image=small, seeds=SEED, **SETTINGS)
    assert torch.equal(same.image, made.image)
    model.scale_factor = 0.5
    with pytest.raises(ValueError, match=r"has no scale factor, got 0\.5"):
        save(model, tmp_path / "folder", layout="diffusers")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("cond_stage_model.channel_mapper.weight", "LDM's semantic synthesis"),
        ("low_scale_model.betas", "load the folder in diffusers' layout"),
        ("depth_model.model.scratch.layer1_rn.weight", "load the folder in diffusers' layout"),
    ],
)
def test_files_with_other_conditions_are_refused(tmp_path: Path, key: str, message: str) -> None:
    models = {
        "vqvae": peer_model("VQModel", {**VAE, "num_vq_embeddings": 64}, DTYPE),
        "unet": peer_model("UNet2DModel", {**LDM, "in_channels": 6}, DTYPE),
    }
    torch.save(compvis_state("ldm", models) | {key: torch.ones(3, 5, 1, 1)}, tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        fastdiff.load(tmp_path / "x")
