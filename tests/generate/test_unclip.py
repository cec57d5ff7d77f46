"""unCLIP from a prompt to an enlarged image, against diffusers' UnCLIPPipeline.

The noise is ours, Philox of the seeds, handed to diffusers in the order in which it draws.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.save import save
from fastdiff.generate.facts import check
from fastdiff.generate.job import (
    ImageToImageJob,
    InterpolationJob,
    SampleSettings,
    TextJob,
    TextSettings,
    stage_seed,
)
from fastdiff.generate.recipe import from_json, to_json
from fastdiff.generate.session import Session
from fastdiff.generate.slerp import slerp
from fastdiff.generate.unclip import UnCLIPConditions, prior_seed
from fastdiff.kernels import INITIAL_NOISE, SAMPLER_NOISE, int64_bits, philox_normal
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.worker import Worker
from tests.support.drawing import images
from tests.support.unclip_models import LARGE, SMALL, WIDTH, karlo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("unclip") / "karlo"
    karlo(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return fastdiff.load(folder)


def job(
    prompt: str = "ab c", seed: int = 7, samples: int = 1, negative: str | None = None
) -> TextJob:
    return TextJob(
        prompt=prompt,
        seed=seed,
        text=TextSettings(
            prior_steps=4, prior_guidance_scale=3.0, prior_samples=samples, negative=negative
        ),
        settings=SampleSettings(steps=3, guidance_scale=2.5, upsampler_steps=3, batch=4),
    )


def initial_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """What a job starts from: (1, *shape)."""
    return philox_normal(torch.tensor([int64_bits(seed)]), shape, step=0, stream=INITIAL_NOISE)


def noises(seed: int, shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> list[Tensor]:
    """What a sampler adds in its first rows: (1, *shape) each."""
    seeds = torch.tensor([int64_bits(seed)])
    drawn = [philox_normal(seeds, shape, step=row, stream=SAMPLER_NOISE) for row in range(rows)]
    return [noise.to(dtype) for noise in drawn]


def starts(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The pipeline's arguments with the noise that our job begins with."""
    shapes = {
        "prior_latents": (prior_seed(seed, 0), (WIDTH,)),
        "decoder_latents": (seed, (3, SMALL, SMALL)),
        "super_res_latents": (stage_seed(seed, "superresolution"), (3, LARGE, LARGE)),
    }
    return {name: initial_noise(own, shape).to(dtype) for name, (own, shape) in shapes.items()}


def hand_over(monkeypatch: pytest.MonkeyPatch, draws: Iterator[Tensor]) -> None:
    """The scheduler's draws are ours."""
    module = importlib.import_module("diffusers.schedulers.scheduling_unclip")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws))


