"""Fused ops for diffusion models, each with a readable reference: ``fastdiff.kernels``."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING or __name__ != "kernels":
    from .ada_layer_norm import ada_layer_norm as ada_layer_norm
    from .add_group_norm_silu import add_group_norm_silu as add_group_norm_silu
    from .add_layer_norm import add_layer_norm as add_layer_norm
    from .attention import attention as attention
    from .cat_group_norm_silu import cat_group_norm_silu as cat_group_norm_silu
    from .choose import (
        BACKENDS,
        OPS,
        Backend,
        BackendError,
        BackendWarning,
        Explanation,
        available,
        backend,
        checkpoint_contexts,
        explain,
        record_backends,
        selected_backend,
    )
    from .gate_residual import gate_residual as gate_residual
    from .gather_rows import gather_rows as gather_rows
    from .geglu import geglu as geglu
    from .group_norm_silu import group_norm_silu as group_norm_silu
    from .layer_norm import layer_norm as layer_norm
    from .op import Op, Work, shapes_only
    from .philox_normal import int64_bits, philox4x32, philox_normal
    from .philox_normal.streams import INITIAL_NOISE, POSTERIOR_NOISE, SAMPLER_NOISE, Stream
    from .sampler_step import COLUMNS, sampler_step

    # every folder is an op and is imported here; the "as" lines above are for type checkers
    for _room in iter_modules(__path__):
        if _room.ispkg:
            import_module(f"{__name__}.{_room.name}")
    globals().update({_name: _op.public for _name, _op in OPS.items()})
else:
    # From the root of a checkout this folder is importable as a top-level `kernels`, a name that
    # belongs to another project and that transformers probes by importing it. So the import itself
    # succeeds, submodules are hidden, and the first use raises an error that explains the mix-up.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        raise ImportError(
            f"cannot import {name!r} from {__name__!r}: this package is 'fastdiff.kernels' "
            "(a top-level 'kernels' belongs to another project); use 'from fastdiff import kernels'"
        )


__all__ = [
    "BACKENDS",
    "COLUMNS",
    "INITIAL_NOISE",
    "OPS",
    "POSTERIOR_NOISE",
    "SAMPLER_NOISE",
    "Backend",
    "BackendError",
    "BackendWarning",
    "Explanation",
    "Op",
    "Stream",
    "Work",
    "available",
    "backend",
    "checkpoint_contexts",
    "explain",
    "int64_bits",
    "philox4x32",
    "philox_normal",
    "record_backends",
    "sampler_step",
    "selected_backend",
    "shapes_only",
]
__all__ += [name for name in globals().get("OPS", ()) if name not in __all__]


def __dir__() -> list[str]:
    """The public names; the files of the package stay importable."""
    return sorted(__all__)
