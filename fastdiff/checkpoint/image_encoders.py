"""CLIP's image encoder in diffusers' folders, and how its feature_extractor prepares a picture.

The network is transformers' own; only its config and its weights are read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.checkpoint.build import Plan
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.text_encoders import plain_names, plan_transformer
from fastdiff.checkpoint.weights import Weights, read_json
from fastdiff.models.unclip import CLIPImageEncoder

KIND = "CLIPVisionModelWithProjection"
PREPROCESSOR = "preprocessor_config.json"
_FIELDS = (
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers"),
    *("num_attention_heads", "num_channels", "image_size", "patch_size", "hidden_act"),
    "layer_norm_eps",
)
BICUBIC = 3
"""Pillow's number of the filter."""
FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": BICUBIC,
}
"""Option of a feature_extractor -> the only value that fastdiff has."""
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
"""CLIPImageProcessor's defaults."""


def plan_folder(folder: Path, weights: Weights, loading: Loading) -> Plan:
    """Plan an image_encoder folder, with its config.json and weights.

    Raises:
        ValueError: the architecture is another one, or the weights do not fit.
        ImportError: transformers is not installed.
    """
    path = folder / "config.json"
    data = read_json(path)
    if (kinds := data.get("architectures")) != [KIND]:
        raise ValueError(f"{path}: architectures must be {KIND}, got {kinds!r:.60}")
    if data.get("num_channels", 3) != 3:
        raise ValueError(f"{path}: num_channels must be 3, got {data['num_channels']!r:.20}")
    fields = {name: data[name] for name in _FIELDS if name in data}
    return plan_transformer(KIND, "CLIPVisionConfig", fields, plain_names(weights), loading)


def encoder(plan: Plan, folder: Path, loading: Loading) -> CLIPImageEncoder:
    """Read a planned image encoder. folder: of its feature_extractor.

    Raises:
        ValueError: it prepares pictures in a way that fastdiff does not have.
    """
    path = folder / PREPROCESSOR
    data = read_json(path)
    for name, value in FIXED.items():
        given = data.get(name, value)
        same = abs(given - value) < 1e-9 if isinstance(given, float | int) else given == value
        if not same:
            raise ValueError(f"{path}: {name} must be {value!r}, got {given!r:.40}")
    config: Any = plan.model.config
    size, crop = _side(path, data, "size", 224), _side(path, data, "crop_size", 224)
    if not config.image_size == crop <= size:
        raise ValueError(
            f"{path}: crop_size must be {config.image_size}, what the image encoder reads, and "
            f"size at least that, got {crop} and {size}"
        )
    mean, std = (
        _channels(path, data, name, usual)
        for name, usual in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )
    return CLIPImageEncoder(model=loading.fill(plan), size=size, crop=crop, mean=mean, std=std)


def _side(path: Path, data: dict[str, Any], name: str, usual: int) -> int:
    """A size, which newer versions of transformers write as a dictionary of equal sides."""
    value = data.get(name, usual)
    sides = set(value.values()) if isinstance(value, dict) else {value}
    side = sides.pop() if len(sides) == 1 else None
    if type(side) is not int or side < 1:
        raise ValueError(f"{path}: {name} must be one positive size, got {value!r:.60}")
    return side


def _channels(
    path: Path, data: dict[str, Any], name: str, usual: list[float]
) -> tuple[float, float, float]:
    value = data.get(name, usual)
    numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
    if not numbers or len(value) != 3:
        raise ValueError(f"{path}: {name} must be three numbers, got {value!r:.60}")
    red, green, blue = map(float, value)
    return red, green, blue
