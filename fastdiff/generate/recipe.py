"""Recipes: everything that an image depends on, stored as JSON in its PNG, and how to read it.

    {"recipe": 3, "fastdiff", "torch", "model", "weights", "layout", "backend", "device", "dtype",
     "job": `to_json`, "class_name", "sampler": the sampler that CHECKPOINT stood for,
     "refiner": {"path", "weights"}, "load": options of `fastdiff.load`}

Older versions can be read, but are never written. Version 1 is from before there were jobs: classes
and text had separate formats. Up to version 2, prompts supported only the brackets of web UIs, so
any other syntax in them is read as the text that it was.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import ASSETS
from fastdiff.configs import from_dict, to_dict
from fastdiff.generate.job import CHECKPOINT, KINDS, PICTURES, Job, Picture
from fastdiff.generate.session import Session
from fastdiff.kernels.choose import selected_backend
from fastdiff.models.prompts import as_text

VERSION = 3
SYNTAX_VERSION = 3
"""First version in which BREAK and other syntax of web UIs has a meaning in prompts."""
NEW_BITS = (
    "recipe version 1: since then guided and unguided images are computed in one batch, which "
    "rounds differently"
)
"""Why an image made from a recipe of version 1 may differ in its bits."""
EDITS = {"img2img": "image-to-image", "inpaint": "inpaint"}
TEXT_FIELDS = ("upscale", "upscale_strength", "upscale_via", "switch")
EDIT_FIELDS = ("image", "mask", "strength", "paste")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The recipe in a picture: how it was made."""

    version: int
    job: Job
    model: str
    """The path it was loaded from, or the name of a shipped model."""
    weights: str
    backend: str
    device: str
    dtype: str
    """torch's name, such as float32."""
    load: dict[str, Any] = field(default_factory=dict)
    """Options that were given to `fastdiff.load`."""
    refiner: dict[str, Any] | None = None
    """The refiner's path and weights."""
    reread: bool = False
    """Whether backslashes were added to a prompt to keep it as text."""


def write_recipe(job: Job, session: Session, refiner: Session | None = None) -> dict[str, Any]:
    """The recipe of a checked job. Hashes the weights once per model."""
    facts, label = session.facts, getattr(job, "label", None)
    named = session.model.sampler if job.settings.sampler == CHECKPOINT else None
    return {
        "recipe": VERSION,
        "fastdiff": fastdiff.__version__,
        "torch": torch.__version__,
        "model": place(session.model),
        "weights": session.model.weights_hash,
        "layout": session.model.layout,
        "backend": selected_backend(),
        "device": session.device.type,
        "dtype": str(session.dtype).removeprefix("torch."),
        "job": to_json(job),
        "class_name": facts.class_names[label] if label is not None and facts.class_names else None,
        "sampler": None if named is None else to_dict(named),
        "refiner": None
        if refiner is None
        else {"path": place(refiner.model), "weights": refiner.model.weights_hash},
    }


def to_json(job: Job) -> dict[str, Any]:
    """A job as JSON: its kind, its fields, and pictures as path and sha256 of the file's bytes.

    A picture given as pixels has no path, and its hash is that of its values.
    """
    kind = next(name for name, cls in KINDS.items() if isinstance(job, cls))
    data: dict[str, Any] = {"kind": kind}
    for entry in fields(job):
        name, value = entry.name, getattr(job, entry.name)
        if "later" in entry.metadata and _is_default(value, entry.default):
            continue
        if is_dataclass(value):
            value = {k: v for k, v in to_dict(value).items() if k != "batch"}
        elif name in PICTURES and value is not None:
            value = identities(value)
        data[name] = value
    return data


def _is_default(value: Any, default: Any) -> bool:
    """Whether a field has its default; pictures may be tensors, which are not compared."""
    return value is default or bool(is_dataclass(value) and value == default)


def from_json(data: Any) -> Job:
    """Inverse of `to_json`; missing fields get their defaults.

    Raises:
        ValueError: the kind or a field is unknown, or a value is missing or wrong.
    """
    if not isinstance(data, dict) or data.get("kind") not in tuple(KINDS):
        got = data.get("kind") if isinstance(data, dict) else data
        raise ValueError(f"unknown kind of job {got!r:.40}; expected one of {', '.join(KINDS)}")
    given = {name: data[name] for name in PICTURES if data.get(name) is not None}
    return with_pictures(data, {name: _path(name, value) for name, value in given.items()})


def with_pictures(data: Mapping[str, Any], pictures: Mapping[str, Picture]) -> Job:
    """A job from its JSON, whose own entries of pictures are not read, and its pictures.

    Raises:
        ValueError: a field is unknown, or a value is missing or wrong.
    """
    cls = KINDS[data["kind"]]
    rest = {k: v for k, v in data.items() if k != "kind" and k not in PICTURES}
    made: Any = from_dict(_without_pictures(data["kind"]), rest)
    given = {f.name: getattr(made, f.name) for f in fields(made)} | dict(pictures)
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
    if missing:
        raise ValueError(f"{cls.__name__}: {missing[0]}: missing")
    job: Job = cls(**given)
    return job


@functools.cache
def _without_pictures(kind: str) -> type[Any]:
    """A dataclass with the fields of a kind of job but its pictures, which are read here."""
    cls = KINDS[kind]
    hints = get_type_hints(cls)
    plain = [
        (f.name, hints[f.name], f) if f.default is not MISSING else (f.name, hints[f.name])
        for f in fields(cls)
        if f.name not in PICTURES
    ]
    return make_dataclass(cls.__name__, plain, frozen=True, kw_only=True)


