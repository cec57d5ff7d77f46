"""What `fastdiff bench` measures: options -> rows, in order of their value, until time is up."""

from __future__ import annotations

import inspect
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdiff import kernels
from fastdiff.bench import contest, whole, whole_job
from fastdiff.bench.clock import timer_for
from fastdiff.bench.clocks import Clocks
from fastdiff.bench.contest import Conditions, UserKernel
from fastdiff.bench.providers import Make
from fastdiff.bench.record import environment
from fastdiff.bench.result import Row, Run
from fastdiff.bench.run import Case, lost_context, said
from fastdiff.bench.shapes import Call, Job, Shape
from fastdiff.bench.subjects import SUBJECTS
from fastdiff.kernels.choose import bound_arguments

PRESETS = {
    "digits": Job(network="unet", preset="digits", size=8, batch=16),
    "sd15": Job(network="unet", preset="sd1", size=64, batch=2),
    "sdxl": Job(network="unet", preset="sdxl", size=128, batch=2),
    "vae": Job(network="decoder", preset="kl-f8", size=64, batch=1),
    "adm256": Job(network="unet", preset="adm-imagenet256", size=256, batch=2),
    "dit-xl": Job(network="dit", preset="dit-xl-2", size=32, batch=2),
}
"""Name -> the network, at the batch of one guided image (the digits: of eight)."""
QUICK = {"digits": 8, "sd15": 32}
"""The presets of a quick run on a CPU, and the sizes of their latents."""
QUICK_FLOPS, QUICK_BYTES = 4e9, 3e8
"""Calls with more work are left out of a quick run on a CPU."""
MINUTES = {True: 1.0, False: 20.0}
"""Quick or not -> the limit of the run."""
ROW_S = {True: 0.6, False: 3.0}
STEP_S = {True: 3.0, False: 60.0}
"""Quick or not -> seconds of timed rounds of a call, and of a network."""
PARTS = ("ops", "networks", "images", "jobs")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure; empty tuples mean all that fits.

    Raises:
        ValueError: options that contradict each other, or unknown names.
    """

    parts: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    shape: Shape | None = None
    """Shape of x, in place of those of the presets; needs one op."""
    batch: int | None = None
    size: int | None = None
    """Height and width of the networks' latents or pixels; None: those of the presets."""
    dtype: str | None = None
    """None: fp32 on a CPU, bf16 on a GPU."""
    providers: tuple[str, ...] = ()
    backward: bool = False
    quick: bool = False
    minutes: float | None = None
    device: str = "cpu"
    threads: int | None = None
    """CPU threads of PyTorch and of our kernels; None: as they are."""
    compile: bool | None = None
    """Whether torch.compile takes part; None: unless the run is quick."""

    def __post_init__(self) -> None:
        for given, known, what in (
            (self.parts, PARTS, "part"),
            (self.presets, PRESETS, "preset"),
            (self.ops, SUBJECTS, "op"),
            ((self.dtype,) if self.dtype else (), DTYPES, "dtype"),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")
        if self.shape is not None and len(self.ops) != 1:
            raise ValueError("--shape needs one --op, whose x has that shape")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"--batch must be at least 1, got {self.batch}")
        if self.size is not None and (self.size < 8 or self.size % 8):
            raise ValueError(f"--size must be a multiple of 8, got {self.size}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"--minutes must be positive, got {self.minutes:g}")

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype or ("bf16" if self.on_gpu else "fp32")]

    @property
    def compiles(self) -> bool:
        return not self.quick if self.compile is None else self.compile

    def wants(self, part: str) -> bool:
        """Whether a part takes place; naming ops leaves only them."""
        if self.parts:
            return part in self.parts
        if part == "jobs" and self.quick:
            return False  # eleven rounds take longer than all the rest
        return part == "ops" or not (self.ops or self.shape or self.backward)

    def jobs(self) -> dict[str, Job]:
        """The networks, by preset."""
        if self.presets:
            names: Sequence[str] = self.presets
        elif self.on_gpu:
            names = [*PRESETS]
        else:
            names = [*QUICK] if self.quick else ["digits", "sd15", "vae"]
        found = {}
        for name in names:
            job = PRESETS[name]
            if self.quick and not self.on_gpu:
                job = replace(job, size=QUICK.get(name, job.size // 2), batch=min(job.batch, 16))
            if self.batch is not None:
                job = replace(job, batch=self.batch)
            if self.size is not None:
                job = replace(job, size=self.size)
            found[name] = job
        return found

    def measured_networks(self) -> dict[str, Job]:
        """Those of `jobs` of which whole evaluations are measured, by preset."""
        if not self.quick or self.on_gpu:
            return self.jobs()
        # a network at full size takes seconds per call
        return {name: job for name, job in self.jobs().items() if name == "digits"}


def op_cases(plan: Plan, kernel: UserKernel | None = None) -> list[tuple[Case, int]]:
    """The cases of ops with their calls per evaluation: the largest call of each op first, then the
    others in turns.

    Raises:
        ValueError: the shape does not fit the op, or no network of the plan calls it.
    """
    direction = "backward" if plan.backward else "forward"
    shared: dict[str, Any] = {"dtype": plan.torch_dtype, "direction": direction}
    ops = plan.ops or tuple(op for op in SUBJECTS if op != "gather_rows")
    if plan.shape is not None:
        (op,) = ops
        job = replace(PRESETS["sd15"], batch=plan.shape[0])
        return [
            (
                Case(
                    subject=SUBJECTS[op],
                    job_name="",
                    job=job,
                    call=called(op, plan.shape),
                    **shared,
                ),
                1,
            )
        ]
    ranked = []
    for name, job in plan.jobs().items():
        calls = job.collect()
        for op in ops:
            mine = sorted((c for c in calls if c.op == op), key=lambda c: -c.numbers)
            mine = [call for call in mine if kernel is None or accepts(kernel.function, call)]
            for place, call in enumerate(mine):
                case = Case(subject=SUBJECTS[op], job_name=name, job=job, call=call, **shared)
                if plan.quick and not plan.on_gpu and heavy(case):
                    continue
                ranked.append((place, case, calls[call]))
    if plan.quick:
        fewest: dict[tuple[str, str], int] = {}
        kept = []
        for place, case, count in ranked:
            key = case.subject.op, case.job_name
            fewest[key] = fewest.get(key, 0) + 1
            if fewest[key] <= (3 if kernel else 1):
                kept.append((place, case, count))
        ranked = kept
    if not ranked:
        presets = ", ".join(plan.jobs())
        raise ValueError(
            f"{', '.join(ops)} is not called by {presets} as this run measures it; pass --shape or "
            f"other --preset names ({', '.join(PRESETS)})"
        )
    ranked.sort(key=lambda entry: entry[0])
    return [(case, count) for _, case, count in ranked]


def called(op: str, shape: Shape) -> Call:
    """The call of an op whose x has this shape.

    Raises:
        ValueError: the op refuses such an x, or x alone does not determine the other operands.
    """
    subject = SUBJECTS[op]
    if subject.operands is None:
        raise ValueError(f"--shape cannot be used for {op}; leave it out for its usual shapes")
    try:
        call = Call(op, subject.operands(shape))
        meta = Make(torch.float32, torch.device("meta"))
        args, kwargs = subject.arguments(call, PRESETS["sd15"], meta)
        kernels.OPS[op].check(*bound_arguments(op, args, kwargs))
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"--shape {shape} does not fit x of {op}: {error}") from None
    return call


def accepts(function: Callable[..., Any], call: Call) -> bool:
    """Whether a function has a parameter for each option of a call."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a C function: the call itself will show it
        return True
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return True
    return all(name in parameters for name, _ in call.options)


def heavy(case: Case) -> bool:
    work = case.work
    return work.flops > QUICK_FLOPS or work.bytes > QUICK_BYTES


def measure(
    plan: Plan,
    *,
    kernel: UserKernel | None = None,
    progress: Progress = lambda done, total: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Run:
    """Measure all that a plan asks for.

    Args:
        progress: called as progress(rows done, rows in all).
        on_row: called with each row as soon as it is done.
    """
    device = torch.device(plan.device)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    start = time.monotonic()
    minutes = plan.minutes or MINUTES[plan.quick]
    deadline = start + 60 * minutes
    conditions = Conditions(timer=timer_for(device), device=device, budget_s=ROW_S[plan.quick])
    todo = list(_tasks(plan, kernel, conditions))
    rows: list[Row] = []
    left_out: list[str] = []
    with Clocks(dry_run=device.type != "cuda") as clocks:
        clocks.begin()
        for place, (name, task) in enumerate(todo):
            progress(place, len(todo))
            if time.monotonic() > deadline:
                left_out.append(name)
                continue
            try:
                row = task()
            except Exception as error:
                if lost_context(error) or isinstance(error, ValueError):
                    raise
                left_out.append(f"{name}: {said(error)}")
                continue
            rows.append(row)
            on_row(row)
        progress(len(todo), len(todo))
        sampled = clocks.end()
    facts = {**environment(), **device_facts(device)}
    facts["minutes"] = round((time.monotonic() - start) / 60, 2)
    facts["quick"] = plan.quick
    return Run(environment=facts, rows=tuple(rows), clocks=sampled, left_out=tuple(left_out))


def _tasks(
    plan: Plan, kernel: UserKernel | None, conditions: Conditions
) -> Iterator[tuple[str, Callable[[], Row]]]:
    if plan.wants("ops"):
        for case, count in op_cases(plan, kernel):
            yield (
                str(case),
                lambda case=case, count=count: _op(  # type: ignore[misc]
                    plan, case, count, kernel, conditions
                ),
            )
    if kernel is not None:
        return
    longer = replace(conditions, budget_s=STEP_S[plan.quick])
    if plan.wants("networks"):
        for preset, job in plan.measured_networks().items():
            yield (
                f"{preset} step",
                lambda preset=preset, job=job: whole.step_row(  # type: ignore[misc]
                    preset,
                    job,
                    longer,
                    dtype=plan.torch_dtype,
                    compile_too=plan.compiles,
                    peers=not plan.quick,
                    only=plan.providers,
                ),
            )
    if plan.wants("images") and "digits" in plan.jobs():
        yield "digits images", lambda: whole.image_row(longer)
    if plan.wants("jobs") and "digits" in plan.jobs():
        yield "digits job", lambda: whole_job.job_row(longer, rows=whole_job.ROWS[plan.quick])


def _op(
    plan: Plan, case: Case, count: int, kernel: UserKernel | None, conditions: Conditions
) -> Row:
    only = plan.providers
    ours = [n for n in contest.backends(case, conditions.device) if not only or n in only]
    others = contest.baselines(
        case, conditions.device, compile_too=plan.compiles or "compile" in only
    )
    others = [n for n in others if not only or n in only or n == "eager"]
    row = contest.op_row(case, conditions, ours=ours, others=others, kernel=kernel, calls=count)
    if case.job_name:
        row = contest.with_savings(row, evaluation_seconds(case.job, row, conditions))
    return row


_rates: dict[tuple[str, torch.dtype], float] = {}


def evaluation_seconds(job: Job, row: Row, conditions: Conditions) -> float:
    """An estimate of one evaluation of a network: its FLOPs at the rate of a large product."""
    dtype = DTYPES[{"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[row.dtype]]
    key = str(conditions.device), dtype
    if key not in _rates:
        side = 1024 if conditions.device.type == "cpu" else 8192
        a = torch.randn(side, side, device=conditions.device).to(dtype)
        timing = conditions.timer(lambda: torch.mm(a, a), budget_s=0.2)
        _rates[key] = 2 * side**3 / timing.median_s
    return whole.flops(job) / _rates[key]


def device_facts(device: torch.device) -> dict[str, Any]:
    """What tells devices apart, and what a reader of times asks about them."""
    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "driver": "",
        "system": f"{platform.system()} {platform.machine()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cache": "warm: calls follow one another on the same operands",
    }
    if device.type == "cuda":
        facts["driver"] = _driver()
        facts["cuda"] = torch.version.cuda
        facts["cache"] = (
            "cold: the L2 is overwritten before each call; short calls in a graph, warm"
        )
    return facts


def _driver() -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
