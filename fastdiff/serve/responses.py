"""Images as bytes, and what is written around them: JSON, and server-sent events."""

from __future__ import annotations

import base64
import io
import time
from typing import Any

from torch import Tensor

from fastdiff.generate.run import Result
from fastdiff.generate.webui import to_parameters
from fastdiff.images import png_info, to_pil
from fastdiff.serve.errors import ApiError, to_json
from fastdiff.serve.schema import Wanted
from fastdiff.serve.worker import Made


def encoded(image: Tensor, wanted: Wanted, recipe: dict[str, Any] | None = None) -> str:
    """An image in the format that a request wants, in base64.

    image: (1 or 3, H, W) in [-1, 1]. recipe: written into a PNG.
    """
    stream, picture = io.BytesIO(), to_pil(image)
    if wanted.format == "png":
        info = None if recipe is None else png_info(recipe, to_parameters(recipe))
        picture.save(stream, format="PNG", pnginfo=info)
    else:
        picture.save(stream, format=wanted.format.upper(), quality=wanted.quality)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def finished(result: Result | Made, wanted: Wanted, served: str) -> str:
    """A finished image; its recipe names the model as it is served, not by its path."""
    recipe = {**result.recipe, "model": served} if wanted.format == "png" else None
    return encoded(result.image, wanted, recipe)


def about(wanted: Wanted, height: int, width: int) -> dict[str, Any]:
    """The fields that answers and events share."""
    return {
        "size": f"{width}x{height}",
        "background": "opaque",
        "output_format": wanted.format,
    }


def answer(wanted: Wanted, images: list[str], size: tuple[int, int]) -> bytes:
    """The body of an answer: OpenAI's, and the seed of each image."""
    data = [
        {"b64_json": image, "seed": job.seed}
        for image, job in zip(images, wanted.jobs, strict=True)
    ]
    return to_json({"created": int(time.time()), "data": data, **about(wanted, *size)})


def event(kind: str, fields: dict[str, Any]) -> bytes:
    """A server-sent event named like its type, as OpenAI's API sends them."""
    data = to_json({"type": kind, "created_at": int(time.time()), **fields})
    return b"event: " + kind.encode("ascii") + b"\ndata: " + data + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that fails after it has begun."""
    return b"event: error\ndata: " + to_json({"type": "error", **error.body}) + b"\n\n"
