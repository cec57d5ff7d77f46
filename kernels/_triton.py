"""What the Triton kernels of all ops share: the launch, the configs, the registration, small device
functions.

Every kernel is started by `launch`. That makes the launches visible: `recording_launches` keeps
them instead of running them, so that a call on meta tensors tells which kernels, grids and
constants a real one would use. `benchmarks.resources` compiles those ahead of time for GPUs that
this machine does not have.

A launch config (tile sizes, warps, pipeline stages) is looked up by (op, GPU, dtype, shape class):
in the user's cache, written by ``fastdiff tune``; in ``tuned/<gpu>.json``; in the file of the GPU's
architecture. Nothing is searched on first use.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import UNAVAILABLE, Implementation, Op

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
    UNAVAILABLE["triton"] = "the package triton is not installed (its wheels are for Linux)"

Config = dict[str, int]
"""Constants of a kernel by name, with num_warps and num_stages among them."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""True under TRITON_INTERPRET=1: kernels run in Python, on CPU tensors too. Fixed at import."""
TUNED = Path(__file__).parent / "tuned"


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without triton the function as it is, never to be called."""
    return function if triton is None else triton.jit(function)


def constexpr_function(function: Callable[..., Any]) -> Any:
    """`triton.constexpr_function`: plain Python on constants, called inside a kernel."""
    return function if triton is None else triton.constexpr_function(function)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


# Launches


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One start of a kernel: what it was given, by parameter name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Tensors, numbers and None, then constants."""
    num_warps: int
    num_stages: int

    def compile(self) -> Any:
        """Compile it as a start of the kernel would, for triton's active driver; run nothing."""
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        values = [v for name, v in self.arguments.items() if name not in constants]
        return self.kernel.warmup(
            *values,
            grid=self.grid,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **{name: self.arguments[name] for name in constants},
        )


_recorded: list[Launch] | None = None
_architecture: str | None = None


@contextmanager
def recording_launches(architecture: str | None = None) -> Iterator[list[Launch]]:
    """Keep the launches in a list instead of running them; configs are those of `architecture`.

    For calls on meta tensors: what a launcher returns holds no data.
    """
    global _recorded, _architecture
    before = _recorded, _architecture
    _recorded, _architecture = [], architecture
    try:
        yield _recorded
    finally:
        _recorded, _architecture = before


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run a kernel on the device and the current stream of its first tensor.

    Args:
        kernel: a function under `jit`.
        grid: programs along up to three axes; nothing runs if one is 0.
        arguments: the kernel's tensors and numbers, in order.
        constants: its `tl.constexpr` parameters.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        names = kernel.arg_names
        bound = {**dict(zip(names, arguments, strict=False)), **constants}
        assert set(bound) == set(names), f"{set(names) ^ set(bound)} of {kernel.__name__}"
        _recorded.append(
            Launch(
                kernel=kernel,
                grid=tuple(grid),
                arguments=bound,
                num_warps=num_warps,
                num_stages=num_stages,
            )
        )
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)


