"""Graphs, streams, devices and races, which only a GPU can test: every op on every route through
the Triton and CUDA kernels (routes.py).

Tests that need no GPU also run without one, under the emulation and in Triton's interpreter, and
check there that each route reaches its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from benchmarks.device.dry import dry_jobs
from fastdiff import kernels
from fastdiff.bench import shapes, tune
from fastdiff.bench.providers import Make, Subject
from fastdiff.bench.subjects import NETWORK_OPS
from fastdiff.bench.watch import watched
from tests.kernels import cases, routes
from tests.kernels.graphs import captured
from tests.kernels.routes import Route

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CALLS = [
    pytest.param(*p.values, gradients, id=f"{p.id}{' gradients' * gradients}", marks=p.marks)
    for gradients, parameters in ((False, routes.EVERY), (True, routes.DIFFERENTIABLE))
    for p in parameters
]
every_call = pytest.mark.parametrize(("backend", "route", "gradients"), CALLS)


def gpu_test(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_gpu:
        test = mark(test)
    return test


def tensors(*trees: Any) -> list[Tensor]:
    return [t for t in tree_flatten(trees)[0] if isinstance(t, Tensor)]


def prepared(
    route: Route, where: str = "cuda", *, gradients: bool = False
) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A function that calls the op and returns everything it writes, and the operands."""
    args, kwargs = route.inputs(where)
    operands = tensors(args, kwargs)
    floats = [t for t in operands if t.is_floating_point()]

    def run() -> list[Tensor]:
        with route.forced():
            outputs = tensors(getattr(kernels, route.op)(*args, **kwargs))
            if gradients:
                ones = [torch.ones_like(y) for y in outputs]
                return [*outputs, *torch.autograd.grad(outputs, floats, ones)]
        return [*outputs, *operands]

    if gradients:
        for t in floats:
            t.requires_grad_()
    return run, operands


def changed_to(operands: list[Tensor], numbers: list[Tensor]) -> None:
    with torch.no_grad():
        for operand, number in zip(operands, numbers, strict=True):
            operand.copy_(number)


def copies(some: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in some]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether tensors are equal bit for bit, including NaN."""
    return len(some) == len(others) and all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        if a.ndim
        else torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


@every_call
def test_a_route_reaches_its_kernels_and_repeats_its_bits(
    backend: str, route: Route, gradients: bool
) -> None:
    run, operands = prepared(route, cases.device_of(backend), gradients=gradients)
    numbers = copies(operands)
    with cases.recording(route.op) as ran:
        first = copies(run())
    assert ran == [backend]
    for _ in range(3 if torch.cuda.is_available() else 1):
        changed_to(operands, numbers)
        assert same(copies(run()), first)
    if backend == "cuda":
        with watched() as seen:
            run()
        assert any(route.kernel in launch.kernel for launch in seen), seen
        assert max(launch.cluster for launch in seen) >= route.cluster, seen
        if not gradients:
            assert {launch.cluster for launch in seen} <= {1, route.cluster} or not route.name


@gpu_test
@every_call
def test_a_graph_replays_with_other_numbers_and_waits_for_nothing(
    backend: str, route: Route, gradients: bool
) -> None:
    run, operands = prepared(route, gradients=gradients)
    first = copies(operands)
    second = [t * 0.5 if t.is_floating_point() else t.flip(0) if t.ndim else t for t in first]
    graph, results = captured(run)
    for numbers in (first, second):
        changed_to(operands, numbers)
        graph.replay()
        have = copies(results)
        changed_to(operands, numbers)
        assert same(have, [t.detach() for t in run()])


@gpu_test
@every_call
def test_an_op_keeps_the_order_of_the_current_stream_and_does_not_wait(
    backend: str, route: Route, gradients: bool
) -> None:
    """Operands are written with a delay, on another stream, and the call returns before that."""
    run, operands = prepared(route, gradients=gradients)
    numbers = copies(operands)
    expected = copies(run())
    changed_to(operands, [torch.zeros_like(t) for t in operands])
    run()  # so that its memory is already allocated
    torch.cuda.synchronize()
    stream, written = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        run()
        changed_to(operands, numbers)
        stream.synchronize()
        changed_to(operands, [torch.zeros_like(t) for t in operands])
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        changed_to(operands, numbers)
        written.record()
        have = run()
        waited = written.query()
    torch.cuda.synchronize()
    assert same(have, expected)
    assert not waited, "the call returned only after the device had finished all earlier work"


@gpu_test
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("own", "current"), [(0, 1), (1, 0), (1, 1)])
@every_call
def test_an_op_runs_on_the_device_of_its_tensors(
    backend: str, route: Route, gradients: bool, own: int, current: int
) -> None:
    with torch.cuda.device(own):
        expected = copies(prepared(route, f"cuda:{own}", gradients=gradients)[0]())
    run, _ = prepared(route, f"cuda:{own}", gradients=gradients)
    with torch.cuda.device(current):
        have = copies(run())
        assert torch.cuda.current_device() == current
        assert torch.ones(3, device="cuda").sum() == 3  # torch still works on the current device
    assert all(t.device.index == own for t in have)
    assert same(have, expected)


@pytest.mark.parametrize("backend", cases.KERNELS)
@pytest.mark.parametrize("subject", NETWORK_OPS, ids=lambda subject: subject.op)
def test_bits_repeat_at_the_sizes_of_the_networks(subject: Subject, backend: str) -> None:
    """Results and gradients repeat; without a GPU, only the smallest networks are run."""
    where = torch.device(cases.device_of(backend))
    jobs = shapes.GPU_JOBS if where.type == "cuda" else dry_jobs()
    make, served = Make(torch.bfloat16, where), 0
    for name in ("SD 1.5 U-Net", "KL-f8 decoder") if where.type == "cuda" else jobs:
        for call in (c for c in jobs[name].collect() if c.op == subject.op):
            args, kwargs = subject.arguments(call, jobs[name], make)
            inputs = cases.with_gradients((args, kwargs))
            with kernels.backend(backend):
                if kernels.explain(subject.op, *inputs[0], **inputs[1]).chosen != backend:
                    continue  # unsupported, such as heads of 512 in CUDA
                results = []
                for _ in range(3):
                    outputs, gradients = cases.run(subject.ours, inputs)
                    results.append(copies([*outputs, *gradients]))
            served += 1
            assert same(results[0], results[1]), call
            assert same(results[0], results[2]), call
    if where.type == "cuda":
        assert served


@gpu_test
@pytest.mark.parametrize("case", tune.cases(dtypes=[torch.bfloat16, torch.float32]), ids=str)
def test_bits_of_triton_repeat_in_every_shape_class(case: tune.Case) -> None:
    """Programs run in parallel here, unlike in the interpreter, so races can show."""
    results = []
    for _ in range(3):
        call, operands = tune._prepared(case, torch.device("cuda"))
        results.append(copies(tensors(call(), operands)))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
