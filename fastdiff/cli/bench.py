"""``fastdiff bench``: is it faster on this machine, and what limits it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastdiff.cli.console import print_pairs, seconds
from fastdiff.cli.machine import Compute, DtypeName, device_and_dtype, progress
from fastdiff.cli.parsing import OptionalInt, OptionalName, OptionalPath, parse

if TYPE_CHECKING:
    from fastdiff.bench.changes import Change
    from fastdiff.bench.contest import UserKernel
    from fastdiff.bench.plan import Plan
    from fastdiff.bench.result import Entry, Row, Run

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure fastdiff's kernels, networks and images on this machine, next to what else there is.

    All providers of a row take turns, each result is compared with fp64, and a ratio counts only
    beyond the noise: the share by which the same code differs from itself. --kernel puts a function
    of yours on the shapes of real networks. --compare reads two files of --json and exits with 1 if
    anything became slower; --against measures this version and another in turns and does the same.
    'pip install fastdiff[bench]' is needed for --html.

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
    """Measure only these parts: ops, networks, images, jobs."""
    shape: OptionalName = None
    """Shape of x for one --op, in place of those of networks: 2,320,64,64."""
    batch: OptionalInt = None
    """Batch size of the networks."""
    size: OptionalInt = None
    """Height and width of the networks' latents: 32, 64, 128."""
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
    repeat: OptionalInt = None
    """Fresh processes that measure the rows again, which --compare needs; default: 10 with --json
    or --against, else none."""
    html: OptionalPath = None
    """Write a page with pictures to this file."""
    compare: Annotated[
        tuple[Path, Path] | None, tyro.conf.arg(metavar="BEFORE AFTER", help_behavior_hint="")
    ] = None
    """Measure nothing; compare two files that --json wrote."""
    against: OptionalPath = None
    """Measure this version and another in turns, and compare: a checkout, or the python of another
    environment."""


def main(words: Sequence[str]) -> int:
    options = parse(Bench, words, prog="fastdiff bench")
    return 0 if options is None else run(options)


def run(options: Bench) -> int:
    if options.compare is not None:
        return compare(*options.compare)
    from fastdiff.bench.user import user_kernel

    if options.repeat is not None and options.repeat < 0:
        raise ValueError(f"--repeat must be at least 0, got {options.repeat}")
    op = options.op[0] if len(options.op) == 1 else None
    kernel = None if options.kernel is None else user_kernel(options.kernel, op)
    plan = plan_of(options, kernel)
    if options.against is not None:
        return against(options.against, plan, kernel, options.repeat)
    return measure(options, plan, kernel)


def plan_of(options: Bench, kernel: UserKernel | None) -> Plan:
    from fastdiff.bench.plan import Plan

    device, _ = device_and_dtype(Compute(device=options.device))
    return Plan(
        parts=options.part,
        presets=options.preset,
        ops=options.op if kernel is None else (kernel.op,),
        shape=None if options.shape is None else shape_of(options.shape),
        batch=options.batch,
        size=options.size,
        dtype=options.dtype,
        providers=options.provider,
        backward=options.backward,
        quick=options.quick,
        minutes=options.minutes,
        device=str(device),
        threads=options.threads,
    )


def measure(options: Bench, plan: Plan, kernel: UserKernel | None) -> int:
    """Measure, print, and write the files."""
    from fastdiff.bench import page, repeats, result
    from fastdiff.bench import plan as planning

    with progress("measuring") as report:
        found = planning.measure(plan, kernel=kernel, progress=report, on_row=print_row)
    if not found.rows:
        raise ValueError(f"nothing was measured: {'; '.join(found.left_out)}")
    print_answer(found)
    processes = repeats.PROCESSES if options.repeat is None else options.repeat
    if options.json is not None:
        result.save(found, options.json)  # what is there is kept if a process fails
        if processes:
            with progress("in fresh processes") as report:
                (again,) = repeats.repeat(
                    plan,
                    [repeats.Program()],
                    kernel=kernel,
                    processes=processes,
                    progress=report,
                )
            found = replace(found, repeats=repeats.passed(again, found))
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
    """Print what changed between two runs. Returns 1 if anything became slower."""
    from fastdiff.bench import changes, result

    return print_changes(changes.compare(result.load(before), result.load(after)))


def against(place: Path, plan: Plan, kernel: UserKernel | None, repeat: int | None) -> int:
    """Measure another version and this one in turns; print what changed from it to this one."""
    import torch

    from fastdiff.bench import changes, repeats

    programs = [repeats.Program.of(place), repeats.Program()]
    processes = repeats.PROCESSES if repeat is None else repeat
    if processes < changes.LEAST:
        raise ValueError(f"--against needs --repeat {changes.LEAST} or more, got {processes}")
    with progress("both in turns") as report:
        before, after = repeats.repeat(
            plan, programs, kernel=kernel, processes=processes, progress=report
        )
    threads = plan.threads or torch.get_num_threads()
    return print_changes(changes.changes(before, after, threads=threads, paired=True))


def print_changes(found: Sequence[Change]) -> int:
    for change in sorted(found, key=lambda change: change.speedup.value):
        if change.verdict != "equal":
            print(said(change))
    count = Counter(change.verdict for change in found)
    print(
        f"{len(found)} compared: {count['slower']} slower, {count['faster']} faster, "
        f"{count['equal']} without a change of 10%, {count['unsure']} cannot tell"
    )
    if count["unsure"]:
        print(advice([change for change in found if change.verdict == "unsure"]))
    return 1 if count["slower"] else 0


def said(change: Change) -> str:
    ratio = change.speedup
    verdict = "cannot tell" if change.verdict == "unsure" else change.verdict
    return (
        f"{verdict}: {change.row} {change.provider}, {ratio.value:.2f} x the speed before "
        f"({ratio.low:.2f} to {ratio.high:.2f} in {change.clock}, {ratio.rounds} processes, "
        f"margin {change.margin:.0%})"
    )


def advice(unsure: Sequence[Change]) -> str:
    """What to do where a change of a tenth could have been missed."""
    needed = [change.processes_needed for change in unsure]
    if None in needed:
        return (
            "cannot tell: this machine itself changed too much between the two runs; measure both "
            "again, or use --against, which takes turns"
        )
    most = max(n for n in needed if n is not None)
    return (
        f"cannot tell: the noise hides a change of 10%; measure when the machine is less busy, or "
        f"with --repeat {most}"
    )
