"""Count what can be counted without a GPU: launches, instructions, host cost of op calls.

    python -m fastdiff.bench.counts launches
    python -m fastdiff.bench.counts launches --docs
    python -m fastdiff.bench.counts sass
    python -m fastdiff.bench.counts sass --docs
    python -m fastdiff.bench.counts host
    python -m fastdiff.bench.counts host --op geglu attention --backend cpu --json
    python -m fastdiff.bench.counts host --network "SD 1.5 U-Net"
    python -m fastdiff.bench.counts host --against ../older-checkout --at-most 1.05
    python -m fastdiff.bench.counts host --accelerated
    python -m fastdiff.bench.counts host --accelerated --docs
    python -m fastdiff.bench.counts inductor
    python -m fastdiff.bench.counts inductor --network "SD 1.5 U-Net" --docs
    python -m fastdiff.bench.counts compile --docs

`launches` counts kernel launches, bytes and FLOPs per evaluation of Stable Diffusion 1.5, SDXL, the
KL-f8 decoder and ADM, in our networks, in diffusers' and in accelerated diffusers; launches.py
states the rules.

`sass` counts instructions per number (GroupNorm, GEGLU) and per 64 keys (attention) in the machine
code for an H200, blocks per call and bytes in flight; sass.py states the rules.

`inductor` compiles the same networks with torch.compile for an H200 that is not there, and counts
the kernels in the generated code; inductor.py states the rules. It takes minutes per network.

`compile` compiles what Triton would compile before the first evaluation on a new machine.

`host` measures the cost of every op call with launches stubbed, with --network the sum over the
calls of one evaluation. Next to it is the number of functions called, in Python and C, which does
not vary from run to run. Costs are in units of one
``torch.add`` of two one-element tensors, on the same machine at the same moment (see host.py), so
that they can be compared across machines. With --against, the package of another checkout
alternates with this one on the same calls, and the last column is the median of the paired ratios,
this checkout over the other. Costs vary by a few percent from one process to the next: to decide a
close result, use --processes 4. With --accelerated, it measures an evaluation of accelerated
diffusers against one of plain diffusers instead (see eager.py).

`inductor --docs`, `compile --docs` and `host --accelerated --docs` write docs/counts.json;
`launches --docs` makes the page from it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from fastdiff.bench import counted
from fastdiff.bench.checkout import CheckoutProcess, checkout_folder, checkout_process
from fastdiff.bench.host import BACKENDS, COMPOSED, MODES
from fastdiff.bench.record import ROOT

DOCS = ROOT / "docs" / "counts.md"
WORKER = Path(__file__).with_name("host.py")
VARIABLES = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
TURN = 4
"""Rounds that one checkout measures before the other takes over."""


@dataclass(frozen=True, kw_only=True)
class HostCost:
    """One op on one backend; costs are in tiny adds."""

    op: str
    backend: str
    mode: str
    launches: int = 0
    """Kernels that a call would start, including the backward pass in mode "gradient"."""
    functions: int = 0
    """Functions that a call calls, in Python and in C; the same in every run."""
    cost: float | None = None
    missing: str = ""
    """Why there is no cost, or none for the other checkout."""
    note: str = ""
    """What, other than the code, makes the two costs differ."""
    other_cost: float | None = None
    """The cost in the other checkout."""
    ratio: float | None = None
    """Median of the paired ratios, this checkout's cost over the other's."""

    @property
    def row(self) -> tuple[str, ...]:
        def number(value: float | None, digits: int) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        costs = number(self.cost, 1), number(self.other_cost, 1), number(self.ratio, 3)
        counted = str(self.launches), str(self.functions)
        return (self.op, self.backend, self.mode, *counted, *costs)


HEAD = ("op", "backend", "mode", "launches", "functions", "adds", "adds, other", "ratio")


def host_costs(
    *,
    ops: Sequence[str] = (),
    backends: Sequence[str] = BACKENDS,
    modes: Sequence[str] = MODES,
    rounds: int = 400,
    processes: int = 1,
    checkout: Path = ROOT,
    against: Path | None = None,
) -> Iterator[HostCost]:
    """Measure op after op.

    Args:
        ops: names; empty: all.
        rounds: per case; each gives one ratio of op to add.
        processes: per checkout; they share the rounds. Memory is laid out differently in each
            process, which changes all of its costs by a few percent.
        checkout: the folder that contains the package.
        against: another checkout to alternate with.

    Raises:
        ValueError: unknown op.
        RuntimeError: a process died; its output is on stderr.
    """
    with contextlib.ExitStack() as stack:
        folders = [checkout, *([against] if against else [])]
        teams = [
            tuple(
                stack.enter_context(checkout_process(folder, WORKER, **VARIABLES))
                for folder in folders
            )
            for _ in range(processes)
        ]
        first = teams[0][0]
        known = first.ask("ops")
        if unknown := set(ops) - set(known):
            listed = ", ".join(known)
            raise ValueError(f"unknown op {', '.join(sorted(unknown))}; expected some of {listed}")
        path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/examples.pt"
        first.ask("save", path)
        for process in itertools.chain(*teams):
            process.ask("load", path)  # in all processes: tensors from a file cost a little more
        for case in itertools.product(ops or known, backends, modes):
            yield _host_cost(teams, case, max(1, round(rounds / TURN / processes)))


def evaluation_costs(
    job: str,
    *,
    backends: Sequence[str] = ("triton", "cuda"),
    rounds: int = 40,
    against: Path | None = None,
) -> Iterator[HostCost]:
    """Measure the op calls of one evaluation of a network, without gradients, and add them up.
    Those that a backend composes of PyTorch's own kernels and ours are left out.

    job: one of `shapes.GPU_JOBS`.

    Raises:
        RuntimeError: an op cannot be measured on a backend, or a process died.
    """
    folders = [ROOT, *([against] if against else [])]
    with contextlib.ExitStack() as stack:
        team = tuple(
            stack.enter_context(checkout_process(folder, WORKER, **VARIABLES)) for folder in folders
        )
        times, *_ = [process.ask("collect", job) for process in team]
        for backend in backends:
            sums, launches, functions, calls = [0.0] * len(team), 0, 0, 0
            for number, count in enumerate(times):
                case = str(number), backend, "inference"
                found = _host_cost([team], case, max(1, round(rounds / TURN)))
                if found.missing == COMPOSED:
                    continue
                calls += count
                if found.cost is None or (against and found.other_cost is None):
                    raise RuntimeError(f"call {number} of {job} on {backend}: {found.missing}")
                for process in team:
                    process.ask("close", *case)
                launches += count * found.launches
                functions += count * found.functions
                for i, cost in enumerate((found.cost, found.other_cost)[: len(team)]):
                    sums[i] += count * (cost or 0.0)
            other = sums[1] if against else None
            yield replace(
                HostCost(op=f"{job}, {calls} calls", backend=backend, mode="inference"),
                launches=launches,
                functions=functions,
                cost=sums[0],
                other_cost=other,
                ratio=sums[0] / other if other else None,
            )


def _host_cost(
    teams: Sequence[tuple[CheckoutProcess, ...]], case: tuple[str, str, str], turns: int
) -> HostCost:
    """teams: each has a process of this checkout and, if there is another checkout, one of that."""
    cost = HostCost(op=case[0], backend=case[1], mode=case[2])
    opened = [[process.ask("open", *case) for process in team] for team in teams]
    mine, *there = opened[0]  # all teams answer the same
    if "missing" in mine:
        return replace(cost, missing=mine["missing"])
    if there and "missing" in there[0]:
        cost = replace(cost, missing=f"other checkout: {there[0]['missing']}")
        teams = [team[:1] for team in teams]
    measured = [_turn(team, case, turn) for turn in range(turns) for team in teams]
    cost = replace(
        cost,
        launches=mine["launches"],
        functions=mine["functions"],
        cost=median(pair[0] for pair in measured),
    )
    if len(teams[0]) == 1:
        return cost
    return replace(
        cost,
        other_cost=median(pair[1] for pair in measured),
        ratio=median(pair[0] / pair[1] for pair in measured),
        note="the other checkout uses arguments of its own" if there[0]["own"] else "",
    )


def _turn(team: tuple[CheckoutProcess, ...], case: tuple[str, str, str], turn: int) -> list[float]:
    """Measure some rounds in each process, alternating which one goes first."""
    order = team if turn % 2 else team[::-1]
    taken = {process: process.ask("measure", *case, TURN) for process in order}
    return [taken[process] for process in team]


def table(costs: Sequence[HostCost]) -> str:
    """Format the costs as a table with one line per case."""
    return aligned([HEAD, *(cost.row for cost in costs if cost.cost is not None)], words=3)


def aligned(rows: Sequence[tuple[str, ...]], *, words: int) -> str:
    """Align the columns of a table; the first `words` hold words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(cells)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def accelerated_cost(backend: str, rounds: int) -> dict[str, Any]:
    """What eager.py finds for one backend.

    Raises:
        RuntimeError: its process failed; the output is on stderr.
    """
    words = [sys.executable, "-m", "fastdiff.bench.eager", backend, str(rounds)]
    environment = {**os.environ, **VARIABLES}
    environment.pop("FASTDIFF_BACKEND", None)
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fastdiff.bench.eager exited with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def accelerated(options: argparse.Namespace) -> int:
    """Run the command ``host --accelerated`` and return its exit code."""
    from fastdiff.bench import counts_page, eager

    found = {
        backend: accelerated_cost(backend, min(options.rounds, 60))
        for backend in options.backend
        if backend != "cpu"
    }
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(aligned([counts_page.EAGER_HEAD, *counts_page.eager_rows(found)], words=1))
    if options.docs:
        for backend, each in found.items():
            counted.record(eager.SECTION, backend, each)
        print(f"wrote {counted.PATH}; `launches --docs` makes the page from it")
    return 0


