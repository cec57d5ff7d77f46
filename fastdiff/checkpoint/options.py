"""How to load a checkpoint, and settings that its files may not state.

This module does not import torch, because commands have these fields as options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fastdiff.names import Prediction, QKVOrder, ScheduleKind

if TYPE_CHECKING:
    from fastdiff.diffusion.schedules import ScheduleConfig

NOISE = ("num_timesteps", "beta_start", "beta_end", "zero_terminal_snr", "shift")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Settings that a model's files may not state; by default those of the published models."""

    vae: Path | None = None
    """File or folder with the autoencoder to use, if the model has none or in place of its own."""
    classifier: Path | None = None
    """File or folder with a noisy classifier to guide the model by."""
    clip: Path | None = None
    """File or folder with a noised CLIP to guide a model that reads text by."""
    tokenizer: tuple[Path, ...] = ()
    """Folder of the CLIP tokenizer, one per text encoder, for files without one."""
    lora: tuple[str, ...] = ()
    """LoRA files (kohya's or peft's names) to merge into the weights: PATH, or PATH:STRENGTH."""
    embedding: tuple[str, ...] = ()
    """Textual inversion files (diffusers' or AUTOMATIC1111's) as NAME=FILE; NAME stands for the
    embedding in prompts."""
    controlnet: tuple[Path, ...] = ()
    """ControlNets (folders of diffusers, or files of the original layout), each of which reads one
    of a job's control pictures."""
    variant: str | None = None
    """Which files of a diffusers folder to read, such as fp16."""
    ema: bool = True
    """Use the averaged weights if a file contains both kinds."""
    text_encoders: bool = True
    """Load the text encoders; they need transformers."""
    prediction: Prediction | None = None
    """What the network returns; "v" for Stable Diffusion 2 at 768 pixels, "flow" with schedule
    "flow"."""
    schedule: ScheduleKind | None = None
    """Shape of the betas that the model was trained with."""
    num_timesteps: int | None = None
    """Number of training timesteps."""
    beta_start: float | None = None
    """beta at t = 0."""
    beta_end: float | None = None
    """beta at the last timestep."""
    zero_terminal_snr: bool | None = None
    """Whether the last timestep is pure noise."""
    shift: float | None = None
    """Shift of the noise levels of a model of flow matching (schedule "flow"); SD3: 3."""
    num_heads: int | None = None
    """Number of heads of every attention; give this or head_dim."""
    num_heads_upsample: int | None = None
    """Number of heads on the way up of a U-Net, if it differs from num_heads: improved-diffusion's
    option of the same name, which its files do not record."""
    head_dim: int | None = None
    """Width of the heads of every attention; give this or num_heads."""
    qkv_order: QKVOrder | None = None
    """Row order of an OpenAI file's packed qkv weights: legacy (H, 3, d), new (3, H, d)."""
    timestep_scale: float | None = None
    """Factor of t before the network sees it: 1000 / T for IDDPM's rescale_timesteps."""
    null_class: bool | None = None
    """Whether the last row of a DiT's or U-ViT's label embedding means "no class"."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    scale_factor: float | None = None
    """Factor by which the latents are multiplied."""
    image_size: int | None = None
    """Height and width of the images that the model was trained on, in pixels."""
    strict: bool = False
    """Refuse to guess what neither the files nor a published model of the same architecture state;
    the error lists the choices."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("prediction", get_args(Prediction)),
            ("schedule", get_args(ScheduleKind)),
            ("qkv_order", get_args(QKVOrder)),
        ):
            value = getattr(self, name)
            if value not in (None, *choices):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.60}")
        if self.null_class not in (None, True, False) or type(self.null_class) is int:
            raise ValueError(f"null_class must be True or False, got {self.null_class!r:.60}")
        for name in (
            *("image_size", "num_heads", "num_heads_upsample", "head_dim"),
            *("norm_groups", "num_timesteps"),
        ):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value > 0):
                raise ValueError(f"{name} must be a positive whole number, got {value!r:.60}")
        for name in ("scale_factor", "timestep_scale", "beta_start", "beta_end", "shift"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"{name} must be positive and finite, got {value!r:.60}")
        if self.num_heads is not None and self.head_dim is not None:
            raise ValueError(
                f"give one of num_heads and head_dim, got {self.num_heads} and {self.head_dim}"
            )
        if self.num_heads_upsample is not None and self.head_dim is not None:
            raise ValueError(
                f"num_heads_upsample needs num_heads, got head_dim {self.head_dim}; give num_heads "
                "instead of head_dim"
            )

    @property
    def given(self) -> dict[str, Any]:
        """Name -> value of the options that were set."""
        plain = LoadOptions()
        names = [entry.name for entry in fields(self)]
        return {n: getattr(self, n) for n in names if getattr(self, n) != getattr(plain, n)}

    @property
    def recorded(self) -> dict[str, Any]:
        """`given` as JSON-compatible values, for a recipe."""
        given = self.given
        for name in ("vae", "classifier", "clip"):
            if name in given:
                given[name] = str(given[name])
        for name in ("lora", "embedding"):
            if name in given:
                given[name] = [*given[name]]
        for name in ("tokenizer", "controlnet"):
            if name in given:
                given[name] = [str(path) for path in given[name]]
        return given

    @classmethod
    def of_recipe(cls, recorded: Mapping[str, Any]) -> LoadOptions:
        """Inverse of `recorded`.

        Raises:
            ValueError: an option is unknown, or a value is of the wrong type.
        """
        if unknown := sorted(recorded.keys() - {entry.name for entry in fields(cls)}):
            raise ValueError(f"unknown loading option {unknown[0]!r:.40}")
        paths: dict[str, Any] = {}
        for name, what, kind in (
            ("tokenizer", "folders", Path),
            ("controlnet", "files or folders", Path),
            ("lora", "files", str),
            ("embedding", "files", str),
        ):
            specs = recorded.get(name, ())
            if not isinstance(specs, list | tuple) or not all(isinstance(s, str) for s in specs):
                raise ValueError(f"{name} must be a list of {what}, got {specs!r:.40}")
            paths[name] = tuple(kind(spec) for spec in specs)
        for name in ("vae", "classifier", "clip"):
            place = recorded.get(name)
            if not isinstance(place, str | None):
                raise ValueError(f"{name} must be a file or folder, got {place!r:.40}")
            paths[name] = None if place is None else Path(place)
        return cls(**{**recorded, **paths})

    @property
    def says_noise(self) -> bool:
        """Whether any option about the training's noise schedule was set."""
        return any(getattr(self, name) is not None for name in ("schedule", *NOISE))

    def noise(self, found: ScheduleConfig) -> ScheduleConfig:
        """Override a schedule that was found or assumed by the options that were set.

        Raises:
            ValueError: the values do not form a valid schedule.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in NOISE}
        given["kind"] = self.schedule
        return replace(found, **{name: value for name, value in given.items() if value is not None})
