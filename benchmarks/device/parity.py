"""Parity at the shapes that networks pass to the ops: one (op, backend) pair per process.

A case is a call of a network in bf16, with the layouts of `runtime.prepare`. Its outputs and
gradients are compared with the formula in fp64 by the rule of tests/support/parity.py, and a second
run must give the same bits. Each case adds a line to parity.jsonl when it has run, so a process
that is killed, or loses its GPU context, leaves those before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.device import records
from benchmarks.device.table import ContextLost, Failed, LeftOut, Plan

JOBS = ("SD 1.5 U-Net", "SDXL U-Net", "KL-f8 decoder")
"""The networks all of whose calls are cases, each at its own batch size."""
FILM = "ADM-256 U-Net"
"""The only network with scale and shift; the largest and the smallest of these calls are cases."""
OWN = (
    *("ada_layer_norm", "cat_group_norm_silu", "gate_residual", "gather_rows"),
    "sampler_step",
)
"""Ops that these networks do not call, at the shapes that their benchmarks declare."""


def cases(jobs: dict[str, Any] | None = None) -> dict[str, list[Any]]:
    """Op -> its `fastdiff.bench.run.Case`s, the smallest first: about 80 over all ops.

    Args:
        jobs: the networks, instead of `JOBS` and `FILM` of shapes.GPU_JOBS.
    """
    from fastdiff.bench import shapes
    from fastdiff.bench.run import Case
    from fastdiff.bench.subjects import SUBJECTS, own_cases

    asked = {name: shapes.GPU_JOBS[name] for name in (*JOBS, FILM)} if jobs is None else jobs
    found: dict[str, dict[Any, Any]] = {}
    for name, job in asked.items():
        calls = list(dataclasses.replace(job, batch=1).collect())
        if name == FILM:
            film = sorted((c for c in calls if c.options), key=lambda call: call.numbers)
            film = [call for call in film if "scale_shift" in dict(call.options)]
            calls = [film[0], film[-1]]
        for call in calls:
            if call.op not in SUBJECTS:
                continue
            at = call.at_batch(job.batch)
            case = Case(subject=SUBJECTS[call.op], job_name=name, job=job, call=at)
            found.setdefault(call.op, {}).setdefault(at, case)  # networks share some calls
    for case in own_cases(64, (2,)) if jobs is None else own_cases(8, (1,)):
        if case.subject.op in OWN:
            found.setdefault(case.subject.op, {})[case.call] = case
    return {op: sorted(of.values(), key=lambda c: c.call.numbers) for op, of in found.items()}


def parity(plan: Plan) -> list[str]:
    """Check the cases of the op and backend of ``plan.part``, as many as there is time for."""
    from fastdiff import kernels

    op, _, backend = plan.part.partition("/")
    if reason := kernels.available()[op][backend]:
        records.add_parity(plan.out, pair=plan.part, planned=0)
        raise LeftOut(reason)
    todo = _dry_cases(op) if plan.dry_run else cases()[op]
    first = _first_checks(plan)
    records.add_parity(plan.out, pair=plan.part, planned=len(first) + len(todo))
    failures = []
    for label, why in first:
        status = "failed" if why else "ok"
        print(f"{label}: {status} {why}".rstrip(), flush=True)
        records.add_parity(
            plan.out, pair=plan.part, case=label, status=status, why=why, seconds=0.0
        )
        failures += [f"{label}: {why}"] if why else []
    notes = checked(todo, backend, plan)
    if failures:
        raise Failed(*failures, *notes)
    return notes


def _first_checks(plan: Plan) -> list[tuple[str, str]]:
    """Name and fault of what has to hold before any case means something: see hopper.py."""
    if plan.part != "attention/cuda" or plan.dry_run:
        return []
    from benchmarks.device import hopper

    return list(hopper.checks()) if hopper.served() else []


def _dry_cases(op: str) -> list[Any]:
    from benchmarks.device.dry import dry_cases, dry_jobs
    from fastdiff.bench.subjects import NETWORK_OPS

    found = cases(dry_jobs())
    for case in dry_cases(NETWORK_OPS, set(found)):
        if case.direction == "forward":  # each has its gradients checked, too
            found.setdefault(case.subject.op, []).append(case)
    return found[op]


def checked(todo: Sequence[Any], backend: str, plan: Plan) -> list[str]:
    """Check cases on a backend until the plan's time is up.

    Raises:
        Failed: a case failed; the others have run.
        ContextLost: the GPU's context is lost.
        LeftOut: the backend serves none of the cases, so nothing was compared.
    """
    end = time.monotonic() + plan.seconds
    went: list[str] = []
    failures = []
    for place, case in enumerate(todo):
        if time.monotonic() > end:
            failures.append(f"no time for {len(todo) - place} of {len(todo)} cases")
            break
        start = time.monotonic()
        status, why = _outcome(case, backend)
        seconds = round(time.monotonic() - start, 2)
        label = f"{case.benchmark} {case.call} {case.job_name}"
        print(f"{label} on {backend}: {status} {why}".rstrip(), flush=True)
        records.add_parity(
            plan.out, pair=plan.part, case=label, status=status, why=why, seconds=seconds
        )
        went.append(status)
        if status == "lost context":
            raise ContextLost(f"{label}: {why}")
        if status == "failed":
            failures.append(f"{label}: {why}")
    count = f"{went.count('ok')} of {len(todo)} cases agree, {went.count('not served')} not served"
    if failures:
        raise Failed(*failures, count)
    if todo and "ok" not in went:
        raise LeftOut(count)
    return [count]


def _outcome(case: Any, backend: str) -> tuple[str, str]:
    from fastdiff import kernels
    from fastdiff.bench.run import lost_context, said

    try:
        check(case, backend)
    except kernels.BackendError as error:
        return "not served", str(error.reasons.get(backend))
    except AssertionError as error:
        return "failed", " ".join(str(error).split())[:300]
    except Exception as error:  # noqa: BLE001 - reported; the other cases run
        return ("lost context" if lost_context(error) else "failed"), said(error)
    return "ok", ""


def check(case: Any, backend: str) -> None:
    """Compare a case with fp64 on one backend, and with itself, bit by bit.

    Raises:
        AssertionError: an error exceeds its bound, or two runs differ.
        fastdiff.kernels.BackendError: the backend cannot run the case.
    """
    import torch

    from fastdiff.bench.providers import Make
    from tests.kernels import cases as rule

    make = Make(case.dtype, torch.device(rule.device_of(backend)))

    def inputs(seed: int) -> rule.Inputs:
        torch.manual_seed(seed)
        return case.subject.arguments(case.call, case.job, make)

    op = case.subject.op
    if op == "sampler_step":
        _check_step(inputs, backend)
        return
    if op == "gather_rows":
        _check_gather(inputs, backend)
        return
    rule.EAGER.setdefault(op, case.subject.eager)
    rule.check_inputs(op, inputs, backend)
    once, again = (rule.run_on(backend, op, inputs(0)) for _ in range(2))
    for kind, one, other in zip(("output", "gradient"), once, again, strict=True):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            _same_bits(a, b, f"{kind} {index}")


def _check_step(inputs: Callable[[int], Any], backend: str) -> None:
    """`check` for `sampler_step`, which changes x and the history in place and has no formula.

    The reference in fp64 takes its place; tests/kernels/test_sampler_step.py compares that with the
    equations written out. The yardstick is the reference in the dtypes of the call.
    """
    import torch

    from fastdiff import kernels
    from tests.support.parity import assert_parity

    def stepped(
        name: str, index: int | None, *, wide: bool = False
    ) -> Callable[[int], torch.Tensor]:
        """The argument at an index after the step; None: the log-density of its noise."""

        def run(seed: int) -> torch.Tensor:
            args, options = inputs(seed)
            if wide:
                args = tuple(a.double() if a.is_floating_point() else a for a in args)
            density = torch.empty(len(args[0]), dtype=args[0].dtype, device=args[0].device)
            asked = density if index is None else None
            with kernels.backend(name):
                kernels.sampler_step(*args, **options, log_prob=asked)
            changed: torch.Tensor = density if index is None else args[index]
            return changed

        return run

    for index, name in ((0, "x"), (2, "history"), (None, "log_prob")):
        exact, eager = stepped("reference", index, wide=True), stepped("reference", index)
        assert_parity(stepped(backend, index), exact, eager, name=name)
        _same_bits(stepped(backend, index)(0), stepped(backend, index)(0), name)


def _check_gather(inputs: Callable[[int], Any], backend: str) -> None:
    """`check` for `gather_rows`, which copies and rounds once: it has the bits of its reference."""
    from fastdiff import kernels

    args, options = inputs(0)
    found = []
    for name in (backend, backend, "reference"):
        with kernels.backend(name):
            found.append(kernels.gather_rows(*args, **options))
    for index, (one, again, exact) in enumerate(zip(*found, strict=True)):
        _same_bits(one, again, f"output {index}")
        _same_bits(one, exact, f"output {index}", "from the reference")


def _same_bits(one: Any, other: Any, name: str, where: str = "from run to run") -> None:
    import torch

    whole = {2: torch.int16, 4: torch.int32}[one.element_size()]  # NaN is not equal to itself
    same = torch.equal(one.view(whole), other.view(whole))
    assert same, f"{name} differs {where}"
