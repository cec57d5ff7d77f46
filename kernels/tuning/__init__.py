"""Launch configs of the Triton kernels, and the backends that measured fastest."""

from __future__ import annotations

from .configs import (
    TUNED,
    Config,
    Gpu,
    Tuned,
    architectures,
    config,
    forget_configs,
    gpu_of,
    lookup,
    nearest_architecture,
    on_new_configs,
    override_config,
    read_tuned,
    tuned_cache,
    tuned_files,
)
