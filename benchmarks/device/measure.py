"""The stages that measure ops, and the search for launch configs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.device import records
from benchmarks.device.dry import dry_cases, dry_jobs
from benchmarks.device.table import ContextLost, LeftOut, Plan

WORKERS = min(14, os.cpu_count() or 1)
"""Processes that compile."""
SAVE_S = 5.0
"""Seconds between two savings of measurements; a process that is killed loses no more."""
MOST_IMPORTANT = (
    ("attention", "self/40"),
    ("group_norm_silu", "nhwc/large"),
    ("attention_context", "80/40"),
    ("attention", "self/64"),
    ("group_norm_silu", "nhwc/small"),
)
"""(tunable, shape class) of the five classes that `tune` begins with: most of the time of SD 1.5,
SDXL and KL-f8 in our kernels."""
SLOW = ("compile", "sdpa math")
"""Providers that `ops` leaves out: each of their shapes takes seconds to compile or to run."""


def ops(plan: Plan) -> list[str]:
    """Benchmark every op against its providers, attention first, without Inductor."""
    from fastdiff.bench import shapes
    from fastdiff.bench.run import cases
    from fastdiff.bench.subjects import NETWORK_OPS, own_cases

    jobs, batches = (dry_jobs(), (1,)) if plan.dry_run else (shapes.GPU_JOBS, shapes.GPU_BATCHES)
    found = [*own_cases(8 if plan.dry_run else 64, batches), *cases(NETWORK_OPS, jobs, batches)]
    todo = [
        dataclasses.replace(case, providers=tuple(p for p in case.providers if p not in SLOW))
        for case in sorted(found, key=_attention_first)
    ]
    return _benchmarked(plan, _once_each(todo) if plan.dry_run else todo)


def _attention_first(case: Any) -> tuple[bool, bool, int]:
    """At the networks' own batch sizes; the other batch sizes come last."""
    return case.priority > 1, case.subject.op != "attention", case.priority


def bench(plan: Plan) -> list[str]:
    """Benchmark every op against all providers, Inductor among them."""
    import torch

    from fastdiff.bench import shapes
    from fastdiff.bench import tune as search
    from fastdiff.bench.run import cases
    from fastdiff.bench.subjects import NETWORK_OPS, own_cases
    from fastdiff.kernels.tuning import configs

    jobs, batches = (dry_jobs(), (1,)) if plan.dry_run else (shapes.GPU_JOBS, shapes.GPU_BATCHES)
    todo = [*own_cases(8 if plan.dry_run else 64, batches), *cases(NETWORK_OPS, jobs, batches)]
    todo.sort(key=lambda case: case.priority)
    if not plan.dry_run:
        gpu = configs.gpu_of(torch.device("cuda"))
        search.compile_in_use(tuned_cases(), gpu=gpu, workers=WORKERS)
    return _benchmarked(plan, _once_each(todo) if plan.dry_run else todo)


def _once_each(todo: Sequence[Any]) -> list[Any]:
    """For a dry run: each op once, forward and backward."""
    from fastdiff.bench.subjects import NETWORK_OPS

    once = list({case.benchmark: case for case in reversed(todo)}.values())
    return once + dry_cases(NETWORK_OPS, {case.subject.op for case in once})


def _benchmarked(plan: Plan, todo: Sequence[Any]) -> list[str]:
    """Measure cases until the time is up, saving them meanwhile, then the winners."""
    import torch

    from fastdiff.bench import tune as search
    from fastdiff.bench.run import Outcome, fastest_backends
    from fastdiff.kernels.tuning import configs

    end = time.monotonic() + plan.seconds
    device = torch.device("cpu" if plan.dry_run else "cuda")
    urgent = [case for case in todo if case.priority == 0]
    outcome = run_cases(plan, urgent, end)
    first, notes = _from_the_host(plan) if time.monotonic() < end else (Outcome(), [])
    later = run_cases(plan, [case for case in todo if case.priority > 0], end)
    for name in ("records", "failures", "unavailable", "left_out"):
        getattr(outcome, name).extend([*getattr(first, name), *getattr(later, name)])
    if not plan.dry_run:
        gpu = configs.gpu_of(device)
        winners = fastest_backends(outcome.records)
        search.save_backends(winners, search.facts(gpu), search.cache_file(gpu))
        notes += [f"auto will try first for {op}: {keys}" for op, keys in winners.items()]
    return records.summarized(outcome, [f"{len(first.records)} timings from the host", *notes])