# Configs


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """The kernels of one op that share a config, and how to search for it.

    `fastdiff tune` times ``calls(...)[0]`` under every candidate; `benchmarks.resources` compiles
    what all the calls launch, for every architecture.
    """

    name: str
    """Key in the JSON files; the op's name, or that with "_backward"."""
    shape_classes: tuple[str, ...]
    candidates: Callable[[str, torch.dtype], Iterable[Config]]
    """(shape class, dtype) -> the configs to try."""
    calls: Callable[[str, torch.dtype, str], list[Callable[[], Any]]]
    """(shape class, dtype, device) -> calls on tensors of that class: the one that is timed, then
    other variants of the kernels (layouts, options)."""
    all_calls: Callable[[str, torch.dtype, str], list[Callable[[], Any]]] | None = None
    """Calls of every size and option that takes the config of the class, where these are too many
    to be compiled each time; None: `calls` are all."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    takes: Callable[[str, torch.dtype], bool] = lambda shape_class, dtype: True
    """(shape class, one of `dtypes`) -> whether there is such a config."""

    def pairs(self) -> list[tuple[str, torch.dtype]]:
        """The (shape class, dtype) that have a config."""
        return [(c, d) for c in self.shape_classes for d in self.dtypes if self.takes(c, d)]


TUNABLES: dict[str, Tunable] = {}


def define_tunable(tunable: Tunable) -> None:
    """Enter a tunable in TUNABLES."""
    assert tunable.name not in TUNABLES, f"tunable {tunable.name} is defined twice"
    TUNABLES[tunable.name] = tunable


_overrides: dict[tuple[str, str | None], Config] = {}


@contextmanager
def override_config(name: str, config: Config, shape_class: str | None = None) -> Iterator[None]:
    """Use one config for a tunable, whatever the files say: the search tries candidates by it.

    Args:
        shape_class: the class it holds for; None: all.
    """
    before = dict(_overrides)
    _overrides[name, shape_class] = config
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def config(name: str, x: Tensor, shape_class: str) -> Config:
    """The launch config of a tunable for x's device and dtype.

    Raises:
        LookupError: no file has the class (our bug: a test holds that all files have all classes).
    """
    for key in ((name, shape_class), (name, None)):
        if key in _overrides:
            return _overrides[key]
    return lookup(name, gpu_of(x.device), x.dtype, shape_class)


@dataclass(frozen=True)
class Gpu:
    """What configs are kept for: the GPU's name and its architecture."""

    name: str
    architecture: str
    """Such as "sm_90" or "gfx942"."""

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device; for interpreted or recorded launches one of no name."""
    if device.type == "cuda":
        return _gpu_at(device.index if device.index is not None else torch.cuda.current_device())
    return Gpu("", _architecture or "sm_90")


@lru_cache
def _gpu_at(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Gpu(properties.name, properties.gcnArchName.partition(":")[0])
    return Gpu(properties.name, f"sm_{properties.major}{properties.minor}")


def target(architecture: str) -> Any:
    """What triton calls an architecture."""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def tuned_cache() -> Path:
    """Where ``fastdiff tune`` writes: FASTDIFF_CACHE or the user's cache folder."""
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
    """Where, when and with which versions it was searched; None: chosen without measurement."""
    configs: dict[str, dict[str, Config]] = field(repr=False)
    """Tunable -> "dtype/shape class" ("*/shape class" for all dtypes) -> config."""
    backends: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    """Op -> "dtype/shape class" (measured.py) -> the backend that measured fastest."""

    def find(self, name: str, dtype: torch.dtype, shape_class: str) -> Config | None:
        known = self.configs.get(name, {})
        exact = f"{str(dtype).removeprefix('torch.')}/{shape_class}"
        return known.get(exact) or known.get(f"*/{shape_class}")


def read_tuned(path: Path) -> Tuned:
    """Read a file of configs. Raises ValueError when it is not one."""
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
            f"{path} is no file of launch configs ({type(error).__name__}: {error}); "
            "remove it or run 'fastdiff tune' again"
        ) from error


def architectures() -> tuple[str, ...]:
    """The architectures with a file of their own."""
    names = sorted(path.stem for path in TUNED.glob("*.json"))
    return tuple(name for name in names if re.fullmatch(r"sm_\d+|gfx\w+", name))


def nearest_architecture(architecture: str) -> str:
    """The one itself; else the last earlier one of the same vendor, else the first later one."""
    vendor = architecture[:2]
    known = [name for name in architectures() if name.startswith(vendor)]
    if architecture in known or not known:
        return architecture
    number = lambda name: int(re.sub(r"\D", "", name) or 0)  # noqa: E731
    earlier = [name for name in known if number(name) <= number(architecture)]
    return max(earlier, key=number) if earlier else min(known, key=number)


