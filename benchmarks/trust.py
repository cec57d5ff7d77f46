"""How far `fastdiff bench` can be believed on this machine.

    python -m benchmarks.trust               50 comparisons of code with itself, and a planted
                                             slow-down of 10% that --compare must find
    python -m benchmarks.trust --pairs 10

A/A: PyTorch's own function takes part as a user's kernel, so every verdict other than "equal" or
"unsure" is false. Planted: one op takes a tenth longer in the second of two runs. Exits with 1 if a
verdict is false or the slow-down is not found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fastdiff import kernels
from fastdiff.bench.clock import timer_for
from fastdiff.bench.contest import Conditions, UserKernel, op_row
from fastdiff.bench.plan import Plan, device_facts, op_cases
from fastdiff.bench.record import environment
from fastdiff.bench.result import Change, Run, compare
from fastdiff.bench.run import Case

CPU = torch.device("cpu")
OPS = ("group_norm_silu", "geglu", "layer_norm")
PLANTED = "geglu"
SLOWER = 0.1


def cases() -> list[Case]:
    return [case for case, _ in op_cases(Plan(quick=True, presets=("sd15",), ops=OPS))]


def false_verdicts(pairs: int, budget_s: float) -> list[str]:
    """The verdicts of a function against itself that claim a difference."""
    conditions = Conditions(timer=timer_for(CPU), device=CPU, budget_s=budget_s)
    todo, found, seen = cases(), [], Counter[str]()
    for number in range(pairs):
        case = todo[number % len(todo)]
        kernel = UserKernel(name="itself:eager", op=case.subject.op, function=case.subject.eager)
        channels_last = replace(case, subject=replace(case.subject, norm=False))
        row = op_row(channels_last, conditions, ours=(), others=("eager",), kernel=kernel)
        entry = row[kernel.name]
        seen[entry.verdict or entry.note] += 1
        print(f"A/A {number + 1} of {pairs}: {dict(seen)}", end="\r", file=sys.stderr)
        if entry.verdict in ("faster", "slower"):
            found.append(f"{row}: {entry.verdict} {entry.ratio}")
    print(f"A/A: {dict(seen)}", file=sys.stderr)
    return found


def runs(budget_s: float) -> tuple[Run, Run]:
    """Two runs of the same code, the second with the planted slow-down."""
    conditions = Conditions(timer=timer_for(CPU), device=CPU, budget_s=budget_s)
    facts = {**environment(), **device_facts(CPU)}

    def run() -> Run:
        rows = [op_row(case, conditions, ours=("cpu",), others=("eager",)) for case in cases()]
        return Run(environment=facts, rows=tuple(rows))

    before = run()
    with slowed(PLANTED, SLOWER):
        return before, run()


@contextmanager
def slowed(op: str, share: float) -> Iterator[None]:
    """Let our CPU kernel of an op take longer by a share of its own time."""

    def later(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = forward(*args)
            end = start + (1 + share) * (time.perf_counter() - start)
            while time.perf_counter() < end:
                pass
            return result

        return run

    before = kernels.OPS[op].backends
    kernels.OPS[op].use({**before, "cpu": before["cpu"].wrapped(later)})
    try:
        yield
    finally:
        kernels.OPS[op].use(before)


def missed(changes: Sequence[Change]) -> list[str]:
    """What `compare` should have said and did not."""
    found = []
    for change in changes:
        planted = change.row.startswith(PLANTED)
        line = f"{change.row}: {change.verdict} {change.speedup}, noise {change.noise:.1%}"
        print(line, file=sys.stderr)
        if planted != (change.verdict == "slower") or change.verdict == "faster":
            found.append(line)
    return found


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
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads that wait for one another multiply the noise
    wrong = false_verdicts(options.pairs, options.seconds)
    wrong += missed(compare(*runs(2 * options.seconds)))
    for line in wrong:
        print(f"trust: {line}")
    print(f"{options.pairs} comparisons of code with itself, one slow-down: {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
