"""What only a GPU shows: graphs, streams, devices, races. Every op, on the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastdiff import kernels, tuning
from tests.kernels import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DIFFERENTIABLE = [op for op in kernels.OPS if op not in ("sampler_step", "philox_normal")]


def tensors(*trees: Any) -> list[Tensor]:
    return [t for t in tree_flatten(trees)[0] if isinstance(t, Tensor)]


def prepared(
    op: str, device: str = "cuda", *, gradients: bool = False
) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A call that gives what it returns and leaves behind, and the operands."""
    args, kwargs = cases.ordinary_inputs(op, device)
    operands = tensors(args, kwargs)
    floats = [t for t in operands if t.is_floating_point()]

    def run() -> list[Tensor]:
        with kernels.backend("triton"):
            outputs = tensors(getattr(kernels, op)(*args, **kwargs))
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


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Bit for bit, NaN too."""
    return len(some) == len(others) and all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        if a.ndim
        else torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize(
    ("op", "gradients"),
    [*((op, False) for op in kernels.OPS), *((op, True) for op in DIFFERENTIABLE)],
)
def test_a_graph_replays_with_other_numbers_and_waits_for_nothing(op: str, gradients: bool) -> None:
    run, operands = prepared(op, gradients=gradients)
    first = [t.detach().clone() for t in operands]
    second = [t * 0.5 if t.is_floating_point() else t for t in first]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    changed_to(operands, first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for numbers in (first, second):
        changed_to(operands, numbers)
        graph.replay()
        have = [t.detach().clone() for t in captured]
        changed_to(operands, numbers)
        assert same(have, [t.detach() for t in run()])


@pytest.mark.parametrize("op", kernels.OPS)
def test_an_op_keeps_the_order_of_the_current_stream(op: str) -> None:
    """Its operands are written late, on a stream of their own."""
    run, operands = prepared(op)
    numbers = [t.clone() for t in operands]
    expected = [t.clone() for t in run()]
    for t in operands:
        t.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        changed_to(operands, numbers)
        have = run()
    torch.cuda.synchronize()
    assert same(have, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("op", kernels.OPS)
def test_an_op_runs_on_the_device_of_its_tensors(op: str) -> None:
    expected = [t.cpu() for t in prepared(op, "cuda:0")[0]()]
    run, _ = prepared(op, "cuda:1")
    with torch.cuda.device(0):
        assert same([t.cpu() for t in run()], expected)


@pytest.mark.parametrize("case", tuning.cases(dtypes=[torch.bfloat16, torch.float32]), ids=str)
def test_bits_repeat_at_real_sizes(case: tuning.Case) -> None:
    """The interpreter runs one program after the other; here they race if they can."""
    results = []
    for _ in range(3):
        call, operands = tuning._prepared(case, torch.device("cuda"))
        results.append([t.clone() for t in tensors(call(), operands)])
    assert same(results[0], results[1])
    assert same(results[0], results[2])
