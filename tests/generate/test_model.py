"""`fastdiff.load(...).generate(...)`: one call for the common case, and what the package shows."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.generate.job import ClassJob, ImageToImageJob, InpaintJob, Job, UpscaleJob
from fastdiff.generate.model import Model, with_generate
from fastdiff.generate.session import Session
from fastdiff.images import read_image, save_png
from tests.support.drawing import images
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return with_generate(tiny_model())


def grey(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def same(model: Model, made: Any, jobs: list[Job]) -> None:
    assert torch.equal(made.tensor, images(model, jobs))


def test_pictures_in_memory_are_taken_as_they_are(model: Model, tmp_path: Path) -> None:
    """Pillow images of any mode as if they had been saved, results as their pixels, lists as one
    per seed."""
    call: dict[str, Any] = {"classes": 2, "steps": 2, "strength": 0.5}
    sized: dict[str, Any] = {**call, "height": 16, "width": 24}
    colours = np.random.default_rng(0).integers(0, 256, (20, 28, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        found = model.generate(image=picture, **sized)
    assert torch.equal(found.tensor, model.generate(image=tmp_path / "a.png", **sized).tensor)
    made = model.generate(classes=[0, 1], steps=2)
    again = model.generate(image=made, seeds=[0, 1], **call)
    assert torch.equal(again.tensor, model.generate(image=made.tensor, seeds=[0, 1], **call).tensor)
    one = model.generate(image=made[1], seeds=[1], **call)
    assert torch.equal(one.tensor[0], again.tensor[1])
    mask = Image.fromarray(np.pad(np.full((8, 16), 255, np.uint8), ((0, 8), (0, 0))))
    painted = model.generate(image=made.pil[0], mask=mask, classes=2, steps=2).tensor[0]
    assert torch.equal(painted[:, 8:], to_tensor(made.pil[0])[:, 8:])
    assert not torch.equal(painted[:, :8], to_tensor(made.pil[0])[:, :8])
    assert repr(made) == "Images(2 of 16 x 16; .tensor, .pil, [0].save(path))"


def test_log_probs_of_images(model: Model) -> None:
    """One per row, 0 for the last of ddpm, with the bits that each image has alone."""
    call: dict[str, Any] = {"sampler": "ddpm", "steps": 3}
    made = model.generate(classes=[1, 2], log_probs=True, **call)
    kept = [result.log_probs for result in made]
    assert [row.ne(0).tolist() for row in kept] == [[True, True, False]] * 2
    alone = model.generate(classes=2, seeds=1, log_probs=True, **call)
    assert torch.equal(alone[0].log_probs, kept[1])
    plain = model.generate(classes=[1, 2], **call)
    assert torch.equal(plain.tensor, made.tensor)
    assert plain[0].log_probs is None


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, np.float32))[None] / 255 * 2 - 1


def test_a_result_is_a_mask_as_its_picture_is(model: Model) -> None:
    """Grey levels decide, white from the middle on."""
    made = model.generate(classes=3, steps=2)
    call: dict[str, Any] = {"classes": 2, "steps": 2, "image": grey()}
    expected = model.generate(mask=made.pil[0], **call)
    assert torch.equal(model.generate(mask=made[0], **call).tensor, expected.tensor)


def test_other_pictures_are_refused(model: Model) -> None:
    pixels = np.zeros((16, 16), np.float32)
    for kind in (ImageToImageJob, UpscaleJob):
        with pytest.raises(ValueError, match="image must be a file or a tensor, got ndarray; "):
            kind(image=pixels, label=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask must be a file or a tensor, got int"):
        InpaintJob(image=grey(), mask=3, label=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image must be a file or a tensor, got Image; fastdiff"):
        ImageToImageJob(image=Image.new("L", (16, 16)), label=1)  # type: ignore[arg-type]
    read = read_image(Image.new("L", (16, 16), 255))  # what the message advises
    assert torch.equal(read, torch.ones(3, 16, 16))
    with pytest.raises(ValueError, match="image must be a file or a tensor, got NoneType"):
        ImageToImageJob(image=None, label=1)  # type: ignore[arg-type]
    for wrong in (None, pixels):
        with pytest.raises(ValueError, match="expected an image file or a Pillow image, got "):
            read_image(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the image has no pixels, got 0 x 5"):
        read_image(Image.new("L", (0, 5)))
    with pytest.raises(ValueError, match="image must be one for all images or one per seed, got 3"):
        model.generate(classes=1, image=[grey()] * 3, seeds=[0, 1])


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
        ({"stepz": 3}, "'stepz'; did you mean steps. Expected one of variation_seed, "),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "20"}, "steps must be a whole number or None, got '20'"),
        ({"steps": 2.5}, "steps must be a whole number or None, got 2.5"),
        ({"steps": True}, "steps must be a whole number or None, got True"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number or None, got '7'"),
        ({"strength": None, "image": grey()}, "strength must be a number, got None"),
        ({"height": 16.0}, "height must be a whole number or None, got 16.0"),
        ({"classes": 1.5}, "label must be a whole number or text or None, got 1.5"),
        ({"classes": []}, "classes is empty; each of them makes one image"),
        ({"seeds": 1.5}, r"a seed must be a whole number from 0 to 2\*\*64 - 1, got 1.5"),
        ({"seeds": []}, "expected at least one seed, got none"),
        ({"mask": grey()}, "mask needs image, the picture to change"),
        ({"guidence_scale": 3}, "'guidence_scale'; did you mean guidance_scale.*? Expected one of"),
        ({"frames": 3, "image": grey()}, "leave image and mask out"),
        ({"guidance_interval": "01"}, r"must be steps \(first, stop\) .* got '01'"),
        ({"guidance_interval": 3}, r"must be steps \(first, stop\) .* got 3"),
        ({"guidance_interval": (0, 1.5)}, r"must be steps \(first, stop\) .* got \(0, 1.5\)"),
        ({"label": 3}, "unknown option 'label'; give classes="),
    ],
    ids=str,
)
def test_wrong_calls_say_what_is_wrong(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**{"classes": 1, **options})


def test_picture_files_that_cannot_be_read(model: Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image at .*nope\.png; give a PNG, JPEG or"):
        model.generate(classes=1, image=tmp_path / "nope.png")
    (tmp_path / "text.png").write_text("not pixels")
    with pytest.raises(ValueError, match=r"text\.png cannot be read: "):
        model.generate(classes=1, image=str(tmp_path / "text.png"))


def test_numbers_of_other_types_that_are_numbers(model: Model) -> None:
    """An int where a float is expected, NumPy's double; the job keeps what it was given."""
    assert ClassJob(settings=fastdiff.SampleSettings(guidance_scale=2)).settings.guidance_scale == 2
    for scale in (np.float64(2), np.float32(2)):
        settings = fastdiff.SampleSettings(guidance_scale=scale, steps=np.int64(3))  # type: ignore[arg-type]
        assert type(settings.steps) is int
        assert json.loads(json.dumps(asdict(settings)))["guidance_scale"] == 2.0
    expected = model.generate(classes=[1, 2], seeds=[3, 4], steps=2).tensor
    for kind in (np.array, torch.tensor):
        made = model.generate(classes=kind([1, 2]), seeds=kind([3, 4]), steps=2)
        assert torch.equal(made.tensor, expected)
    made = model.generate(classes=torch.tensor(1), seeds=torch.tensor(3), steps=2)
    assert torch.equal(made.tensor[0], expected[0])
    with pytest.raises(ValueError, match="crop must be two whole numbers >= 0, got 'ab'"):
        fastdiff.TextSettings(crop="ab")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance_scale must be a number or None, got True"):
        fastdiff.SampleSettings(guidance_scale=True)


def test_a_model_moves_to_another_device(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = with_generate(tiny_model())
    before = moved.generate(classes=1, steps=2).tensor
    session = Session.of(moved)
    assert moved.to("cpu") is moved
    assert Session.of(moved) is not session
    assert torch.equal(moved.generate(classes=1, steps=2).tensor, before)
    moved.to(torch.device("meta"))
    assert {p.device.type for part in moved.modules.values() for p in part.parameters()} == {"meta"}
    assert Session.of(moved).device.type == "meta"
    with pytest.raises(ValueError, match=r"device must be one of torch's, .* got 'gpu'"):
        model.to("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(model: Model, tmp_path: Path) -> None:
    save_bundle(model, tmp_path)
    with pytest.raises(ValueError, match=r"device 'cuda' is not available \(.*\); use 'cpu'"):
        model.to("cuda")
    with pytest.raises(ValueError, match=r"device 'cuda:1' is not available \(.*\); use 'cpu'"):
        fastdiff.load(tmp_path, device="cuda:1")
