"""Whole evaluations on a GPU: our backends, diffusers' modules, and the share of each op.

The networks have random weights in bf16. One evaluation is timed as a CUDA graph, so that Python
overhead counts for neither side. The time of an op is the sum over its calls: each distinct call of
the network is captured with its operands and timed by itself, on each backend.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff import kernels
from fastdiff.bench import shapes
from fastdiff.bench.clock import Method, Timer, Timing
from fastdiff.bench.providers import FAST_BYTES, LAUNCH_S, import_diffusers
from fastdiff.bench.record import NETWORK, Record, Share
from fastdiff.bench.run import Outcome, said
from fastdiff.bench.shapes import Call, Function, Job

BACKENDS = ("auto", "triton", "cuda", "reference")
"""auto: for each op, the backend that measured fastest."""
NETWORKS = ("SD 1.5 U-Net", "KL-f8 decoder")
DTYPE = torch.bfloat16


def evaluate(
    jobs: dict[str, Job],
    *,
    timer: Timer,
    device: torch.device,
    budget_s: float = 0.5,
    peers: bool = True,
) -> tuple[Outcome, list[Share]]:
    """Time each network on each backend and in diffusers.

    Args:
        peers: whether to try diffusers.
    """
    outcome, shares = Outcome(), []
    for name, job in jobs.items():
        module, inputs = job.build(str(device), DTYPE)
        for backend in BACKENDS:
            try:
                with kernels.backend(backend), torch.inference_mode():
                    step = functools.partial(module, **inputs)
                    total = timer(step, method="graph", budget_s=budget_s)
                    outcome.records.append(record_of(name, job, backend, total))
                    shares += _shares(name, backend, module, inputs, total, timer)
            except kernels.BackendError as error:  # a forced backend may not support every call
                outcome.unavailable.append(f"{name} on {backend} alone: {said(error)}")
            except Exception as error:  # noqa: BLE001 - reported; the other backends continue
                outcome.failures.append(f"{name} on {backend}: {said(error)}")
        if not peers:
            continue
        try:
            for provider, peer in diffusers_steps(job, device):
                with torch.inference_mode():
                    total = timer(peer, method="graph", budget_s=budget_s)
                outcome.records.append(record_of(name, job, provider, total))
        except Exception as error:  # noqa: BLE001 - diffusers may be missing or broken
            outcome.unavailable.append(f"{name} in diffusers: {said(error)}")
    return outcome, shares


def record_of(name: str, job: Job, provider: str, timing: Timing) -> Record:
    """The record of one evaluation."""
    return Record(
        benchmark=NETWORK,
        job=name,
        shape=str((job.batch, 4, job.size, job.size)),
        provider=provider,
        dtype=str(DTYPE).removeprefix("torch."),
        threads=torch.get_num_threads(),
        rounds=timing.rounds,
        q1_s=timing.q1_s,
        median_s=timing.median_s,
        q3_s=timing.q3_s,
        bytes=_weight_bytes(job),
        flops=_flops(job),
        method=timing.method,
    )


@functools.cache
def _flops(job: Job) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    module, inputs = job.build("meta")
    counter = FlopCounterMode(display=False)
    with kernels.backend("reference"), torch.device("meta"), torch.no_grad(), counter:
        module(**inputs)
    return counter.get_total_flops()


@functools.cache
def _weight_bytes(job: Job) -> int:
    module, _ = job.build("meta")
    return sum(p.numel() for p in module.parameters()) * DTYPE.itemsize


def _shares(
    name: str,
    backend: str,
    module: torch.nn.Module,
    inputs: dict[str, Tensor],
    total: Timing,
    timer: Timer,
) -> list[Share]:
    """The share of each op, from timing every distinct call with its own operands."""
    counts: Counter[Call] = Counter()
    caught: dict[Call, Callable[[], Any]] = {}

    def catching(op: str, function: Function) -> Function:
        def run(*args: Any) -> Any:
            call = shapes.call_of(op, args)
            counts[call] += 1
            caught.setdefault(call, functools.partial(function, *args))
            return function(*args)

        return run

    with shapes.wrapped(catching):
        module(**inputs)
    seconds: dict[str, float] = {}
    calls: Counter[str] = Counter()
    for call, function in caught.items():
        small = call.numbers * DTYPE.itemsize / FAST_BYTES < LAUNCH_S and call.op != "attention"
        method: Method = "graph" if small else "events"
        taken = timer(function, method=method, budget_s=0.01).median_s
        seconds[call.op] = seconds.get(call.op, 0.0) + counts[call] * taken
        calls[call.op] += counts[call]
    return [
        Share(
            job=name,
            op=op,
            calls=calls[op],
            seconds=seconds[op],
            total_s=total.median_s,
            backend=backend,
        )
        for op in sorted(seconds)
    ]


def diffusers_steps(job: Job, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same evaluation with diffusers' modules: unchanged, channels_last, and accelerated."""
    diffusers = import_diffusers()
    make = functools.partial(torch.randn, device=device, dtype=DTYPE)
    with torch.device(device):
        if job.network == "unet":
            module = diffusers.UNet2DConditionModel(cross_attention_dim=768)
            x, context = make(job.batch, 4, job.size, job.size), make(job.batch, 77, 768)
            t = torch.zeros(job.batch)
        else:
            blocks = 4
            module = diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=["DownEncoderBlock2D"] * blocks,
                up_block_types=["UpDecoderBlock2D"] * blocks,
                layers_per_block=2,
                latent_channels=4,
            ).decoder
            x = make(job.batch, 4, job.size, job.size)
    module = module.to(DTYPE).eval().requires_grad_(False)
    others = (t, context) if job.network == "unet" else ()
    yield "diffusers", lambda: module(x, *others)
    last = module.to(memory_format=torch.channels_last)
    image = x.contiguous(memory_format=torch.channels_last)
    yield "diffusers channels_last", lambda: last(image, *others)
    fastdiff.accelerate(module, strict=True)
    yield "diffusers accelerated", lambda: last(image, *others)
