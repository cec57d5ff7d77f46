"""Other people's models and pipelines with our ops: `fastdiff.accelerate`, `compile_pass`."""

from typing import Any

from fastdiff.integrations.report import AccelerateError, Entry, Report
from fastdiff.integrations.swap import accelerate

__all__ = ["AccelerateError", "Entry", "Report", "accelerate", "compile_pass"]


def __getattr__(name: str) -> Any:
    """`compile_pass`: Inductor is imported when it is asked for."""
    if name == "compile_pass":
        from fastdiff.integrations.inductor import compile_pass

        return compile_pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
