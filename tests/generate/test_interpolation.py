"""Frames between two images: the noise and the conditions against their closed forms in fp64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.generate.facts import check
from fastdiff.generate.interpolation import noise_between
from fastdiff.generate.job import ClassJob, InterpolationJob, Job, SampleSettings, frames_of
from fastdiff.generate.model import with_generate
from fastdiff.generate.recipe import from_json, to_json
from fastdiff.generate.session import Session
from fastdiff.generate.slerp import slerp
from fastdiff.models.text import encode_prompt
from tests.support import drawing
from tests.support.diffusers_models import checkpoint, components
from tests.support.tiny import tiny_model

SETTINGS = SampleSettings(steps=3, sampler="ddim", guidance_scale=2.0)


@pytest.fixture(scope="module")
def model() -> Model:
    wide = tiny_model(stored_hash="ab" * 32, path=Path("t"))
    for module in wide.modules.values():
        module.double()
    return wide


def draw(model: Model, *jobs: Job) -> Tensor:
    return drawing.images(model, jobs)


@pytest.mark.parametrize("angle", [0.3, math.pi / 2, 3.0])
def test_slerp_is_a_rotation(angle: float) -> None:
    """b = cos(angle) a + sin(angle) n, n at right angles to a: the mix turns a by s * angle."""
    generator = torch.Generator().manual_seed(0)
    a, n = (torch.randn(3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    n -= a * (n * a).sum() / (a * a).sum()
    n *= a.norm() / n.norm()
    b = math.cos(angle) * a + math.sin(angle) * n
    for share in (0.125, 0.5, 0.9):
        turned = math.cos(share * angle) * a + math.sin(share * angle) * n
        torch.testing.assert_close(slerp(a, b, share), turned, rtol=1e-12, atol=1e-12)


def test_the_noise_of_a_frame(model: Model) -> None:
    session = Session.of(model)
    ends = [session.noise(seed, (3, 8, 8)) for seed in (4, 9)]
    u, v = (end.flatten().numpy() for end in ends)
    theta = math.acos(float(u @ v) / math.sqrt(float(u @ u) * float(v @ v)))
    for at in (0.0, 0.25, 0.75, 1.0):
        job = InterpolationJob(label=0, seed=4, to_seed=9, at=at, height=16, width=16)
        noise = noise_between(session, job)
        expected = (math.sin((1 - at) * theta) * u + math.sin(at * theta) * v) / math.sin(theta)
        torch.testing.assert_close(noise.flatten(), torch.tensor(expected), rtol=1e-12, atol=1e-12)
        if at in (0, 1):
            assert torch.equal(noise, ends[int(at)])


def test_the_ends_are_the_two_images(model: Model) -> None:
    """Bit for bit, from one class and seed to another."""
    job = InterpolationJob(label=0, to_label=2, seed=4, to_seed=9, settings=SETTINGS)
    made = draw(model, *frames_of(job, 4))
    ends = draw(
        model,
        ClassJob(label=0, seed=4, settings=SETTINGS),
        ClassJob(label=2, seed=9, settings=SETTINGS),
    )
    assert torch.equal(made[[0, -1]], ends)
    distances = (made - ends[0]).flatten(1).norm(dim=1)
    assert distances.tolist() == sorted(distances.tolist())
    alone = draw(model, frames_of(job, 4)[2])
    assert torch.equal(alone[0], made[2])  # a frame does not depend on the others


def test_a_class_between_two(model: Model) -> None:
    """Equals class 0 of a model whose label embedding has that mixture in row 0."""
    at = 0.25
    frame = InterpolationJob(label=0, to_label=2, seed=4, at=at, settings=SETTINGS)
    other = copy.deepcopy(model)
    table: Any = other.denoiser.label_embed.weight  # type: ignore[union-attr]
    table.data[0] = (1 - at) * table.data[0] + at * table.data[2]
    expected = draw(other, ClassJob(label=0, seed=4, settings=SETTINGS))
    torch.testing.assert_close(draw(model, frame), expected, rtol=0, atol=1e-10)
    ends = draw(model, *(ClassJob(label=n, seed=4, settings=SETTINGS) for n in (0, 2)))
    assert all(float((expected[0] - end).abs().max()) > 1e-3 for end in ends)


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_a_prompt_between_two(kind: str, tmp_path: Path) -> None:
    """Tokens and pooled text on the straight line; sizes and the negative prompt as they are."""
    session = Session.of(checkpoint(kind, components(kind, tmp_path)))
    long = "a photo of a red cat " * 20  # two chunks: the short prompt is padded to as many
    job = InterpolationJob(prompt="a cat", to_prompt=long, at=0.25, settings=SETTINGS)
    checked: Any = check(job, session.facts)
    mixed, negative = session.conditions.of(checked, (64, 64), guided=True)
    first, last = (
        encode_prompt(session.model.text_encoders, prompt, chunks=2) for prompt in ("a cat", long)
    )
    assert mixed.context is not None
    expected = 0.75 * first.tokens + 0.25 * last.tokens
    torch.testing.assert_close(mixed.context, expected.to(mixed.context), rtol=1e-5, atol=1e-5)
    assert negative is not None
    assert negative.tokens == mixed.tokens == first.tokens.shape[1]
    if kind == "xl":
        assert first.pooled is not None
        assert last.pooled is not None
        pooled = 0.75 * first.pooled + 0.25 * last.pooled
        assert mixed.added is not None
        assert negative.added is not None
        width = pooled.shape[1]
        torch.testing.assert_close(mixed.added[:, :width], pooled, rtol=1e-5, atol=1e-5)
        sizes = mixed.added[:, width:], negative.added[:, width:]
        torch.testing.assert_close(*sizes, rtol=0, atol=1e-6)


def test_one_call_makes_the_frames(model: Model) -> None:
    model = with_generate(model)
    call: dict[str, Any] = {"steps": 3, "sampler": "ddim", "guidance_scale": 2.0}
    made = model.generate(classes="one", seeds=[4, 5], to_label=2, to_seed=7, frames=3, **call)
    jobs = [
        frame
        for seed in (4, 5)
        for frame in frames_of(
            InterpolationJob(label=1, to_label=2, seed=seed, to_seed=7, settings=SETTINGS), 3
        )
    ]
    assert [result.job.at for result in made] == [0, 0.5, 1, 0, 0.5, 1]
    assert torch.equal(made.tensor, draw(model, *jobs))
    call |= {"to_label": 2, "to_seed": 7, "frames": 1, "at": 0.5}
    (single,) = model.generate(classes="one", seeds=4, **call)
    assert torch.equal(single.image, made[1].image)
    again = from_json(to_json(single.job))
    assert again == single.job
    for options, message in (
        ({"frames": 3}, "needs a second image; give one or more of to_seed"),
        ({"frames": 0, "to_seed": 1}, "frames must be at least 1, got 0"),
        ({"frames": 3, "to_seed": 1, "at": 0.5}, "got 0.5 and 3 frames; leave one of them out"),
        ({"frames": 1, "to_seed": 1, "at": 1.5}, r"at must be in \[0, 1\], got 1.5"),
        ({"frames": 3, "to_label": 4}, "class must be from 0 to 3, got 4"),
        ({"frames": 3, "to_prompt": "a cat"}, "does not read text, got prompt 'a cat'"),
        ({"to_seed": 1}, "to_seed needs frames, the number of images to make"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(classes=0, **options)
