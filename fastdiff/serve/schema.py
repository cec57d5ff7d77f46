"""The fields of a request's body, and the jobs that they make.

A field that is unknown, or that OpenAI has and this server does not support, is an error: nothing
is ignored. Types are checked here, as `fastdiff.configs` does for all configs; values are checked
where jobs are (`fastdiff.generate.job`, `facts.check`), and against the server's limits.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

from fastdiff.configs import from_dict
from fastdiff.generate.facts import Facts, check
from fastdiff.generate.job import (
    MAX_SEED,
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    Job,
    SampleSettings,
    TextJob,
    TextSettings,
)
from fastdiff.serve.errors import ApiError, in_our_words, wrong
from fastdiff.serve.limits import Limits

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["png", "webp", "jpeg"]
Priority = Literal["low", "normal", "high"]
PRIORITIES: dict[Priority, float] = {"low": 0.25, "normal": 1.0, "high": 4.0}
"""Priority -> weight in the queue, from the lowest."""
MOST_PARTIALS = 3
RANDOM_SEED_BITS = 53
"""Seeds that the server draws survive JavaScript's numbers."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The body of POST /v1/images/generations; null means the default."""

    prompt: str | None = None
    """What the image should show. For a model of classes the name or number of one; empty: no
    class."""
    classes: tuple[str | int, ...] | None = None
    """In place of a prompt, for a model of classes: one for all images, or one per image."""
    model: str | None = None
    """The model that the server serves, by the name that /v1/models lists."""
    n: int | None = None
    """Number of images; default: one, or one per class."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, or auto: the size that the model was trained at."""
    negative_prompt: str | None = None
    """What to guide away from."""
    num_inference_steps: int | None = None
    """Steps from noise to image."""
    guidance_scale: float | None = None
    """Up to 1: no guidance; larger: closer to the prompt or class."""
    seed: int | None = None
    """Seed of the first image; the others count up. Default: drawn at random; answers name it."""
    sampler: str | None = None
    """A sampler that `fastdiff samplers` lists."""
    cache: int | None = None
    """Evaluate the whole U-Net once per this many evaluations; see `SampleSettings.cache`."""
    cache_branch: int | None = None
    """As `SampleSettings.cache_branch`."""
    cache_center: int | None = None
    """As `SampleSettings.cache_center`."""
    cache_power: float | None = None
    """As `SampleSettings.cache_power`."""
    response_format: str | None = None
    """b64_json, the only one."""
    output_format: Format | None = None
    """png (with the image's recipe), webp or jpeg."""
    output_compression: int | None = None
    """Quality of webp and jpeg, 0 to 100, the default."""
    stream: bool | None = None
    """Answer with server-sent events; for one image."""
    partial_images: int | None = None
    """With stream: 0 to 3 estimates of the unfinished image."""
    priority: Priority | None = None
    """low, normal (the default) or high: the share of the slots while others wait too."""
    quality: Literal["auto"] | None = None
    """auto; num_inference_steps decides."""
    background: Literal["auto", "opaque"] | None = None
    """auto or opaque: images have no transparency."""


@dataclass(frozen=True, kw_only=True)
class Edit(Generation):
    """The fields of POST /v1/images/edits besides the files image and mask."""

    strength: float | None = None
    """Fraction of the steps that are taken: 0 keeps the image, 1 makes a new one. Default: 0.75, or
    1 with a mask."""


