"""How the commands load a model, and what they say of what its files left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastdiff.cli.parsing import OptionalFloat, OptionalInt, OptionalName

if TYPE_CHECKING:
    import torch

    from fastdiff.checkpoint.model import Model

HIDDEN = tyro.conf.arg(help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a model's files may leave open; everything is taken from the published models else."""

    prediction: Annotated[Literal["eps", "v", "x0"] | None, HIDDEN] = None
    """What the network returns, where a file does not say: v for Stable Diffusion 2 at 768."""
    num_heads: OptionalInt = None
    """Heads of every attention, where a file does not say."""
    head_dim: OptionalInt = None
    """Width of a head, where a file does not say."""
    qkv_order: Annotated[Literal["legacy", "new"] | None, HIDDEN] = None
    """Attention order of an OpenAI file."""
    image_size: OptionalInt = None
    """Height and width of the training's images, where a file does not say."""
    scale_factor: OptionalFloat = None
    """The latents are multiplied by it, where a file does not say."""
    timestep_scale: OptionalFloat = None
    """The network sees t times this; 1000 / T for improved-diffusion's rescale_timesteps."""
    tokenizer: tuple[Path, ...] = ()
    """Folder of the CLIP tokenizer, one per text encoder, for files that hold none."""
    variant: OptionalName = None
    """Which files of a diffusers folder to read, such as fp16."""
    ema: bool = True
    """Take the averaged weights where the file has both."""

    @property
    def given(self) -> dict[str, Any]:
        """Keyword arguments of `fastdiff.load`: what was given."""
        plain = LoadOptions()
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        }

    @property
    def recorded(self) -> dict[str, Any]:
        """The same for a recipe: JSON-able."""
        return {
            name: [str(folder) for folder in value] if name == "tokenizer" else value
            for name, value in self.given.items()
        }

    @classmethod
    def of_recipe(cls, recorded: Mapping[str, Any]) -> LoadOptions:
        """What `recorded` gave.

        Raises:
            ValueError: an unknown option, or a value of another kind.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(recorded.keys() - known):
            raise ValueError(f"unknown option of loading {unknown[0]!r:.40}")
        folders = recorded.get("tokenizer", ())
        if not isinstance(folders, list | tuple) or not all(isinstance(f, str) for f in folders):
            raise ValueError(f"tokenizer must be a list of folders, got {folders!r:.40}")
        return cls(**{**recorded, "tokenizer": tuple(map(Path, folders))})


def load(path: str, options: LoadOptions, device: torch.device, dtype: torch.dtype) -> Model:
    """A model.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `fastdiff.load`.
    """
    from fastdiff.checkpoint.open import load as open_model

    return open_model(path, device=device, dtype=dtype, **options.given)


def assumed(model: Model) -> list[tuple[str, str]]:
    """What the files do not say and was taken from the published models, as lines to print."""
    facts = model.provenance.get("assumed", {})
    if not facts:
        return []
    flags = {field.name for field in fields(LoadOptions)}
    said = [
        f"--{name.replace('_', '-')}\N{NO-BREAK SPACE}{value}"
        if name in flags
        else f"{name} {value}"
        for name, value in facts.items()
    ]
    return [("assumed", f"{', '.join(said)} (the files do not say; give what is wrong yourself)")]
