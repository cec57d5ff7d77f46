"""Run everything that needs a GPU, in one command and under ten minutes.

    python -m benchmarks.device --out results
    python -m benchmarks.device --only environment bench --minutes 5
    python -m benchmarks.device --dry-run --out /tmp/dry       on the CPU, on tiny shapes

Each stage runs in a process of its own, with its own share of the time. A stage that fails does not
stop the others, but the exit code is then 1:

    environment   the GPU, its driver, the versions
    build         the compiled module with the CUDA kernels, for this GPU only
    tests         the parity tests and the tests marked `gpu`, on the device
    sanitize      small parity cases under the four tools of compute-sanitizer, if installed
    tune          launch configs, for the later stages and for kernels/tuning/tuned/
    bench         every op against its providers (fastdiff/bench/run.py), including Triton against
                  CUDA; the winners are used by the next stage and go to kernels/tuning/tuned/
    networks      whole evaluations, and the share of each op in them (networks/gpu_networks.py)

Output in --out: ``results/<device>/<commit>.json`` (move it to benchmarks/results/),
``tuned/<gpu>.json`` (move it to kernels/tuning/tuned/), ``cuda-kernels.txt`` (registers and
occupancy of every launch), ``summary.json`` and ``log.txt``.

A dry run executes the code of every stage without a GPU, with Triton's interpreter, the host's
clock and the smallest networks. Its numbers are meaningless.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {
    "environment": 15,
    "build": 70,
    "tests": 110,
    "sanitize": 80,
    "tune": 90,
    "bench": 150,
    "networks": 55,
}
"""Each stage's share of ten minutes."""
NOTHING_TO_RUN = 98
"""Exit code of a process that has no kernel to run."""
FOUND = 99
"""Exit code of compute-sanitizer if the process succeeded but there is something to report."""
GRACE_S = 15
"""Extra time after a stage's share, to write down its results."""
TESTS = ("tests/kernels", "tests/bench/test_clock.py")
IGNORED = tuple(
    f"tests/kernels/test_{name}.py"
    for name in ("resources", "cuda_resources", "cuda_host", "cuda_matrix", "native", "sanitizers")
)
"""Tests of ahead-of-time compilation, the emulation and CPU code, which do not use the device."""
WORKERS = min(14, os.cpu_count() or 1)
"""Processes that compile."""
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arguments of a stage."""

    out: Path
    seconds: float
    dry_run: bool
    commit: str | None


@dataclass(kw_only=True)
class Result:
    """The outcome of a stage."""

    stage: str
    status: str
    """"ok", "failed", "timed out" or "left out"."""
    seconds: float
    notes: list[str] = field(default_factory=list)


class LeftOut(Exception):
    """A stage cannot run on this machine."""


class Failed(Exception):
    """A stage found something wrong; raised after it has done everything it could."""


# Stages: each runs in a process of its own and returns notes


def environment_stage(plan: Plan) -> list[str]:
    """Write the facts that the numbers depend on to facts.json, for the other stages."""
    import torch

    from fastdiff.bench import record

    facts: dict[str, Any] = record.environment()
    if plan.commit:
        facts["commit"] = plan.commit
    if plan.dry_run:
        facts["device"] = "dry run"
    facts["triton"] = _version("triton")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _nvidia_smi("driver_version"),
            "clocks": _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit"),
        }
    elif not plan.dry_run:
        raise Failed("torch finds no usable GPU")
    (plan.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    return [f"{name} {value}" for name, value in facts.items()]


def tests_stage(plan: Plan) -> list[str]:
    """Run pytest on the device, in several processes if pytest-xdist is installed."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    words += ["-p", "no:benchmark"]  # it warns under xdist, and warnings are errors
    if plan.dry_run:
        words += ["tests/kernels/test_geglu.py", "-k", "bad_input"]
    else:
        words += [*TESTS, *(f"--ignore={path}" for path in IGNORED)]
        if importlib.util.find_spec("xdist"):
            words += ["-n", str(min(8, os.cpu_count() or 1))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-20000:], done.stderr[-5000:])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        failing = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise Failed(*failing[:20], *lines[-1:])
    return lines[-1:]


