"""Benchmark the ops on a GPU: shapes, providers, timing, records.

Each file of `ops` declares a `Subject` (providers.py); the shapes are those that the networks of
`shapes.GPU_JOBS` pass to the op. Providers:

    triton, cuda          our kernels
    reference             our reference in PyTorch
    eager                 what people write; a norm gets NCHW, PyTorch's default layout
    eager channels_last   the same on channels_last, the layout that triton and compile get
    compile               eager channels_last through torch.compile
    sdpa ...              each of PyTorch's attention kernels: flash, efficient, cudnn, math
    copy, matmul          the limits: a copy of the same bytes, timed with the same method, and a
                          large product in the same dtype

A case that probably takes less time than its launches is timed in a CUDA graph for every provider,
the others with a cold cache (fastdiff/bench/clock.py). Our kernels must agree with the reference
before they are timed. Cases run in order of `priority` until the time is up; the rest are counted.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.utils._pytree import tree_flatten

from fastdiff import kernels
from fastdiff.bench import shapes
from fastdiff.bench.clock import Method, Timer
from fastdiff.bench.providers import (
    CHOICES,
    EVERYTHING,
    FAST_BYTES,
    FAST_FLOPS,
    LATER,
    LAUNCH_S,
    LIBRARY,
    SDPA,
    Arguments,
    Direction,
    Make,
    Subject,
    compiled_for,
)
from fastdiff.bench.record import Record
from fastdiff.bench.shapes import Call, Job
from fastdiff.bench.tune import agrees
from fastdiff.kernels import Work
from fastdiff.kernels.choose import bound_arguments
from fastdiff.kernels.tuning.measured import ANY

BACKENDS = (*CHOICES, "cpu", "reference", "auto")
"""Providers that are our op on one of its backends."""
MATMUL = 8192
"""Size of the square matrix product whose rate counts as the peak."""
CONTEXT_LOST = "the CUDA context is lost, so no more cases can run"
"""The last of `Outcome.failures` in this event."""
PROVIDER_S = 0.05
"""Seconds of timed rounds per provider."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to measure, with several providers."""

    subject: Subject
    job_name: str
    job: Job
    call: Call
    direction: Direction = "forward"
    dtype: torch.dtype = torch.bfloat16
    providers: tuple[str, ...] = EVERYTHING
    priority: int = 0

    @property
    def benchmark(self) -> str:
        return self.subject.op + ("" if self.direction == "forward" else " backward")

    @property
    def work(self) -> Work:
        return self.subject.work(self.call, self.job, self.dtype, self.direction)

    @property
    def method(self) -> Method:
        """A graph if launch bound, except for gradients: autograd leaves the captured stream."""
        work = self.work
        least = max(work.bytes / FAST_BYTES, work.flops / FAST_FLOPS)
        return "graph" if least < LAUNCH_S and self.direction == "forward" else "events"

    def __str__(self) -> str:
        return f"{self.benchmark} {self.job_name} {self.call}"


def cases(
    subjects: Sequence[Subject],
    jobs: dict[str, Job] | None = None,
    batches: Sequence[int] = shapes.GPU_BATCHES,
) -> list[Case]:
    """Every call of every job at every batch size, the most important ones first.

    Priority 0: each op's largest call of a job at the job's own batch size, all attention calls
       there, and gradients that have a goal
    1: every other call at that batch size, and the other gradients
    2: the largest calls at the other batch sizes
    3: everything else
    """
    found = []
    for name, job in (shapes.GPU_JOBS if jobs is None else jobs).items():
        single = replace(job, batch=1)
        calls = list(single.collect())
        for subject in subjects:
            mine = sorted((c for c in calls if c.op == subject.op), key=lambda c: -c.numbers)
            for place, one in enumerate(mine):
                for batch in dict.fromkeys((job.batch, *batches)):
                    usual, first = batch == job.batch, place == 0 or subject.sdpa
                    priority = (0 if first else 1) if usual else (2 if place == 0 else 3)
                    case = Case(
                        subject=subject,
                        job_name=name,
                        job=replace(job, batch=batch),
                        call=one.at_batch(batch),
                        providers=EVERYTHING if priority == 0 else LATER,
                        priority=priority,
                    )
                    found.append(case)
                    if kernels.OPS[subject.op].differentiable and usual and place == 0:
                        gradient = replace(case, direction="backward")
                        if not subject.gradients_first:
                            gradient = replace(gradient, priority=1, providers=LATER)
                        found.append(gradient)
    # within a priority, ops take turns
    turns: dict[tuple[int, str], int] = {}
    keyed = []
    for case in found:
        key = case.priority, case.benchmark
        turns[key] = turns.get(key, -1) + 1
        keyed.append((case.priority, turns[key], case))
    return [case for *_, case in sorted(keyed, key=lambda entry: entry[:2])]


