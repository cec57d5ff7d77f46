"""A row becomes the job that Python would make; columns without a meaning are named."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastdiff.generate.facts import Facts, check
from fastdiff.generate.job import (
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    Job,
    SampleSettings,
    UpscaleJob,
)
from fastdiff.generate.recipe import to_json
from fastdiff.images import save_png
from fastdiff.jobs.fields import Builder, Columns, field_types, from_words
from fastdiff.jobs.rows import Row
from tests.support.tiny import tiny_model

FACTS = Facts.of(tiny_model())
PHOTO = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def job_of(
    values: dict[str, Any],
    *,
    columns: dict[str, str] | None = None,
    defaults: dict[str, Any] | None = None,
    words: bool = False,
    folder: Path = Path(),
    number: int = 3,
) -> Job:
    build = Builder(Columns(columns or {}, ()), defaults or {}, FACTS, seed=40, folder=folder)
    return build(Row(number, values, None, words))


def settings(**values: Any) -> SampleSettings:
    return SampleSettings(**values)


CASES: list[tuple[dict[str, Any], dict[str, Any], Job]] = [
    ({}, {}, ClassJob(seed=43)),
    ({"label": "two", "seed": 7}, {}, ClassJob(label=2, seed=7)),
    ({"label": 1, "steps": 5}, {"steps": 9, "sampler": "ddim"},
     ClassJob(label=1, seed=43, settings=settings(steps=5, sampler="ddim"))),
    ({"label": 1, "steps": None}, {"steps": 9},
     ClassJob(label=1, seed=43, settings=settings(steps=9))),
    ({"settings": {"steps": 4, "eta": 0}}, {"sampler": "ddim"},
     ClassJob(seed=43, settings=settings(steps=4, eta=0.0, sampler="ddim"))),
    ({"to_seed": 5, "at": 0.5}, {}, InterpolationJob(seed=43, to_seed=5, at=0.5)),
    ({"variation_seed": 5, "variation": 0.5}, {},
     ClassJob(seed=43, variation_seed=5, variation=0.5)),
    ({"guidance_interval": [1, 3], "guidance_scale": 2}, {},
     ClassJob(seed=43, settings=settings(guidance_interval=(1, 3), guidance_scale=2.0))),
]  # fmt: skip


@pytest.mark.parametrize(("values", "defaults", "expected"), CASES)
def test_a_row_is_the_job_of_its_values(
    values: dict[str, Any], defaults: dict[str, Any], expected: Job
) -> None:
    assert job_of(values, defaults=defaults) == check(expected, FACTS)


def test_words_of_csv_become_values() -> None:
    words = {
        "label": "2",
        "steps": " 12 ",
        "eta": "5e-1",
        "sampler": "ddim",
        "guidance_interval": "1 4",
        "seed": "9",
        "width": "",
    }
    wanted = settings(steps=12, eta=0.5, sampler="ddim", guidance_interval=(1, 4))
    expected = check(ClassJob(label=2, seed=9, settings=wanted), FACTS)
    assert job_of(words, words=True) == expected


def test_pictures_are_files_beside_the_rows_or_bytes(tmp_path: Path) -> None:
    save_png(tmp_path / "p.png", PHOTO)
    save_png(tmp_path / "m.png", PHOTO)
    data = (tmp_path / "p.png").read_bytes()
    whole = {"folder": tmp_path}
    image = job_of({"image": "p.png", "strength": 0.5}, **whole)
    wanted = ImageToImageJob(image=str(tmp_path / "p.png"), strength=0.5, seed=43)
    assert image == check(wanted, FACTS)
    enlarged = job_of({"image": "p.png", "scale": 2.0}, **whole)
    assert enlarged == check(UpscaleJob(image=str(tmp_path / "p.png"), seed=43), FACTS)
    masked = job_of({"image": "p.png", "mask": "m.png"}, **whole)
    assert isinstance(masked, InpaintJob)
    for value in (data, {"bytes": data, "path": None}):
        made: Any = job_of({"png": value}, columns={"image": "png"})
        pixels = torch.tensor(bytearray(Image.open(io.BytesIO(data)).tobytes()))
        assert torch.equal(made.image, pixels.reshape(1, 16, 16) / 127.5 - 1)
        assert replace(made, image="x") == check(ImageToImageJob(image="x", seed=43), FACTS)


def test_a_job_in_the_form_of_a_recipe_is_a_row() -> None:
    wanted = ClassJob(label=3, seed=5, settings=settings(steps=7, sampler="euler", eta=0.5))
    assert job_of(to_json(wanted)) == check(wanted, FACTS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"captoin": "a"},
            r"unknown column 'captoin'; map it to a field \(--column FIELD=captoin\)",
        ),
        ({"batch": 4}, "unknown column 'batch'"),
        ({"label": "nine"}, "unknown class 'nine'; expected one of zero, one, two, three"),
        ({"label": 4}, "class must be from 0 to 3, got 4"),
        ({"label": True}, "label must be a whole number or text or None, got True"),
        ({"steps": "20"}, "settings.steps: expected int, got '20'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"sampler": "ddmi"}, "unknown sampler 'ddmi'"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**64}, "seed must be a whole number from 0"),
        ({"seed": 1.5}, "expected int, got 1.5"),
        ({"height": 17}, "must be positive multiples of"),
        ({"guidance_scale": "high"}, "expected float, got 'high'"),
        ({"prompt": "a cat"}, "does not read text"),
        ({"kind": "movie"}, "unknown kind of job 'movie'"),
        ({"kind": "class", "strength": 0.5}, "strength: unknown field"),
        ({"image": "none.png"}, "image: no image at .*none.png"),
        ({"image": 5}, "image must be a path or the bytes of a file, got 5"),
        ({"image": b"no picture"}, "image: the picture cannot be read: not an image"),
        ({"settings": 5}, "settings must be an object, got 5"),
        ({"strength": 2.0, "image": b"x"}, "strength must be in"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        job_of(values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "1.5", "steps must be a whole number, got '1.5'"),
        ("eta", "much", "eta must be a number, got 'much'"),
        ("emphasis", "yes", "emphasis must be true or false, got 'yes'"),
        ("crop", "3", "crop must be two whole numbers, got '3'"),
        ("seed", "x", "seed must be a whole number, got 'x'"),
    ],
)
def test_wrong_words_are_named(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_words(name, text)


def test_every_field_can_be_given_as_words() -> None:
    """Of each type there is some text that is accepted."""
    texts = ("true", "1", "0.5", "8 8", "crop", "latent")
    for name in field_types():
        values = []
        for text in texts:
            try:
                values.append(from_words(name, text))
            except ValueError:
                continue
        assert values, name


@pytest.mark.parametrize(
    ("columns", "ignored", "there", "message"),
    [
        ({"label": "digit"}, (), ["digit", "name"], "unknown column 'name'"),
        ({"label": "digit"}, (), ["number"], "unknown column 'number'"),
        ({"label": "digit"}, (), ["seed"], "no column 'digit' for label; expected one of seed"),
        ({"label": "digit"}, (), ["digit", "label"], "since label is read from 'digit'"),
        ({"lable": "digit"}, (), ["digit"], "unknown field 'lable'"),
        ({"label": "digit"}, ("digit",), ["digit"], "both used and ignored"),
    ],
)
def test_columns_without_a_meaning_are_named(
    columns: dict[str, str], ignored: tuple[str, ...], there: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Columns(columns, ignored).check(there, FACTS)


def test_columns_with_a_meaning() -> None:
    columns = Columns({"label": "digit", "seed": "digit"}, ("id",))
    columns.check(["digit", "id", "steps", "negative"], FACTS)
    assert columns.fields("digit", FACTS) == ["label", "seed"]
    assert columns.fields("id", FACTS) == []
    assert Columns({}, ()).fields("line", FACTS) == ["label"]
    assert Columns({}, ()).fields("cls", FACTS) == ["label"]


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"stepps": 5}, "unknown field 'stepps'"),
        ({"steps": "many"}, "steps: expected int, got 'many'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"settings": {"steppps": 5}}, "steppps: unknown field"),
        ({"kind": "class", "strength": 0.5}, "a class job has no field 'strength'"),
    ],
)
def test_wrong_defaults_are_refused_at_once(defaults: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Builder(Columns({}, ()), defaults, FACTS, seed=0, folder=Path())
