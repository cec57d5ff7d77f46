"""Describe a run without starting it."""

from __future__ import annotations

import json
from typing import Any

import torch

from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.discriminator import PatchDiscriminator
from fastdiff.models.network import network_family
from fastdiff.models.text_transformer import TextTransformer
from fastdiff.training.autoencoder import AutoencoderRun
from fastdiff.training.classifier import ClassifierRun
from fastdiff.training.diffusion import DiffusionRun
from fastdiff.training.text import architecture


def describe(run: AutoencoderRun | ClassifierRun | DiffusionRun[Any]) -> str:
    """Text for `--dry-run`: the full config as JSON, parameter counts and number of images.

    No file is read or written, and no weights are allocated.
    """
    config = run.optimization
    lines = [json.dumps(run.to_json(), indent=2), ""]
    with torch.device("meta"):
        networks: dict[str, torch.nn.Module]
        if isinstance(run, AutoencoderRun):
            networks = {"autoencoder": Autoencoder(run.model)}
            if run.loss.adversarial_weight:
                networks["discriminator"] = PatchDiscriminator(run.discriminator)
        else:
            networks = {run.kind: network_family(run.kind).network(run.model)}
        if isinstance(run, DiffusionRun) and run.text.layers:
            width, pooled = run.model.context_dim, run.model.added_condition_dim is not None
            wanted = architecture(run.text, run.text.vocabulary, width, pooled=pooled)
            networks["text transformer, at most"] = TextTransformer(wanted)
    for name, network in networks.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        lines.append(f"{name}: {count:,} parameters")
    lines.append(
        f"{config.steps:,} steps of {config.batch_size} images "
        f"({config.steps * config.batch_size:,} in all), {config.precision}, to {run.output.folder}"
    )
    return "\n".join(lines)
