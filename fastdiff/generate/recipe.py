"""Recipes: everything that one image depends on, as JSON inside its PNG; and reading them back.

    {"recipe": 2, "fastdiff", "torch", "model", "weights", "layout", "backend", "device", "dtype",
     "job": `job.to_json`, "class_name", "sampler": what CHECKPOINT meant,
     "refiner": {"path", "weights"}, "load": options of `fastdiff.load`}

Version 1 is what pictures carry that were written before jobs: `classes` and text had a format
each. It is read, and never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import fastdiff
from fastdiff.checkpoint.layouts.bundle import ASSETS
from fastdiff.checkpoint.model import Model
from fastdiff.configs import to_dict
from fastdiff.generate.job import Job, from_json, to_json
from fastdiff.generate.session import Session
from fastdiff.generate.settings import CHECKPOINT
from fastdiff.kernels.choose import selected_backend

VERSION = 2
NEW_BITS = (
    "recipe version 1: since then guided and unguided images are computed in one batch, which "
    "rounds differently"
)
"""Why an image of a version 1 recipe may come out with other bits."""
EDITS = {"img2img": "image-to-image", "inpaint": "inpaint"}
TEXT_FIELDS = ("upscale", "upscale_strength", "upscale_via", "switch")
EDIT_FIELDS = ("image", "mask", "strength", "paste")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a picture says of how it was made."""

    version: int
    job: Job
    model: str
    """The path it was loaded from, or a shipped model's name."""
    weights: str
    backend: str
    device: str
    dtype: str
    """torch's name, such as float32."""
    load: dict[str, Any] = field(default_factory=dict)
    """Options of `fastdiff.load` that were given."""
    refiner: dict[str, Any] | None = None
    """path and weights."""


def write_recipe(job: Job, session: Session, refiner: Session | None = None) -> dict[str, Any]:
    """The recipe of a checked job. Hashes the weights, once per model."""
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


def place(model: Model) -> str:
    """Where a model can be loaded from again: a shipped one by name."""
    path = model.path
    return path.name if path.absolute().parent == ASSETS else str(path)


def read(data: Mapping[str, Any]) -> Recipe:
    """Read a recipe of any version.

    Raises:
        ValueError: a field is missing, unknown or wrong; one line.
    """
    version = data.get("recipe", 1)
    if version not in (1, VERSION):
        raise ValueError(
            f"recipe version {version!r:.40} is newer than this fastdiff, which reads up to "
            f"{VERSION}; update fastdiff"
        )
    if "seeds" in data or "classes" in data or "jobs" in data:
        raise ValueError("a contact sheet is no single image; give one of the images beside it")
    needed = ["weights", "backend", "device", "dtype"]
    needed += ["job", "model"] if version == VERSION else ["seed", "settings"]
    if missing := [name for name in needed if name not in data]:
        raise ValueError(f"it lacks {missing[0]!r}; give an image that fastdiff wrote")
    for name in ("weights", "backend", "device", "dtype"):
        if not isinstance(data[name], str):
            raise ValueError(f"{name} must be text, got {data[name]!r:.40}")
    old = version == 1
    refiner = data.get("refiner")
    if refiner is not None and not isinstance(refiner, dict):
        raise ValueError(f"refiner must be an object or null, got {refiner!r:.40}")
    tokenizer = data.get("tokenizer") if old else None
    return Recipe(
        version=version,
        job=from_json(_old_job(data) if old else data["job"]),
        model=str(data["checkpoint" if "pipeline" in data else "model"]),
        weights=data["weights"],
        backend=data["backend"],
        device=data["device"],
        dtype=data["dtype"],
        load={"tokenizer": tokenizer} if tokenizer else dict(data.get("load") or {}),
        refiner=refiner and {"path": refiner["path"], "weights": refiner.get("weights")},
    )


def _old_job(data: Mapping[str, Any]) -> dict[str, Any]:
    """A version 1 recipe's job as `to_json` writes it today."""
    if not isinstance(data["settings"], dict):
        raise ValueError(f"settings must be an object, got {data['settings']!r:.40}")
    settings = dict(data["settings"])
    if "tile" in settings:
        settings["tile"] = settings["tile"] or 0
    job: dict[str, Any] = {"seed": data["seed"], "settings": settings}
    pipeline = data.get("pipeline")
    if pipeline is None:
        if "class" not in data:
            raise ValueError("it lacks 'class'; give an image that fastdiff wrote")
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
        raise ValueError(f"it lacks {missing[0]!r}; give an image that fastdiff wrote")
    return {"kind": kind, **job, **{name: data[name] for name in wanted}}
