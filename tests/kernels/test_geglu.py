"""geglu: parity, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from fastdiff.kernels import backend, geglu
from tests.kernels import cases
from tests.kernels.interpreter import counting_traffic


@pytest.mark.parametrize(
    ("case", "dtype", "backend"), cases.parity_rows(cases.GEGLU, cases.ALL_BACKENDS)
)
def test_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    cases.check("geglu", case, dtype, backend)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_parity_at_drawn_shapes(backend: str) -> None:
    def check(data: st.DataObject) -> None:
        rows, half, dtype = data.draw(
            st.tuples(st.integers(1, 9), st.integers(1, 70), st.sampled_from(cases.DTYPES))
        )
        assume(rows * half >= 100)  # the largest error of a few numbers is chance
        case = cases.Case("drawn", "any shape", lambda draw: ((draw(rows, 2 * half),), {}))
        cases.check("geglu", case, dtype, backend)

    cases.check_draws(check, backend, 30)


def test_the_gate_is_the_second_half_and_the_gelu_is_exact() -> None:
    x = torch.tensor([2.0, 3.0, -1.0, 0.5], dtype=torch.float64)
    # Phi(-1) and Phi(1/2) from a table of the normal distribution
    expected = torch.tensor([2 * -1 * 0.15865525393145705, 3 * 0.5 * 0.6914624612740131])
    torch.testing.assert_close(geglu(x), expected.double(), rtol=1e-7, atol=0)


def test_fp64_gradients() -> None:
    assert torch.autograd.gradcheck(geglu, torch.randn(2, 6).double().requires_grad_())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"must be even, got shape \(2, 7\)"):
        geglu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="must be even"):
        geglu(torch.tensor(1.0))
    with pytest.raises(ValueError, match="x must be floating point"):
        geglu(torch.zeros(2, 8, dtype=torch.int32))


@cases.needs_triton
def test_triton_op_is_registered_right() -> None:
    x = torch.randn(3, 5, 74, device=cases.device_of("triton"), requires_grad=True)
    for each in (x, x.detach().mT.contiguous().mT, x[:0].detach().requires_grad_()):
        cases.check_registration("geglu", "triton", each)


@cases.needs_triton
def test_triton_compiles_without_break_for_any_batch() -> None:
    cases.check_compiles(geglu, lambda n: (torch.randn(n, 5, 24),))


@cases.needs_interpreter
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_traffic_is_what_the_docstring_says(dtype: torch.dtype) -> None:
    rows, d = 8, 512
    x = torch.randn(rows, 2 * d, dtype=dtype, requires_grad=True)
    with backend("triton"), counting_traffic() as forward:
        y = geglu(x)
    assert forward.total == pytest.approx(3 * rows * d * x.itemsize, rel=0.05)
    with counting_traffic() as backward:
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert backward.total == pytest.approx(5 * rows * d * x.itemsize, rel=0.05)