def inductor(options: argparse.Namespace) -> int:
    """Run the command ``inductor`` and return its exit code."""
    from fastdiff.bench import launches
    from fastdiff.bench.inductor import keep
    from fastdiff.bench.shapes import GPU_JOBS

    if options.network is None:  # a process each, because PyTorch keeps what it was told of the GPU
        for name in GPU_JOBS:
            words = [sys.executable, "-m", "fastdiff.bench.counts", "inductor", "--network", name]
            code = subprocess.run([*words, *(["--docs"] if options.docs else [])], check=False)
            if code.returncode:
                return code.returncode
        return 0
    if options.network not in GPU_JOBS:
        raise ValueError(f"unknown network {options.network!r}; expected one of {list(GPU_JOBS)}")
    found = launches.compiled_network(options.network)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.launches.items()))
    print(
        f"{options.network}: {found.total} launches ({kinds}), {found.kernels} different Triton "
        f"kernels, {found.bytes / 1e9:.2f} GB, {found.flops / 1e12:.2f} TFLOP"
    )
    if options.docs:
        keep(options.network, found)
        print(f"wrote {counted.PATH}; `launches --docs` makes the page from it")
    return 0


def compiled(options: argparse.Namespace) -> int:
    """Run the command ``compile`` and return its exit code."""
    from fastdiff.bench import first_use

    if unknown := set(options.network) - set(first_use.WORK):
        raise ValueError(
            f"unknown network {', '.join(sorted(unknown))}; expected some of "
            f"{', '.join(first_use.WORK)}"
        )
    rows: list[tuple[str, ...]] = [first_use.HEAD]
    for name in options.network or first_use.WORK:
        print(f"{name}:")
        found = first_use.compile_all(first_use.WORK[name]().recorded, lambda s: print(f"  {s}"))
        rows.append((name, *first_use.cells(found)))
        if options.docs:
            counted.record(first_use.SECTION, name, asdict(found))
    print(aligned(rows, words=1))
    if options.docs:
        print(f"wrote {counted.PATH}; `launches --docs` makes the page from it")
    return 0


