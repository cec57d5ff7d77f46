"""The proof of the kernels' speed and correctness on a GPU, in two calls of one command.

    python -m benchmarks.device --call 1 --out out/one       at most 8 minutes
    python -m benchmarks.device --call 2 --out out/two       at most 4.5 minutes
    python -m benchmarks.device --collect out/one out/two    merge both into benchmarks/results/

Without --call, both calls run one after the other. Each stage runs in a process of its own, which
is killed at its limit; a stage that fails, hangs, dies or loses its GPU context does not stop the
others, but the exit code is then 1. If time runs short, the last stages are shortened or skipped,
and the summary names them.

examples:
    python -m benchmarks.device --only environment build bench --minutes 5
    python -m benchmarks.device --only tests more-sanitize     checks that are in no call
    python -m benchmarks.device --call 1 --dry-run --out /tmp/dry     on the CPU, on tiny shapes
    python -m benchmarks.device.wheels out/wheels              on a machine with an index, then
    python -m benchmarks.device --call 1 --wheels out/wheels   offline

A dry run executes the code of every stage without a GPU, with Triton's interpreter, the host's
clock and the smallest networks. Its numbers are meaningless.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.device import records, table
from benchmarks.device.runner import run_call
from benchmarks.device.table import CALL_SECONDS, ContextLost, Failed, LeftOut, Plan, stages_of


def inside(function: str, plan: Plan, outcome: Path) -> int:
    """Run the function of a stage inside its process, and write its outcome to a file.

    An unexpected error leaves no outcome: its traceback is in the log, and the exit code is 1.
    """
    if plan.dry_run:
        import tests.kernels.interpreter  # noqa: F401 - makes Triton's interpreter round like GPUs
    module, _, name = function.partition(":")
    status, notes = "ok", []
    try:
        notes = getattr(import_module(module), name)(plan)
    except LeftOut as reason:
        status, notes = "left out", [str(reason)]
    except Failed as failure:
        status, notes = "failed", [str(line) for line in failure.args]
    except Exception as error:
        if "CUDA error" not in str(error) and not isinstance(error, ContextLost):
            raise
        traceback.print_exc()
        status, notes = "lost context", [" ".join(str(error).split())[:300]]
    records.write(outcome, json.dumps({"status": status, "notes": notes}))
    print("\n".join([status, *notes]), flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    head, _, rest = (__doc__ or "").partition("\n\n")
    listed = "\n".join(_row(name) for name in table.STAGES)
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=head,
        epilog=f"{rest}\nstages, with the seconds they are allowed and their calls:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--out", type=Path, default=Path("out/device"), help="output folder (default: %(default)s)"
    )
    asked = made.add_mutually_exclusive_group()
    asked.add_argument(
        "--call", type=int, choices=list(CALL_SECONDS), help="one of the two calls (default: both)"
    )
    asked.add_argument(
        "--only", nargs="+", choices=list(table.STAGES), metavar="STAGE", help="these stages alone"
    )
    asked.add_argument(
        "--collect", nargs="+", type=Path, metavar="FOLDER",
        help="run nothing; merge the measurements of these folders into benchmarks/results/",
    )  # fmt: skip
    made.add_argument(
        "--minutes", type=float,
        help="the time of a call (default: 8 for call 1, 4.5 for call 2; with --only what the "
        "stages are allowed)",
    )  # fmt: skip
    made.add_argument("--commit", help="the commit, if the working tree is a copy without .git")
    made.add_argument("--wheels", type=Path, help="a folder of wheels to install first, offline")
    made.add_argument("--dry-run", action="store_true", help="run without a GPU, on tiny shapes")
    # how a stage's process is started
    made.add_argument("--inside", help=argparse.SUPPRESS)
    made.add_argument("--part", default="", help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    made.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--site", type=Path, help=argparse.SUPPRESS)
    return made


def _row(name: str) -> str:
    stage = table.STAGES[name]
    calls = ", ".join(map(str, stage.calls)) or "-"
    return f"    {name:14}{stage.seconds:4.0f} s  {calls:5} {stage.does}"


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(argv)
    if options.collect:
        try:
            print("\n".join(f"written: {path}" for path in records.collect(options.collect)))
        except (OSError, ValueError) as error:
            made.error(str(error))
        return 0
    plan = Plan(
        out=options.out.resolve(),
        seconds=options.seconds,
        dry_run=options.dry_run,
        commit=options.commit,
        part=options.part,
        wheels=options.wheels.resolve() if options.wheels else None,
        site=options.site,
    )
    if options.inside:
        return inside(options.inside, plan, options.outcome)
    try:
        if options.only:
            whole = sum(table.STAGES[name].seconds for name in options.only)
            seconds = whole if options.minutes is None else 60 * options.minutes
            return run_call(options.only, plan, seconds, "only")
        codes = []
        for call in [options.call] if options.call else CALL_SECONDS:
            seconds = CALL_SECONDS[call] if options.minutes is None else 60 * options.minutes
            codes.append(run_call(stages_of(call), plan, seconds, f"call-{call}"))
        return max(codes)
    except KeyboardInterrupt:
        print("interrupted; what was measured until then is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
