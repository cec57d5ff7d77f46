"""The official client works: images, streams, edits, errors; each image is the one made alone."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openai import APIStatusError, OpenAI
from PIL import Image

import fastdiff
from fastdiff.images import RECIPE_KEY
from tests.serve.client import Running, as_pixels, file_of, pixels, running, service_of


@pytest.fixture(scope="module")
def model() -> fastdiff.Model:
    return fastdiff.load("digits")


@pytest.fixture(scope="module")
def server(model: fastdiff.Model) -> Iterator[Running]:
    with running(service_of(model)) as made:
        yield made


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def extra(**fields: Any) -> dict[str, Any]:
    return {"num_inference_steps": 3, **fields}


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["digits"]
    assert client.models.retrieve("digits").owned_by == "fastdiff"


def test_images_are_those_made_alone(client: OpenAI, model: fastdiff.Model) -> None:
    more = extra(seed=7, sampler="euler-ancestral", guidance_scale=2.5)
    made = client.images.generate(prompt="3", n=2, extra_body=more)
    alone = model.generate(
        classes=3, seeds=[7, 8], steps=3, sampler="euler-ancestral", guidance_scale=2.5
    )
    assert made.data is not None
    for got, expected in zip(made.data, alone, strict=True):
        assert np.array_equal(pixels(got.b64_json or ""), as_pixels(expected.image))
    assert [getattr(each, "seed", None) for each in made.data] == [7, 8]
    assert (made.size, made.output_format, made.background) == ("32x32", "png", "opaque")


def test_an_image_with_a_cache_is_the_one_made_alone(client: OpenAI, model: fastdiff.Model) -> None:
    more = extra(seed=7, num_inference_steps=6, cache=3, cache_branch=1)
    made = client.images.generate(prompt="3", extra_body=more)
    alone = model.generate(classes=3, seeds=[7], steps=6, cache=3, cache_branch=1)[0]
    assert made.data is not None
    assert np.array_equal(pixels(made.data[0].b64_json or ""), as_pixels(alone.image))
    plain = model.generate(classes=3, seeds=[7], steps=6)[0]
    assert not np.array_equal(as_pixels(alone.image), as_pixels(plain.image))


def test_a_class_per_image(client: OpenAI, model: fastdiff.Model) -> None:
    made = client.images.generate(prompt="", extra_body=extra(seed=1, classes=[4, "9"]))
    alone = model.generate(classes=[4, 9], seeds=[1, 2], steps=3)
    assert made.data is not None
    for got, expected in zip(made.data, alone, strict=True):
        assert np.array_equal(pixels(got.b64_json or ""), as_pixels(expected.image))


def test_without_a_seed_it_is_drawn_and_told(client: OpenAI, model: fastdiff.Model) -> None:
    seeds = set()
    for _ in range(2):
        made = client.images.generate(prompt="5", extra_body=extra())
        assert made.data is not None
        seed = made.data[0].seed  # type: ignore[attr-defined]
        seeds.add(seed)
        alone = model.generate(classes=5, seeds=[seed], steps=3)
        assert np.array_equal(pixels(made.data[0].b64_json or ""), as_pixels(alone[0].image))
    assert len(seeds) == 2


def test_a_png_has_its_recipe_without_a_path(client: OpenAI) -> None:
    made = client.images.generate(prompt="3", extra_body=extra(seed=2))
    assert made.data is not None
    picture = Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json or "")))
    recipe = json.loads(picture.text[RECIPE_KEY])  # type: ignore[attr-defined]
    assert recipe["model"] == "digits"
    assert recipe["job"]["seed"] == 2
    assert "/" not in json.dumps(recipe)


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_formats_have_the_quality_that_is_asked_for(client: OpenAI, kind: Any) -> None:
    sizes = []
    for quality in (5, 95):
        made = client.images.generate(
            prompt="3", output_format=kind, output_compression=quality, extra_body=extra(seed=2)
        )
        assert made.data is not None
        data = base64.b64decode(made.data[0].b64_json or "")
        assert Image.open(io.BytesIO(data)).format == kind.upper()
        sizes.append(len(data))
    assert sizes[0] < sizes[1]


def test_a_stream_has_its_events_in_order(client: OpenAI, model: fastdiff.Model) -> None:
    more = extra(seed=3, num_inference_steps=8)
    stream = client.images.generate(prompt="7", stream=True, partial_images=3, extra_body=more)
    events: list[Any] = list(stream)
    kinds = ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    seen = [pixels(event.b64_json).astype(float) for event in events]
    alone = model.generate(classes=7, seeds=[3], steps=8)[0]
    assert np.array_equal(seen[-1], as_pixels(alone.image))
    distances = [np.abs(each - seen[-1]).mean() for each in seen[:3]]
    assert distances[0] > distances[2] > 0  # the estimates approach the image


def test_a_partial_image_is_the_estimate_of_its_step(client: OpenAI, model: fastdiff.Model) -> None:
    more = extra(seed=3, num_inference_steps=4)
    stream = client.images.generate(prompt="7", stream=True, partial_images=1, extra_body=more)
    first: Any = next(iter(stream))
    estimates = list[Any]()
    model.generate(
        classes=7, seeds=[3], steps=4, on_step=lambda step: estimates.append(step.denoised.clone())
    )
    from fastdiff.generate.session import Session

    expected = Session.of(model).latents.decode(estimates[1])[0]  # after 2 of 4 steps
    assert np.array_equal(pixels(first.b64_json), as_pixels(expected))


def test_an_edit_is_the_one_made_alone(client: OpenAI, model: fastdiff.Model) -> None:
    picture = as_pixels(model.generate(classes=3, seeds=[1], steps=3)[0].image)
    alpha = np.full((32, 32, 4), 255, np.uint8)
    alpha[8:, :, 3] = 0  # transparent: to be replaced
    made = client.images.edit(
        image=("a.png", file_of(picture)),
        mask=("m.png", file_of(alpha)),
        prompt="8",
        extra_body=extra(seed=4),
    )
    white = Image.fromarray((alpha[:, :, 3] == 0).astype(np.uint8) * 255)
    alone = model.generate(
        classes=8, image=Image.fromarray(picture), mask=white, seeds=[4], steps=3
    )[0]
    assert made.data is not None
    got = pixels(made.data[0].b64_json or "")
    assert np.array_equal(got, as_pixels(alone.image))
    assert np.array_equal(got[:8], picture[:8])


def test_an_edit_without_a_mask_varies_the_image(client: OpenAI, model: fastdiff.Model) -> None:
    picture = as_pixels(model.generate(classes=3, seeds=[1], steps=3)[0].image)
    more = extra(seed=4, strength=0.6, num_inference_steps=5)
    stream = client.images.edit(
        image=[("a.png", file_of(picture))], prompt="3", stream=True, partial_images=1,
        extra_body=more,
    )  # fmt: skip
    events: list[Any] = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    alone = model.generate(
        classes=3, image=Image.fromarray(picture), seeds=[4], steps=5, strength=0.6
    )[0]
    assert np.array_equal(pixels(events[-1].b64_json), as_pixels(alone.image))


def test_a_picture_of_another_size_is_resized(client: OpenAI, model: fastdiff.Model) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 3, (48, 1))
    made = client.images.edit(
        image=("a.jpg", file_of(ramp, "JPEG")), prompt="3", size="32x32",  # type: ignore[call-overload]
        extra_body=extra(seed=4, strength=0),
    )  # fmt: skip
    again = Image.open(io.BytesIO(file_of(ramp, "JPEG")))
    alone = model.generate(
        classes=3, image=again, height=32, width=32, seeds=[4], steps=3, strength=0
    )[0]
    assert np.array_equal(pixels(made.data[0].b64_json), as_pixels(alone.image))


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"prompt": "eleven"}, 400, None, "unknown class 'eleven'"),
    ({"n": 11}, 400, "n", "1 to 10 images, got 11"),
    ({"n": 0}, 400, "n", "got 0"),
    ({"size": "31x32"}, 400, None, "nearest sizes are"),
    ({"size": "big"}, 400, "size", "WIDTHxHEIGHT"),
    ({"size": "8192x8192"}, 400, "size", "pixels"),
    ({"response_format": "url"}, 400, "response_format", "keeps no images"),
    ({"output_compression": 50}, 400, "output_compression", "webp and jpeg"),
    ({"output_format": "webp", "output_compression": 101}, 400, "output_compression", "0 to 100"),
    ({"partial_images": 2}, 400, "partial_images", "stream=true"),
    ({"stream": True, "n": 2}, 400, "n", "one image"),
    ({"stream": True, "partial_images": 4}, 400, "partial_images", "0 to 3"),
    ({"model": "gpt-image-1"}, 404, "model", "unknown model"),
    ({"style": "vivid"}, 400, "style", "not supported"),
    ({"user": "me"}, 400, "user", "not supported"),
    ({"moderation": "low"}, 400, "moderation", "not supported"),
    ({"quality": "hd"}, 400, "quality", "expected one of 'auto'"),
    ({"background": "transparent"}, 400, "background", "'opaque'"),
    ({"extra_body": {"foo": 1}}, 400, None, "unknown field 'foo'"),
    ({"extra_body": {"seed": -1}}, 400, "seed", "from 0"),
    ({"extra_body": {"seed": 2**64}}, 400, "seed", "2**64"),
    ({"extra_body": {"seed": "1"}}, 400, "seed", "expected int"),
    ({"extra_body": {"num_inference_steps": 0}}, 400, "num_inference_steps", "at least 1, got 0"),
    ({"extra_body": {"cache": 1}}, 400, "cache", "at least 2, got 1"),
    ({"extra_body": {"cache": 2, "cache_branch": 9}}, 400, "cache_branch", "from 0 to 3"),
    ({"extra_body": {"cache_power": 2}}, 400, "cache_power", "needs cache_center"),
    ({"extra_body": {"num_inference_steps": 201}}, 400, "num_inference_steps", "at most 200"),
    ({"extra_body": {"sampler": "ddmi"}}, 400, None, "unknown sampler 'ddmi'"),
    ({"extra_body": {"negative_prompt": "x"}}, 400, "negative_prompt", "reads no text"),
    ({"extra_body": {"classes": [1]}}, 400, "classes", "both name a class"),
    ({"prompt": "", "n": 3, "extra_body": {"classes": [1, 2]}}, 400, "classes", "one per image"),
    ({"prompt": "x" * 4001}, 400, "prompt", "4000 characters"),
]


@pytest.mark.parametrize(("fields", "status", "param", "message"), WRONG)
def test_what_is_wrong_is_said(
    client: OpenAI, fields: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    with pytest.raises(APIStatusError) as found:
        client.images.generate(**{"prompt": "3", **fields})
    assert found.value.status_code == status
    error: Any = found.value.body
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_guidance_that_overflows_is_the_clients_mistake(client: OpenAI) -> None:
    with pytest.raises(APIStatusError, match="NaN or infinity") as found:
        client.images.generate(prompt="3", extra_body=extra(guidance_scale=1e38))
    assert found.value.status_code == 400