@lru_cache
def tuned_files(gpu: Gpu) -> tuple[Tuned, ...]:
    """The files that hold for a GPU, first come first served."""
    paths = [tuned_cache() / f"{gpu.slug}.json", TUNED / f"{gpu.slug}.json"] if gpu.name else []
    paths.append(TUNED / f"{nearest_architecture(gpu.architecture)}.json")
    return tuple(read_tuned(path) for path in paths if path.exists())


@cache
def lookup(name: str, gpu: Gpu, dtype: torch.dtype, shape_class: str) -> Config:
    """The config that the files have for a GPU. Raises LookupError."""
    for tuned in tuned_files(gpu):
        found = tuned.find(name, dtype, shape_class)
        if found is not None:
            return found
    raise LookupError(f"no launch config of {name} for {dtype} {shape_class} on {gpu}")


_on_new_configs: list[Callable[[], None]] = []


def on_new_configs(function: Callable[[], None]) -> None:
    """Call a function whenever `forget_configs` is called."""
    _on_new_configs.append(function)


def forget_configs() -> None:
    """Read the files anew on the next call (after a search wrote one)."""
    tuned_files.cache_clear()
    lookup.cache_clear()
    for function in _on_new_configs:
        function()


# Registration


def why_not(*tensors: Tensor | None) -> str | None:
    """What stands against these tensors in every Triton kernel, or None."""
    for x in tensors:
        if x is not None and x.is_floating_point() and x.dtype not in DTYPES:
            return f"it takes fp32, fp16 and bf16, got {str(x.dtype).removeprefix('torch.')}"
    return None


def register(
    op: Op,
    function: Callable[..., Any],
    objection: Callable[..., str | None],
) -> None:
    """Enter the Triton implementation of an op, if there is a triton to run it.

    On CPU tensors it runs only when it is asked for by name and under TRITON_INTERPRET=1.
    """
    if triton is None:
        return
    op.register(
        Implementation(
            backend="triton",
            function=function,
            why_not=objection,
            devices=("cuda",),
            emulated_on=("cpu",) if INTERPRETED else (),
        )
    )


# Views


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (rows, D) with the last dimension dense; a view where the strides allow it."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """(..., D) as dense rows: a tensor that holds them, how many, how far apart. x has numbers."""
    if x.is_contiguous():  # no view has to be made
        d = x.shape[-1]
        return x, x.numel() // d, d
    flat = as_rows(x)
    return flat, len(flat), flat.stride(0)


# Device functions


@jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)) in fp32: exact to the last places, no overflow (exp goes to inf or 0)."""
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def two_sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a + b rounded, and what the rounding took off (Knuth 1969, TAOCP 4.2.2, theorem B)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


# Moments: a count, the mean of so many numbers, and the sum of their squared differences from it.
# Merged by the formula of Chan, Golub, LeVeque 1979, eq. 2.1; E[x^2] - E[x]^2 would lose all digits
# where the mean is large.


@jit
def with_tile(
    values: tl.tensor,
    inside: tl.tensor,
    more: tl.tensor,
    count: tl.tensor,
    mean: tl.tensor,
    squares: tl.tensor,
) -> tl.tensor:
    """Mean and squares of `count` numbers and of the `more` numbers of a tile together."""
    values = tl.where(inside, values, 0.0)
    tile_mean = tl.sum(values) / more
    apart = tl.where(inside, values - tile_mean, 0.0)
    delta = tile_mean - mean
    share = more / (count + more)
    return mean + delta * share, squares + tl.sum(apart * apart) + delta * delta * count * share


@jit
def merged(counts: tl.tensor, means: tl.tensor, squares: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Mean and squares of `count` numbers from those of their parts along axis 0; a part may have
    none. The mean is taken twice, the second time above the first."""
    mean = tl.sum(means * counts, 0) / count
    mean += tl.sum((means - tl.expand_dims(mean, 0)) * counts, 0) / count
    apart = means - tl.expand_dims(mean, 0)
    return mean, tl.sum(squares + counts * apart * apart, 0)
