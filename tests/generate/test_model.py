"""`fastdiff.load(...).generate(...)`: one call for the common case, and what the package shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.generate.job import ClassJob, ImageToImageJob, InpaintJob, Job, UpscaleJob
from fastdiff.generate.model import Model, with_generate
from fastdiff.images import save_png
from tests.support.drawing import images
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return with_generate(tiny_model())


def grey(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def same(model: Model, made: Any, jobs: list[Job]) -> None:
    assert torch.equal(made.tensor, images(model, jobs))


def test_one_call_makes_the_jobs(model: Model, tmp_path: Path) -> None:
    settings = {"settings": fastdiff.generate.job.SampleSettings(steps=3, sampler="ddim")}
    call: dict[str, Any] = {"steps": 3, "sampler": "ddim"}
    made = model.generate(classes=["one", 3, None], seeds=[4, 5, 6], **call)
    jobs: list[Job] = [
        ClassJob(label=label, seed=seed, **settings) for label, seed in ((1, 4), (3, 5), (None, 6))
    ]
    same(model, made, jobs)
    assert made[0].pil.size == (16, 16)
    assert made[0].pil.mode == "L"
    assert [image.size for image in made.pil] == [(16, 16)] * 3
    assert len(made[1:]) == 2
    same(model, model.generate(classes=[0, 1], **call), [
        ClassJob(label=0, seed=0, **settings), ClassJob(label=1, seed=1, **settings),
    ])  # fmt: skip
    image, mask = grey(), torch.ones(16, 16)
    same(model, model.generate(classes=2, image=image, strength=0.5, **call), [
        ImageToImageJob(image=image, label=2, strength=0.5, **settings),
    ])  # fmt: skip
    same(model, model.generate(classes=2, image=image, mask=mask, **call), [
        InpaintJob(image=image, mask=mask, label=2, **settings),
    ])  # fmt: skip
    same(model, model.generate(classes=2, image=image, scale=1.5, **call), [
        UpscaleJob(image=image, label=2, scale=1.5, **settings),
    ])  # fmt: skip
    both = torch.stack([image, grey(1)])
    made = model.generate(classes=2, image=both, seeds=[0, 1], **call)
    assert not torch.equal(made[0].image, made[1].image)
    save_png(tmp_path / "a.png", image)
    from_file = model.generate(classes=2, image=tmp_path / "a.png", **call).tensor
    assert (from_file - made[0].image).abs().max() < 0.1  # rounded to bytes


def test_edits_of_a_model_of_classes(model: Model) -> None:
    """Strength 0 is the autoencoder's reconstruction; outside the mask pixels stay."""
    image, mask = grey(), torch.zeros(16, 16)
    mask[4:10, 4:10] = 1
    assert model.autoencoder is not None
    back = model.autoencoder.decode(model.autoencoder.encode_latent(image[None])).clamp(-1, 1)
    none = model.generate(classes=1, image=image, strength=0).tensor
    torch.testing.assert_close(none, back, rtol=1e-5, atol=1e-5)
    painted = model.generate(classes=1, image=image, mask=mask, steps=3).tensor[0]
    assert torch.equal(painted[:, mask == 0], image[:, mask == 0])
    assert (painted != image)[:, mask == 1].float().mean() > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seeds": []}, "at least one seed, got none"),
        ({"seeds": [-1]}, "a seed must be a whole number from 0"),
        ({"seeds": [1.5]}, "a seed must be a whole number from 0"),
        ({"classes": [1, 2], "seeds": [1]}, "got 2 classes and 1 seeds"),
        ({"classes": "five"}, "unknown class 'five'; expected one of zero, one"),
        ({"stepz": 3}, "unknown option 'stepz'; expected one of label, image, seed"),
        ({"prompts": "a cat"}, "does not read text, got prompt 'a cat'"),
        (
            {"image": torch.zeros(2, 1, 16, 16), "seeds": 1},
            "image must be one for all images or one per seed, got 2",
        ),
        ({"image": torch.zeros(1, 15, 16)}, "multiples of 2, got 16 x 15"),
        ({"image": torch.zeros(1, 16, 16), "height": 8}, "height and width resize files"),
        ({"scale": 2.0}, "unknown option 'scale'"),
    ],
)
def test_calls_that_do_not_fit(model: Model, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**call)


def test_what_load_gives_saves_and_generates(tmp_path: Path) -> None:
    save_bundle(tiny_model(), tmp_path / "tiny")
    model = fastdiff.load(tmp_path / "tiny")
    made = model.generate(classes=1, steps=2)
    save_bundle(model, tmp_path / "again")  # after its networks were prepared
    again = fastdiff.load(tmp_path / "again")
    assert again.weights_hash == model.weights_hash
    assert torch.equal(again.generate(classes=1, steps=2).tensor, made.tensor)
    assert len(str(model).splitlines()) <= 10


def test_a_change_of_the_model_is_seen(model: Model) -> None:
    """Caches kept between calls are dropped when fields of the model change."""
    first = model.generate(classes=1, steps=2, guidance_scale=1).tensor
    model.prediction = "v"
    assert not torch.equal(model.generate(classes=1, steps=2, guidance_scale=1).tensor, first)
    model.prediction = "eps"
    assert torch.equal(model.generate(classes=1, steps=2, guidance_scale=1).tensor, first)


def test_the_package_shows_what_is_public() -> None:
    assert set(fastdiff.__all__) <= set(dir(fastdiff))
    for name in fastdiff.__all__:
        assert callable(getattr(fastdiff, name)) or name == "kernels"
    with pytest.raises(AttributeError, match="no attribute 'acelerate'"):
        fastdiff.acelerate  # type: ignore[attr-defined]  # noqa: B018
    code = """
import sys, fastdiff
assert "torch" not in sys.modules
assert fastdiff.kernels.explain and callable(fastdiff.generate)
import fastdiff.generate.job
assert callable(fastdiff.generate)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
