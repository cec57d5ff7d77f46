"""GLIDE's networks and files against the published structure written out in plain PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.build import check_names
from fastdiff.checkpoint.layouts import glide, openai
from fastdiff.checkpoint.open import Loading
from fastdiff.generate.facts import Facts, resolved
from fastdiff.generate.job import SampleSettings
from fastdiff.models.glide import PADDING, GLIDEText, GLIDETextConfig
from fastdiff.models.presets import UNETS
from fastdiff.models.unet import UNet
from tests.models import published_glide as published
from tests.models.published_glide import BASE, INPAINT, TINY, UPSAMPLER, Size

SAID: dict[str, Any] = {"head_dim": 8, "norm_groups": 8}
WORDS = "abcdefghijklmnopqrstuvwxyz"


def save(folder: Path, size: Size = TINY, name: str = "glide.pt", seed: int = 0) -> Path:
    """A file with the random weights of `published.draw`, in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = published.draw(size, seed)
    torch.save({key: value.float() for key, value in weights.items()}, folder / name)
    return folder / name


def save_vocabulary(folder: Path) -> Path:
    """GPT-2's files with its 256 bytes and a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    merges = [("r", "e"), ("re", "d"), ("Ġ", "c"), ("Ġc", "at")]
    vocabulary = [*letters, "re", "red", "Ġc", "at", "Ġcat", "<|endoftext|>"]
    merges.insert(3, ("a", "t"))
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("size", "name", "count"),
    [
        (BASE, "glide", 385_030_726),
        (INPAINT, "glide-inpaint", 385_037_638),
        (UPSAMPLER, "glide-upsampler", 398_361_286),
    ],
    ids=["base", "inpaint", "upsampler"],
)
def test_published_files_have_exactly_our_tensors(size: Size, name: str, count: int) -> None:
    shapes = published.shapes(size)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    loading = Loading()
    text = {key: shape for key, shape in shapes.items() if key.startswith(glide.TEXT)}
    rest = {key: shape for key, shape in shapes.items() if key not in text}
    config = glide.unet_config(rest, loading)
    assert replace(config, dropout=0.1) == UNETS[name]
    spoken = glide.text_config(text, loading)
    assert spoken == GLIDETextConfig(vocabulary=50257, tokens=128, width=512, depth=16, num_heads=8)
    with torch.device("meta"):
        unet, encoder = UNet(config), GLIDEText(spoken)
    check_names(unet, openai.names(unet), rest)
    check_names(encoder, glide.text_names(encoder), text)
    ours = [p.numel() for part in (unet, encoder) for p in part.parameters()]
    assert sum(ours) == count


@torch.no_grad()
@pytest.mark.parametrize("inputs", [3, 7, 6], ids=["base", "inpaint", "upsampler"])
def test_equal_to_the_published_structure(inputs: int, tmp_path: Path) -> None:
    """fp64, from a file; `error` of a wrong order of rows or of a missing token is above 1e-2."""
    size = replace(TINY, inputs=inputs)
    weights = published.draw(size)
    torch.save(weights, tmp_path / "glide.pt")
    model = fastdiff.load(tmp_path / "glide.pt", dtype=torch.float64, **SAID)
    assert model.layout == "glide"
    assert model.denoiser is not None
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[5, 299, 0, 7, 7, 2], [9, 1, 0, 0, 0, 0]])
    there = torch.tensor([[True] * 6, [True, True, *[False] * 4]])
    x = torch.randn(2, inputs, 8, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([3, 961])
    tokens = published.text(weights, size, ids, there)
    encoder: Any = model.text_encoders[0].model
    ours = encoder(torch.where(there, ids, PADDING))
    torch.testing.assert_close(ours, tokens, rtol=1e-11, atol=1e-12)
    expected = published.unet(weights, size, x, t, tokens)
    actual = model.denoiser(x, t, context=ours, added=ours[:, -1])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    ahead = model.denoiser.body(
        x,
        model.denoiser.embed(t, added=ours[:, -1]),
        model.denoiser.project_context(ours),
    )
    torch.testing.assert_close(ahead, expected, rtol=1e-10, atol=1e-11)


def test_what_the_files_do_not_state_is_that_of_the_paper(tmp_path: Path) -> None:
    base = fastdiff.load(save(tmp_path), **SAID)
    assert base.schedule is not None
    assert (base.schedule.kind, base.image_size, base.image_channels) == ("cosine", 64, 3)
    upsampler = fastdiff.load(save(tmp_path, replace(TINY, inputs=6), "up.pt"), **SAID)
    assert upsampler.schedule is not None
    assert (upsampler.schedule.kind, upsampler.image_size) == ("linear", 256)
    assert "small image" in upsampler.provenance["condition"]
    assert set(base.assumed) == {"schedule", "prediction", "image_size"}
    assert base.denoiser is not None
    assert base.denoiser.config.learned_sigma
    with pytest.raises(ValueError, match="multiple of its head_dim 64, got 16; set head_dim"):
        fastdiff.load(save(tmp_path), norm_groups=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The base model, the one for inpainting and the upsampler, with a vocabulary."""
    folder = tmp_path_factory.mktemp("glide")
    words = save_vocabulary(folder / "words")
    return {
        name: fastdiff.load(
            save(folder, replace(TINY, inputs=inputs, tokens=12), f"{name}.pt"),
            tokenizer=words,
            image_size=16 if name == "upsampler" else 8,
            **SAID,
        )
        for name, inputs in (("base", 3), ("inpaint", 7), ("upsampler", 6))
    }


