"""The emulated matrix instructions against plain matrix products, and the faults they report."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests import cuda_host

pytestmark = cuda_host.needs_compiler


def probe(name: str, a: Tensor, b: Tensor | None, c: Tensor, order: str = "forward") -> str | None:
    """Run a kernel of matrix_probes.cu on a and b, with its result in c; return its fault."""
    cuda_host.set_order(order)
    function = cuda_host.library().matrix_probe
    function.restype = ctypes.c_char_p
    pointers = (ctypes.c_void_p(0 if x is None else x.data_ptr()) for x in (a, b, c))
    fault = function(name.encode(), *pointers)
    return None if fault is None else fault.decode()


@pytest.mark.parametrize("order", cuda_host.ORDERS)
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products(dtype: torch.dtype, depth: int, order: str) -> None:
    a = torch.randint(-9, 10, (16, depth)).to(dtype)
    b = torch.randint(-9, 10, (depth, 8)).to(dtype)
    c = torch.randint(-99, 100, (16, 8)).float()  # integers: every sum is exact
    expected = c + a.float() @ b.float()
    assert probe(f"{str(dtype).removeprefix('torch.')} {depth}", a, b, c, order) is None
    assert torch.equal(c, expected)


def test_products_are_exact_and_sums_are_fp32() -> None:
    a, b, c = torch.zeros(16, 16).half(), torch.zeros(16, 8).half(), torch.zeros(16, 8)
    a[3, :2] = torch.tensor([65504.0, 2.0**-24])
    b[:2, 5] = torch.tensor([65504.0, 2.0**-24])
    assert probe("float16 16", a, b, c) is None
    assert c[3, 5] == 65504.0**2  # beyond fp16; 2^-48 more is lost in fp32
    a[3, 0] = 0
    c.zero_()
    assert probe("float16 16", a, b, c) is None
    assert c[3, 5] == 2.0**-48


@pytest.mark.parametrize("order", cuda_host.ORDERS)
@pytest.mark.parametrize("count", [2, 4])
def test_matrices_by_rows_and_by_columns(count: int, order: str) -> None:
    numbers = torch.arange(64 * count, dtype=torch.int16).view(count, 8, 8)
    found = torch.zeros_like(numbers)
    assert probe(f"rows {count}", numbers, None, found, order) is None
    assert torch.equal(found, numbers)
    assert probe(f"columns {count}", numbers, None, found, order) is None
    assert torch.equal(found, numbers.mT)


@pytest.mark.parametrize("order", cuda_host.ORDERS)
def test_copies_arrive_at_the_wait(order: str) -> None:
    numbers = torch.arange(1, 513, dtype=torch.int16).view(64, 8)
    found = torch.zeros(32, 8, dtype=torch.int16)
    assert probe("copies", numbers, None, found, order) is None
    numbers[5] = 0  # the padding row
    assert torch.equal(found, numbers[:32].view(16, 2, 8).flip(1).reshape(32, 8))


def wrong_in_some_order(name: str, right: str, rows: int) -> bool:
    results = []
    numbers = torch.arange(64 * 8, dtype=torch.int16)
    for which in (right, name):
        for order in cuda_host.ORDERS:
            found = torch.zeros(rows, 8, dtype=torch.int16)
            assert probe(which, numbers, None, found, order) is None
            results.append(found)
    assert all(torch.equal(x, results[0]) for x in results[:4])
    return any(not torch.equal(x, results[0]) for x in results[4:])


def test_a_missing_barrier_or_wait_shows_in_some_order() -> None:
    assert wrong_in_some_order("rows 4, no barrier", "rows 4", 32)
    assert wrong_in_some_order("copies, no wait", "copies", 32)


def test_faults_are_named() -> None:
    zeros = torch.zeros(16, 16).half()
    fault = probe("half a warp", zeros, zeros, torch.zeros(16, 8))
    assert fault is not None
    assert "divergent barrier: 16 threads (first 0) at mma.sync" in fault
    fault = probe("rows 4, misaligned", zeros, None, torch.zeros(4, 8, 8).short())
    assert fault is not None
    assert "ldmatrix of a row that is not aligned" in fault
