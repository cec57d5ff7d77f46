"""Launch configs (tile sizes, warps, pipeline stages), by (tunable, GPU, dtype, shape class).

They are looked up first in the user's cache, written by ``fastdiff tune``, then in
``tuned/<gpu>.json``, then in the file of the GPU's architecture. Nothing is tuned on first use.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..choose import forget_plans
from ..triton import recorded_architecture

Config = dict[str, int]
"""Constants of a kernel by name, including num_warps and num_stages."""
TUNED = Path(__file__).parent / "tuned"
_overrides: dict[tuple[str, str | None], Config] = {}


@contextmanager
def override_config(name: str, config: Config, shape_class: str | None = None) -> Iterator[None]:
    """Use one config for a tunable instead of those in the files; the search tries candidates so.

    Args:
        shape_class: the class to override; None: all.
    """
    before = dict(_overrides)
    _overrides[name, shape_class] = config
    forget_plans()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        forget_plans()


def config(name: str, x: Tensor, shape_class: str) -> Config:
    """The launch config of a tunable for x's device and dtype.

    Raises:
        LookupError: no file has the class (a bug: a test checks that all files have all classes).
    """
    for key in ((name, shape_class), (name, None)):
        if key in _overrides:
            return _overrides[key]
    return lookup(name, gpu_of(x.device), x.dtype, shape_class)


@dataclass(frozen=True)
class Gpu:
    """The key of configs: a GPU's name and its architecture."""

    name: str
    architecture: str
    """Such as "sm_90" or "gfx942"."""

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device; one without a name for interpreted or recorded launches."""
    if device.type == "cuda":
        return _gpu_at(device.index if device.index is not None else torch.cuda.current_device())
    return Gpu("", recorded_architecture() or "sm_90")


@lru_cache
def _gpu_at(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Gpu(properties.name, properties.gcnArchName.partition(":")[0])
    return Gpu(properties.name, f"sm_{properties.major}{properties.minor}")


def tuned_cache() -> Path:
    """The folder that ``fastdiff tune`` writes to: under FASTDIFF_CACHE or the user's cache."""
    root = os.environ.get("FASTDIFF_CACHE")
    if root:
        return Path(root) / "tuned"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "fastdiff" / "tuned"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One file of configs."""

    path: Path
    measured: dict[str, Any] | None
    """Where, when and with which versions it was tuned; None: chosen without measurement."""
    configs: dict[str, dict[str, Config]] = field(repr=False)
    """Tunable -> "dtype/shape class" ("*/shape class" for all dtypes) -> config."""
    backends: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    """Op -> "dtype/shape class" (measured.py) -> the backend that measured fastest."""

    def find(self, name: str, dtype: torch.dtype, shape_class: str) -> Config | None:
        known = self.configs.get(name, {})
        exact = f"{str(dtype).removeprefix('torch.')}/{shape_class}"
        return known.get(exact) or known.get(f"*/{shape_class}")


def read_tuned(path: Path) -> Tuned:
    """Read a file of configs. Raises ValueError if it is not one."""
    try:
        content = json.loads(path.read_text())
        return Tuned(
            path=path,
            measured=content["measured"],
            configs=content["configs"],
            backends=content.get("backends", {}),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a valid file of launch configs ({type(error).__name__}: {error}); "
            "delete it or run 'fastdiff tune' again"
        ) from error


def architectures() -> tuple[str, ...]:
    """The architectures that have a file of configs."""
    names = sorted(path.stem for path in TUNED.glob("*.json"))
    return tuple(name for name in names if re.fullmatch(r"sm_\d+|gfx\w+", name))


def nearest_architecture(architecture: str) -> str:
    """The architecture itself if it has a file; else the nearest earlier one of the same vendor;
    else the first later one."""
    vendor = architecture[:2]
    known = [name for name in architectures() if name.startswith(vendor)]
    if architecture in known or not known:
        return architecture
    number = lambda name: int(re.sub(r"\D", "", name) or 0)  # noqa: E731
    earlier = [name for name in known if number(name) <= number(architecture)]
    return max(earlier, key=number) if earlier else min(known, key=number)


@lru_cache
def tuned_files(gpu: Gpu) -> tuple[Tuned, ...]:
    """The files that apply to a GPU, in order of precedence."""
    paths = [tuned_cache() / f"{gpu.slug}.json", TUNED / f"{gpu.slug}.json"] if gpu.name else []
    paths.append(TUNED / f"{nearest_architecture(gpu.architecture)}.json")
    return tuple(read_tuned(path) for path in paths if path.exists())


@cache
def lookup(name: str, gpu: Gpu, dtype: torch.dtype, shape_class: str) -> Config:
    """The config for a GPU from the files. Raises LookupError."""
    for tuned in tuned_files(gpu):
        found = tuned.find(name, dtype, shape_class)
        if found is not None:
            return found
    raise LookupError(f"no launch config for {name}, {dtype}, {shape_class} on {gpu}")


_on_new_configs: list[Callable[[], None]] = []


def on_new_configs(function: Callable[[], None]) -> None:
    """Register a function to call whenever `forget_configs` is called."""
    _on_new_configs.append(function)


def forget_configs() -> None:
    """Read the files again on the next call (after tuning has written one)."""
    tuned_files.cache_clear()
    lookup.cache_clear()
    forget_plans()
    for function in _on_new_configs:
        function()