def host(options: argparse.Namespace) -> int:
    """Run the command ``host`` and return its exit code."""
    if options.accelerated:
        return accelerated(options)
    if options.network:
        backends = [name for name in options.backend if name != "cpu"]
        found = list(
            evaluation_costs(
                options.network,
                backends=backends,
                rounds=min(options.rounds, 40),
                against=options.against,
            )
        )
    else:
        found = list(
            host_costs(
                ops=options.op,
                backends=options.backend,
                modes=options.mode,
                rounds=options.rounds,
                processes=options.processes,
                against=options.against,
            )
        )
    if options.json:
        print(json.dumps([asdict(cost) for cost in found], indent=1))
    else:
        print(table(found))
        for cost in found:
            if remark := cost.missing or cost.note:
                print(f"{cost.op} {cost.backend} {cost.mode}: {remark}")
    if not any(cost.cost is not None for cost in found):
        print("counts: nothing could be measured", file=sys.stderr)
        return 2
    limit = options.at_most
    slower = [cost for cost in found if limit and cost.ratio is not None and cost.ratio > limit]
    for cost in slower:
        print(
            f"counts: {cost.op} {cost.backend} {cost.mode} costs {cost.ratio:.3f} times as much as "
            f"in {options.against}, more than {limit:g}",
            file=sys.stderr,
        )
    return 1 if slower else 0


