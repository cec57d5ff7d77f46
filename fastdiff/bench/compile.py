"""Compile Triton kernels for a GPU that this machine need not have."""

from __future__ import annotations

from typing import Any

from fastdiff.kernels.triton import Launch


def target(architecture: str) -> Any:
    """Triton's target for an architecture."""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def compile_launch(launch: Launch) -> Any:
    """Compile a kernel as launching it would, for triton's active driver, without running it."""
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    values = [v for name, v in launch.arguments.items() if name not in constants]
    return launch.kernel.warmup(
        *values,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **{name: launch.arguments[name] for name in constants},
    )
