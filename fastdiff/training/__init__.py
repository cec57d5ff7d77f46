"""Training of both stages: typed configs, one training loop, exact resume."""

from __future__ import annotations

from fastdiff.training.autoencoder import (
    AutoencoderLossConfig,
    AutoencoderRun,
    adaptive_weight,
    hinge_loss,
    train_autoencoder,
)
from fastdiff.training.classifier import ClassifierRun, train_classifier
from fastdiff.training.concat import ConcatConfig
from fastdiff.training.config import OptimizationConfig, OutputConfig
from fastdiff.training.derive import for_data
from fastdiff.training.describe import describe
from fastdiff.training.diffusion import DiffusionRun, PreviewConfig
from fastdiff.training.ema import EMA, ema_decay
from fastdiff.training.objective import DenoiserLossConfig
from fastdiff.training.presets import TRAINING_PRESETS
from fastdiff.training.rates import learning_rate
from fastdiff.training.task import train_diffusion
from fastdiff.training.text import TextConfig

__all__ = [
    "EMA",
    "TRAINING_PRESETS",
    "AutoencoderLossConfig",
    "AutoencoderRun",
    "ClassifierRun",
    "ConcatConfig",
    "DenoiserLossConfig",
    "DiffusionRun",
    "OptimizationConfig",
    "OutputConfig",
    "PreviewConfig",
    "TextConfig",
    "adaptive_weight",
    "describe",
    "ema_decay",
    "for_data",
    "hinge_loss",
    "learning_rate",
    "train_autoencoder",
    "train_classifier",
    "train_diffusion",
]
