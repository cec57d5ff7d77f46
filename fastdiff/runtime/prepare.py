"""Prepare a module for inference: device, dtype, memory layout and faster CPU layers."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from fastdiff.models.network import Network
from fastdiff.runtime.cpu_layers import prepare_layers, restore_layers

Module = TypeVar("Module", bound=nn.Module)


@torch.inference_mode(False)  # or autograd could not save weights that it copies
def prepare(
    module: Module,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    keep_copies: bool = True,
    half_as_fp32: bool | None = None,
) -> Module:
    """Prepare a module for inference, in place: device, dtype, layout, eval, no gradients.

    On the CPU its convolutions, linear layers and upsamplings are also replaced by those of
    `fastdiff.runtime.cpu_layers`. On other devices networks are packed (`Network.pack`), and a
    module that was prepared for the CPU gets its own layers back.

    Args:
        keep_copies: CPU only: let layers keep a second, faster form of their weights, made at the
            first call. In fp32 that takes 2.3 GB on top of the 3.4 GB of Stable Diffusion 1.5's
            U-Net; if bf16 or fp16 weights compute in fp32, 4 bytes for each 2-byte weight. Results
            change only by rounding: in the weights of upsamplings, and in small convolutions, for
            which PyTorch has another kernel.
        half_as_fp32: CPU only: whether convolutions and linear layers with bf16 or fp16 weights
            compute in fp32 and round their results; None: if the CPU lacks the instructions
            (AVX512-BF16, AVX512-FP16, AMX, or those of Arm), which is logged once.
    """
    module.to(device=device, dtype=dtype)
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        prepare_layers(module, keep_copies=keep_copies, half_as_fp32=half_as_fp32)
    else:
        restore_layers(module)
        pack(module)
    return module


def pack(module: nn.Module) -> None:
    """Pack each network in a module (`Network.pack`)."""
    for part in module.modules():
        if isinstance(part, Network):
            part.pack()
