"""Names shared by options, configs and files.

This module imports nothing heavy, so that a command can list the choices of an option before torch
is loaded.
"""

from __future__ import annotations

from typing import Literal, get_args

Prediction = Literal["eps", "v", "x0", "flow"]
"""What a network returns: the noise, the velocity, the clean sample, or noise minus sample."""
ScheduleKind = Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow"]
"""Shapes of the betas (`diffusion.schedules`), or straight paths without any (`diffusion.flow`)."""
TimestepSpacing = Literal["leading", "trailing", "linspace", "simple"]
"""How a sampler's steps are spaced over the training timesteps."""
SigmaSpacing = Literal["karras", "exponential"]
"""How a sampler's steps are spaced over the noise levels."""
FastDPMSpacing = Literal["var-linear", "var-quadratic", "step-linear", "step-quadratic"]
"""How FastDPM chooses noise levels; see `diffusion.fastdpm`."""
FASTDPM_SPACINGS: tuple[str, ...] = get_args(FastDPMSpacing)
Spacing = Literal[
    "trailing",
    "leading",
    "linspace",
    "simple",
    "karras",
    "exponential",
    "var-linear",
    "var-quadratic",
    "step-linear",
    "step-quadratic",
]
SPACINGS: tuple[str, ...] = get_args(Spacing)
Extra = Literal["none", "inpainting", "upsampler", "sketch", "depth"]
"""What a denoiser reads in the channels behind those of x (`models.concat`)."""
QKVOrder = Literal["legacy", "new"]
"""Row order of packed qkv weights: new is (3, H, d), legacy is (H, 3, d)."""