def test_tokens_are_those_of_gpt2_in_lower_case(models: dict[str, Any]) -> None:
    encoder = models["base"].text_encoders[0]
    vocabulary = encoder.tokenizer.get_vocab()
    wanted = [vocabulary["red"], vocabulary["Ġcat"]]
    assert encoder.check_prompt("RED cat") == encoder.check_prompt("red cat") == wanted
    assert encoder.check_prompt("") == []


def test_a_prompt_decides_the_image(models: dict[str, Any]) -> None:
    options: dict[str, Any] = {"steps": 3, "seeds": 0}
    one, two = (models["base"].generate(prompts, **options).tensor for prompts in ("red", "cat"))
    assert one.shape == (1, 3, 8, 8)
    assert not torch.equal(one, two)
    unguided = models["base"].generate("red", guidance_scale=1, **options).tensor
    assert not torch.equal(one, unguided)


def test_bytes_do_not_depend_on_the_batch(models: dict[str, Any]) -> None:
    prompts = ["red", "a cat", "", "red cat"]
    small = torch.rand(3, 4, 4) * 2 - 1
    for name, more in (("base", {}), ("upsampler", {"image": small})):
        options: dict[str, Any] = {"steps": 3, **more}
        together = models[name].generate(prompts, seeds=[5, 6, 7, 8], **options).tensor
        for index, prompt in enumerate(prompts):
            alone = models[name].generate(prompt, seeds=5 + index, **options).tensor
            assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize(("name", "scale"), [("base", 3), ("inpaint", 3), ("upsampler", 1)])
def test_default_guidance_is_that_of_the_published_samples(
    models: dict[str, Any], name: str, scale: float
) -> None:
    facts = Facts.of(models[name])
    assert resolved(SampleSettings(), facts).guidance_scale == scale
    assert resolved(SampleSettings(guidance_scale=5.0), facts).guidance_scale == 5


def test_guidance_leads_away_from_padding_alone(tmp_path: Path) -> None:
    """One DDIM step from sigma_max by hand: eps = eps_0 + w (eps_c - eps_0), eps_0 of no token."""
    base = fastdiff.load(
        save(tmp_path, replace(TINY, tokens=12)),
        dtype=torch.float64,
        schedule="linear",
        image_size=8,
        tokenizer=save_vocabulary(tmp_path / "words"),
        **SAID,
    )
    encoder, unet = base.text_encoders[0], base.denoiser
    ids = encoder.check_prompt("red cat")
    padded = torch.tensor([[PADDING] * 12, [*ids, *[PADDING] * (12 - len(ids))]])
    made: list[Tensor] = []
    base.generate(
        "red cat",
        seeds=3,
        steps=1,
        sampler="ddim",
        clamp=1e9,
        guidance_scale=3.0,
        on_step=lambda step: made.append(step.denoised.clone()),
    )
    session = vars(base)["_session"][1]
    with torch.no_grad():
        tokens = encoder.model(padded)
        x = session.noise(3, (3, 8, 8)).expand(2, -1, -1, -1)
        table = session.schedule
        t = torch.tensor([999, 999])
        out = unet(x, t, context=tokens, added=tokens[:, -1])[:, :3]
        eps = out[0] + 3.0 * (out[1] - out[0])
        alpha = table.alpha(t[:1])
        expected = (x[0] - (1 - alpha**2).sqrt() * eps) / alpha
    torch.testing.assert_close(made[0].flatten(), expected.flatten(), rtol=1e-9, atol=1e-9)