def build_stage(plan: Plan) -> list[str]:
    """Run ``setup.py build_ext`` with the CUDA kernels, for the architecture of this GPU."""
    if plan.dry_run:
        raise LeftOut("a dry run uses the existing module")
    import torch

    major, minor = torch.cuda.get_device_capability()
    # the suffix "a" enables the accelerated features of an architecture
    architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")
    environment = {
        **os.environ,
        "FASTDIFF_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", architecture),
    }
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    print(done.stdout[-20000:], done.stderr[-5000:])
    if done.returncode:
        raise Failed("the build failed", *done.stderr.splitlines()[-10:])
    say = "from fastdiff.kernels import compiled; print(compiled.describe())"
    module = subprocess.run(
        [sys.executable, "-c", say], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [module.stdout.strip() or module.stderr.strip()[-300:], *_kernels_of_the_gpu(plan)]


def _kernels_of_the_gpu(plan: Plan) -> list[str]:
    """Write the resources of every launch, as the driver reports them, to cuda-kernels.txt."""
    words = [sys.executable, "-m", "benchmarks.resources.cuda_device"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed("listing the kernels' resources failed", *done.stderr.splitlines()[-10:])
    (plan.out / "cuda-kernels.txt").write_text(done.stdout)
    return [f"{len(done.stdout.splitlines()) - 1} kinds of launches in cuda-kernels.txt"]


def sanitize_stage(plan: Plan) -> list[str]:
    """Run the tools of compute-sanitizer on `parity_cases`."""
    found = shutil.which("compute-sanitizer")
    if found is None and not plan.dry_run:
        raise LeftOut("compute-sanitizer is not installed")
    # without compute-sanitizer all runs are the same, and that of memcheck has every backend
    tools = TOOLS if found else {"memcheck": TOOLS["memcheck"]}
    end, notes, bad = time.monotonic() + plan.seconds, [], []
    for place, (tool, backends) in enumerate(tools.items()):
        share = max(1.0, (end - time.monotonic()) / (len(tools) - place))
        try:
            notes += [f"{tool}: {line}" for line in _sanitize(found, tool, backends, share)]
        except (Failed, LeftOut) as error:
            bad += [f"{tool}: {line}" for line in error.args] if isinstance(error, Failed) else []
            notes += [f"{tool}: {error}"] if isinstance(error, LeftOut) else []
    if bad:
        raise Failed(*bad, *notes)
    return notes


def _sanitize(found: str | None, tool: str, backends: Sequence[str], seconds: float) -> list[str]:
    """Run one tool; without compute-sanitizer (in a dry run), only the cases."""
    inner = [sys.executable, "-m", "benchmarks.device", "--parity-cases", *backends]
    inner += ["--seconds", str(seconds)]
    words = [found, "--tool", tool, "--error-exitcode", str(FOUND)] if found else []
    if found and tool == "memcheck":
        words += ["--report-api-errors", "no"]  # libraries probe the API and expect errors
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*words, *inner], cwd=ROOT, capture_output=True, text=True, env=environment,
            check=False, timeout=2 * seconds + GRACE_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"timed out after {2 * seconds + GRACE_S:.0f} s") from None
    print(done.stdout[-20000:], done.stderr[-5000:])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == NOTHING_TO_RUN:
        raise LeftOut(lines[-1])
    others = done.returncode == FOUND and tool != "memcheck" and in_kernels_of_others(done.stdout)
    if done.returncode and not others:
        raise Failed(*lines[-10:], *done.stderr.splitlines()[-3:])
    return [f"reports in other kernels than ours: {others}"] * bool(others) + lines[-2:]


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
    operands and gradients of one call."""
    import torch
    from torch.utils._pytree import tree_flatten

    from fastdiff import kernels
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
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def tune_stage(plan: Plan) -> list[str]:
    """Run `fastdiff tune` for bf16 within the time of the stage, writing to <out>/tuned/."""
    import torch

    from fastdiff.bench import tune
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

    path, measured = tune.cache_file(gpu), tune.facts(gpu)
    notes = []
    dry = recording_launches(gpu.architecture) if plan.dry_run else contextlib.nullcontext()
    with dry:
        for found in tune.tune(
            tuned_cases(),
            gpu=gpu,
            device=device,
            timer=fake if plan.dry_run else timer_for(device),
            budget_s=plan.seconds,
            workers=0 if plan.dry_run else WORKERS,
        ):
            tune.save([found], measured, path)
            changed = f"{found.gain:.2f} x, {found.before} -> {found.after}"
            notes.append(
                f"{found.case}: {changed if found.after != found.before else 'kept'}; tried "
                f"{found.tried}, left {found.left}, rejected {dict(found.rejected)}"
            )
            print(notes[-1], flush=True)
    return [f"written: {path}", *notes]


def tuned_cases() -> list[Any]:
    """The cases that `bench` and `networks` use: bf16 if supported, and only their head dims."""
    import torch

    from fastdiff.bench import shapes, tune
    from fastdiff.bench.tunables import TUNABLES

    dims = {
        str(call.tensors[0][3])
        for job in shapes.GPU_JOBS.values()
        for call in dataclasses.replace(job, batch=1).collect()
        if call.op == "attention"
    }

    def used(case: tune.Case) -> bool:
        if torch.bfloat16 in TUNABLES[case.tunable].dtypes and case.dtype != torch.bfloat16:
            return False
        # shape classes of attention end in the head dim
        return not case.tunable.startswith("attention") or case.shape_class.split("/")[-1] in dims

    return [case for case in tune.cases() if used(case)]


def bench_stage(plan: Plan) -> list[str]:
    """Benchmark every op against its providers."""
    import torch

    from fastdiff.bench import shapes, tune
    from fastdiff.bench.clock import HostTimer, timer_for
    from fastdiff.bench.ops import sampler_step
    from fastdiff.bench.run import MATMUL, Case, Outcome, cases, fastest_backends
    from fastdiff.bench.run import run as run_cases
    from fastdiff.bench.subjects import NETWORK_OPS, own_cases
    from fastdiff.kernels.tuning import configs

    end = time.monotonic() + plan.seconds
    device = torch.device("cpu" if plan.dry_run else "cuda")
    timer = HostTimer(rounds=1) if plan.dry_run else timer_for(device)
    jobs = dry_jobs() if plan.dry_run else shapes.GPU_JOBS
    batches = (1,) if plan.dry_run else shapes.GPU_BATCHES
    size = 8 if plan.dry_run else 64
    try:
        from fastdiff.bench.providers import import_diffusers

        diffusers, notes = import_diffusers(), []
    except ImportError as error:
        diffusers, notes = None, [f"diffusers' schedulers left out: {error}"]
    if not plan.dry_run:
        gpu_here = configs.gpu_of(device)
        tune.compile_in_use(tuned_cases(), gpu=gpu_here, workers=WORKERS)
    first = sampler_step.from_the_host(timer, device, diffusers, size=size, batches=batches)
    save(plan, first.records, [])
    todo = cases(NETWORK_OPS, jobs, batches)
    todo = sorted([*own_cases(size, batches), *todo], key=lambda case: case.priority)
    if plan.dry_run:  # each op once, forward and backward
        todo = list({case.benchmark: case for case in reversed(todo)}.values())
        todo += dry_cases(NETWORK_OPS, {case.subject.op for case in todo})
    saved = [0, time.monotonic()]

    def progress(case: Case, outcome: Outcome) -> None:
        print(f"{len(outcome.records):5} timings, {end - time.monotonic():4.0f} s: {case}")
        if time.monotonic() - saved[1] > 20:  # so that measurements survive a crash
            save(plan, outcome.records[int(saved[0]) :], [])
            saved[:] = [len(outcome.records), time.monotonic()]

    outcome = run_cases(
        todo,
        timer=timer,
        device=device,
        deadline=end,
        inductor="eager" if plan.dry_run else "inductor",
        matmul=64 if plan.dry_run else MATMUL,
        progress=progress,
    )
    save(plan, outcome.records, [])
    if not plan.dry_run:
        winners = fastest_backends(outcome.records)
        tune.save_backends(winners, tune.facts(gpu_here), tune.cache_file(gpu_here))
        notes += [f"auto will try first for {op}: {keys}" for op, keys in winners.items()]
    outcome.failures = [*first.failures, *outcome.failures]
    return summarized(outcome, [f"{len(first.records)} timings from the host", *notes])


def networks_stage(plan: Plan) -> list[str]:
    """Benchmark whole evaluations."""
    import torch

    from benchmarks.networks import gpu_networks
    from fastdiff.bench import shapes
    from fastdiff.bench.clock import HostTimer, timer_for

    device = torch.device("cpu" if plan.dry_run else "cuda")
    jobs = {name: shapes.GPU_JOBS[name] for name in gpu_networks.NETWORKS}
    outcome, shares = gpu_networks.evaluate(
        dry_jobs() if plan.dry_run else jobs,
        timer=HostTimer(rounds=1) if plan.dry_run else timer_for(device),
        device=device,
        peers=not plan.dry_run,
    )
    save(plan, outcome.records, shares)
    return summarized(outcome, [])


STAGES: dict[str, Callable[[Plan], list[str]]] = {
    "environment": environment_stage,
    "build": build_stage,
    "tests": tests_stage,
    "sanitize": sanitize_stage,
    "tune": tune_stage,
    "bench": bench_stage,
    "networks": networks_stage,
}


def dry_jobs() -> dict[str, Any]:
    """The smallest networks."""
    from fastdiff.bench.shapes import Job

    return {
        "digits U-Net": Job(network="unet", preset="digits", size=2, batch=1),
        "digits decoder": Job(network="decoder", preset="digits", size=2, batch=1),
    }


def dry_cases(subjects: Sequence[Any], known: set[str]) -> list[Any]:
    """Cases for the ops of transformers, which the smallest networks lack."""
    from fastdiff.bench.run import Case
    from fastdiff.bench.shapes import Call

    (job, *_) = dry_jobs().values()
    x, weight = (1, 4, 32), (32,)
    calls = {
        "geglu": Call("geglu", (x,)),
        "layer_norm": Call("layer_norm", (x, weight, weight)),
        "add_layer_norm": Call("add_layer_norm", (x, x, weight, weight)),
    }
    return [
        Case(subject=subject, job_name="", job=job, call=calls[subject.op], direction=direction)
        for subject in subjects
        if subject.op not in known
        for direction in ("forward", "backward")
    ]


def summarized(outcome: Any, notes: Sequence[str]) -> list[str]:
    """Summarize an outcome as notes. Raises Failed if something failed."""
    counts = [
        f"{len(outcome.records)} timings",
        f"{len(outcome.left_out)} cases left out for lack of time"
        + (f", from {outcome.left_out[0]} on" if outcome.left_out else ""),
        f"{len(outcome.unavailable)} not supported by the provider",
    ]
    for line in (*outcome.left_out, *outcome.unavailable):
        print(line)
    lines = [*counts, *notes, *outcome.unavailable[:5]]
    if outcome.failures:
        raise Failed(*outcome.failures, *lines)
    return lines


def save(plan: Plan, records: Sequence[Any], shares: Sequence[Any]) -> None:
    """Save records and shares to <out>/results/<device>/<commit>.json."""
    from fastdiff.bench import record

    known = plan.out / "facts.json"
    facts = json.loads(known.read_text()) if known.exists() else {}
    facts.pop("date", None)
    if plan.commit:
        facts["commit"] = plan.commit
    if records or shares:
        record.save_records(records, shares, results=plan.out / "results", extra=facts)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# The command


def run_stage(stage: str, plan: Plan) -> Result:
    """Run one stage in its own process; its output goes to log.txt."""
    words = [sys.executable, "-m", "benchmarks.device", "--inside", stage, "--out", str(plan.out)]
    words += ["--seconds", str(plan.seconds), *(["--dry-run"] if plan.dry_run else [])]
    words += ["--commit", plan.commit] if plan.commit else []
    environment = {**os.environ, "FASTDIFF_CACHE": str(plan.out), "PYTHONUNBUFFERED": "1"}
    if plan.dry_run:
        environment["TRITON_INTERPRET"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = time.monotonic()
    said = plan.out / f"{stage}.json"
    said.unlink(missing_ok=True)
    with (plan.out / "log.txt").open("a") as log:
        log.write(f"\n=== {stage}\n")
        log.flush()
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = process.wait(plan.seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - start
    if code is None:
        return Result(stage=stage, status="timed out", seconds=seconds, notes=["see log.txt"])
    if not said.exists():
        notes = [f"exit code {code}, see log.txt"]
        return Result(stage=stage, status="failed", seconds=seconds, notes=notes)
    found = json.loads(said.read_text())
    said.unlink()
    return Result(stage=stage, status=found["status"], seconds=seconds, notes=found["notes"])


def inside(stage: str, plan: Plan) -> int:
    """Run a stage inside its process; unexpected errors propagate, with their traceback."""
    status, notes = "ok", []
    if plan.dry_run:
        import tests.kernels.interpreter  # noqa: F401 - makes Triton's interpreter round like GPUs
    try:
        notes = STAGES[stage](plan)
    except LeftOut as reason:
        status, notes = "left out", [str(reason)]
    except Failed as failure:
        status, notes = "failed", [str(line) for line in failure.args]
    (plan.out / f"{stage}.json").write_text(json.dumps({"status": status, "notes": notes}))
    print("\n".join([status, *notes]))
    return 0


def run(stages: Sequence[str], plan: Plan, minutes: float) -> int:
    """Run the stages one after the other; returns 1 if one failed."""
    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / "log.txt").unlink(missing_ok=True)
    whole = minutes * 60
    end = time.monotonic() + whole
    asked = sum(SECONDS[stage] for stage in stages)
    results: list[Result] = []
    for place, stage in enumerate(stages):
        # time that earlier stages did not use is shared among the rest
        rest = sum(SECONDS[later] for later in stages[place:])
        left = end - time.monotonic()
        share = left * SECONDS[stage] / rest if asked else left
        if share < 1:
            note = "no time left; use a larger --minutes, or --only"
            results.append(Result(stage=stage, status="timed out", seconds=0.0, notes=[note]))
            continue
        print(f"{stage}: up to {share:.0f} s", flush=True)
        result = run_stage(
            stage, dataclasses.replace(plan, seconds=share - min(share / 2, GRACE_S))
        )
        results.append(result)
        print(f"{stage}: {result.status}, {result.seconds:.0f} s", flush=True)
        shown = result.notes if result.status != "ok" else result.notes[:12]
        for note in shown[:40]:
            print(f"  {note}", flush=True)
    content = {
        "dry_run": plan.dry_run,
        "stages": [dataclasses.asdict(result) for result in results],
    }
    (plan.out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
    bad = [r for r in results if r.status in ("failed", "timed out")]
    print(f"\n{len(results)} stages, {len(bad)} failed; {whole - (end - time.monotonic()):.0f} s")
    for result in results:
        print(f"  {result.stage:12} {result.status:10} {result.seconds:4.0f} s")
    for path in written(plan.out):
        print(f"written: {path}")
    return 1 if bad else 0


def written(out: Path) -> Iterator[Path]:
    files = ("results/*/*.json", "tuned/*.json", "cuda-kernels.txt", "summary.json", "log.txt")
    for pattern in files:
        yield from sorted(out.glob(pattern))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/device"), help="output folder (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="for all stages (default: %(default)s)"
    )
    parser.add_argument("--commit", help="the commit, if the working tree is a copy without .git")
    parser.add_argument("--dry-run", action="store_true", help="run without a GPU, on tiny shapes")
    parser.add_argument("--inside", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--parity-cases", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.parity_cases:
        return parity_cases(options.parity_cases, options.seconds)
    plan = Plan(
        out=options.out.resolve(),
        seconds=options.seconds,
        dry_run=options.dry_run,
        commit=options.commit,
    )
    if options.inside:
        return inside(options.inside, plan)
    return run(options.only, plan, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
