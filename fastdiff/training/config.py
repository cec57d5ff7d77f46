"""The parts of a run's config that both stages share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

PrecisionName = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Training length, learning rate schedule and precision (AdamW)."""

    steps: int
    """Total number of optimizer steps."""

    batch_size: int
    """Images per optimizer step."""

    accumulate: int = 1
    """Parts that a batch is split into to save memory; the gradient is that of the whole batch."""

    learning_rate: float = 1e-4
    """Highest learning rate of AdamW."""

    beta1: float = 0.9
    """Decay of AdamW's first moment; 0.5 is usual with a discriminator."""

    beta2: float = 0.999
    """Decay of AdamW's second moment."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""

    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine that ends at final_learning_rate."""

    final_learning_rate: float = 0.0
    """Learning rate at the end of the cosine."""

    clip_norm: float = 0.0
    """Norm to which the gradients of each network are clipped; 0: no clipping."""

    ema_decay: float = 0.9999
    """Decay of the averaged weights, which are sampled from and exported; 0: the latest weights."""

    ema_warmup: bool = True
    """Start with a smaller decay, (1 + n) / (10 + n) for update n, as LDM does."""

    precision: PrecisionName = "fp32"
    """fp32, or autocast to bf16 or fp16 (with loss scaling); an error if the device lacks it."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and takes about a third more
    time."""

    channels_last: bool = False
    """Use the channels_last memory format for images and weights."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} and "
                f"{self.accumulate}; choose a batch_size of {self.accumulate} times a whole number"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate must be 0 to learning_rate ({self.learning_rate}), "
                f"got {self.final_learning_rate}"
            )
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "clip_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay must be constant or cosine, got {self.decay!r}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision must be fp32, bf16 or fp16, got {self.precision!r}")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The run folder, and what to write to it how often."""

    folder: str
    """Folder for config.json, log.jsonl, checkpoints/, samples/, tensorboard/ and model/."""

    log_every: int = 50
    """Steps between log lines; each line contains the means since the previous one."""

    preview_every: int = 1000
    """Steps between preview sheets of samples or reconstructions; 0: none."""

    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end and when interrupted."""

    keep: int = 2
    """Number of checkpoints to keep; older ones are deleted."""

    tensorboard: bool = True
    """Also write scalars and sheets to TensorBoard."""

    export_dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision of the weights in model/."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("output folder must not be empty; name a folder for the run")
        for name in ("log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("preview_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.export_dtype not in ("fp32", "fp16"):
            raise ValueError(f"export_dtype must be fp32 or fp16, got {self.export_dtype!r}")
