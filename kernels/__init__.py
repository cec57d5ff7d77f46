"""Fused ops for diffusion models, each with a readable reference: ``fastdiff.kernels``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING or __name__ == "fastdiff.kernels":
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
    from fastdiff.kernels.measured import prefer_measured
    from fastdiff.kernels.philox import (
        INITIAL_NOISE,
        POSTERIOR_NOISE,
        SAMPLER_NOISE,
        Stream,
        philox4x32,
        philox_normal,
    )
    from fastdiff.kernels.sampler_step import COLUMNS, sampler_step

    prefer_measured()
else:
    # In a checkout's root this folder can be seen as a top-level `kernels`, a name that belongs to
    # another project and that transformers probes by importing it. So the import is let pass,
    # submodules are out of reach, and the first use says what is wrong.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        raise ImportError(
            f"{name!r} was asked of {__name__!r}, but this package is called 'fastdiff.kernels' "
            "(a top-level 'kernels' belongs to another project): use 'from fastdiff import kernels'"
        )


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
