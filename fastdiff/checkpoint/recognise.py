"""Which layout a file or folder has, told by what is in it and never by its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastdiff.checkpoint.weights import Weights, read_json, some

# The layout -> keys that only it has, together.
FILES: Mapping[str, tuple[str, ...]] = {
    "compvis": ("model.diffusion_model.input_blocks.0.0.weight",),
    "compvis first stage": ("encoder.down.0.block.0.norm1.weight", "post_quant_conv.weight"),
    "guided-diffusion": ("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),
    "ddpm": ("temb.dense.0.weight", "down.0.block.0.norm1.weight"),
    "diffusers model": ("conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"),
    "diffusers autoencoder": ("encoder.conv_in.weight", "encoder.mid_block.resnets.0.norm1.weight"),
    "fastdiff unet": ("input_blocks.0.0.weight", "output_blocks.0.0.norm1.weight"),
    "OpenAI classifier": ("input_blocks.0.0.weight", "out.0.weight"),
}
NEEDS_CONFIG = ("diffusers model", "diffusers autoencoder", "fastdiff unet")


def recognise_file(weights: Weights) -> str:
    """The layout of a single file: "compvis", "compvis first stage", "guided-diffusion", "ddpm".

    A U-Net of CompVis alone, with transformers inside, is "compvis" too.

    Raises:
        ValueError: none of them; says what the file is, or lists its keys.
    """
    keys = weights.places.keys()
    layout = next((name for name, marks in FILES.items() if all(m in keys for m in marks)), None)
    if layout == "guided-diffusion" and any(".transformer_blocks." in key for key in keys):
        return "compvis"
    if layout in NEEDS_CONFIG:
        raise ValueError(
            f"{weights.path}: these are the weights of a {layout}, whose config stands beside "
            f"them; give the folder, {weights.path.parent}"
        )
    if layout is None or layout == "OpenAI classifier":
        raise ValueError(
            f"{weights.path}: expected a checkpoint of CompVis, Stable Diffusion, OpenAI or DDPM, "
            f"got {layout or 'tensors of no known layout'}: {some(sorted(keys), 8) or 'none'}"
        )
    return layout


def recognise_folder(folder: Path) -> str:
    """The layout of a folder: "pipeline", "component" or "bundle".

    Raises:
        FileNotFoundError: it holds none of them.
    """
    if (folder / "model_index.json").is_file():
        return "pipeline"
    config = folder / "config.json"
    if (folder / "model" / "config.json").is_file():
        return "bundle"  # a training run
    if config.is_file():
        return "bundle" if "format" in read_json(config) else "component"
    found = sorted(path.name for path in folder.glob("*"))
    raise FileNotFoundError(
        f"{folder}: expected model_index.json (a diffusers pipeline) or config.json (a model or a "
        f"fastdiff bundle), got {some(found) or 'an empty folder'}"
    )