UNSUPPORTED = {
    "style": "prompts describe the style",
    "user": "this server keeps no record of users",
    "safety_identifier": "this server keeps no record of users",
    "moderation": "this server does not moderate",
    "input_fidelity": "strength decides how much of the image is kept",
}
"""OpenAI's fields that would have to be ignored, and why they are refused."""
CACHING = ("cache", "cache_branch", "cache_center", "cache_power")
Body = TypeVar("Body", bound=Generation)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A request that has been checked."""

    jobs: Sequence[Job]
    """Checked jobs, one per image."""
    format: Format
    quality: int
    """Of webp and jpeg."""
    stream: bool
    partials: int
    priority: Priority


def read_json(text: bytes) -> dict[str, Any]:
    """A body as an object.

    Raises:
        ApiError: it is not a JSON object, or names a field twice.
    """

    def refuse(name: str) -> None:
        raise ValueError(name)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise wrong("a field of the body occurs twice; send it once", code="invalid_json")
        return made

    try:
        body = json.loads(text.decode(), parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise wrong("the body is not valid JSON in UTF-8", code="invalid_json") from None
    if not isinstance(body, dict):
        raise wrong("the body must be a JSON object with a prompt", code="invalid_json")
    return body


def read_fields(form: Mapping[str, str], cls: type[Body]) -> dict[str, Any]:
    """The fields of a multipart form as the values that JSON would have.

    Raises:
        ApiError: a value is not a number although its field is.
    """
    hints = get_type_hints(cls)
    return {name: _value(name, text, get_args(hints.get(name))) for name, text in form.items()}


def _value(name: str, text: str, kinds: tuple[Any, ...]) -> Any:
    if bool in kinds:
        return {"true": True, "false": False}.get(text, text)
    try:
        if int in kinds and re.fullmatch(r"-?\d{1,30}", text):
            return int(text)
        if float in kinds:
            return float(text)
    except ValueError:
        raise wrong(f"{name}: expected a number, got {text!r:.40}", name) from None
    return [text] if name == "classes" else text


def read_body(data: dict[str, Any], cls: type[Body], *, served: str) -> Body:
    """The fields of a body, typed.

    served: the name of the model.

    Raises:
        ApiError: a field is unknown, not supported or of the wrong type, or names another model.
    """
    data = dict(data)
    for name, why in UNSUPPORTED.items():
        if data.pop(name, None) is not None:
            raise wrong(f"{name} is not supported: {why}; leave it out", name, code="unsupported")
    if isinstance(data.get("classes"), str | int) and data["classes"] is not True:
        data["classes"] = [data["classes"]]
    for name, value in data.items():
        if name not in (known := [field.name for field in fields(cls)]):
            message = f"unknown field {name!r:.60}; expected one of {', '.join(known)}"
            raise wrong(message, code="unknown_field")
        if isinstance(value, float) and not -1e308 < value < 1e308:
            raise wrong(f"{name} is not a finite number", name)
    try:
        body = from_dict(cls, data)
    except ValueError as error:
        message = str(error).partition(": ")[2]
        raise wrong(message, re.split(r"[:\[]", message)[0], code="invalid_type") from None
    if body.model not in (None, served):
        raise unknown_model(body.model, served)
    return body


def unknown_model(name: str, served: str) -> ApiError:
    """The error for a model that is not served."""
    message = f"unknown model {name!r:.80}; this server has {served!r}"
    return ApiError(404, message, "model_not_found", "model")


def read_generation(body: Generation, facts: Facts, limits: Limits) -> Wanted:
    """The jobs of a generation.

    Raises:
        ApiError: a field is wrong, too large, or does not fit the model.
    """
    height, width = read_size(body, limits)
    sides = {"height": height, "width": width}
    kind: type[Any] = TextJob if facts.reads_text else ClassJob
    return _wanted(body, facts, limits, kind, sides)


def read_edit(
    body: Edit, facts: Facts, limits: Limits, image: Tensor, mask: Tensor | None
) -> Wanted:
    """The jobs of an edit.

    image: (C, H, W) in [-1, 1]. mask: (1, H, W), 1 where the image is to be replaced, or None.

    Raises:
        ApiError: as for `read_generation`; the picture does not fit the model.
    """
    more: dict[str, Any] = {"image": image}
    if mask is not None:
        more["mask"] = mask
    if body.strength is not None:
        more["strength"] = body.strength
    try:
        facts.check_size(image.shape[1], image.shape[2])
    except ValueError as error:
        raise wrong(f"{in_our_words(str(error))}; resize it with size", "image") from None
    kind: type[Any] = ImageToImageJob if mask is None else InpaintJob
    return _wanted(body, facts, limits, kind, more)


def read_size(body: Generation, limits: Limits) -> tuple[int | None, int | None]:
    """Height and width; None: those of the model, or of the picture.

    Raises:
        ApiError: `size` is not WIDTHxHEIGHT, or has too many pixels.
    """
    if body.size in (None, "auto"):
        return None, None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", body.size or "", re.ASCII)
    if found is None:
        raise wrong(f"size must be auto or WIDTHxHEIGHT, got {body.size!r:.40}", "size")
    width, height = int(found[1]), int(found[2])
    _check_pixels(height, width, limits)
    return height, width


def _check_pixels(height: int, width: int, limits: Limits) -> None:
    if not 0 < height * width <= limits.pixels:
        raise wrong(
            f"an image may have 1 to {limits.pixels} pixels, got {width} x {height}; use a smaller "
            "size",
            "size",
        )


def _wanted(
    body: Generation, facts: Facts, limits: Limits, kind: type[Any], more: dict[str, Any]
) -> Wanted:
    conditions = _conditions(body, facts, limits)
    count = _count(body, len(conditions), limits)
    chosen: Format = body.output_format or "png"
    first = secrets.randbits(RANDOM_SEED_BITS) if body.seed is None else body.seed
    if not 0 <= first <= MAX_SEED + 1 - count:
        raise wrong(f"seed must be from 0 to 2**64 - n, got {first}", "seed")
    try:
        caching = {name: getattr(body, name) for name in CACHING}
        settings = SampleSettings(
            sampler=body.sampler,
            steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            **{name: value for name, value in caching.items() if value is not None},
        )
        if facts.reads_text:
            more = {**more, "text": TextSettings(negative=body.negative_prompt)}
        elif body.negative_prompt is not None:
            raise wrong("this model reads no text; leave negative_prompt out", "negative_prompt")
        jobs = [
            check(kind(**more, **own, seed=first + index, settings=settings), facts)
            for index, own in enumerate(conditions * (count // len(conditions)))
        ]
    except ValueError as error:
        message = in_our_words(str(error))
        word = re.split(r"\W", message)[0]
        known = word in {field.name for field in fields(body)}
        raise wrong(message, word if known else None) from None
    if jobs[0].settings.total > limits.steps:
        message = f"at most {limits.steps} steps are allowed, got {jobs[0].settings.total}"
        raise wrong(f"{message}; set num_inference_steps", "num_inference_steps")
    if isinstance(jobs[0], ClassJob | TextJob):
        _check_pixels(jobs[0].height or 0, jobs[0].width or 0, limits)
    return Wanted(
        jobs=jobs,
        format=chosen,
        quality=_quality(body, chosen),
        stream=bool(body.stream),
        partials=_partials(body, count),
        priority=body.priority or "normal",
    )


def _conditions(body: Generation, facts: Facts, limits: Limits) -> list[dict[str, Any]]:
    """What the images show: one for all of them, or one each, as fields of jobs."""
    for name in ("prompt", "negative_prompt"):
        if len(getattr(body, name) or "") > limits.prompt:
            raise wrong(f"{name} may have {limits.prompt} characters", name, code="too_long")
    if facts.reads_text:
        if body.classes is not None:
            raise wrong("this model has no classes; leave classes out", "classes")
        if body.prompt is None:
            raise wrong("prompt is missing", "prompt", code="missing")
        return [{"prompt": body.prompt}]
    if facts.label_classes is None:
        if body.prompt or body.classes is not None:
            name = "prompt" if body.prompt else "classes"
            raise wrong("this model reads no text and has no classes; leave it out", name)
        return [{}]
    if body.prompt and body.classes is not None:
        raise wrong("prompt and classes both name a class; leave one of them out", "classes")
    if body.classes is not None and not body.classes:
        raise wrong("classes is empty; name one for all images, or one per image", "classes")
    return [{"label": label} for label in (body.classes or [body.prompt or None])]


def _count(body: Generation, conditions: int, limits: Limits) -> int:
    count = conditions if body.n is None else body.n
    if not 1 <= count <= limits.images:
        raise wrong(f"a request may ask for 1 to {limits.images} images, got {count}", "n")
    if count % conditions or conditions not in (1, count):
        raise wrong(
            f"classes must be one for all images or one per image, got {conditions} classes and "
            f"n={count}",
            "classes",
        )
    return count


def _quality(body: Generation, chosen: Format) -> int:
    quality = body.output_compression
    if quality is not None and chosen == "png":
        raise wrong(
            "output_compression is for webp and jpeg, and png has no loss; leave it out",
            "output_compression",
        )
    if quality is not None and not 0 <= quality <= 100:
        raise wrong(
            f"output_compression must be from 0 to 100, got {quality}", "output_compression"
        )
    if body.response_format not in (None, "b64_json"):
        url = body.response_format == "url"
        why = "this server keeps no images that a URL could name" if url else "it is unknown"
        raise wrong(
            f"response_format {body.response_format!r:.40} is not supported: {why}; use b64_json",
            "response_format",
            code="unsupported",
        )
    return 100 if quality is None else quality


def _partials(body: Generation, count: int) -> int:
    if not body.stream:
        if body.partial_images:
            raise wrong("partial_images needs stream=true", "partial_images")
        return 0
    if count > 1:
        raise wrong("a stream is for one image, since its events name none; set n=1", "n")
    partials = body.partial_images or 0
    if not 0 <= partials <= MOST_PARTIALS:
        raise wrong(
            f"partial_images must be from 0 to {MOST_PARTIALS}, got {partials}", "partial_images"
        )
    return partials
