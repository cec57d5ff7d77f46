"""compute-sanitizer on parity cases: the smallest of every op, and every route of CUDA kernels.

python -m benchmarks.device.sanitize cuda triton      the cases alone, without a tool
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.device.table import ROOT, Failed, LeftOut, Plan

NOTHING_TO_RUN = 98
"""Exit code of a process that has no kernel to run."""
FOUND = 99
"""Exit code of compute-sanitizer if the process succeeded but there is something to report."""
SANITIZED_CASES = 2
"""Parity cases per op, the smallest ones; every route of the CUDA kernels runs as well."""
TOOLS = {
    "memcheck": ("triton", "cuda"),
    "racecheck": ("cuda",),
    "synccheck": ("cuda",),
    "initcheck": ("cuda",),
}
"""compute-sanitizer's tools -> the backends whose kernels they check. Triton's kernels contain no
barriers or shared memory written by us."""


def sanitize(plan: Plan) -> list[str]:
    """Run the tool of ``plan.part`` on `parity_cases`.

    Without compute-sanitizer, a dry run runs the cases alone, for the tool that has every backend.
    """
    tool, found = plan.part, shutil.which("compute-sanitizer")
    if found is None and not (plan.dry_run and tool == "memcheck"):
        raise LeftOut("compute-sanitizer is not installed")
    inner = [sys.executable, "-m", "benchmarks.device.sanitize", *TOOLS[tool]]
    inner += ["--seconds", str(plan.seconds), *(["--dry-run"] if plan.dry_run else [])]
    words = [found, "--tool", tool, "--error-exitcode", str(FOUND)] if found else []
    if found and tool == "memcheck":
        words += ["--report-api-errors", "no"]  # libraries probe the API and expect errors
    lines, code = _passed_on([*words, *inner])
    if code == NOTHING_TO_RUN:
        raise LeftOut(lines[-1])
    others = in_kernels_of_others("\n".join(lines)) if code == FOUND and tool != "memcheck" else 0
    if code and not others:
        raise Failed(*lines[-12:])
    return [f"reports in other kernels than ours: {others}"] * bool(others) + lines[-2:]


def _passed_on(words: Sequence[str]) -> tuple[list[str], int]:
    """Run a command, passing on its output. Returns its lines and its exit code."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    lines = []
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                lines.append(line.rstrip())
    return lines, process.returncode


def in_kernels_of_others(report: str) -> int:
    """The number of places that compute-sanitizer reports, if none is in a kernel of csrc/, else 0.

    Kernels of PyTorch and cuBLAS are checked too, because initcheck must see what writes an input.
    """
    places = [line for line in report.splitlines() if re.match(r"=+ .*\bat .*\+0x", line)]
    return 0 if any("fastdiff::" in place for place in places) else len(places)


def parity_cases(backends: Sequence[str], seconds: float) -> int:
    """Run the smallest parity cases of every op on some backends, and one for every route of the
    CUDA kernels, as many as there is time for.

    Returns:
        The exit code: 0, or `NOTHING_TO_RUN` if no op has these backends on this machine.
    """
    import torch

    from fastdiff import kernels
    from fastdiff.kernels.choose import DEVICES, EMULATED
    from tests.kernels import cases
    from tests.kernels.routes import CUDA as ROUTES

    end = time.monotonic() + 0.8 * seconds

    def numbers(case: Any) -> int:
        return sum(t.numel() for t in cases.tensors_in(case.inputs(torch.float32)))

    def takes(op: str, case: Any, backend: str) -> bool:
        where = cases.device_of(backend)
        if case is None:
            args, kwargs = cases.ordinary_inputs(op, where)
        else:
            args, kwargs = case.inputs(torch.float16, where)
        try:
            with kernels.backend(backend):
                getattr(kernels, op)(*args, **kwargs)
        except kernels.BackendError:
            return False
        return True

    todo: list[tuple[int, str, Callable[[], None]]] = []
    for op, backend in itertools.product(kernels.OPS, backends):
        if kernels.available()[op][backend] is not None:
            continue
        # with only a handful of numbers, the largest error is a matter of luck
        rows = [case for case in getattr(cases, op.upper(), []) if numbers(case) > 100]
        ordered = sorted(rows, key=numbers) or [None]
        served = (case for case in ordered if takes(op, case, backend))
        for place, case in enumerate(itertools.islice(served, SANITIZED_CASES)):
            label = f"{op} {case or 'against the reference'} on {backend}"
            check = partial(cases.check, op, case, torch.float16, backend)
            alone = partial(agreement, op, backend)
            todo.append((2 * place, label, alone if case is None else check))
    # routes come between an op's first and second case
    where = cases.device_of("cuda")  # the CPU under the emulation
    runs = where in (*DEVICES["cuda"], *EMULATED.get("cuda", ()))
    for route in ROUTES if "cuda" in backends and runs else ():
        if kernels.available()[route.op]["cuda"] is None and (clusters() or route.cluster == 1):
            todo.append((1, f"{route} on cuda", partial(along, route)))
    if not todo:
        print(f"no op has kernels for {' or '.join(backends)} on this machine")
        return NOTHING_TO_RUN
    ran = 0
    for _, label, run in sorted(todo, key=lambda entry: entry[0]):  # ops take turns
        if time.monotonic() > end:
            break
        run()
        print(f"{label}: ok", flush=True)
        ran += 1
    print(f"{ran} of {len(todo)} cases" + ("; no time for the rest" if ran < len(todo) else ""))
    assert ran, "there was not enough time for a single case"
    return 0


def clusters() -> bool:
    """Whether blocks can read each other's shared memory; under the emulation they can."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9


def along(route: Any) -> None:
    """Check the parity of one route of an op's CUDA kernels (tests/kernels/routes.py)."""
    from tests.kernels import cases

    with route.forced():
        cases.check_inputs(
            route.op, lambda seed: route.inputs(cases.device_of("cuda"), seed), "cuda"
        )


def agreement(op: str, backend: str) -> None:
    """Compare a backend with the reference for an op without parity cases: outputs, modified
    operands and gradients of one call, by their largest error relative to the largest number."""
    import torch
    from torch.utils._pytree import tree_flatten

    from fastdiff import kernels
    from fastdiff.bench.tune import agrees
    from tests.kernels import cases

    results = []
    for name in (backend, "reference"):
        args, kwargs = cases.ordinary_inputs(op, cases.device_of(backend))
        leaves = cases.tensors_in((args, kwargs)) if kernels.OPS[op].differentiable else []
        for leaf in leaves:
            leaf.requires_grad_()
        with kernels.backend(name):
            found = getattr(kernels, op)(*args, **kwargs)
        flat = [t for t in tree_flatten((found, args))[0] if isinstance(t, torch.Tensor)]
        if leaves:
            y = found if isinstance(found, torch.Tensor) else found[0]
            flat += torch.autograd.grad(y, leaves, y.detach())
        results.append([t.detach() for t in flat])
    for have, want in zip(*results, strict=True):
        assert agrees(have, want), f"{op} on {backend} differs from the reference"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.sanitize")
    parser.add_argument("backends", nargs="+")
    parser.add_argument("--seconds", type=float, default=60.0, help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    if options.dry_run:
        import tests.kernels.interpreter  # noqa: F401 - makes Triton's interpreter round like GPUs
    return parity_cases(options.backends, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
