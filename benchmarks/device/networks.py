"""The stages that measure whole networks: ours, plain torch ops, Inductor, and a sampling loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv_transpose2d

from benchmarks.device import records
from benchmarks.device.dry import dry_jobs
from benchmarks.device.measure import run_cases
from benchmarks.device.table import Plan
from benchmarks.networks import gpu_networks
from fastdiff import kernels
from fastdiff.bench import shapes
from fastdiff.bench.clock import HostTimer, Method, Timer, Timing, timer_for
from fastdiff.bench.plain import plain_ops
from fastdiff.bench.record import LAUNCHED, LOOP, LOOP_LAUNCHED, NETWORK
from fastdiff.bench.run import Outcome, cases, lost_context, said
from fastdiff.bench.shapes import Job
from fastdiff.bench.subjects import SUBJECTS
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.layers import upsample_nearest
from fastdiff.runtime.conditions import Condition
from fastdiff.runtime.cpu_layers import folded
from fastdiff.runtime.engine import Engine, Request
from fastdiff.runtime.graphs import CudaRecorder, Recorder, StepGraphs, rounded_rows

STEPS = 20
GUIDANCE = 7.5
BUDGET_S = 1.0
"""Seconds of timed rounds per provider and method."""
LOOP_ROUNDS = 9
DOUBLINGS = [(rows, *size) for rows in (2, 32) for size in ((1280, 8), (1280, 16), (640, 32))]
"""Rows, channels and sides before the doubling of Stable Diffusion 1.5's three, guided, for one
image and for 16."""


@contextmanager
def timed_convolutions() -> Iterator[None]:
    """Let cuDNN time its algorithms at the first call of each convolution and keep the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


PROVIDERS: tuple[tuple[str, Callable[[], AbstractContextManager[None]]], ...] = (
    ("auto", nullcontext),
    ("auto, cudnn.benchmark", timed_convolutions),
    ("plain", plain_ops),
)


def _device(plan: Plan) -> torch.device:
    return torch.device("cpu" if plan.dry_run else "cuda")


def _timer(plan: Plan) -> Timer:
    return HostTimer(rounds=1) if plan.dry_run else timer_for(_device(plan))


def _jobs(plan: Plan) -> dict[str, Job]:
    if plan.dry_run:
        return dry_jobs()
    return {name: shapes.GPU_JOBS[name] for name in gpu_networks.NETWORKS}


def _built(job: Job, device: torch.device, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """The network in bf16, and random inputs: products of zeros are faster.

    Its weights preserve the scale of activations. With those of `Job.build`, biases drown what the
    ops contribute, and a wrong op would not show.
    """
    module, inputs = job.build(str(device), gpu_networks.DTYPE)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))
    return module, _random(inputs, seed)


