"""Our ops in existing models and pipelines: `fastdiff.accelerate` and `fastdiff.compile_pass`."""

from typing import TYPE_CHECKING

from fastdiff.integrations.report import AccelerateError, Entry, Report
from fastdiff.integrations.swap import accelerate
from fastdiff.integrations.verify import VerificationWarning

if TYPE_CHECKING:
    from fastdiff.integrations.inductor import compile_pass as compile_pass

__all__ = [
    "AccelerateError",
    "Entry",
    "Report",
    "VerificationWarning",
    "accelerate",
    "compile_pass",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import `compile_pass` on first use, because it imports Inductor."""
        if name == "compile_pass":
            from fastdiff.integrations.inductor import compile_pass

            return compile_pass
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
