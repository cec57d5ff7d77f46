"""Fused ops for diffusion models, each with a readable reference: ``fastdiff.kernels``."""

from __future__ import annotations

if __name__ != "fastdiff.kernels":
    raise ImportError(
        f"this package was imported as {__name__!r}; its name is 'fastdiff.kernels' "
        "(a top-level 'kernels' belongs to another project): use 'from fastdiff import kernels'"
    )

from fastdiff.kernels.add_group_norm_silu import add_group_norm_silu
from fastdiff.kernels.attention import attention
from fastdiff.kernels.dispatch import (
    BACKENDS,
    OPS,
    BackendError,
    BackendWarning,
    Explanation,
    Implementation,
    available,
    backend,
    explain,
    record_backends,
    selected_backend,
)
from fastdiff.kernels.geglu import geglu
from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.layer_norm import add_layer_norm, layer_norm
from fastdiff.kernels.philox import (
    INITIAL_NOISE,
    POSTERIOR_NOISE,
    SAMPLER_NOISE,
    Stream,
    philox4x32,
    philox_normal,
)
from fastdiff.kernels.sampler_step import COLUMNS, sampler_step

__all__ = [
    "BACKENDS",
    "COLUMNS",
    "INITIAL_NOISE",
    "OPS",
    "POSTERIOR_NOISE",
    "SAMPLER_NOISE",
    "BackendError",
    "BackendWarning",
    "Explanation",
    "Implementation",
    "Stream",
    "add_group_norm_silu",
    "add_layer_norm",
    "attention",
    "available",
    "backend",
    "explain",
    "geglu",
    "group_norm_silu",
    "layer_norm",
    "philox4x32",
    "philox_normal",
    "record_backends",
    "sampler_step",
    "selected_backend",
]
