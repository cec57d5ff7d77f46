"""layer_norm and add_layer_norm: parity, gradients, traffic, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import add_layer_norm, backend, layer_norm
from fastdiff.kernels import triton as _triton
from fastdiff.kernels.layer_norm.triton import backward, forward
from fastdiff.kernels.tuning import configs
from tests.kernels import cases
from tests.kernels.interpreter import counting_traffic


@pytest.mark.parametrize(
    ("case", "dtype", "backend"), cases.parity_rows(cases.LAYER_NORM, cases.ALL_BACKENDS)
)
def test_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    cases.check("layer_norm", case, dtype, backend)


@pytest.mark.parametrize(
    ("case", "dtype", "backend"), cases.parity_rows(cases.ADD_LAYER_NORM, cases.ALL_BACKENDS)
)
def test_add_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    cases.check("add_layer_norm", case, dtype, backend)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_parity_at_drawn_shapes(backend: str) -> None:
    def check(data: st.DataObject) -> None:
        # all numbers of a row share its rounded statistics, so with few rows the largest error is
        # chance
        shape = (data.draw(st.integers(8, 20)), data.draw(st.integers(2, 130)))
        assume(shape[0] * shape[1] >= 100)
        residual = data.draw(st.booleans())
        case = cases.layer_norm_case("drawn", "any shape", shape, residual=residual)
        op = "add_layer_norm" if residual else "layer_norm"
        cases.check(op, case, data.draw(st.sampled_from(cases.DTYPES)), backend)

    cases.check_draws(check, backend, 25)


TILES = {"ELEMENTS": 512, "num_warps": 4, "PROGRAMS": 3}
"""Several tiles per program, at sizes that are feasible in the interpreter."""


@cases.needs_triton
@pytest.mark.parametrize("shape", [(70, 33), (2, 25, 100), (13, 512)], ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_parity_with_many_tiles_to_a_program(op: str, shape: tuple[int, ...]) -> None:
    case = cases.layer_norm_case("tiles", "as above", shape, residual=op == "add_layer_norm")
    with (
        configs.override_config("layer_norm", TILES),
        configs.override_config("layer_norm_backward", TILES),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            cases.check(op, case, dtype, "triton")


def names(call: Callable[[], object]) -> list[str]:
    with _triton.recording_launches("sm_90") as launches:
        call()
    return [launch.kernel.__name__.strip("_") for launch in launches]


@cases.needs_triton
def test_which_kernels_run() -> None:
    """Rows of 4096 stay in registers and wider ones are read in tiles; partial sums are computed
    only if a gradient needs them."""
    for d, kind in ((4096, "layer_norm"), (4097, "layer_norm_wide")):
        x, weight = torch.empty(5, d, device="meta"), torch.empty(d, device="meta")
        assert names(lambda: forward(x, None, weight, None, 1e-5)) == [f"{kind}_kernel"]  # noqa: B023
        assert names(lambda: forward(x, x, weight, None, 1e-5)) == [f"{kind}_kernel"]  # noqa: B023
        ran = names(lambda: backward(x, x, x, None, weight, None, 1e-5, [True, True, False]))  # noqa: B023
        shares = [] if d == 4096 else ["wide_shares_kernel"]
        assert ran == [f"{kind}_backward_kernel", *shares, "sum_shares_kernel"]
        plain = names(lambda: backward(x, None, x, None, weight, None, 1e-5, [True, False, False]))  # noqa: B023
        assert plain == [f"{kind}_backward_kernel"]


def results(op: Callable[..., object], x: Tensor, *rest: Tensor) -> list[Tensor]:
    """Outputs and gradients on Triton."""
    with backend("triton"):
        outputs, gradients = cases.run(op, cases.with_gradients(((x, *rest), {})))
    return outputs + gradients


@cases.needs_triton
def test_bits_repeat_and_do_not_depend_on_the_batch() -> None:
    device = cases.device_of("triton")
    x, residual = torch.randn(2, 7, 9, 320, device=device).bfloat16()
    weight, bias = torch.randn(2, 320, device=device)
    first, second = (results(add_layer_norm, x, residual, weight, bias) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for i in range(7):
        alone = results(add_layer_norm, x[i : i + 1], residual[i : i + 1], weight, bias)
        assert torch.equal(alone[0][0], first[0][i])
        assert torch.equal(alone[1][0], first[1][i])


@pytest.mark.parametrize("backend_name", cases.ALL_BACKENDS)
@pytest.mark.parametrize("used", ["y", "total"])
def test_one_output_may_go_unused(backend_name: str, used: str) -> None:
    device = cases.device_of(backend_name)
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((5, 40), (5, 40), (40,))]
    with backend(backend_name):
        y, total = add_layer_norm(*leaves)
        out = y if used == "y" else total
        weights = torch.randn(40, device=device).expand(5, 40)  # a gradient with stride 0
        gradients = torch.autograd.grad(out, leaves, weights, allow_unused=True)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = kernels.OPS["add_layer_norm"].formula(*wide)[0 if used == "y" else 1]
    expected = torch.autograd.grad(out, wide, weights.double(), allow_unused=True)
    for have, want in zip(gradients, expected, strict=True):
        if want is None:
            assert have is None
        else:
            torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend_name", cases.ALL_BACKENDS)
def test_parameters_and_residual_may_have_another_dtype(backend_name: str) -> None:
    """In a bf16 network with fp32 parameters, their gradients have fp32 precision."""
    device = cases.device_of(backend_name)
    x = torch.randn(9, 72, device=device).bfloat16().requires_grad_()
    residual = torch.randn(9, 72, device=device, requires_grad=True)
    weight = torch.randn(72, device=device, requires_grad=True)
    bias = torch.randn(72, device=device).half().requires_grad_()
    leaves = (x, residual, weight, bias)
    with backend(backend_name):
        y, total = add_layer_norm(*leaves)
        gradients = torch.autograd.grad([y, total], leaves, [torch.ones_like(y)] * 2)
    assert y.dtype == total.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in (total, weight, bias)]
    out = kernels.OPS["layer_norm"].formula(*wide)
    expected = torch.autograd.grad(out, wide, torch.ones_like(out))
    torch.testing.assert_close(y.double(), out, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(gradients[2].double(), expected[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[3].double(), expected[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradients[0].double(), expected[0] + 1, rtol=2**-8, atol=2**-6)


@cases.needs_triton
def test_triton_does_not_take_doubles() -> None:
    with pytest.raises(RuntimeError, match="fp32, fp16 and bf16, got float64"), backend("triton"):
        layer_norm(torch.zeros(2, 6, device=cases.device_of("triton")).double())


@cases.needs_triton
def test_triton_ops_are_registered_right() -> None:
    device = cases.device_of("triton")
    x, residual = torch.randn(2, 3, 5, 40, device=device)
    weight, bias = torch.randn(2, 40, device=device)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    check = cases.check_registration
    check("layer_norm", "triton", x, weight, None, 1e-5)
    check("layer_norm", "triton", x[:0].detach().mT.contiguous().mT, None, bias, 1e-5)
    check("add_layer_norm", "triton", *leaves, 1e-5)


@cases.needs_triton
def test_triton_compiles_without_break_for_any_batch() -> None:
    weight, bias = torch.randn(2, 24)
    cases.check_compiles(layer_norm, lambda n: (torch.randn(n, 5, 24), weight, bias))
    cases.check_compiles(
        add_layer_norm, lambda n: (torch.randn(n, 5, 24), torch.randn(n, 5, 24), weight, bias)
    )


@cases.needs_interpreter
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("d", [320, 8192])
def test_traffic_is_what_the_docstring_says(d: int, residual: bool, dtype: torch.dtype) -> None:
    """Parameters are counted separately: every program reads them, but from the L1 cache."""
    rows = 256 if d == 320 else 20
    x, other = torch.randn(2, rows, d, dtype=dtype).requires_grad_().unbind(0)
    op, inputs = (add_layer_norm, (x, other)) if residual else (layer_norm, (x,))
    once, wide = rows * d * x.itemsize, d > 4096
    with backend("triton"), counting_traffic() as forward:
        out = op(*inputs)
    loads = (2 if wide else 1) * len(inputs)
    assert forward.total == pytest.approx((loads + len(inputs)) * once, rel=0.05)
    y = out if isinstance(out, Tensor) else out[0] + out[1]
    with counting_traffic() as backward:
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    expected = ((3 + 2 if wide else 2) + 1 + residual) * once
    assert backward.total == pytest.approx(expected, rel=0.05)


@cases.needs_interpreter
@pytest.mark.parametrize("d", [320, 8192])
def test_traffic_of_parameters(d: int) -> None:
    rows, programs, wide = (256, 8, False) if d == 320 else (16, 4, True)
    x, weight, bias = torch.randn(rows, d), torch.randn(d), torch.randn(d)
    settings = {"ELEMENTS": 2048, "num_warps": 4, "PROGRAMS": programs}
    with (
        configs.override_config("layer_norm_backward", settings),
        counting_traffic() as plain,
    ):
        backward(x, None, x, None, weight, bias, 1e-5, [True, False, False])
    with (
        configs.override_config("layer_norm_backward", settings),
        counting_traffic() as both,
    ):
        backward(x, None, x, None, weight, bias, 1e-5, [True] * 3)
    again = 2 * rows * d * x.itemsize if wide else 0  # x and dy are read a second time
    saved = 0 if wide else (rows // 4 - programs) * d * 4  # fewer programs read the weight
    expected = again - saved + 2 * 8 * programs * d + 2 * d * 4
    assert both.total - plain.total == pytest.approx(expected, rel=0.05)


def test_y_is_the_norm_of_the_rounded_total() -> None:
    x, residual = torch.randn(2, 4, 32).bfloat16()
    y, total = add_layer_norm(x, residual)
    assert torch.equal(total, (x.double() + residual.double()).bfloat16())
    assert torch.equal(y, layer_norm(total))


def test_a_constant_row_is_the_bias() -> None:
    """For any value of the row. The exact gradient is 0, so parity has no scale to compare with."""
    bias = torch.randn(6)
    for value in (0.0, 3.3, 1e4):
        assert torch.equal(layer_norm(torch.full((2, 6), value), None, bias), bias.expand(2, 6))
    assert torch.equal(layer_norm(torch.tensor([[5.5]])), torch.zeros(1, 1))


@pytest.mark.parametrize("backend_name", cases.KERNELS)
@pytest.mark.parametrize("d", [73, 4501, 9001])
def test_a_constant_row_is_the_bias_in_kernels(d: int, backend_name: str) -> None:
    """In fp32, d times 0.1 divided by d is not 0.1, so kernels subtract the row's first element
    before they sum."""
    device = cases.device_of(backend_name)
    x, residual = torch.full((2, 3, d), 0.1, device=device)
    bias = torch.randn(d, device=device)
    with backend(backend_name):
        assert torch.equal(layer_norm(x, None, bias), bias.expand(3, d))
        y, total = add_layer_norm(x, residual, None, bias)
    assert torch.equal(y, bias.expand(3, d))
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("backend_name", cases.ALL_BACKENDS)
@pytest.mark.parametrize("d", [600, 4500])
def test_a_mean_a_hundred_thousand_deviations_away_costs_no_digits(
    d: int, backend_name: str
) -> None:
    """Eager PyTorch loses 1e-3 here: rounding the mean costs more than a thousandth of std."""
    x = (1000 + 0.01 * torch.randn(8, d)).to(cases.device_of(backend_name))
    with backend(backend_name):
        y = layer_norm(x)
    expected = kernels.OPS["layer_norm"].formula(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6)


def test_fp64_gradients() -> None:
    x, residual = torch.randn(2, 3, 6).double().requires_grad_().unbind()
    weight, bias = torch.randn(2, 6).double().requires_grad_().unbind()
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    assert torch.autograd.gradcheck(add_layer_norm, (x, residual, weight, bias))


@cases.needs_triton
@pytest.mark.parametrize("d", [600, 4500])
def test_gradients_too_keep_their_digits_at_a_large_mean(d: int) -> None:
    device = cases.device_of("triton")
    x, weight = 1000 + 0.01 * torch.randn(8, d), torch.randn(d)
    have = results(layer_norm, x.to(device), weight.to(device))[1:]
    _, expected = cases.run(
        kernels.OPS["layer_norm"].formula, cases.with_gradients(((x, weight), {}), torch.float64)
    )
    for gradient, exact in zip(have, expected, strict=True):
        assert (gradient.cpu() - exact).abs().max() < 1e-5 * exact.abs().max()


def test_bad_input() -> None:
    x = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"weight must have shape \(6,\), got \(5,\)"):
        layer_norm(x, torch.zeros(5))
    with pytest.raises(ValueError, match="got a scalar"):
        layer_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match="floating point"):
        layer_norm(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"add_layer_norm: residual must have shape \(2, 6\)"):
        add_layer_norm(x, x[:1])
