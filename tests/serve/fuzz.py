"""Bodies of all kinds, and what the server may answer. ``python -m tests.serve.fuzz 10000`` sends
so many, 32 at a time, and prints how many answers had which status."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import fastdiff
from fastdiff.serve.app import create_app
from tests.serve.client import Answer, ask, file_of, form_of, service_of

ALLOWED = {200, 400, 404, 413, 415, 429}
SECRETS = ("Traceback", "site-packages", "fastdiff/", str(Path.home()), str(Path.cwd()), "0x7f")
AT_ONCE = 32
DECODED = 0.3
"""Share of forms whose files are pictures; each costs a process."""

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 10, 11, 2**31, 2**53, 2**64 - 1, 2**64, -(2**70), 10**400),
    *(0.0, 0.5, 1.0, -0.5, 1e-300, 1e38, 1e308, -1e308, 2.5),
    *("", "3", "7", "eleven", "none", "\u0000", "\ud800", "é" * 50, "x" * 5000, "🙂", "' OR 1=1"),
    *("../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "32x32", "16x16", "0x0"),
    *("99999x99999", "32X32", "auto", "png", "webp", "jpeg", "gif", "b64_json", "url", "opaque"),
    *("euler", "ddim", "ddpm", "heun", "checkpoint", "dpmpp-2m-sde", "digits", "gpt-image-1"),
    *([], [1], ["3", 4], [None], [[1]], {}, {"a": 1}, [1] * 100),
]
NAMES = (
    *("prompt", "classes", "model", "n", "size", "negative_prompt", "num_inference_steps"),
    *("cache", "cache_branch", "cache_center", "cache_power", "priority"),
    *("guidance_scale", "seed", "sampler", "response_format", "output_format"),
    *("output_compression", "stream", "partial_images", "quality", "background", "style", "user"),
    *("strength", "foo", "", "__class__", "image", "mask", "settings", "tile", "batch"),
)


def fields(draw: random.Random) -> dict[str, Any]:
    """A valid body, with up to four fields changed."""
    body: dict[str, Any] = {"prompt": draw.choice("0123456789"), "num_inference_steps": 1}
    for name, values in (
        ("seed", (0, 5, 2**64 - 1)),
        ("sampler", ("euler", "ddim", "heun", "euler-ancestral")),
        ("guidance_scale", (1, 2.5)),
        ("output_format", ("png", "webp", "jpeg")),
        ("stream", (True,)),
        ("size", ("32x32", "auto", "16x16")),
    ):
        if draw.random() < 0.3:
            body[name] = draw.choice(values)
    for _ in range(draw.choice((0, 0, 1, 1, 2, 4))):
        body[draw.choice(NAMES)] = draw.choice(VALUES)
    return body


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Bytes with a part cut off, doubled, replaced or changed."""
    start = draw.randrange(len(data) + 1)
    end = min(start + draw.randrange(40), len(data))
    noise = draw.randbytes(draw.randrange(20))
    return draw.choice(
        (
            data[:start],
            data[:start] + data[end:],
            data[:end] + data[start:],
            data[:start] + noise + data[end:],
            b"[" * 100_000 if draw.random() < 0.02 else noise,
        )
    )


def generation(draw: random.Random) -> tuple[str, bytes, dict[str, str]]:
    body = json.dumps(fields(draw)).encode()
    if draw.random() < 0.25:
        body = damaged(draw, body)
    if draw.random() < 0.02:
        body = b'{"prompt": "3", "seed": %s}' % draw.choice((b"NaN", b"1e999", b"9" * 5000, b"-"))
    kind = "application/json"
    if draw.random() < 0.05:
        kind = draw.choice(("text/plain", "", "application/json; charset=utf-16", "multipart/x"))
    return "/v1/images/generations", body, {"content-type": kind}


def edit(draw: random.Random) -> tuple[str, bytes, dict[str, str]]:
    parts: dict[str, str | bytes] = {}
    for name, value in fields(draw).items():
        parts[name.replace('"', "")] = value if isinstance(value, str) else json.dumps(value)
    parts = {n: v.encode("utf-8", "replace").decode() for n, v in parts.items()}  # type: ignore[union-attr]
    shades = np.frombuffer(draw.randbytes(32 * 32 * 4), np.uint8).reshape(32, 32, 4)
    picture = file_of(shades[:, :, :3], draw.choice(("PNG", "JPEG", "WEBP", "BMP")))
    if draw.random() < DECODED:
        parts["image"] = damaged(draw, picture) if draw.random() < 0.3 else picture
        if draw.random() < 0.5:
            parts["mask"] = file_of(shades) if draw.random() < 0.7 else damaged(draw, picture)
    elif draw.random() < 0.5:
        parts["image"] = "text"
    if draw.random() < 0.1:
        parts[draw.choice(NAMES) or "x"] = picture
    body, headers = form_of(parts)
    if draw.random() < 0.25:
        body = damaged(draw, body)
    if draw.random() < 0.1:
        headers["content-type"] = draw.choice(
            ("multipart/form-data", 'multipart/form-data; boundary="', "application/json",
             "multipart/form-data; boundary=x7; charset=punycode", "multipart/form-data; boundary=")
        )  # fmt: skip
    return "/v1/images/edits", body, headers


def complaint(answer: Answer) -> str | None:
    """What is wrong with an answer, or None."""
    text = answer.body.decode("utf-8")
    if answer.status not in ALLOWED:
        return f"status {answer.status}"
    if answer.status == 200:
        return None
    error = json.loads(text)["error"]
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return "not OpenAI's format"
    leaked = [secret for secret in SECRETS if secret in text]
    return f"it contains {leaked}" if leaked else None


async def campaign(count: int, seed: int) -> tuple[Counter[int], list[str]]:
    """Send bodies. Returns how many answers had which status, and the complaints."""
    service = service_of(fastdiff.load("digits"), steps=4, pixels=64 * 64, slots=16)
    app = create_app(service)
    service.worker.start()
    draw, statuses, complaints = random.Random(seed), Counter[int](), list[str]()
    requests = iter([draw.choice((generation, generation, edit))(draw) for _ in range(count)])

    async def client() -> None:
        for path, body, headers in requests:
            answer = await ask(app, path, body, headers)
            statuses[answer.status] += 1
            if (found := complaint(answer)) is not None:
                complaints.append(
                    f"{found}: {path} {headers} {body[:300]!r}: {answer.body[:300]!r}"
                )

    try:
        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
        assert (service.open, service.uploads.held) == (0, 0)
        again = await ask(
            app, "/v1/images/generations", b'{"prompt": "3", "num_inference_steps": 1}',
            {"content-type": "application/json"},
        )  # fmt: skip
        assert again.status == 200  # it still works
    finally:
        service.worker.stop()
        service.worker.join(30)
    return statuses, complaints


if __name__ == "__main__":
    found, wrong = asyncio.run(campaign(int((sys.argv[1:] or ["10000"])[0]), seed=1))
    print(dict(sorted(found.items())))
    print("\n".join(wrong[:20]) or "no complaints")
    sys.exit(bool(wrong))
