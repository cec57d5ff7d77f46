"""Devices and precisions: exactly what was requested, or an error."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fastdiff.checkpoint.open import open_device
from fastdiff.training.config import PrecisionName

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA if available, otherwise the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return open_device(name)


def check_precision(precision: PrecisionName, device: torch.device) -> None:
    """Raise ValueError if `device` cannot train in `precision`."""
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"precision 'fp16' needs a CUDA device, got {device.type!r}; use 'bf16' or 'fp32'"
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision 'bf16' is not supported by {name}; use 'fp16' or 'fp32'")


def autocast(precision: PrecisionName, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])
