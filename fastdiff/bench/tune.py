"""The search for launch configs behind ``fastdiff tune``, and the files that apply to a GPU.

For each (tunable, shape class, dtype), the config in use and the op's candidates are timed on the
current GPU. A candidate that does not compile or does not fit is counted and skipped. The fastest
one must give the same results as the config in use before it is written to the user's cache.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import fastdiff
from fastdiff.bench.clock import Method, Timer
from fastdiff.bench.compile import compile_launch, target
from fastdiff.bench.tunables import TUNABLES
from fastdiff.files import write_text
from fastdiff.kernels.triton import INTERPRETED, recording_launches
from fastdiff.kernels.tuning import Config, Gpu, Tuned, configs

GAIN = 1.02
"""Speedup that a candidate needs to replace the config in use; anything less is noise."""
SMALL_S = 20e-6
"""Calls shorter than this are timed in a CUDA graph, because their launches would take longer."""
CASE_S = 0.05
"""Seconds of timed calls per candidate."""
# Relative to the largest and to the root-mean-square number: two configs only differ in rounding.
TOLERANCE = {
    torch.float32: 64 * torch.finfo(torch.float32).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One key of a file of configs."""

    tunable: str
    shape_class: str
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}/{self.shape_class}"

    def __str__(self) -> str:
        return f"{self.tunable} {self.key}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of searching one case."""

    case: Case
    before: Config
    """The config in use."""
    after: Config
    """The fastest config, or the one in use if none is faster by `GAIN`."""
    before_s: float
    after_s: float
    method: Method
    tried: int
    """Candidates that were compiled and, if possible, timed."""
    left: int
    """Candidates skipped for lack of time."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> number of candidates."""

    @property
    def gain(self) -> float:
        return self.before_s / self.after_s


def cases(
    ops: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (),
    shape_classes: Sequence[str] = (),
) -> list[Case]:
    """The cases to tune; an empty argument selects all.

    Raises:
        ValueError: unknown op or shape class, or a combination that does not exist.
    """
    for what, asked, known in (
        ("op", ops, list(TUNABLES)),
        ("shape class", shape_classes, [c for t in TUNABLES.values() for c in t.shape_classes]),
    ):
        for word in asked:
            if word not in known:
                listed = ", ".join(dict.fromkeys(known))
                raise ValueError(f"unknown {what} {word!r}; expected one of {listed}")
    found = [
        Case(tunable=name, shape_class=shape_class, dtype=dtype)
        for name, tunable in TUNABLES.items()
        for shape_class, dtype in tunable.pairs()
        if (not ops or name in ops)
        and (not dtypes or dtype in dtypes)
        and (not shape_classes or shape_class in shape_classes)
    ]
    if not found:
        raise ValueError(
            "nothing to tune: no case has this combination of ops, dtypes and shape classes"
        )
    return found


# One case


def search(
    case: Case, *, gpu: Gpu, device: torch.device, timer: Timer, budget_s: float = 60.0
) -> Found:
    """Time the config in use, then the candidates in random order until the budget is spent.

    Raises:
        RuntimeError: the config in use does not run (a bug, or the GPU has failed).
    """
    end = time.monotonic() + budget_s
    before = configs.lookup(case.tunable, gpu, case.dtype, case.shape_class)
    call = _prepared(case, device)[0]
    with configs.override_config(case.tunable, before, case.shape_class):
        once = timer(call, method="events", budget_s=CASE_S / 5)
        method: Method = "graph" if once.median_s < SMALL_S else "events"
        before_s = timer(call, method=method, budget_s=CASE_S).median_s
    timed: list[tuple[float, Config]] = []
    rejected: Counter[str] = Counter()
    todo = ordered_candidates(case, before)
    tried = 0
    while todo and time.monotonic() < end:
        candidate = todo.pop(0)
        tried += 1
        try:
            with configs.override_config(case.tunable, candidate, case.shape_class):
                timed.append((timer(call, method=method, budget_s=CASE_S).median_s, candidate))
        except Exception as error:
            reason = _refusal(error)
            if reason is None:
                raise RuntimeError(f"{case}, {candidate}: {error}") from error
            rejected[reason] += 1
    after, after_s = before, before_s
    for seconds, candidate in sorted(timed, key=lambda pair: pair[0]):
        if before_s / seconds < GAIN:
            break
        again = []
        for chosen in (before, candidate):  # time again: the best of many is lucky, clocks drift
            with configs.override_config(case.tunable, chosen, case.shape_class):
                again.append(timer(call, method=method, budget_s=CASE_S).median_s)
        if again[0] / again[1] < GAIN:
            rejected["no faster when timed again"] += 1
        elif not same_results(case, before, candidate, device):
            rejected["gives different results"] += 1
        else:
            after, (before_s, after_s) = candidate, again
            break
    return Found(
        case=case,
        before=before,
        after=after,
        before_s=before_s,
        after_s=after_s,
        method=method,
        tried=tried,
        left=len(todo),
        rejected=rejected,
    )


