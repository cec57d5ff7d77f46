"""How far `fastdiff bench` can be believed on this machine.

    python -m benchmarks.trust               50 comparisons of code with itself within a run, 50 or
                                             more between runs, and a planted slow-down of 10%
    python -m benchmarks.trust --pairs 10 --runs 3 --processes 10

Within a run, PyTorch's own function takes part as a user's kernel, so every verdict other than
"equal" or "unsure" is false. Between runs, each run is compared with the next one as --compare does
it, row by row. Then one op takes a tenth longer: in a last run, and in one that takes turns with
unchanged code as --against does it. Exits with 1 if a verdict is false or the slow-down is not
found; "cannot tell" is no false verdict, but does not find it either.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fastdiff import kernels
from fastdiff.bench import repeats
from fastdiff.bench.changes import Change, changes
from fastdiff.bench.clock import timer_for
from fastdiff.bench.contest import Conditions, UserKernel, op_row
from fastdiff.bench.plan import Plan, op_cases
from fastdiff.bench.repeats import Program, repeat

CPU = torch.device("cpu")
PLANTED = "geglu"
SLOWER = 0.1
PLAN = Plan(quick=True, parts=("ops",), threads=1)
"""One thread: threads that wait for one another multiply the noise."""
RUNS = 7
"""Each is compared with the next; each has nine rows."""


def false_verdicts(pairs: int, budget_s: float) -> list[str]:
    """The verdicts of a function against itself within one run that claim a difference."""
    conditions = Conditions(timer=timer_for(CPU), device=CPU, budget_s=budget_s)
    todo = [case for case, _ in op_cases(replace(PLAN, presets=("sd15",)))]
    todo = [case for case in todo if case.subject.op in ("group_norm_silu", PLANTED, "layer_norm")]
    found, seen = [], Counter[str]()
    for number in range(pairs):
        case = todo[number % len(todo)]
        kernel = UserKernel(name="itself:eager", op=case.subject.op, function=case.subject.eager)
        channels_last = replace(case, subject=replace(case.subject, norm=False))
        row = op_row(channels_last, conditions, ours=(), others=("eager",), kernel=kernel)
        entry = row[kernel.name]
        seen[entry.verdict or entry.note] += 1
        if entry.verdict in ("faster", "slower"):
            found.append(f"{row}: {entry.verdict} {entry.ratio}")
    say(f"within a run: {dict(seen)}")
    return found


def false_changes(runs: int, processes: int) -> tuple[list[str], tuple[repeats.Repeated, ...]]:
    """The changes that --compare claims between runs of the same code, and the last run."""
    found: list[str] = []
    seen: Counter[str] = Counter()
    (before,) = repeat(PLAN, [Program()], processes=processes)
    for number in range(1, runs):
        (after,) = repeat(PLAN, [Program()], processes=processes)
        for change in changes(before, after, threads=PLAN.threads):
            seen[change.verdict] += 1
            if change.verdict in ("faster", "slower"):
                found.append(line(change))
        say(f"between runs, {number + 1} of {runs}: {dict(seen)}")
        before = after
    return found, before


def missed(found: Sequence[Change], how: str) -> list[str]:
    """What should have been said of a run with the planted slow-down and was not."""
    wrong = []
    for change in found:
        planted = change.row.startswith(PLANTED)
        say(f"{how}: {line(change)}")
        if change.verdict != "slower" if planted else change.verdict in ("faster", "slower"):
            wrong.append(f"{how}: {line(change)}")
    return wrong


def line(change: Change) -> str:
    ratio = change.speedup
    return (
        f"{change.row}: {change.verdict} {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), "
        f"{change.clock}, margin {change.margin:.1%}"
    )


def say(text: str) -> None:
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{text}  [load {load}]", file=sys.stderr, flush=True)


@contextmanager
def slowed(op: str, share: float) -> Iterator[None]:
    """Let our CPU kernel of an op take longer by a share of its own time, of CPU time too."""

    def later(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.thread_time()
            result = forward(*args)
            end = start + (1 + share) * (time.thread_time() - start)
            while time.thread_time() < end:
                pass
            return result

        return run

    before = kernels.OPS[op].backends
    kernels.OPS[op].use({**before, "cpu": before["cpu"].wrapped(later)})
    try:
        yield
    finally:
        kernels.OPS[op].use(before)


def main(argv: Sequence[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trust",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per row (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=RUNS, help="(default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=repeats.PROCESSES, help="per run (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    planted = Program(module="benchmarks.slowed")
    wrong, last = false_changes(options.runs, options.processes)
    (after,) = repeat(PLAN, [planted], processes=options.processes)
    wrong += missed(changes(last, after, threads=PLAN.threads), "--compare")
    pair = repeat(PLAN, [Program(), planted], processes=options.processes)
    wrong += missed(changes(*pair, threads=PLAN.threads, paired=True), "--against")
    torch.set_num_threads(1)
    wrong += false_verdicts(options.pairs, options.seconds)
    for text in wrong:
        print(f"trust: {text}")
    print(f"{len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
