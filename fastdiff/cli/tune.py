"""``fastdiff tune``: search for the fastest launch configs on this machine's GPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastdiff.cli.console import print_numbers, seconds
from fastdiff.cli.machine import TORCH_NAMES, Compute, DtypeName, device_and_dtype, progress
from fastdiff.cli.parsing import OptionalPath, parse

if TYPE_CHECKING:
    from fastdiff.bench.tune import Found


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search for the fastest launch configs of the Triton kernels on this machine's GPU.

    Times the candidates of each op, checks that the fastest one computes the same as the current
    one, and writes it to the user's cache (FASTDIFF_CACHE, else ~/.cache/fastdiff), which later
    runs read first. Other configs are kept. 'fastdiff doctor' shows the files in use.

    Examples:
      fastdiff tune
      fastdiff tune --op attention group_norm_silu --dtype bf16 --budget-minutes 5
      fastdiff tune --device cuda:1 --export tuned.json
    """

    op: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Tune only these ops, by the names in the table's first column."""
    dtype: Annotated[tuple[DtypeName, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Tune only these dtypes."""
    shape_class: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")
    ] = ()
    """Tune only these shape classes, which follow the dtype in the table."""
    budget_minutes: float = 20.0
    """Time limit of the search in minutes."""
    device: str = "auto"
    """Which GPU to use: auto, cuda, cuda:0, ..."""
    workers: int = min(16, os.cpu_count() or 1)
    """Number of processes that compile candidates in advance; 0: none."""
    export: OptionalPath = None
    """Also write the results to this file, in the format of kernels/tuning/tuned/<gpu>.json."""

    def __post_init__(self) -> None:
        if not 0 < self.budget_minutes < float("inf"):
            raise ValueError(f"--budget-minutes must be positive, got {self.budget_minutes:g}")
        if self.workers < 0:
            raise ValueError(f"--workers must be at least 0, got {self.workers}")


def main(words: Sequence[str]) -> int:
    options = parse(Tune, words, prog="fastdiff tune")
    return 0 if options is None else run(options)


def run(options: Tune) -> int:
    import torch

    from fastdiff.bench import tune
    from fastdiff.bench.clock import timer_for
    from fastdiff.kernels.triton import INTERPRETED, triton
    from fastdiff.kernels.tuning import configs

    dtypes = [getattr(torch, TORCH_NAMES[name]) for name in options.dtype]
    todo = tune.cases(options.op, dtypes, options.shape_class)
    if options.device == "auto" and not torch.cuda.is_available():
        raise ValueError("tuning needs a GPU, but torch finds none on this machine")
    device, _ = device_and_dtype(Compute(device=options.device))
    if device.type != "cuda":
        raise ValueError(f"tuning needs a GPU, got --device {options.device}")
    if triton is None or INTERPRETED:
        raise ValueError(
            "tuning needs triton without its interpreter; install triton and unset TRITON_INTERPRET"
        )
    gpu = configs.gpu_of(device)
    path = tune.cache_file(gpu)
    aside = tune.set_aside_broken(path)
    if aside:
        print(f"{path} could not be read; it is now {aside}")
    measured = tune.facts(gpu)
    found: list[Found] = []
    with progress("tuning") as report:
        for one in tune.tune(
            todo,
            gpu=gpu,
            device=device,
            timer=timer_for(device),
            budget_s=options.budget_minutes * 60,
            report=report,
            workers=options.workers,
        ):
            found.append(one)
            tune.save([one], measured, path)  # Ctrl-C keeps what is done
    if options.export:
        tune.save(found, measured, Path(options.export))
    print_found(found)
    print(f"\nwritten: {path}")
    if options.export:
        print(f"written: {options.export}")
    return 0


def print_found(found: Sequence[Found]) -> None:
    """Print the table, and why candidates were left out."""
    heading = ("op", "dtype/class", "before", "", "after", "", "gain", "tried")
    rows: list[tuple[str, ...]] = [heading]
    for one in found:
        same = one.after == one.before
        rows.append(
            (
                one.case.tunable,
                one.case.key,
                config_text(one.before),
                microseconds(one.before_s),
                "kept" if same else config_text(one.after),
                "" if same else microseconds(one.after_s),
                "" if same else f"{one.gain:.2f} x",
                f"{one.tried} of {one.tried + one.left}",
            )
        )
    print_numbers(rows, left=True)
    rejected: Counter[str] = sum((one.rejected for one in found), Counter())
    left_out = [f"{count} {reason}" for reason, count in rejected.most_common()]
    left = sum(one.left for one in found)
    if left:
        left_out.append(f"{left} not tried (use a larger --budget-minutes)")
    if left_out:
        print(f"\ncandidates left out: {'; '.join(left_out)}")


def config_text(config: dict[str, int]) -> str:
    """``ROWS 4, warps 8``."""
    return ", ".join(f"{name.removeprefix('num_')} {value}" for name, value in config.items())


def microseconds(value: float) -> str:
    return f"{value * 1e6:.1f} µs" if value < 1e-3 else seconds(value)