@dataclass(kw_only=True)
class Outcome:
    """The result of running some cases."""

    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Cases that should have run and did not, or gave wrong results."""
    unavailable: list[str] = field(default_factory=list)
    """Cases that a rival's kernel does not support."""
    left_out: list[str] = field(default_factory=list)
    """Cases that were skipped for lack of time."""


def run(
    todo: Sequence[Case],
    *,
    timer: Timer,
    device: torch.device,
    deadline: float,
    inductor: str = "inductor",
    matmul: int = MATMUL,
    progress: Callable[[Case, Outcome], None] = lambda case, outcome: None,
) -> Outcome:
    """Measure cases until ``time.monotonic()`` passes the deadline; failures affect only one case.

    Args:
        inductor: the backend of torch.compile.
        matmul: size of the matrix product that determines the peak.
    """
    outcome = Outcome()
    peaks: dict[torch.dtype, tuple[Any, Work]] = {}
    for place, case in enumerate(todo):
        if time.monotonic() > deadline:
            outcome.left_out = [str(case) for case in todo[place:]]
            break
        progress(case, outcome)
        if case.subject.limit == "matmul" and case.dtype not in peaks:
            peaks[case.dtype] = _peak(case.dtype, device, timer, matmul)
        try:
            _measure_case(case, outcome, timer, device, inductor)
            _limit(case, outcome, timer, device, peaks)
        except Exception as error:  # noqa: BLE001 - reported; the other cases continue
            outcome.failures.append(f"{case}: {said(error)}")
            if lost_context(error):
                outcome.failures.append(CONTEXT_LOST)
                outcome.left_out = [str(case) for case in todo[place + 1 :]]
                break
    return outcome


def _measure_case(
    case: Case, outcome: Outcome, timer: Timer, device: torch.device, inductor: str
) -> None:
    subject = case.subject
    make = Make(case.dtype, device)
    arguments = subject.arguments(case.call, case.job, make)
    wanted = [p for p in subject.providers if p in case.providers]
    for backend in [name for name in CHOICES if name in wanted]:
        objection = _objection(case, backend, arguments)
        if objection is not None:
            wanted.remove(backend)
            # every op has Triton kernels; CUDA kernels need nvcc and support fewer cases
            if backend == "triton":
                outcome.failures.append(f"{case}: triton cannot run: {objection}")
            elif kernels.available()[subject.op][backend] is None:
                outcome.unavailable.append(f"{case} {backend}: {objection}")
        elif not _ours_agrees(case, make, backend):
            wanted.remove(backend)
            outcome.failures.append(f"{case}: {backend} does not agree with the reference")
    for provider in wanted:
        foreign = provider in (*LIBRARY, "compile")
        try:
            with _provider(case, provider, arguments, inductor) as function:
                timing = timer(function, method=case.method, budget_s=PROVIDER_S)
        except Exception as error:
            if not foreign or lost_context(error):
                raise
            outcome.unavailable.append(f"{case} {provider}: {said(error)}")
            continue
        record = record_of(case, provider, timing, case.work)
        class_of = kernels.OPS[subject.op].shape_class
        if provider in CHOICES and case.direction == "forward" and class_of is not None:
            given = bound_arguments(subject.op, *arguments)
            record = replace(record, shape_class=class_of(*given))
        outcome.records.append(record)


