"""Estimate the memory of a training run: weights, moments, gradients, activations.

bytes = 4 * parameters * (weight, gradient, two moments of AdamW, average) + what a forward pass
saves for its backward pass + a batch of images
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fastdiff.checkpoint.weights import empty_model
from fastdiff.data import DataConfig
from fastdiff.memory import check_memory
from fastdiff.runtime.peak import peak_of
from fastdiff.training.config import OptimizationConfig

COPIES = 5
"""Numbers per parameter: weight, gradient, two moments, average."""
BACKWARD = 1.25
"""Factor of what a forward pass saves, for temporary gradients and gaps between blocks."""
FP32 = 4


def training_bytes(
    config: Any,
    optimization: OptimizationConfig,
    data: DataConfig,
    forward: Callable[[Any, int], Any],
    *,
    others: int = 0,
    device: torch.device,
) -> int:
    """Memory of a run, in bytes.

    config: the network's. forward: called with the network on the meta device and the number of
    rows computed at once; creates its inputs there. others: number of parameters of other networks.
    """
    network: nn.Module = empty_model(config, "the config", 2**62)
    network.train()
    if optimization.gradient_checkpointing:
        for module in network.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True  # type: ignore[assignment]
    rows = optimization.batch_size // optimization.accumulate

    def call() -> None:
        leaves = tree_leaves(forward(network, rows))
        results = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        if optimization.gradient_checkpointing:  # the peak comes where a block is run again
            torch.autograd.backward(results, [torch.empty_like(x) for x in results])

    peak = peak_of(
        network,
        call,
        device=device,
        dtype=torch.float32,
        training=True,
    )
    half = 1 if optimization.precision == "fp32" else 2
    parameters = sum(parameter.numel() for parameter in network.parameters())
    images = optimization.batch_size * data.channels * data.image_size**2
    return round(FP32 * (COPIES * (parameters + others) + 4 * images) + BACKWARD * peak.most / half)


def check_training(need: int, folder: str, device: torch.device) -> None:
    """Check that a run fits in memory. need: its bytes.

    Raises:
        NotEnoughMemory: the run would not fit.
    """
    check_memory(
        need,
        f"training {folder}",
        device=device,
        way_out="set a smaller optimization.batch_size or data.image_size, or a larger "
        "optimization.accumulate",
    )
