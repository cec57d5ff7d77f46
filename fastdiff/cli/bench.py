"""``fastdiff bench``: is it faster on this machine, and what limits it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastdiff.cli.console import print_pairs, seconds
from fastdiff.cli.machine import Compute, DtypeName, device_and_dtype, progress
from fastdiff.cli.parsing import OptionalInt, OptionalName, OptionalPath, parse

if TYPE_CHECKING:
    from fastdiff.bench.result import Change, Entry, Row, Run

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure fastdiff's kernels, networks and images on this machine, next to what else there is.

    All providers of a row take turns, each result is compared with fp64, and a ratio counts only
    beyond the noise: the share by which the same code differs from itself. --kernel puts a function
    of yours on the shapes of real networks. --compare reads two files of --json and exits with 1 if
    anything became slower. 'pip install fastdiff[bench]' is needed for --html.

    Examples:
      fastdiff bench --quick
      fastdiff bench --op group_norm_silu --kernel mymodule:my_norm --html out/bench.html
      fastdiff bench --compare before.json after.json
    """

    quick: bool = False
    """Measure small networks and the largest calls only: about a minute."""
    op: Names = ()
    """Measure only calls of these ops: group_norm_silu, attention, geglu, ..."""
    preset: Names = ()
    """Networks that the calls come from: digits, sd15, sdxl, vae, adm256, dit-xl."""
    part: Names = ()
    """Measure only these parts: ops, networks, images."""
    shape: OptionalName = None
    """Shape of x for one --op, in place of those of networks: 2,320,64,64."""
    batch: OptionalInt = None
    """Batch size of the networks."""
    dtype: Annotated[
        DtypeName | None, tyro.conf.arg(metavar="{fp32,bf16,fp16}", help_behavior_hint="")
    ] = None
    """Default: fp32 on a CPU, bf16 on a GPU."""
    provider: Names = ()
    """Measure only these backends and rivals, and eager: cpu, triton, cuda, compile, ..."""
    backward: bool = False
    """Measure gradients."""
    kernel: OptionalName = None
    """A function of yours, module:function or file.py:function, called as PyTorch's counterpart."""
    minutes: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Time limit; default: 1 with --quick, else 20."""
    device: str = "auto"
    """Where to measure: auto, cpu, cuda, cuda:0, ..."""
    threads: OptionalInt = None
    """CPU threads of PyTorch and of our kernels."""
    json: OptionalPath = None
    """Write the results to this file."""
    html: OptionalPath = None
    """Write a page with pictures to this file."""
    compare: Annotated[
        tuple[Path, Path] | None, tyro.conf.arg(metavar="BEFORE AFTER", help_behavior_hint="")
    ] = None
    """Measure nothing; compare two files that --json wrote."""


def main(words: Sequence[str]) -> int:
    options = parse(Bench, words, prog="fastdiff bench")
    return 0 if options is None else run(options)


def run(options: Bench) -> int:
    if options.compare is not None:
        return compare(*options.compare)
    from fastdiff.bench import page, result
    from fastdiff.bench.plan import Plan, measure
    from fastdiff.bench.user import user_kernel

    device, _ = device_and_dtype(Compute(device=options.device))
    op = options.op[0] if len(options.op) == 1 else None
    kernel = None if options.kernel is None else user_kernel(options.kernel, op)
    plan = Plan(
        parts=options.part,
        presets=options.preset,
        ops=options.op if kernel is None else (kernel.op,),
        shape=None if options.shape is None else shape_of(options.shape),
        batch=options.batch,
        dtype=options.dtype,
        providers=options.provider,
        backward=options.backward,
        quick=options.quick,
        minutes=options.minutes,
        device=str(device),
        threads=options.threads,
    )
    with progress("measuring") as report:
        found = measure(plan, kernel=kernel, progress=report, on_row=print_row)
    if not found.rows:
        raise ValueError(f"nothing was measured: {'; '.join(found.left_out)}")
    print_answer(found)
    if options.json is not None:
        result.save(found, options.json)
        print(options.json)
    if options.html is not None:
        page.write(found, options.html)
        print(options.html)
    return 0


def shape_of(text: str) -> tuple[int, ...]:
    """``2,320,64,64`` -> (2, 320, 64, 64). Raises ValueError."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--shape must be positive numbers such as 2,320,64,64, got {text!r}")
    return shape


def print_row(row: Row) -> None:
    """A heading and a line per provider, in 80 columns."""
    print(f"{row}  {row.dtype}, noise {row.noise:.1%}")
    for entry in row.entries:
        print(f"  {entry.provider:<23.23}{line(entry, row)}")
    print(flush=True)


def line(entry: Entry, row: Row) -> str:
    from fastdiff.bench.record import duration

    if entry.median_s is None:
        return entry.note
    parts = [f"{duration(entry.median_s):>9}"]
    if entry.ratio is not None:
        parts.append(f"{entry.ratio.value:5.2f} x {entry.verdict:<6}")
    elif entry.provider == row.baseline:
        parts.append("best baseline ")
    else:
        parts.append(" " * 14)
    if entry.share is not None and entry.provider != row.limit:
        parts.append(f"{entry.share:4.0%} of {row.limit}")
    if entry.error is not None:
        parts.append(f"error {entry.error:.1f}")
    if entry.saves is not None and abs(entry.saves) >= 0.001:
        parts.append(f"job {entry.saves:+.1%}")
    return "  ".join(parts).rstrip()


def print_answer(found: Run) -> None:
    from fastdiff.bench.page import answer

    facts = found.environment
    device = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}"
    pairs = [("machine", device), ("took", seconds(60 * facts["minutes"]))]
    pairs += [("answer" if not place else "", text) for place, text in enumerate(answer(found))]
    if found.left_out:
        pairs.append(("left out", "; ".join(found.left_out) + "; use a larger --minutes"))
    pairs.append(("columns", COLUMNS))
    print_pairs(pairs)


COLUMNS = (
    "speed relative to the best baseline; share of the limit; error against fp64 relative to "
    "eager's; job: share of an evaluation saved in place of the fastest of ours (estimated)"
)


def compare(before: Path, after: Path) -> int:
    """Print what changed beyond the noise. Returns 1 if anything became slower."""
    from fastdiff.bench import result

    changes = result.compare(result.load(before), result.load(after))
    changed = [change for change in changes if change.verdict in ("faster", "slower")]
    for change in sorted(changed, key=lambda change: change.speedup.value):
        print(said(change))
    slower = sum(change.verdict == "slower" for change in changes)
    unsure = sum(change.verdict == "unsure" for change in changes)
    print(
        f"{len(changes)} compared: {slower} slower, {len(changed) - slower} faster, {unsure} "
        "within the noise or too few rounds to tell"
    )
    return 1 if slower else 0


def said(change: Change) -> str:
    speedup = change.speedup
    return (
        f"{change.verdict}: {change.row} {change.provider}, {speedup.value:.2f} x the speed before "
        f"({speedup.low:.2f} to {speedup.high:.2f}, noise {change.noise:.1%})"
    )
