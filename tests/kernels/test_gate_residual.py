"""gate_residual: parity on every backend, gradients, shapes of the gate, strides, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import backend
from fastdiff.kernels.gate_residual import gate_residual
from tests.kernels import cases
from tests.kernels.interpreter import counting_traffic


def eager(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return (gate if gate.ndim == 3 else gate[:, None]) * x + residual


cases.EAGER["gate_residual"] = eager


def row(
    name: str,
    reason: str,
    shape: tuple[int, int, int],
    *,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    mean: float = 0.3,
    std: float = 1.0,
    gate: str = "(N, C)",
) -> cases.Case:
    def build(draw: cases.Draw) -> cases.Inputs:
        x, residual = (layout(draw(*shape, mean=mean, std=std)) for _ in range(2))
        n, _, c = x.shape
        gates = {
            "(N, C)": lambda: draw(n, c),
            "(N, 1, C)": lambda: draw(n, 1, c),
            "packed": lambda: draw(n, 6 * c).chunk(6, dim=1)[2],
        }
        return (x, gates[gate](), residual), {}

    return cases.Case(name, reason, build)


ROWS = [
    row("dit-1152", "DiT-XL: width 1152, a sixth of one projection", (2, 8, 1152), gate="packed"),
    row("dit-384", "DiT-S", (3, 16, 384), gate="packed"),
    row("sd3-1536", "SD3: wider than a tile", (2, 5, 1536)),
    row("pixart", "the gate has a dimension of 1 for the tokens", (2, 9, 72), gate="(N, 1, C)"),
    row("odd", "no size is a power of two, no 16-byte loads", (3, 5, 37)),
    row("many-rows", "more rows than fit in a chunk or a share", (2, 150, 40)),
    row("many-rows-odd", "chunks of unequal lengths, no 16-byte loads", (2, 131, 21)),
    row("one-row", "T = 1", (4, 1, 64)),
    row("one-sample", "no guidance, batch 1", (1, 7, 48)),
    row("one-number", "C = 1", (2, 3, 1)),
    row("sliced", "columns of a wider tensor", (2, 9, 80), layout=lambda x: x[..., 3:43]),
    row("transposed", "C is not contiguous", (2, 24, 6), layout=lambda x: x.mT),
    row("every-other", "gaps between rows", (2, 18, 24), layout=lambda x: x[:, ::2]),
    row("near-overflow", "products overflow fp16", (2, 4, 64), mean=2e4, std=1e4),
    row("tails", "products of fp16 are subnormal", (2, 4, 64), mean=0, std=1e-4),
    row("empty-batch", "nothing to do", (0, 4, 8)),
    row("empty-sequence", "nothing to do, the gate's gradient is zero", (2, 0, 8)),
]


@pytest.mark.parametrize(("case", "dtype", "backend"), cases.parity_rows(ROWS, cases.ALL_BACKENDS))
def test_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    cases.check("gate_residual", case, dtype, backend)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_parity_at_drawn_shapes(backend: str) -> None:
    def check(data: st.DataObject) -> None:
        n, rows, c = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 70)))
        assume(n * rows * c >= 100)  # the largest error of a few numbers is chance
        dtype = data.draw(st.sampled_from(cases.DTYPES))
        gate = data.draw(st.sampled_from(("(N, C)", "(N, 1, C)", "packed")))
        case = row("drawn", "any shape", (n, rows, c), gate=gate)
        cases.check("gate_residual", case, dtype, backend)

    cases.check_draws(check, backend, 30)


@pytest.mark.parametrize("name", cases.ALL_BACKENDS)
def test_the_gate_may_have_another_dtype(name: str) -> None:
    """In a bf16 network with an fp32 gate, the gate's gradient has fp32 precision."""
    device = cases.device_of(name)
    x, residual = torch.randn(2, 2, 9, 72, device=device).bfloat16()
    gate = torch.randn(2, 72, device=device)
    leaves = [t.requires_grad_() for t in (x.detach(), gate, residual.detach())]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    emulates = name == "cuda" and not torch.cuda.is_available()
    context = cases.cuda_host.emulated() if emulates else backend(name)
    with context, backend(name):
        y = gate_residual(*leaves)
        found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [g.dtype for g in (y, *found)] == [torch.bfloat16, *(t.dtype for t in leaves)]
    out = kernels.OPS["gate_residual"].formula(*wide)
    expected = torch.autograd.grad(out, wide, torch.ones_like(out))
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "residual", "result"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_dtypes_are_promoted_as_pytorch_does(
    x: torch.dtype, residual: torch.dtype, result: torch.dtype
) -> None:
    """Autocast gives a branch in bf16 and a residual in fp32; nothing of the residual is lost."""
    leaves = [torch.randn(2, 5, 24).to(x), torch.randn(2, 24).to(x), torch.randn(2, 5, 24)]
    leaves = [t.requires_grad_() for t in (*leaves[:2], leaves[2].to(residual))]
    y = gate_residual(*leaves)
    assert y.dtype == result == eager(*leaves).dtype
    wide = [t.detach().double().requires_grad_() for t in leaves]
    torch.testing.assert_close(y.double(), eager(*wide), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(y.square().sum(), leaves)
    expected = torch.autograd.grad(eager(*wide).square().sum(), wide)
    for gradient, exact, leaf in zip(found, expected, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        tolerance = 2 * torch.finfo(leaf.dtype).eps
        assert (gradient.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_the_gradient_of_the_residual_is_that_of_the_sum_itself() -> None:
    """No kernel runs if only the residual wants one, and it is handed on without a copy."""
    x, residual = torch.randn(2, 2, 5, 24)
    gate, dy = torch.randn(2, 24), torch.randn(2, 5, 24)
    residual.requires_grad_()
    with backend("cpu" if kernels.compiled.native else "reference"):
        y = gate_residual(x, gate, residual)
    (found,) = torch.autograd.grad(y, residual, dy)
    assert found.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("name", cases.BACKENDS)
def test_the_residual_is_not_saved(name: str) -> None:
    device = cases.device_of(name)
    x, residual = (torch.randn(2, 5, 24, device=device, requires_grad=True) for _ in range(2))
    gate = torch.randn(2, 24, device=device)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend(name):
        gate_residual(x, gate, residual)
    assert saved
    assert residual.untyped_storage().data_ptr() not in saved


def test_second_derivatives() -> None:
    x, residual = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    gate = torch.randn(2, 4, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, gate, residual)]
    assert torch.autograd.gradgradcheck(gate_residual, leaves)
    fp32 = [t.detach().float().requires_grad_() for t in leaves]

    def second(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        y = function(*inputs).pow(3).sum()
        gradients = torch.autograd.grad(y, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    for found, expected in zip(second(gate_residual, fp32), second(eager, leaves), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@cases.needs_native
def test_a_sample_has_the_same_bits_alone_and_on_any_number_of_threads() -> None:
    x, residual, dy = torch.randn(3, 5, 900, 72)
    gate, before, results = torch.randn(5, 72), torch.get_num_threads(), []

    def run(*tensors: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = gate_residual(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    with backend("cpu"):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(x, gate, residual, dy=dy))
            torch.set_num_threads(before)
        alone = [
            run(*(t[i : i + 1] for t in (x, gate, residual)), dy=dy[i : i + 1]) for i in range(5)
        ]
    assert all(map(torch.equal, *results))
    for i, own in enumerate(alone):
        assert all(torch.equal(a[0], b[i]) for a, b in zip(own, results[0], strict=True))


@cases.needs_triton
def test_triton_compiles_without_break_for_any_batch() -> None:
    cases.check_compiles(
        gate_residual,
        lambda n: (torch.randn(n, 5, 24), torch.randn(n, 24), torch.randn(n, 5, 24)),
    )


@pytest.mark.parametrize("name", cases.BACKENDS)
def test_pytorchs_own_checks(name: str) -> None:
    device = cases.device_of(name)
    x, residual = torch.randn(2, 2, 5, 24, device=device)
    gate = torch.randn(2, 24, device=device, requires_grad=True)
    leaves = x.clone().requires_grad_(), gate, residual.clone().requires_grad_()
    cases.check_registration("gate_residual", name, *leaves)


def test_bad_input() -> None:
    x, gate = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"x must be \(N, T, C\), got shape \(3, 8\)"):
        gate_residual(x[0], gate, x[0])
    with pytest.raises(ValueError, match=r"gate must have shape \(2, 8\), got \(8,\)"):
        gate_residual(x, gate[0], x)
    with pytest.raises(ValueError, match=r"gate must have shape \(2, 1, 8\), got \(2, 3, 8\)"):
        gate_residual(x, x, x)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 3, 8\), got \(2, 1, 8\)"):
        gate_residual(x, gate, x[:, :1])
    with pytest.raises(ValueError, match=r"gate must be floating point, got torch\.int32"):
        gate_residual(x, gate.int(), x)
    with pytest.raises(ValueError, match=r"residual must be floating point, got torch\.int64"):
        gate_residual(x, gate, x.long())


@cases.needs_interpreter
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_traffic_is_what_the_docstring_says(dtype: torch.dtype) -> None:
    n, length, c = 2, 64, 512
    x, residual = (torch.randn(n, length, c, dtype=dtype, requires_grad=True) for _ in range(2))
    gate = torch.randn(n, c, dtype=dtype, requires_grad=True)
    with backend("triton"), counting_traffic() as forward:
        y = gate_residual(x, gate, residual)
    # the gate is read for every row, from the caches
    assert forward.total == pytest.approx(4 * x.nbytes, rel=0.05)
    with counting_traffic() as backward:
        torch.autograd.grad(y, (x, gate, residual), torch.ones_like(y))
    chunks = 64
    shares, gates = 4 * n * chunks * c, n * chunks * c * x.itemsize
    assert backward.total == pytest.approx(3 * x.nbytes + shares + gates, rel=0.05)
