"""`model.generate(clip=...)`: to which caption, which models fit, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.checkpoint.guide import with_clip
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.cli import main
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.generate.job import InterpolationJob, SampleSettings, TextJob, TextSettings
from fastdiff.generate.memory import Call, need_of
from fastdiff.generate.model import with_generate
from fastdiff.generate.session import Session
from fastdiff.images import read_recipe, to_uint8
from fastdiff.models.contrastive import Contrastive, ContrastiveConfig, NoisedCLIP
from fastdiff.models.text import TextEncoder
from fastdiff.models.text_transformer import TextTransformer, TextTransformerConfig
from fastdiff.models.tokenizer import Tokenizer
from tests.support.tiny import UNET, randomize, tiny_model, tiny_unet

TOKENIZER = Tokenizer.learn(["a red circle", "a blue square"] * 2, 280)
TEXT = TextTransformerConfig(
    vocab_size=len(TOKENIZER),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=12,
)
CONFIG = ContrastiveConfig(text=TEXT, widths=(8, 16), dim=8, image_channels=3, noised=True)
OPTIONS: dict[str, Any] = {"steps": 3, "sampler": "ddim", "guidance_scale": 2}
PROMPTS = ["a red circle", "a blue square", "a red square"]


def text_model(**change: Any) -> Model:
    """A model of latents that reads text with a transformer of its own."""
    torch.manual_seed(0)  # `randomize` keeps the first values of biases
    network = TextTransformer(TEXT)
    randomize(network, 3)
    config = replace(UNET, num_classes=None, null_class=False, context_dim=16)
    fields: dict[str, Any] = {
        "denoiser": tiny_unet(config),
        "class_names": (),
        "text_encoders": (TextEncoder(model=network.eval(), tokenizer=TOKENIZER),),
    }
    return tiny_model(**{**fields, **change})


def clip_model(**change: Any) -> Model:
    """A noised CLIP for the latents of `text_model`."""
    torch.manual_seed(0)
    net = Contrastive(change.pop("config", CONFIG))
    randomize(net, 5)
    fields: dict[str, Any] = {
        "layout": "bundle",
        "clip": NoisedCLIP(model=net.eval().requires_grad_(False), tokenizer=TOKENIZER),
        "schedule": ScheduleConfig(),
        "scale_factor": tiny_model().scale_factor,
        "image_size": 16,
        "image_channels": 1,
        "path": Path("guide"),
    }
    return Model(**{**fields, **change})


def test_each_image_is_guided_to_its_own_prompt_with_the_bits_that_it_has_alone() -> None:
    model, guide = with_generate(text_model()), clip_model()
    plain = model.generate(PROMPTS, **OPTIONS)
    images = model.generate(PROMPTS, clip=guide, clip_scale=500, **OPTIONS)
    assert {result.job.settings.clip_scale for result in images} == {500.0}
    assert all((a.image - b.image).abs().max() > 0.01 for a, b in zip(images, plain, strict=True))
    (alone,) = model.generate(PROMPTS[1], seeds=1, clip=guide, clip_scale=500, **OPTIONS)
    assert torch.equal(alone.image, images[1].image)


def test_mixed_scales_do_not_mix() -> None:
    """Guided, unguided and between two prompts in one batch, as alone."""
    model = with_clip(text_model(), clip_model())
    jobs: list[Any] = [
        TextJob(
            prompt=PROMPTS[seed % 3],
            seed=seed,
            settings=SampleSettings(steps=3, clip_scale=(0.0, 400.0, 900.0)[seed // 2]),
        )
        for seed in range(6)
    ]
    jobs.append(
        InterpolationJob(prompt=PROMPTS[0], to_prompt=PROMPTS[1], at=0.5, settings=jobs[3].settings)
    )
    together = [result.image for result in fastdiff.generate(model, jobs)]
    for job, image in zip(jobs, together, strict=True):
        (alone,) = fastdiff.generate(model, [job])
        assert torch.equal(alone.image, image)


def test_a_scale_of_zero_is_the_model_without_it() -> None:
    model = with_generate(text_model())
    plain = model.generate(PROMPTS[0], **OPTIONS)
    zero = model.generate(PROMPTS[0], clip=clip_model(), clip_scale=0, **OPTIONS)
    one = model.generate(PROMPTS[0], clip=clip_model(), **OPTIONS)
    assert torch.equal(zero.tensor, plain.tensor)
    assert one[0].job.settings.clip_scale == 1
    assert not torch.equal(one.tensor, plain.tensor)


def test_between_two_prompts_each_pulls_by_its_share() -> None:
    session = Session.of(with_clip(text_model(), clip_model()))
    settings = SampleSettings(clip_scale=8.0)
    job = InterpolationJob(prompt=PROMPTS[0], to_prompt=PROMPTS[1], at=0.25, settings=settings)
    first, second = session.clip_pulls(job)
    assert (first.scale, second.scale) == (6.0, 2.0)
    (only,) = session.clip_pulls(TextJob(prompt="a (red:1.3) circle", settings=settings))
    assert only.objective is first.objective, "weights are left out"
    literal = TextSettings(emphasis=False)
    (other,) = session.clip_pulls(
        TextJob(prompt="a (red:1.3) circle", settings=settings, text=literal)
    )
    assert other.objective is not first.objective


def test_the_objective_of_a_caption_is_the_embeddings_dot_product() -> None:
    """With the temperature, as log p(caption given x) up to its normaliser."""
    guide = clip_model().clip
    assert guide is not None
    words = TOKENIZER(PROMPTS[0])["input_ids"]
    ids = torch.tensor([words + [0] * (TEXT.max_position_embeddings - len(words))])
    found = guide.caption(PROMPTS[0])
    torch.testing.assert_close(found, guide.model.scale * guide.model.embed_text(ids)[0])
    assert found.norm() == pytest.approx(float(guide.model.scale), rel=1e-5)


def test_a_bundle_keeps_it_and_the_command_line_uses_it(tmp_path: Path) -> None:
    save_bundle(text_model(), tmp_path / "text")
    save_bundle(clip_model(), tmp_path / "clip")
    both = fastdiff.load(tmp_path / "text", clip=tmp_path / "clip")
    assert both.weights_hash != fastdiff.load(tmp_path / "text").weights_hash
    save_bundle(both, tmp_path / "both")
    options = {"clip_scale": 500, **OPTIONS}
    expected = with_generate(text_model()).generate(PROMPTS[0], clip=clip_model(), **options)
    for model, more in (
        (both, {}),
        (fastdiff.load(tmp_path / "both"), {}),
        (fastdiff.load(tmp_path / "text"), {"clip": tmp_path / "clip"}),
    ):
        found = model.generate(PROMPTS[0], **options, **more)
        assert torch.equal(found.tensor, expected.tensor)
    words = f"--model {tmp_path}/text --clip {tmp_path}/clip --clip-scale 500 --steps 3"
    command = ["txt2img", PROMPTS[0], *words.split(), "--sampler", "ddim", "--guidance-scale", "2"]
    assert main([*command, "--out", str(tmp_path / "made")]) == 0
    [picture] = (tmp_path / "made").glob("*.png")
    pixels = torch.from_numpy(np.array(Image.open(picture)))
    assert torch.equal(pixels, to_uint8(expected.tensor[0])[0])
    assert read_recipe(picture)["job"]["settings"]["clip_scale"] == 500


def test_the_gradient_is_counted_in_the_memory() -> None:
    model = with_clip(text_model(), clip_model(config=replace(CONFIG, widths=(512, 512))))
    call = Call(device=torch.device("cpu"), dtype=torch.float32, count=8)
    work = {}
    for scale in (0.0, 1.0):
        settings = SampleSettings(steps=3, guidance_scale=2.0, clip_scale=scale)
        job = TextJob(prompt=PROMPTS[0], height=64, width=64, settings=settings)
        work[scale] = need_of([model], job, call, loaded=True).work
    assert work[1.0] > 1.5 * work[0.0]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no noised CLIP; train one with 'fastdiff train"):
        with_clip(text_model(), tiny_model())
    with pytest.raises(ValueError, match="does not read text, so its images have no caption"):
        with_clip(tiny_model(), clip_model())
    with pytest.raises(ValueError, match=r"scale factor: 3\.0 for the clip, 0\.8 for"):
        with_clip(text_model(), clip_model(scale_factor=3.0))
    with pytest.raises(ValueError, match="the noise schedule differs"):
        with_clip(text_model(), clip_model(schedule=ScheduleConfig(kind="cosine")))
    grey = replace(CONFIG, image_channels=1)
    with pytest.raises(ValueError, match="channels: 1 for the clip, 3 for the denoiser"):
        with_clip(text_model(), clip_model(config=grey))
    model = with_generate(text_model())
    with pytest.raises(ValueError, match="loaded without a noised CLIP, so clip_scale has no"):
        model.generate(PROMPTS[0], clip_scale=2, **OPTIONS)
    with pytest.raises(ValueError, match="clip_scale must be a number >= 0, got -1"):
        SampleSettings(clip_scale=-1)
    with pytest.raises(ValueError, match="contains a noised CLIP, which guides a denoiser"):
        with_generate(clip_model()).generate(PROMPTS[0])
