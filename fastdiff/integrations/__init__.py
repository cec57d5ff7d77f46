"""Other people's models and pipelines with our ops: `fastdiff.accelerate`, `compile_pass`."""

from fastdiff.integrations.report import Entry, Report
from fastdiff.integrations.swap import accelerate

__all__ = ["Entry", "Report", "accelerate"]