def identity(picture: Picture) -> dict[str, str | None]:
    """The entry of a picture in a recipe: its path, and the hash of its bytes or values."""
    if isinstance(picture, Tensor):
        numbers = picture.detach().float().cpu().contiguous().numpy().tobytes()
        return {"path": None, "sha256": hashlib.sha256(numbers).hexdigest()}
    path = Path(picture)
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def identities(value: Picture | tuple[Picture | None, ...]) -> Any:
    """`identity` of a picture, or of each of several."""
    if not isinstance(value, tuple):
        return identity(value)
    return [None if picture is None else identity(picture) for picture in value]


def hashes(found: Any) -> Any:
    """The SHA-256 of the pictures in an entry of a recipe: one, or a list."""
    if isinstance(found, list):
        return [hashes(each) for each in found]
    return found.get("sha256") if isinstance(found, dict) else None


def _path(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [None if each is None else _path(name, each) for each in value]
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise ValueError(
            f"the {name} was given as pixels and not as a file, so it cannot be found; "
            f"give --{name}"
        )
    return path


def place(model: Model) -> str:
    """The path to load a model from again, or its name if it is a shipped model."""
    path = model.path
    return path.name if path.absolute().parent == ASSETS else str(path)


def read(data: Mapping[str, Any]) -> Recipe:
    """Read a recipe of any version.

    Raises:
        ValueError: a field is missing, unknown or wrong; the message is one line.
    """
    version = data.get("recipe", 1)
    if version not in range(1, VERSION + 1):
        raise ValueError(
            f"recipe version must be at most {VERSION} for this version of fastdiff, got "
            f"{version!r:.40}; update fastdiff"
        )
    if not {"seeds", "frames", "classes", "jobs"}.isdisjoint(data):
        raise ValueError("it belongs to a contact sheet; use a single image from its folder")
    if guided := data.get("guided_by"):
        raise ValueError(
            f"the image was guided by functions that no recipe contains ({guided!s:.60}); call "
            "model.generate with the same pulls"
        )
    needed = ["weights", "backend", "device", "dtype"]
    needed += ["seed", "settings"] if version == 1 else ["job", "model"]
    if missing := [name for name in needed if name not in data]:
        raise ValueError(f"it lacks {missing[0]!r}; use an image that fastdiff wrote")
    for name in ("weights", "backend", "device", "dtype"):
        if not isinstance(data[name], str):
            raise ValueError(f"{name} must be text, got {data[name]!r:.40}")
    old = version == 1
    refiner = data.get("refiner")
    if refiner is not None and not isinstance(refiner, dict):
        raise ValueError(f"refiner must be an object or null, got {refiner!r:.40}")
    tokenizer = data.get("tokenizer") if old else None
    written = _old_job(data) if old else data["job"]
    wanted = _as_text(written) if version < SYNTAX_VERSION else written
    return Recipe(
        version=version,
        job=from_json(wanted),
        reread=wanted != written,
        model=str(data["checkpoint" if "pipeline" in data else "model"]),
        weights=data["weights"],
        backend=data["backend"],
        device=data["device"],
        dtype=data["dtype"],
        load={"tokenizer": tokenizer} if tokenizer else dict(data.get("load") or {}),
        refiner=refiner and {"path": refiner["path"], "weights": refiner.get("weights")},
    )


def _as_text(job: Any) -> Any:
    """Escape the prompts of a job to mean what they meant before SYNTAX_VERSION."""
    text = job.get("text", {}) if isinstance(job, dict) else None
    if not isinstance(text, dict) or text.get("emphasis") is False:
        return job

    def changed(values: dict[str, Any], *names: str) -> dict[str, Any]:
        own = {name: as_text(values[name]) for name in names if isinstance(values.get(name), str)}
        return {**values, **own}

    job = changed(job, "prompt", "to_prompt")
    return {**job, "text": changed(text, "negative")} if text else job


def _old_job(data: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the job of a version 1 recipe to the present format of `to_json`."""
    if not isinstance(data["settings"], dict):
        raise ValueError(f"settings must be an object, got {data['settings']!r:.40}")
    settings = dict(data["settings"])
    if "tile" in settings:
        settings["tile"] = settings["tile"] or 0
    job: dict[str, Any] = {"seed": data["seed"], "settings": settings}
    pipeline = data.get("pipeline")
    if pipeline is None:
        if "class" not in data:
            raise ValueError("it lacks 'class'; use an image that fastdiff wrote")
        return {"kind": "class", "label": data["class"], **job}
    wanted = ["prompt", "text", "height", "width"]
    if pipeline == "txt2img":
        kind, wanted = "text", [*wanted, *TEXT_FIELDS]
    elif pipeline in EDITS:
        kind = EDITS[pipeline]
        wanted += EDIT_FIELDS if kind == "inpaint" else ("image", "strength")
    else:
        raise ValueError(f"unknown pipeline {pipeline!r:.40}; expected one of txt2img, {EDITS}")
    if missing := [name for name in wanted if name not in data]:
        raise ValueError(f"it lacks {missing[0]!r}; use an image that fastdiff wrote")
    return {"kind": kind, **job, **{name: data[name] for name in wanted}}