def test_inpainting_keeps_what_the_mask_leaves(models: dict[str, Any]) -> None:
    image = torch.rand(3, 8, 8) * 2 - 1
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 2:6] = 1
    found = models["inpaint"].generate("red", image=image, mask=mask, seeds=0, steps=2).tensor[0]
    kept = (mask == 0).expand_as(found)
    torch.testing.assert_close(found[kept], image[kept], rtol=0, atol=0)
    assert (found - image)[~kept].abs().min() > 0
    with pytest.raises(ValueError, match="7 channels: 3 of the image, a mask and the image to"):
        models["inpaint"].generate("red", seeds=0)


def test_the_inpainting_network_reads_the_image_where_the_mask_is_zero(
    models: dict[str, Any],
) -> None:
    """The published order: x, then the image times the kept part, then the kept part."""
    seen: list[Tensor] = []
    unet = models["inpaint"].denoiser
    hook = unet.input_blocks[0][0].register_forward_pre_hook(
        lambda _, given: seen.append(given[0].clone())
    )
    image = torch.rand(3, 8, 8) * 2 - 1
    mask = torch.zeros(1, 8, 8)
    mask[:, :3] = 1
    try:
        models["inpaint"].generate("red", image=image, mask=mask, seeds=0, steps=1)
    finally:
        hook.remove()
    for row in seen[0]:
        torch.testing.assert_close(row[3:6], image * (1 - mask))
        torch.testing.assert_close(row[6:], 1 - mask)


def test_upsampling_needs_the_small_image(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"pass image= .*txt2img PROMPT --image FILE"):
        models["upsampler"].generate("red", seeds=0)
    small = torch.rand(3, 4, 4) * 2 - 1
    found = models["upsampler"].generate("red", image=small, seeds=0, steps=2).tensor
    assert found.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="not an upsampler"):
        list(fastdiff.generate(models["base"], [fastdiff.TextJob(prompt="red", image=small)]))


@pytest.mark.parametrize(
    ("prompt", "outcome"),
    [
        ("", None),
        ("🍎", None),
        ("قطة", None),
        ("\x00\x07\u202e", None),
        ("word " * 10_000, "at most 12 tokens, got"),
        ("(red:1.3) cat", "no weights and no BREAK"),
        ("\ud800", "Unicode"),
    ],
    ids=["empty", "emoji", "right-to-left", "control", "long", "weights", "surrogate"],
)
def test_odd_prompts(models: dict[str, Any], prompt: str, outcome: str | None) -> None:
    if outcome is not None:
        with pytest.raises(ValueError, match=outcome):
            models["base"].generate(prompt, seeds=0, steps=1)
        return
    found = models["base"].generate(prompt, seeds=0, steps=1).tensor
    assert bool(found.isfinite().all())


def test_a_missing_vocabulary_is_named(tmp_path: Path) -> None:
    model = fastdiff.load(save(tmp_path), image_size=8, **SAID)
    with pytest.raises(ValueError, match=r"has no tokenizer.*--tokenizer FOLDER"):
        model.generate("red", seeds=0)
    bare = fastdiff.load(tmp_path / "glide.pt", text_encoders=False, image_size=8, **SAID)
    with pytest.raises(ValueError, match="has no text encoder"):
        bare.generate("red", seeds=0)
    with pytest.raises(ValueError, match=r"token ids up to 261, .* only has 200 tokens"):
        fastdiff.load(
            save(tmp_path, replace(TINY, vocabulary=200)),
            tokenizer=save_vocabulary(tmp_path / "words"),
            **SAID,
        )
