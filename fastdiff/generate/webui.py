"""Write and read the text ``parameters`` that web UIs store in pictures.

    a cat, (sky:1.2)
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 5, Size: 512x768

The last line is "key: value, key: value"; a value with a comma, a colon or a line break in it is a
JSON string (AUTOMATIC1111's web UI, `modules/infotext_utils.py`). Settings with an equivalent in
fastdiff are used, the others are listed. The noise differs, so the picture does too.
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
"""Name in web UIs -> fastdiff's sampler with the same formula."""
SCHEDULES = {"Karras": "karras", "Exponential": "exponential", "Simple": "simple"}
""""Schedule type" -> spacing. Older files append it to the name of the sampler."""
PLAIN_SCHEDULES = ("Automatic", "Uniform")
OF_THE_PROGRAM = ("Version", "Model", "Model hash", "VAE", "VAE hash", "Hashes", "Lora hashes")
"""Keys about the program and the files that made the picture, which --model replaces."""
MAX_LEFT = 30
"""Maximum number of unused pairs that are listed."""
MIN_PAIRS = 3
"""A last line with fewer pairs than this is part of the prompt, as in the web UIs."""
NEGATIVE = "Negative prompt:"

_PAIR = re.compile(r'\s*(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A job read from the parameters of a web UI."""

    job: TextJob
    left_out: tuple[str, ...]
    """Settings that were not used, as "key: value"."""


def to_parameters(recipe: Mapping[str, Any]) -> str | None:
    """The text for a recipe (`recipe.write_recipe`), or None if the picture has no prompt.

    A sampler that web UIs do not have keeps its fastdiff name.
    """
    job = recipe["job"]
    if job.get("prompt") is None:
        return None
    settings, text = job["settings"], job["text"]
    escape: Callable[[str], str] = (lambda words: words) if text["emphasis"] else _escaped
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
    lines = [escape(job["prompt"])]
    if text["negative"]:
        lines.append(f"{NEGATIVE} {escape(text['negative'])}")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in pairs.items() if v is not None))
    return "\n".join(lines)


def from_parameters(text: str) -> Foreign:
    """Read the parameters of a web UI as a job.

    Raises:
        ValueError: the text is not such parameters, or a value is not supported by fastdiff.
    """
    prompt, negative, pairs = _read(text)
    if "Steps" not in pairs:
        raise ValueError("the text has no 'Steps: ...', which the parameters of web UIs have")
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
    """Prompt, negative prompt and the pairs of the last line."""
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
    """Sampler and spacing in fastdiff; what has no equivalent stays in `left`."""
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
    """Remove a key from `left` and return its value as a number.

    Raises:
        ValueError: the value is not a number.
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
