"""Diffusion models with fused kernels: a complete, readable, tested system.

model = fastdiff.load(path)                           any checkpoint, as one `Model`
images = model.generate("a cat", seeds=[0, 1])        one call for the common case
for result in fastdiff.generate(model, jobs): ...     any mix of jobs, streamed
fastdiff.accelerate(pipeline)                         makes existing modules faster
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdiff import kernels as kernels
    from fastdiff.generate.job import ClassJob as ClassJob
    from fastdiff.generate.job import ControlSettings as ControlSettings
    from fastdiff.generate.job import ImageToImageJob as ImageToImageJob
    from fastdiff.generate.job import InpaintJob as InpaintJob
    from fastdiff.generate.job import InterpolationJob as InterpolationJob
    from fastdiff.generate.job import SampleSettings as SampleSettings
    from fastdiff.generate.job import TextJob as TextJob
    from fastdiff.generate.job import TextSettings as TextSettings
    from fastdiff.generate.job import UpscaleJob as UpscaleJob
    from fastdiff.generate.model import Images as Images
    from fastdiff.generate.model import Model as Model
    from fastdiff.generate.model import load as load
    from fastdiff.generate.run import Result as Result
    from fastdiff.generate.run import generate as generate
    from fastdiff.integrations import AccelerateError as AccelerateError
    from fastdiff.integrations import Report as Report
    from fastdiff.integrations import accelerate as accelerate
    from fastdiff.integrations import compile_pass as compile_pass
    from fastdiff.kernels import backend as backend

__version__ = "0.1.0"

_FROM = {
    "AccelerateError": "fastdiff.integrations",
    "ClassJob": "fastdiff.generate.job",
    "ControlSettings": "fastdiff.generate.job",
    "ImageToImageJob": "fastdiff.generate.job",
    "Images": "fastdiff.generate.model",
    "InpaintJob": "fastdiff.generate.job",
    "InterpolationJob": "fastdiff.generate.job",
    "Model": "fastdiff.generate.model",
    "Report": "fastdiff.integrations",
    "Result": "fastdiff.generate.run",
    "SampleSettings": "fastdiff.generate.job",
    "TextJob": "fastdiff.generate.job",
    "TextSettings": "fastdiff.generate.job",
    "UpscaleJob": "fastdiff.generate.job",
    "accelerate": "fastdiff.integrations",
    "backend": "fastdiff.kernels",
    "compile_pass": "fastdiff.integrations",
    "load": "fastdiff.generate.model",
}
_MODULES = ("generate", "kernels")  # packages; `fastdiff.generate` is callable as well
__all__ = [
    "AccelerateError",
    "ClassJob",
    "ControlSettings",
    "ImageToImageJob",
    "Images",
    "InpaintJob",
    "InterpolationJob",
    "Model",
    "Report",
    "Result",
    "SampleSettings",
    "TextJob",
    "TextSettings",
    "UpscaleJob",
    "accelerate",
    "backend",
    "compile_pass",
    "generate",
    "kernels",
    "load",
]

if not TYPE_CHECKING:  # a type checker takes a module's __getattr__ as leave for any name

    def __getattr__(name: str) -> object:
        """Import a public name on first use, so that `import fastdiff` does not load torch."""
        if name in _FROM:
            return getattr(importlib.import_module(_FROM[name]), name)
        if name in _MODULES:
            return importlib.import_module(f"fastdiff.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