def ordered_candidates(case: Case, before: Config) -> list[Config]:
    """All candidates except the config in use, shuffled so that a short search covers each kind."""
    listed = TUNABLES[case.tunable].candidates(case.shape_class, case.dtype)
    unique = {json.dumps(c, sort_keys=True): c for c in listed if c != before}
    candidates = list(unique.values())
    random.Random(str(case)).shuffle(candidates)
    return candidates


def _refusal(error: Exception) -> str | None:
    """Why a candidate is rejected; None for an error that no config should cause."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OutOfResources" in names:
        return "needs more than the GPU has"
    if names & {"CompilationError", "PTXASError", "PassManagerError", "MLIRError"}:
        return "does not compile"
    if "PassManager" in str(error) or "failed to legalize" in str(error):
        return "does not compile"  # raised by the compiler as a plain RuntimeError
    return None


class _Filled(TorchDispatchMode):
    """Fills uninitialized tensors, which may contain NaN, with normal numbers (integers: zeros)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"):
            result = result.normal_() if result.is_floating_point() else result.zero_()
        new = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        known = {(t.data_ptr(), t.shape, t.stride()) for t in self.made}
        self.made += [t for t in new if (t.data_ptr(), t.shape, t.stride()) not in known]
        return result


def _prepared(case: Case, device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    """The call to time, on random numbers that are the same every time, and its operands."""
    tunable = TUNABLES[case.tunable]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        with _Filled() as filled:
            calls = tunable.calls(case.shape_class, case.dtype, str(device))
    return calls[0], filled.made


def same_results(case: Case, one: Config, other: Config, device: torch.device) -> bool:
    """Whether two configs give the same outputs and the same modified operands."""
    results = []
    for chosen in (one, other):
        call, operands = _prepared(case, device)
        with configs.override_config(case.tunable, chosen, case.shape_class):
            returned = [t for t in tree_flatten(call())[0] if isinstance(t, Tensor)]
        results.append([*returned, *operands])
    return all(map(agrees, *results))


def agrees(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding (integers: exactly)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if not one.numel():
        return True
    a, b = one.float(), other.float()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    tolerance, error = TOLERANCE.get(one.dtype, TOLERANCE[torch.float32]), a - b
    largest = bool(error.abs().max() <= tolerance * a.abs().max())
    return largest and bool(error.square().mean() <= (tolerance * tolerance) * a.square().mean())


# All cases


def tune(
    todo: Sequence[Case],
    *,
    gpu: Gpu,
    device: torch.device,
    timer: Timer,
    budget_s: float,
    report: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 0,
) -> Iterator[Found]:
    """`search` each case, with a share of the time in proportion to its number of candidates.

    Args:
        report: called with the numbers of finished and of all cases.
        workers: processes that compile candidates in advance; 0: compile each when it is timed.
    """
    end = time.monotonic() + budget_s
    sizes = [1 + len(list(TUNABLES[c.tunable].candidates(c.shape_class, c.dtype))) for c in todo]
    with compiled_ahead(todo, gpu=gpu, workers=workers):
        for done, case in enumerate(todo):
            report(done, len(todo))
            share = max(0.0, end - time.monotonic()) * sizes[done] / sum(sizes[done:])
            yield search(case, gpu=gpu, device=device, timer=timer, budget_s=share)
        report(len(todo), len(todo))


@contextlib.contextmanager
def compiled_ahead(todo: Sequence[Case], *, gpu: Gpu, workers: int) -> Iterator[None]:
    """Fill triton's disk cache in other processes, in the order in which `tune` needs candidates.

    A candidate that they have not reached in time is compiled when it is timed.
    """
    if not workers or INTERPRETED:
        yield
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for case in todo:
            before = configs.lookup(case.tunable, gpu, case.dtype, case.shape_class)
            for candidate in ordered_candidates(case, before):
                pool.submit(compile_one, case, candidate, gpu.architecture)
        yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def compile_in_use(todo: Sequence[Case], *, gpu: Gpu, workers: int) -> None:
    """Compile all kernel variants with the configs in use, in several processes."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for case in todo:
            chosen = configs.lookup(case.tunable, gpu, case.dtype, case.shape_class)
            pool.submit(compile_one, case, chosen, gpu.architecture, variants=True)


def compile_one(case: Case, chosen: Config, architecture: str, *, variants: bool = False) -> None:
    """Compile everything that a config launches for an architecture, on meta tensors.

    Errors are ignored here, because running the kernel raises them again.

    Args:
        variants: compile all calls of the tunable, not only the one that is timed.
    """
    from triton.runtime import driver

    driver.set_active(_NoDriver(architecture))
    calls = TUNABLES[case.tunable].calls(case.shape_class, case.dtype, "meta")
    with (
        contextlib.suppress(Exception),
        recording_launches(architecture) as launches,
        configs.override_config(case.tunable, chosen, case.shape_class),
    ):
        for call in calls if variants else calls[:1]:
            call()
        for launch in launches:
            compile_launch(launch)


@dataclass
class _NoDriver:
    """The part of a triton driver that compilation needs."""

    architecture: str

    def get_current_target(self) -> Any:
        return target(self.architecture)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


# Files


def facts(gpu: Gpu) -> dict[str, Any]:
    """The facts that a measurement depends on."""
    import triton

    return {
        "gpu": gpu.name,
        "architecture": gpu.architecture,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "fastdiff": fastdiff.__version__,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed package."""
    folder = Path(fastdiff.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cache_file(gpu: Gpu) -> Path:
    """The user's file of configs for a GPU."""
    return configs.tuned_cache() / f"{gpu.slug}.json"


def set_aside_broken(path: Path) -> Path | None:
    """Rename a file that is not a valid file of configs, so that a new one can replace it.

    Returns:
        Its new name, or None if nothing was wrong.
    """
    if not path.exists():
        return None
    try:
        configs.read_tuned(path)
    except ValueError:
        aside = path.with_suffix(".broken")
        os.replace(path, aside)
        configs.forget_configs()
        return aside
    return None


def save(found: Iterable[Found], measured: dict[str, Any], path: Path) -> None:
    """Add configs to a file, atomically. Entries that were not searched are kept.

    Raises:
        ValueError: the file exists but is not a valid file of configs.
    """
    old = configs.read_tuned(path) if path.exists() else None
    entries = {name: dict(keys) for name, keys in (old.configs if old else {}).items()}
    kept = sum(map(len, entries.values()))
    for one in found:
        kept -= one.case.key in entries.get(one.case.tunable, {})
        entries.setdefault(one.case.tunable, {})[one.case.key] = one.after
    if old and old.measured and "backends" in old.measured:
        measured = {**measured, "backends": old.measured["backends"]}
    if old and old.measured and kept:  # some entries come from earlier searches
        last = {name: fact for name, fact in old.measured.items() if name != "earlier"}
        earlier = old.measured.get("earlier", []) + ([last] if last != measured else [])
        measured = {**measured, **({"earlier": earlier} if earlier else {})}
    write_text(path, text_of(measured, entries, old.backends if old else {}))
    configs.forget_configs()


def save_backends(fastest: dict[str, dict[str, str]], measured: dict[str, Any], path: Path) -> None:
    """Add the backends that `auto` tries first to a file, atomically (kernels/tuning/measured.py).

    Args:
        fastest: op -> "dtype/shape class" -> backend.

    Raises:
        ValueError: the file exists but is not a valid file of configs.
    """
    old = configs.read_tuned(path) if path.exists() else None
    backends = {op: dict(keys) for op, keys in (old.backends if old else {}).items()}
    for op, keys in fastest.items():
        backends.setdefault(op, {}).update(keys)
    origin = {**(old.measured if old and old.measured else measured), "backends": measured}
    write_text(path, text_of(origin, old.configs if old else {}, backends))
    configs.forget_configs()


def text_of(
    measured: dict[str, Any] | None,
    configs: dict[str, dict[str, Config]],
    backends: dict[str, dict[str, str]] | None = None,
) -> str:
    """The text of a file of configs, one line per config."""
    text = f'{{\n "measured": {json.dumps(measured)},\n "configs": {_section(configs)}'
    return text + (f',\n "backends": {_section(backends)}' if backends else "") + "\n}\n"


def _section(entries: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name in sorted(entries):
        lines = ",\n".join(
            f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in entries[name].items()
        )
        parts.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}" if lines else f'  "{name}": {{}}')
    body = ",\n".join(parts)
    return f"{{\n{body}\n }}"


# The files that apply to a GPU


def describe(gpu: Gpu) -> list[str]:
    """Describe the files of configs that apply to a GPU, one line each."""
    lines = []
    for tuned in configs.tuned_files(gpu):
        count = sum(map(len, tuned.configs.values()))
        if tuned.measured:
            lines.append(f"{count} tuned on {_when(tuned)}: {tuned.path}")
    if not any(tuned.measured for tuned in configs.tuned_files(gpu)):
        nearest = configs.nearest_architecture(gpu.architecture)
        lines.append(
            f"no configs measured for this GPU: using those of {nearest}, chosen without "
            "measurement; run 'fastdiff tune'"
        )
    return lines


def shipped() -> dict[str, str]:
    """File in the package -> where it was measured."""
    files = map(configs.read_tuned, sorted(configs.TUNED.glob("*.json")))
    return {tuned.path.stem: _when(tuned) for tuned in files}


def _when(tuned: Tuned) -> str:
    origin = tuned.measured
    if not origin:
        return "chosen without measurement"
    date = str(origin["date"])[:10]
    return f"{origin['gpu']}, {date}, torch {origin['torch']}, triton {origin['triton']}"
