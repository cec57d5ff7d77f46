"""Stable Diffusion 2.1 unCLIP against diffusers' StableUnCLIPImg2ImgPipeline."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.save import save
from fastdiff.generate.job import (
    ImageToImageJob,
    InterpolationJob,
    SampleSettings,
    TextJob,
    TextSettings,
    stage_seed,
)
from fastdiff.generate.session import Session
from fastdiff.images import to_pil
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.worker import Worker
from tests.generate.test_unclip import edited, initial_noise
from tests.generate.test_unclip_pictures import picture
from tests.models.test_against_diffusers import randn
from tests.support.diffusers_models import UNET, components, seeded
from tests.support.drawing import images
from tests.support.peers import import_diffusers
from tests.support.unclip_models import processor, vision

WIDTH, SEED, DTYPE = 16, 5, torch.float64
PROJECTED = UNET | {
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2 * WIDTH,
}
SETTINGS = SampleSettings(steps=4, guidance_scale=3.0, batch=2)

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def normalizer() -> Any:
    """The statistics of the embeddings, random."""
    import_diffusers("StableUnCLIPImg2ImgPipeline")
    from diffusers.pipelines.stable_diffusion import stable_unclip_image_normalizer as module

    made = module.StableUnCLIPImageNormalizer(embedding_dim=WIDTH)
    with torch.no_grad():
        made.mean.copy_(randn(1, WIDTH, dtype=DTYPE, seed=8))
        made.std.copy_(1.5 + 0.1 * randn(1, WIDTH, dtype=DTYPE, seed=9))
    return made.to(torch_device="cpu", torch_dtype=DTYPE)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    root = tmp_path_factory.mktemp("stable-unclip")
    diffusers = import_diffusers("StableUnCLIPImg2ImgPipeline", "DDPMScheduler")
    parts = components("sd2", root / "words")
    kept = ("text_encoder", "tokenizer", "vae", "scheduler")
    pipe = diffusers.StableUnCLIPImg2ImgPipeline(
        **{name: parts[name] for name in kept},
        unet=seeded("UNet2DConditionModel", PROJECTED, 4),
        image_encoder=vision(DTYPE, WIDTH),
        feature_extractor=processor(),
        image_normalizer=normalizer(),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
    for name in ("text_encoder", "vae", "unet"):
        getattr(pipe, name).to(DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(root / "model")
    pipe.set_progress_bar_config(disable=True)
    model = fastdiff.load(root / "model", dtype=DTYPE)
    pipe.scheduler.alphas_cumprod = Session.of(model).schedule.alphas_cumprod
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.alphas_cumprod[0]
    return pipe, model, root / "model"


def theirs(pipe: Any, monkeypatch: pytest.MonkeyPatch, level: int, **given: Any) -> Tensor:
    """diffusers' image from our noise: (3, H, W) in [-1, 1]."""
    module = importlib.import_module(type(pipe).__module__)
    noise = initial_noise(stage_seed(SEED, "image noise"), (1, WIDTH))[0].to(DTYPE)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    made = pipe(
        **given,
        noise_level=level,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=initial_noise(SEED, (4, 8, 8)).to(DTYPE),
        output_type="pt",
    ).images[0]
    return 2 * made - 1


def assert_same(ours: Tensor, wanted: Tensor) -> None:
    assert float(ours.std()) > 0.05
    # diffusers has the schedule of the embedding's noise in fp32
    torch.testing.assert_close(ours, wanted.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("prompt", "level"), [("a red cat", 0), ("", 300), ("dog", 999)])
def test_the_image_equals_that_of_diffusers(
    pair: Any, prompt: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, model, _ = pair
    given = picture(0)
    wanted = theirs(
        pipe, monkeypatch, level, image=to_pil(given), prompt=prompt, negative_prompt="sky"
    )
    text = TextSettings(image_noise=level, negative="sky")
    job = TextJob(prompt=prompt, image=given, seed=SEED, text=text, settings=SETTINGS)
    assert_same(images(model, [job])[0], wanted)


def test_one_call_and_frames_between_two_pictures(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, model, _ = pair
    one, two = picture(0), picture(1)
    ends = [model.image_encoder.encode(each) for each in (one, two)]
    theta = torch.arccos(torch.cosine_similarity(*ends))
    middle = torch.sin(theta / 2) * (ends[0] + ends[1]) / torch.sin(theta)
    wanted = theirs(pipe, monkeypatch, 10, image_embeds=middle, prompt="cat")
    asked: Any = {"seeds": SEED, "steps": 4, "guidance_scale": 3.0, "image_noise": 10}
    frames = model.generate("cat", image=one, to_image=two, frames=3, **asked)
    assert_same(frames.tensor[1], wanted)
    for number, end in ((0, one), (2, two)):
        (alone,) = model.generate("cat", image=end, **asked)
        assert torch.equal(frames.tensor[number], alone.image)
    (plain,) = model.generate(image=one, steps=2)
    assert plain.job.settings.guidance_scale == 10


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (TextJob(prompt="a"), "makes variations of a picture, and none was given"),
        (ImageToImageJob(image=picture(0), prompt="a"), "begins with noise and takes a picture"),
        (
            TextJob(prompt="a", image=picture(0), text=TextSettings(image_noise=1000)),
            "image_noise must be 0 to 999, got 1000",
        ),
        (
            InterpolationJob(prompt="a", to_prompt="b"),
            "makes variations of a picture, and none was given",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(pair: Any, job: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(pair[1], [job])


def test_it_is_neither_written_nor_served(pair: Any, tmp_path: Path) -> None:
    _, model, folder = pair
    with pytest.raises(ValueError, match=r"further networks .*image_noise, image_encoder"):
        save(model, tmp_path / "copy", layout="diffusers")
    with pytest.raises(ValueError, match="cannot write a U-Net that reads an image embedding"):
        save(fastdiff.load(folder / "unet"), tmp_path / "copy", layout="diffusers")
    with pytest.raises(ValueError, match="which the server does not run"):
        Worker(model, Metrics(), queue=2)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("image_encoder", {"architectures": None}, "architectures must be CLIPVision"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type must be None or"),
        ("image_normalizer", {"_class_name": "Linear"}, "must be 'StableUnCLIPImageNormalizer'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    pair: Any, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fastdiff.load(edited(pair[2], tmp_path / "edited", part, **change))


def test_a_unet_reads_one_added_vector(pair: Any, tmp_path: Path) -> None:
    both = edited(pair[2], tmp_path / "edited", "unet", addition_embed_type="text_time")
    with pytest.raises(ValueError, match="class_embed_type must be None or, without addition"):
        fastdiff.load(both / "unet")


def test_options_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="has no noise of pictures or of their embeddings"):
        fastdiff.load("digits").generate(image=torch.zeros(1, 8, 8), image_noise=3)
