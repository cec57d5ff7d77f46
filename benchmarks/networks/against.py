"""Compare this checkout's networks with another's on this CPU, in turns, to catch slowdowns.

    python -m benchmarks.networks.against ../older-checkout
    python -m benchmarks.networks.against ../older-checkout --only digits --rounds 9 --at-least 0.98

Each checkout runs in a process of its own, with the same random weights. A round is one call of
each, alternating which goes first. A speed-up is the median over rounds of the ratio of the other's
seconds to this one's, by the clock and in CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.networks.call import CALLS
from fastdiff.bench.checkout import checkout_folder, checkout_process
from fastdiff.bench.record import ROOT
from fastdiff.bench.report import table

WORKER = Path(__file__).with_name("call.py")
HEAD = ("network", "seconds", "seconds, other", "speed-up", "speed-up, CPU time")


@dataclass(frozen=True)
class Compared:
    """Medians over the rounds; seconds are by the clock."""

    name: str
    seconds: float
    other_seconds: float
    speedup: float
    cpu_speedup: float

    @property
    def row(self) -> tuple[str, ...]:
        seconds = f"{self.seconds:.3f}", f"{self.other_seconds:.3f}"
        return (self.name, *seconds, f"{self.speedup:.3f}", f"{self.cpu_speedup:.3f}")


def compared(name: str, against: Path, rounds: int) -> Compared:
    """Compare one of `CALLS`. Raises RuntimeError if a process dies; its output is on stderr."""
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(checkout_process(c, WORKER)) for c in (ROOT, against)]
        for process in pair:
            process.ask("open", name)
        taken = []
        for number in range(rounds):
            order = pair if number % 2 else pair[::-1]
            seconds = {process: process.ask("measure") for process in order}
            taken.append([seconds[process] for process in pair])
            print(f"{name}: round {number + 1} of {rounds}", end="\r", file=sys.stderr)
    return Compared(
        name,
        *(median(pair[which][0] for pair in taken) for which in (0, 1)),
        *(median(pair[1][clock] / pair[0][clock] for pair in taken) for clock in (0, 1)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks.against",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkout", type=checkout_folder, help="the other checkout, with its compiled module built"
    )
    parser.add_argument("--only", nargs="+", choices=CALLS, default=tuple(CALLS))
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--at-least", type=float, help="exit code 1 if a CPU speed-up is smaller")
    options = parser.parse_args(argv)
    try:
        found = [compared(name, options.checkout, options.rounds) for name in options.only]
    except RuntimeError as error:
        print(f"against: {error}", file=sys.stderr)
        return 2
    print(table(HEAD, [one.row for one in found]))
    slower = [f for f in found if options.at_least and f.cpu_speedup < options.at_least]
    for one in slower:
        message = f"{one.name} runs at {one.cpu_speedup:.3f} of the other's speed"
        print(f"against: {message}, less than {options.at_least:g}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