def launches(options: argparse.Namespace) -> int:
    """Run the command ``launches`` and return its exit code."""
    # host.py measures without these modules
    from fastdiff.bench import counts_page as found

    if options.docs:
        DOCS.write_text(whole_page())
        print(f"wrote {DOCS}")
        return 0
    print(aligned(found.rows(), words=3), end="\n\n")
    print(aligned(found.kind_rows(), words=2), end="\n\n")
    print(aligned(found.step_rows(), words=1))
    return 0


SASS_HEAD = "## Instructions\n\n"
"""The section that `sass` writes; it is the last one of the page."""


def sass_section() -> str:
    """The section of instructions in docs/counts.md, as it is."""
    return DOCS.read_text().partition(SASS_HEAD)[2]


def whole_page() -> str:
    """The text of docs/counts.md; the section of instructions stays as it is."""
    from fastdiff.bench import counts_page

    return counts_page.page(sass_section())


def sass(options: argparse.Namespace) -> int:
    """Run the command ``sass`` and return its exit code."""
    from fastdiff.bench import sass as counted

    if options.docs:
        before = DOCS.read_text().partition(SASS_HEAD)[0]
        DOCS.write_text(before + SASS_HEAD + counted.section())
        print(f"wrote {DOCS}")
        return 0
    if options.json:
        print(json.dumps(counted.facts(), indent=1))
        return 0
    instructions, sizes, missing = counted.counted()
    print(aligned(instructions, words=3), end="\n\n")
    print(aligned(sizes, words=3))
    for reason in missing:
        print(reason)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff.bench.counts",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    words = commands.add_parser(
        "launches", help="launches, bytes and FLOPs per evaluation of a network (needs diffusers)"
    )
    words.add_argument("--docs", action="store_true", help="write docs/counts.md instead")
    words.set_defaults(run=launches, at_most=None, against=None)
    words = commands.add_parser(
        "sass", help="instructions, blocks and bytes in flight of the kernels on an H200"
    )
    words.add_argument("--docs", action="store_true", help="write them into docs/counts.md")
    words.add_argument("--json", action="store_true", help="print a JSON object")
    words.set_defaults(run=sass, at_most=None, against=None)
    words = commands.add_parser(
        "inductor", help="kernels that torch.compile launches, read off its code (needs diffusers)"
    )
    words.add_argument("--network", help='only this one, such as "SD 1.5 U-Net"')
    words.add_argument("--docs", action="store_true", help="write docs/counts.json")
    words.set_defaults(run=inductor, at_most=None, against=None)
    words = commands.add_parser(
        "compile", help="what Triton compiles at first use, and for how long (needs triton)"
    )
    words.add_argument("--network", nargs="+", default=(), help="only these")
    words.add_argument("--docs", action="store_true", help="write docs/counts.json")
    words.set_defaults(run=compiled, at_most=None, against=None)
    words = commands.add_parser(
        "host", help="host cost of every op call, in units of one tiny torch.add"
    )
    words.add_argument("--op", nargs="+", default=(), help="only these ops")
    words.add_argument(
        "--network",
        metavar="JOB",
        help='all op calls of one evaluation, such as "SD 1.5 U-Net", on the GPU backends',
    )
    words.add_argument(
        "--accelerated",
        action="store_true",
        help="an evaluation of accelerated diffusers against plain diffusers (needs diffusers)",
    )
    words.add_argument(
        "--docs", action="store_true", help="with --accelerated: write docs/counts.json"
    )
    words.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    words.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    words.add_argument(
        "--rounds", type=int, default=400, help="rounds per case (default: %(default)s)"
    )
    words.add_argument(
        "--processes", type=int, default=1, help="processes per checkout (default: %(default)s)"
    )
    words.add_argument("--against", type=checkout_folder, help="another checkout to alternate with")
    words.add_argument("--at-most", type=float, help="exit code 1 if a ratio is larger")
    words.add_argument("--json", action="store_true", help="print a JSON list")
    words.set_defaults(run=host)
    options = parser.parse_args(argv)
    if getattr(options, "accelerated", False) and (options.op or options.network):
        parser.error("--accelerated measures a whole network, so it takes no --op and no --network")
    if options.at_most is not None and options.against is None:
        parser.error("--at-most limits a ratio, so it needs --against CHECKOUT")
    try:
        code: int = options.run(options)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"counts: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