def _random(inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(inputs["x"].device if "x" in inputs else "cpu").manual_seed(seed)
    drawn = {}
    for name, x in inputs.items():
        drawn[name] = x.clone()
        if x.is_floating_point() and name != "t":
            drawn[name].normal_(generator=generator)
    return drawn


class _Stopped(Exception):
    """There is no time for the rest."""


class _Measured:
    """Times functions until the time of a plan is up, saving each timing at once."""

    def __init__(self, plan: Plan) -> None:
        self.outcome, self._plan, self._timer = Outcome(), plan, _timer(plan)
        self._end = time.monotonic() + plan.seconds

    def left(self, what: str) -> None:
        """Raises _Stopped, and notes what is left out, if the time is up."""
        if time.monotonic() > self._end:
            self.outcome.left_out.append(what)
            raise _Stopped

    def add(
        self, benchmark: str, name: str, job: Job, provider: str, step: Callable[[], Any],
        method: Method,
    ) -> None:  # fmt: skip
        """Time a function, with gradients off; errors of one provider do not stop the others."""
        what = f"{benchmark}: {name} by {provider}"
        self.left(what)
        try:
            with torch.inference_mode():
                timing = self._timer(step, method=method, budget_s=BUDGET_S)
        except Exception as error:
            if lost_context(error):
                raise
            kind = "unavailable" if isinstance(error, kernels.BackendError) else "failures"
            getattr(self.outcome, kind).append(f"{what}: {said(error)}")
            return
        self.keep(benchmark, name, job, provider, timing)

    def keep(
        self, benchmark: str, name: str, job: Job, provider: str, timing: Timing, steps: int = 1
    ) -> None:
        """Save a timing of a number of evaluations."""
        record = gpu_networks.record_of(name, job, provider, timing)
        record = replace(
            record, benchmark=benchmark, bytes=steps * record.bytes, flops=steps * record.flops
        )
        self.outcome.records.append(record)
        records.save(self._plan, [record])
        print(f"{benchmark}: {name} by {provider}: {timing}", flush=True)


def unet(plan: Plan) -> list[str]:
    """Time networks as a graph and launched op by op: ours, plain torch ops, and diffusers'.

    Our network in bf16 may be off from plain ops in fp64 by the parity rule's factor times what
    plain ops in bf16 are off.
    """
    measured, device = _Measured(plan), _device(plan)
    notes: list[str] = []
    try:
        for name, job in _jobs(plan).items():
            measured.left(name)
            module, inputs = _built(job, device)
            try:
                notes.append(f"{name}: {_parity(module, inputs)}")
            except AssertionError as error:  # a wrong network is still measured
                measured.outcome.failures.append(f"{name}: {said(error)}")
            for provider, ops in PROVIDERS:
                for benchmark, method in _METHODS:
                    with ops():
                        step = lambda: module(**inputs)  # noqa: B023, E731 - called here only
                        measured.add(benchmark, name, job, provider, step, method)
            if not plan.dry_run:
                _peers(measured, name, job, device)
        notes += _doublings(plan, measured)
    except _Stopped:
        pass
    return records.summarized(measured.outcome, notes)


def _doublings(plan: Plan, measured: _Measured) -> Iterator[str]:
    """Whether a doubling folded into its convolution would be faster, as it is on CPUs.

    A line per convolution of `DOUBLINGS`: plain time over folded time. Nothing is built on it for
    GPUs yet, see docs/decisions/runtime.md.
    """
    timer, device, dtype = _timer(plan), _device(plan), gpu_networks.DTYPE
    for rows, channels, side in [(1, 8, 4)] if plan.dry_run else DOUBLINGS:
        what = f"doubling {rows} x {channels} x {side} x {side}"
        measured.left(what)
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
        wide = folded(conv.weight.detach())
        conv, wide = conv.to(device, dtype), wide.to(device, dtype)
        x = torch.randn(rows, channels, side, side, device=device, dtype=dtype)
        layout = torch.channels_last
        conv = conv.to(memory_format=layout)  # type: ignore[call-overload]
        x, wide = x.to(memory_format=layout), wide.to(memory_format=layout)

        def plain(conv: Any = conv, x: Tensor = x) -> Tensor:
            y: Tensor = conv(upsample_nearest(x))
            return y

        def fold(conv: Any = conv, x: Tensor = x, wide: Tensor = wide) -> Tensor:
            return conv_transpose2d(x, wide, conv.bias, stride=2, padding=1)

        with torch.inference_mode():
            torch.testing.assert_close(fold().float(), plain().float(), rtol=0.05, atol=0.05)
            before, after = (
                timer(step, method="graph", budget_s=BUDGET_S).median_s for step in (plain, fold)
            )
        yield f"{what}: {before * 1e6:.1f} us, folded {after * 1e6:.1f}, {before / after:.2f} x"


_METHODS: tuple[tuple[str, Method], ...] = ((NETWORK, "graph"), (LAUNCHED, "host"))


def _peers(measured: _Measured, name: str, job: Job, device: torch.device) -> None:
    try:
        peers: Iterator[tuple[str, Callable[[], Any]]] = gpu_networks.diffusers_steps(job, device)
        for provider, step in peers:
            for benchmark, method in _METHODS:
                measured.add(benchmark, name, job, provider, step, method)
    except ImportError as error:
        measured.outcome.unavailable.append(f"{name} in diffusers: {said(error)}")


def _parity(module: Any, inputs: dict[str, Tensor]) -> str:
    """Compare a whole network with fp64 by the parity rule. Raises AssertionError if it fails."""
    from tests.support.parity import assert_parity

    wide = copy.deepcopy(module).double()

    def evaluated(network: Any, ops: Callable[[], AbstractContextManager[None]]) -> Any:
        def run(seed: int) -> Tensor:
            given = _random(inputs, seed)
            if network is wide:
                given = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
            with torch.inference_mode(), ops():
                y: Tensor = network(**given)
            return y

        return run

    assert_parity(
        evaluated(module, nullcontext), evaluated(wide, plain_ops), evaluated(module, plain_ops)
    )
    return "ours agrees with plain ops in fp64"


def inductor(plan: Plan) -> list[str]:
    """Time the networks of plain ops in torch.compile, captured and by its own graphs; then the
    large norms, at which Inductor is aimed."""
    measured, device = _Measured(plan), _device(plan)
    end = time.monotonic() + plan.seconds
    modes = ("default", "reduce-overhead")
    try:
        for name, job in _jobs(plan).items():
            module, inputs = _built(job, device)
            for mode in modes:
                with plain_ops():
                    measured.left(f"{name} in torch.compile, mode {mode}")
                    _compiled(measured, name, job, module, inputs, mode, plan)
    except _Stopped:
        pass
    norms = [SUBJECTS["group_norm_silu"]]
    asked = ("triton", "cuda", "compile")
    small = ((1,), dry_jobs()) if plan.dry_run else (shapes.GPU_BATCHES, shapes.GPU_JOBS)
    found = [case for case in cases(norms, small[1], small[0]) if case.priority == 0]
    outcome = run_cases(plan, [replace(case, providers=asked) for case in found], end)
    for kind in ("records", "failures", "unavailable", "left_out"):
        getattr(measured.outcome, kind).extend(getattr(outcome, kind))
    return records.summarized(measured.outcome)


def _compiled(
    measured: _Measured,
    name: str,
    job: Job,
    module: Any,
    inputs: dict[str, Tensor],
    mode: str,
    plan: Plan,
) -> None:
    """Time a network in torch.compile. What "default" makes is captured in one graph of ours;
    "reduce-overhead" replays its own, so the host's clock times it."""
    torch.compiler.reset()
    start = time.monotonic()
    options: dict[str, Any] = {"backend": "eager"} if plan.dry_run else {"mode": mode}
    compiled = torch.compile(module, dynamic=False, fullgraph=True, **options)
    try:
        with torch.inference_mode():
            for _ in range(3):  # it records its graphs in the second and third call
                compiled(**inputs)
    except Exception as error:
        if lost_context(error):
            raise
        measured.outcome.unavailable.append(f"{name} in torch.compile, {mode}: {said(error)}")
        return
    print(f"{name}, mode {mode}: compiled in {time.monotonic() - start:.0f} s", flush=True)
    step = lambda: compiled(**inputs)  # noqa: E731
    if mode == "default":
        measured.add(NETWORK, name, job, "compile", step, "graph")
        measured.add(LAUNCHED, name, job, "compile", step, "host")
    else:
        measured.add(NETWORK, name, job, "compile reduce-overhead", step, "host")


def loop(plan: Plan) -> list[str]:
    """Time 20 guided steps, each as one replay and launched op by op, with our ops and plain ones.

    It is a failure if replays differ from launches in a bit, or if another prompt, seed, scale,
    sampler or number of steps needs another recording.
    """
    measured, device = _Measured(plan), _device(plan)
    notes: list[str] = []
    name, job = next(iter(_jobs(plan).items()))
    network, _ = _built(job, device)
    try:
        for provider, ops in (("auto", nullcontext), ("plain", plain_ops)):
            measured.left(f"{name} by {provider}")
            try:
                with ops():
                    notes += _looped(measured, name, job, network, provider, plan)
            except AssertionError as error:
                measured.outcome.failures.append(f"{name} by {provider}: {said(error)}")
    except _Stopped:
        pass
    return records.summarized(measured.outcome, notes)


def _looped(
    measured: _Measured, name: str, job: Job, network: Any, provider: str, plan: Plan
) -> list[str]:
    graphs = StepGraphs(_recorder(plan))
    replayed, launched = _engine(network, job, graphs), _engine(network, job, None)
    request = _request(network, job, seed=1)
    first, again, plain = (_finished(e, request) for e in (replayed, replayed, launched))
    assert torch.equal(first, again), "two runs of the same replays differ"
    assert torch.equal(first, plain), "replayed steps differ from launched ones"
    other = _request(network, job, seed=2, sampler="euler-ancestral", steps=7, scale=2.0)
    _finished(replayed, other)
    assert graphs.recorded == 1, f"expected 1 recording for all requests, got {graphs.recorded}"
    for benchmark, engine in ((LOOP, replayed), (LOOP_LAUNCHED, launched)):
        measured.left(f"{benchmark}: {name} by {provider}")
        rounds = 1 if plan.dry_run else LOOP_ROUNDS
        seconds = [_seconds(engine, request) for _ in range(rounds)]
        measured.keep(benchmark, name, job, provider, Timing.of("host", seconds), STEPS)
    return [f"{provider}: replays give the bits of launches; 1 recording serves other requests"]


def _recorder(plan: Plan) -> Recorder:
    if plan.dry_run:
        from tests.support.tape import Tape

        return Tape()
    return CudaRecorder(_device(plan))


def _engine(network: Any, job: Job, graphs: StepGraphs | None) -> Engine:
    channels = network.config.in_channels
    tokens = shapes.CONTEXT_TOKENS if network.config.context_dim else 0
    size = (channels, job.size, job.size)
    engine = Engine(network, shape=size, slots=1, tokens=tokens, graphs=graphs)
    if graphs is None:  # evaluate as many rows as with graphs, for the same bits
        from fastdiff.runtime.denoiser import Denoiser

        engine._denoiser = Denoiser(network, size[1:], rounded=rounded_rows)
    return engine


def _request(
    network: Any, job: Job, *, seed: int, sampler: str = "dpmpp-2m", steps: int = STEPS,
    scale: float = GUIDANCE,
) -> Request:  # fmt: skip
    """Another prompt, noise, sampler and scale for each seed, as Stable Diffusion's pipelines."""
    betas = ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
    table = build_table(sampler, NoiseSchedule(betas), steps, guidance_scale=scale)
    generator, config = torch.Generator().manual_seed(seed), network.config
    if config.context_dim:
        shape = (1, shapes.CONTEXT_TOKENS, config.context_dim)
        pair = [Condition(context=torch.randn(shape, generator=generator)) for _ in range(2)]
    else:
        pair = [Condition(label=seed % config.num_classes), Condition(label=config.num_classes)]
    x = torch.randn(config.in_channels, job.size, job.size, generator=generator)
    return Request(
        table=table, x=x * table.initial_sigma, seed=seed, condition=pair[0], unconditional=pair[1]
    )


def _finished(engine: Engine, request: Request) -> Tensor:
    engine.submit(request)
    while True:
        for result in engine.step():
            assert result.error is None, result.error
            return result.x


def _seconds(engine: Engine, request: Request) -> float:
    """Seconds from handing in a request to having its sample."""
    on_gpu = engine._denoiser.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    _finished(engine, request)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def networks(plan: Plan) -> list[str]:
    """Benchmark whole evaluations on each backend, and the share of each op in them."""
    outcome, shares = gpu_networks.evaluate(
        _jobs(plan), timer=_timer(plan), device=_device(plan), peers=not plan.dry_run
    )
    records.save(plan, outcome.records, shares)
    return records.summarized(outcome)