def with_our_schedule(pipe: Any, model: Model) -> None:
    """Give the pipeline's schedulers our fp64 tables; their own fp32 ones move pixels by 4e-4."""
    schedule = Session.of(model).schedule
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        scheduler = getattr(pipe, name, None)
        if scheduler is not None:
            scheduler.alphas_cumprod, scheduler.betas = schedule.alphas_cumprod, schedule.betas
            scheduler.alphas, scheduler.one = (
                1 - schedule.betas,
                torch.ones((), dtype=torch.float64),
            )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)], ids=["fp32", "fp64"]
)
def test_the_image_equals_that_of_diffusers(
    dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = karlo(tmp_path / "karlo", dtype)
    ours = fastdiff.load(tmp_path / "karlo", dtype=dtype)
    with_our_schedule(pipe, ours)
    seed = 2**40 + 3
    draws = [
        *noises(prior_seed(seed, 0), (WIDTH,), 3, dtype),
        *noises(seed, (3, SMALL, SMALL), 2, dtype),
        *noises(stage_seed(seed, "superresolution"), (3, LARGE, LARGE), 2, dtype),
    ]
    left = iter(draws)
    hand_over(monkeypatch, left)
    theirs = pipe(
        "ab c",
        prior_num_inference_steps=4,
        decoder_num_inference_steps=3,
        super_res_num_inference_steps=3,
        prior_guidance_scale=3.0,
        decoder_guidance_scale=2.5,
        output_type="np",
        **starts(seed, dtype),
    ).images[0]
    assert next(left, None) is None, "diffusers has drawn as often as we have"
    (image,) = images(ours, [job(seed=seed)])
    assert image.shape == (3, LARGE, LARGE)
    got = (image.double() * 0.5 + 0.5).permute(1, 2, 0)
    assert float(got.std()) > 0.05
    # diffusers rounds its result to fp32, whatever the dtype
    torch.testing.assert_close(got, torch.from_numpy(theirs).double(), rtol=0, atol=tolerance)


def embeddings_of(
    pipe: Any, prompt: str, seeds: list[int], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """The image embeddings that diffusers' prior makes from our noise: (N, D)."""
    found = []
    for own in seeds:
        hand_over(monkeypatch, iter(noises(own, (WIDTH,), 3, torch.float32) + [torch.zeros(1)] * 9))
        with pipe.text_proj.register_forward_pre_hook(
            lambda _, __, given: found.append(given["image_embeddings"]), with_kwargs=True
        ):
            pipe(
                prompt,
                prior_num_inference_steps=4,
                decoder_num_inference_steps=2,
                super_res_num_inference_steps=2,
                prior_guidance_scale=3.0,
                prior_latents=initial_noise(own, (WIDTH,)),
            )
    return torch.cat(found)


def test_the_nearer_of_two_embeddings_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ramesh et al. 2022, section 2.2: the larger dot product with the text's embedding."""
    pipe = karlo(tmp_path / "karlo")
    ours = fastdiff.load(tmp_path / "karlo")
    with_our_schedule(pipe, ours)
    conditions = Session.of(ours).conditions
    assert isinstance(conditions, UnCLIPConditions)
    ids = pipe.tokenizer(["ab c"], padding="max_length", max_length=16, return_tensors="pt")
    text = pipe.text_encoder(ids.input_ids).text_embeds[0]
    chosen = set()
    for seed in range(8):
        both = embeddings_of(pipe, "ab c", [prior_seed(seed, i) for i in range(2)], monkeypatch)
        best = int((both @ text).argmax())
        chosen.add(best)
        kept = conditions._image("ab c", seed, job(samples=2).text)
        torch.testing.assert_close(kept, both[best][None], rtol=1e-4, atol=1e-5)
    assert chosen == {0, 1}


def test_an_image_does_not_depend_on_its_neighbours(model: Model) -> None:
    jobs = [job("ab c", 7), job("d", 8, samples=2), job("ab c", 9, negative="x")]
    together = images(model, jobs)
    assert len({tuple(image.flatten().tolist()) for image in together}) == 3
    for each, image in zip(jobs, together, strict=True):
        assert torch.equal(images(model, [each])[0], image)


def test_one_call_fills_in_what_was_published(model: Any) -> None:
    (result,) = model.generate("ab", seeds=3, steps=2, prior_steps=2, upsampler_steps=1)
    text, settings = result.job.text, result.job.settings
    assert (text.prior_guidance_scale, text.prior_samples, settings.guidance_scale) == (4, 2, 8)
    assert (result.job.height, result.job.width) == (LARGE, LARGE)
    assert from_json(to_json(result.job)) == result.job.__class__(
        **{**vars(result.job), "settings": SampleSettings(**{**vars(settings), "batch": None})}
    )
    filled = check(TextJob(prompt="ab"), Session.of(model).facts)
    assert isinstance(filled, TextJob)
    assert (filled.text.prior_steps, filled.settings.upsampler_steps) == (25, 7)
    larger = model.generate("ab", steps=2, prior_steps=2, upsampler_steps=2, height=24, width=32)
    assert larger.tensor.shape == (1, 3, 24, 32)


def test_every_stage_is_part_of_the_hash(folder: Path) -> None:
    hashes = set()
    for part in ("", "prior", "projection", "upsampler", "upsampler_2"):
        changed = fastdiff.load(folder)
        if part:
            next(changed.modules[part].parameters()).data.add_(1)
        hashes.add(changed.weights_hash)
    changed = fastdiff.load(folder)
    assert changed.prior is not None
    changed.prior.sampler = None
    hashes.add(changed.weights_hash)
    assert len(hashes) == 6


def test_between_two_prompts_the_embedding_turns(model: Model) -> None:
    """Section 3.2: z is on the great circle between the ends' embeddings."""
    conditions = Session.of(model).conditions
    assert isinstance(conditions, UnCLIPConditions)
    text = job().text
    ends = [conditions._image(prompt, 7, text) for prompt in ("ab c", "d")]
    frame = InterpolationJob(
        prompt="ab c", to_prompt="d", seed=7, at=0.25, text=text, settings=job().settings
    )
    found, _ = conditions.of(frame, (LARGE, LARGE), guided=False)
    image = slerp(*ends, 0.25)
    parts = [
        conditions.projection(image, conditions.encoder.encode(prompt)) for prompt in ("ab c", "d")
    ]
    assert found.context is not None
    wanted = torch.lerp(parts[0].tokens, parts[1].tokens, 0.25)
    torch.testing.assert_close(found.context, wanted)
    for at, prompt in ((0.0, "ab c"), (1.0, "d")):
        end = InterpolationJob(
            prompt="ab c", to_prompt="d", seed=7, at=at, text=text, settings=job().settings
        )
        assert torch.equal(images(model, [end]), images(model, [job(prompt)]))


def test_the_command_makes_an_image(folder: Path, tmp_path: Path, capsys: Any) -> None:
    from fastdiff.cli import main

    words = f"--prior-steps 2 --steps 2 --upsampler-steps 2 --model {folder} --out {tmp_path}"
    assert main(["txt2img", "ab", *words.split()]) == 0, capsys.readouterr().err
    (made,) = tmp_path.glob("*.png")
    again = ["txt2img", "--like", str(made), "--out", str(tmp_path / "again")]
    assert main(again) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (ImageToImageJob(image=torch.zeros(3, 16, 16), prompt="a"), "begins with noise and takes"),
        (TextJob(prompt="a", upscale=2.0), "networks of its own; leave upscale out"),
        (TextJob(prompt="a" * 15), "at most 14 tokens, got 15"),
        (TextJob(prompt="(a:1.2)"), "has no weights and no BREAK"),
        (TextJob(prompt="a", text=TextSettings(clip_skip=1)), "clip_skip must be 0"),
        (TextJob(prompt="a", height=10), "multiples of 4, got 16 x 10"),
    ],
)
def test_what_it_cannot_do_is_refused(model: Model, wanted: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(model, [wanted])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"prior_steps": 3}, "has no prior, so prior_steps has no effect"),
        ({"upsampler_steps": 3}, "has no upsampler, so upsampler_steps has no effect"),
    ],
)
def test_stages_that_a_model_lacks_are_refused(option: dict[str, Any], message: str) -> None:
    digits = fastdiff.load("digits")
    with pytest.raises(ValueError, match=message):
        digits.generate(image=torch.zeros(1, 8, 8), **option)