def fastest_backends(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """Op -> "dtype/shape class" -> the fastest one of `CHOICES`.

    The winner has the smallest geometric mean over the cases of a class that all of its backends
    ran; without such a case, it is the first of `CHOICES` that ran one. The class `ANY` contains
    all cases of an op.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], dict[str, float]]] = {}
    for record in records:
        if record.provider in CHOICES and record.shape_class:
            for shape_class in (record.shape_class, ANY):
                of_class = found.setdefault((record.benchmark, f"{record.dtype}/{shape_class}"), {})
                case = of_class.setdefault((record.job, record.shape), {})
                case[record.provider] = record.median_s
    winners: dict[str, dict[str, str]] = {}
    for (op, key), cases_of_class in found.items():
        took = {name for case in cases_of_class.values() for name in case}
        names = [name for name in CHOICES if name in took]
        shared = [case for case in cases_of_class.values() if len(case) == len(names)]
        seconds = {name: sum(math.log(case[name]) for case in shared) for name in names}
        winners.setdefault(op, {})[key] = min(names, key=seconds.__getitem__)  # the first of equals
    return winners


@contextlib.contextmanager
def _provider(
    case: Case, provider: str, arguments: Arguments, inductor: str
) -> Iterator[Callable[[], Any]]:
    """The function to time, in a context with the settings it needs."""
    with settings(case, provider):
        yield function_of(case, provider, arguments, inductor)


@contextlib.contextmanager
def settings(case: Case, provider: str) -> Iterator[None]:
    """What a provider's function needs around it, when it is made and when it is called."""
    kernel: AbstractContextManager[Any] = nullcontext()
    if provider in SDPA:
        kernel = sdpa_kernel(SDPA[provider])
    backend = provider if provider in BACKENDS else "reference"
    forward = torch.inference_mode() if case.direction == "forward" else nullcontext()
    with warnings.catch_warnings(), kernels.backend(backend), kernel, forward:
        warnings.simplefilter("ignore")  # SDPA and Inductor are verbose about unsupported calls
        yield


def function_of(
    case: Case, provider: str, arguments: Arguments, inductor: str
) -> Callable[[], Any]:
    """A provider's function of no arguments; make it and call it inside its `settings`."""
    subject, (args, kwargs) = case.subject, arguments
    function: Callable[..., Any] = subject.ours if provider in BACKENDS else subject.eager
    if provider == "eager" and subject.norm:
        args = tuple(_nchw(a) for a in args)
        kwargs = {name: _nchw(a) for name, a in kwargs.items()}
    if case.direction == "backward":
        return _backward(function, args, kwargs, provider == "compile", inductor)
    if provider == "compile":
        function = compiled_for(function, args, kwargs, inductor)
    return lambda: function(*args, **kwargs)


def _backward(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    compile_it: bool,
    inductor: str,
) -> Callable[[], Any]:
    """Computes the gradients of all floating-point operands; the forward pass runs only once."""

    def leaf(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return a.detach().requires_grad_()

    args, kwargs = tuple(map(leaf, args)), {name: leaf(a) for name, a in kwargs.items()}
    if compile_it:
        function = compiled_for(function, args, kwargs, inductor)
    outputs = [t for t in tree_flatten(function(*args, **kwargs))[0] if t.requires_grad]
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    torch.manual_seed(1)
    gradients = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def _objection(case: Case, backend: str, arguments: Arguments) -> str | None:
    """Why a backend cannot run a case, or None."""
    args, kwargs = arguments
    try:
        with kernels.backend(backend), torch.inference_mode():
            case.subject.ours(*args, **kwargs)
    except kernels.BackendError as error:
        return error.reasons[backend]
    return None


def _ours_agrees(case: Case, make: Make, backend: str) -> bool:
    """Whether a backend agrees with the reference, in its outputs and in modified operands."""
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        arguments = case.subject.arguments(case.call, case.job, make)
        with _provider(case, name, arguments, "") as function:
            flat = tree_flatten((function(), arguments))[0]
            results.append([t for t in flat if isinstance(t, Tensor)])
    return all(map(agrees, *results))


def _limit(
    case: Case,
    outcome: Outcome,
    timer: Timer,
    device: torch.device,
    peaks: dict[torch.dtype, tuple[Any, Work]],
) -> None:
    if case.subject.limit == "matmul":
        timing, work = peaks[case.dtype]
        outcome.records.append(record_of(case, "matmul", timing, work))
        return
    source, target = copied(case.work, device)
    timing = timer(lambda: target.copy_(source), method=case.method, budget_s=PROVIDER_S)
    outcome.records.append(record_of(case, "copy", timing, case.work))


def copied(work: Work, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source and target of a copy that moves the bytes of the work."""
    source = torch.ones(max(1, work.bytes // 2), dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source)


def _peak(dtype: torch.dtype, device: torch.device, timer: Timer, side: int) -> tuple[Any, Work]:
    make = Make(dtype, device)
    a, b, out = make(side, side), make(side, side), make(side, side)
    timing = timer(lambda: torch.mm(a, b, out=out), method="events", budget_s=0.2)
    return timing, Work(bytes=3 * a.nbytes, flops=2 * side**3)


def record_of(case: Case, provider: str, timing: Any, work: Work) -> Record:
    return Record(
        benchmark=case.benchmark,
        job=case.job_name,
        shape=str(case.call),
        provider=provider,
        dtype=str(case.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        rounds=timing.rounds,
        q1_s=timing.q1_s,
        median_s=timing.median_s,
        q3_s=timing.q3_s,
        bytes=work.bytes,
        flops=work.flops,
        method=timing.method,
    )


def _nchw(a: Any) -> Any:
    return a.contiguous() if isinstance(a, Tensor) and a.ndim == 4 else a


def lost_context(error: Exception) -> bool:
    """Whether an error leaves the GPU context unusable, so that no other case can run."""
    return "CUDA error" in str(error)


def said(error: Exception) -> str:
    """An error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