def run_cases(plan: Plan, todo: Sequence[Any], end: float) -> Any:
    """The `Outcome` of cases; measurements are saved every `SAVE_S` seconds.

    Raises:
        ContextLost: the GPU's context is lost; what was measured before is saved.
    """
    import torch

    from fastdiff.bench.clock import HostTimer, timer_for
    from fastdiff.bench.run import CONTEXT_LOST, MATMUL, Case, Outcome, run

    saved = [0, time.monotonic()]

    def progress(case: Case, outcome: Outcome) -> None:
        left = end - time.monotonic()
        print(f"{len(outcome.records):5} timings, {left:4.0f} s: {case}", flush=True)
        if time.monotonic() - saved[1] > SAVE_S:
            records.save(plan, outcome.records[int(saved[0]) :])
            saved[:] = [len(outcome.records), time.monotonic()]

    device = torch.device("cpu" if plan.dry_run else "cuda")
    outcome = run(
        todo,
        timer=HostTimer(rounds=1) if plan.dry_run else timer_for(device),
        device=device,
        deadline=end,
        inductor="eager" if plan.dry_run else "inductor",
        matmul=64 if plan.dry_run else MATMUL,
        progress=progress,
    )
    records.save(plan, outcome.records)
    if CONTEXT_LOST in outcome.failures:
        raise ContextLost(*outcome.failures)
    return outcome


def _from_the_host(plan: Plan) -> tuple[Any, list[str]]:
    """The outcome of sampler steps as a loop experiences them, ours and diffusers'."""
    import torch

    from fastdiff.bench import shapes
    from fastdiff.bench.clock import HostTimer, timer_for
    from fastdiff.bench.ops import sampler_step
    from fastdiff.bench.providers import import_diffusers

    try:
        diffusers, notes = import_diffusers(), []
    except ImportError as error:
        diffusers, notes = None, [f"diffusers' schedulers left out: {error}"]
    device = torch.device("cpu" if plan.dry_run else "cuda")
    found = sampler_step.from_the_host(
        HostTimer(rounds=1) if plan.dry_run else timer_for(device),
        device,
        diffusers,
        size=8 if plan.dry_run else 64,
        batches=(1,) if plan.dry_run else shapes.GPU_BATCHES,
    )
    records.save(plan, found.records)
    return found, notes


def compile_triton(plan: Plan) -> list[str]:
    """Compile Triton's kernels for the shape classes of the networks, into its cache on disk."""
    if plan.dry_run:
        raise LeftOut("a dry run interprets the kernels")
    import torch

    from fastdiff.bench import tune as search
    from fastdiff.kernels.tuning import configs

    todo = tuned_cases()
    gpu = configs.gpu_of(torch.device("cuda"))
    search.compile_in_use(todo, gpu=gpu, workers=max(1, WORKERS // 2))  # the build has the others
    return [f"{len(todo)} classes compiled"]


def tune(plan: Plan) -> list[str]:
    """Run `fastdiff tune` for bf16 within the time of the stage, writing to <out>/tuned/."""
    import torch

    from fastdiff.bench import tune as search
    from fastdiff.bench.clock import Method, Timing, timer_for
    from fastdiff.kernels.triton import recording_launches
    from fastdiff.kernels.tuning import configs

    device = torch.device("meta" if plan.dry_run else "cuda")
    gpu = configs.Gpu("Dry run", "sm_90") if plan.dry_run else configs.gpu_of(device)

    def fake(
        function: Callable[[], Any], *, method: Method = "events", budget_s: float = 0.2
    ) -> Timing:
        function()
        return Timing.of("host", [1.0])

    path, measured = search.cache_file(gpu), search.facts(gpu)
    notes, todo = [], tuned_cases()
    five = [one for one in todo if (one.tunable, one.shape_class) in MOST_IMPORTANT]
    five.sort(key=lambda one: MOST_IMPORTANT.index((one.tunable, one.shape_class)))
    dry = recording_launches(gpu.architecture) if plan.dry_run else contextlib.nullcontext()
    with dry:
        for found in search.tune(
            five,
            gpu=gpu,
            device=device,
            timer=fake if plan.dry_run else timer_for(device),
            budget_s=plan.seconds,
            workers=0 if plan.dry_run else WORKERS,
        ):
            search.save([found], measured, path)
            changed = f"{found.gain:.2f} x, {found.before} -> {found.after}"
            notes.append(
                f"{found.case}: {changed if found.after != found.before else 'kept'}; tried "
                f"{found.tried}, left {found.left}, rejected {dict(found.rejected)}"
            )
            print(notes[-1], flush=True)
    return [f"written: {path}", *notes]


def tuned_cases() -> list[Any]:
    """The classes that the networks use: bf16 if supported, and only their head dims."""
    import torch

    from fastdiff.bench import shapes
    from fastdiff.bench import tune as search
    from fastdiff.bench.tunables import TUNABLES

    dims = {
        str(call.tensors[0][3])
        for job in shapes.GPU_JOBS.values()
        for call in dataclasses.replace(job, batch=1).collect()
        if call.op == "attention"
    }

    def used(case: search.Case) -> bool:
        if torch.bfloat16 in TUNABLES[case.tunable].dtypes and case.dtype != torch.bfloat16:
            return False
        # shape classes of attention end in the head dim
        return not case.tunable.startswith("attention") or case.shape_class.split("/")[-1] in dims

    return [case for case in search.cases() if used(case)]