def test_it_is_neither_written_nor_served(model: Model, tmp_path: Path) -> None:
    for layout in ("bundle", "diffusers"):
        with pytest.raises(ValueError, match=r"further networks \(prior, projection, upsamplers\)"):
            save(model, tmp_path / layout, layout=layout)
    with pytest.raises(ValueError, match="which the server does not run"):
        Worker(model, Metrics(), queue=2)


def edited(folder: Path, to: Path, part: str, **change: Any) -> Path:
    """A copy of a pipeline whose config of one part is changed."""
    shutil.copytree(folder, to)
    (place,) = [*(to / part).glob("*config.json")][:1]
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    return to


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("super_res_last", {"sample_size": 24}, "must be the same multiple of the decoder's 8"),
        ("super_res_scheduler", {"variance_type": "learned_range"}, "predicts no variance"),
        ("text_proj", {"_class_name": "Linear"}, "_class_name must be 'UnCLIPTextProjModel'"),
        ("text_proj", {"magic": 1}, "magic must be absent or off"),
        ("prior_scheduler", {"magic": 1}, "the prior cannot be sampled"),
        ("decoder", {"sample_size": None}, "sample_size must be positive, got None"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fastdiff.load(edited(folder, tmp_path / "edited", part, **change))


def test_a_missing_part_is_named(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cut"
    shutil.copytree(folder, place)
    index = json.loads((place / "model_index.json").read_text())
    del index["super_res_last"]
    (place / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="UnCLIPPipeline lacks super_res_last"):
        fastdiff.load(place)
    with pytest.raises(ValueError, match="image_size cannot be given for UnCLIPPipeline"):
        fastdiff.load(folder, image_size=64)
