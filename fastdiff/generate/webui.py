"""The text ``parameters`` that web UIs write into pictures: written beside our recipe, and read.

    a cat, (sky:1.2)
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 5, Size: 512x768

The last line is "key: value, key: value"; a value with a comma, a colon or a line break in it is a
JSON string (AUTOMATIC1111's web UI, `modules/infotext_utils.py`). What means the same here and
there is taken; the rest is named. Noise is not the same, so the picture is another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.files import printable
from fastdiff.generate.job import SampleSettings, TextJob, TextSettings
from fastdiff.names import SPACINGS

SAMPLERS = {
    "DPM++ 2M": "dpmpp-2m",
    "DPM++ 2M SDE": "dpmpp-2m-sde",
    "Euler": "euler",
    "Euler a": "euler-ancestral",
    "Heun": "heun",
    "DDIM": "ddim",
    "PLMS": "plms",
}
"""Their name -> ours, where both are the same formula."""
SCHEDULES = {"Karras": "karras", "Exponential": "exponential", "Simple": "simple"}
"""Their "Schedule type" -> our spacing; older files have it at the end of the sampler's name."""
PLAIN_SCHEDULES = ("Automatic", "Uniform")
OF_THE_PROGRAM = ("Version", "Model", "Model hash", "VAE", "VAE hash", "Hashes", "Lora hashes")
"""Keys that say which files and program made the picture: --model says which to use now."""
MAX_LEFT = 30
"""Most pairs that are named as left out."""
MIN_PAIRS = 3
"""Fewer pairs than this on the last line are the prompt's own words, as web UIs have it."""
NEGATIVE = "Negative prompt:"

_PAIR = re.compile(r'\s*(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a web UI's text asks for."""

    job: TextJob
    left_out: tuple[str, ...]
    """What is not taken, as "key: value"."""


def to_parameters(recipe: Mapping[str, Any]) -> str | None:
    """The text of a recipe of ours (`recipe.write_recipe`), or None if no prompt made the picture.

    A sampler that web UIs do not have keeps our name.
    """
    job = recipe["job"]
    if job.get("prompt") is None:
        return None
    settings, text = job["settings"], job["text"]
    as_it_is: Callable[[str], str] = (lambda words: words) if text["emphasis"] else _escaped
    theirs = {ours: name for name, ours in SAMPLERS.items()}
    named = recipe.get("sampler") or {}
    sampler = named.get("sampler", settings["sampler"])
    spacing = settings["spacing"] or named.get("sigmas")
    schedule = {ours: name for name, ours in SCHEDULES.items()}.get(spacing or "")
    pairs: dict[str, Any] = {
        "Steps": settings["steps"],
        "Sampler": theirs.get(sampler or "", sampler),
        "Schedule type": schedule,
        "CFG scale": settings["guidance_scale"],
        "Seed": job["seed"],
        "Size": f"{job['width']}x{job['height']}" if job.get("width") else None,
        "Clip skip": text["clip_skip"] + 1 if text["clip_skip"] else None,
        "Denoising strength": job.get("strength"),
        "Variation seed": job.get("variation_seed"),
        "Variation seed strength": job.get("variation") or None,
        "Hires upscale": job.get("upscale"),
        "Model": recipe["model"],
        "Version": f"fastdiff {recipe['fastdiff']}",
    }
    lines = [as_it_is(job["prompt"])]
    if text["negative"]:
        lines.append(f"{NEGATIVE} {as_it_is(text['negative'])}")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in pairs.items() if v is not None))
    return "\n".join(lines)


def from_parameters(text: str) -> Foreign:
    """What of a web UI's text means the same here.

    Raises:
        ValueError: it is no such text, or it asks for what fastdiff does not support.
    """
    prompt, negative, pairs = _read(text)
    if "Steps" not in pairs:
        raise ValueError("it has no 'Steps: ...', as the parameters of web UIs have")
    left = {key: value for key, value in pairs.items() if key not in OF_THE_PROGRAM}
    sampler, spacing = _sampler(left)
    size = re.fullmatch(r"(\d+)x(\d+)", left.pop("Size", ""))
    skip = max(_number(left, "Clip skip", int, 1) - 1, 0)
    variation = {}
    if "Variation seed" in left:
        variation = {
            "variation_seed": _number(left, "Variation seed", int, 0),
            "variation": _number(left, "Variation seed strength", float, 0.0),
        }
    job = TextJob(
        prompt=prompt,
        seed=_number(left, "Seed", int, 0),
        width=int(size[1]) if size else None,
        height=int(size[2]) if size else None,
        text=TextSettings(negative=negative or None, clip_skip=skip),
        settings=SampleSettings(
            sampler=sampler,
            spacing=spacing,
            steps=_number(left, "Steps", int, 20),
            guidance_scale=_number(left, "CFG scale", float, 7.0),
        ),
        **variation,
    )
    names = (printable(f"{key}: {value}", 60) for key, value in left.items())
    return Foreign(job=job, left_out=tuple(names)[:MAX_LEFT])


def _read(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt, and the pairs of the last line."""
    *lines, last = text.strip().split("\n")
    pairs = {key.strip(): _unquoted(value.strip()) for key, value in _PAIR.findall(last)}
    if len(pairs) < MIN_PAIRS:
        lines, pairs = [*lines, last], {}
    words: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in lines:
        negative = negative or line.strip().startswith(NEGATIVE)
        words[negative].append(line.strip().removeprefix(NEGATIVE) if negative else line)
    prompt, other = ("\n".join(part).strip() for part in words)
    return prompt, other, pairs


def _sampler(left: dict[str, str]) -> tuple[str | None, str | None]:
    """Our sampler and spacing; what has none of ours stays in `left`."""
    name, schedule = left.get("Sampler", ""), left.get("Schedule type")
    if schedule is None and (ending := name.rpartition(" ")[2]) in SCHEDULES:
        name, schedule = name.rpartition(" ")[0], ending
    sampler = SAMPLERS.get(name) or (name if name in SAMPLERS.values() else None)
    spacing = SCHEDULES.get(schedule or "")
    if sampler is None:
        return None, None
    assert spacing is None or spacing in SPACINGS
    del left["Sampler"]
    if spacing is not None or schedule in PLAIN_SCHEDULES:
        left.pop("Schedule type", None)
    return sampler, spacing


def _number(left: dict[str, str], key: str, kind: Callable[[str], Any], default: Any) -> Any:
    """
    Raises:
        ValueError: there is something else.
    """
    value = left.pop(key, None)
    try:
        return default if value is None else kind(value)
    except ValueError:
        raise ValueError(f"{key} must be a number, got {value!r:.40}") from None


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,\n:]", text) else text


def _unquoted(value: str) -> str:
    if not (value.startswith('"') and value.endswith('"') and len(value) > 1):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _escaped(prompt: str) -> str:
    return re.sub(r"[\\()\[\]]", r"\\\g<0>", prompt)
