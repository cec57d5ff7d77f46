"""ada_layer_norm: parity on every backend, gradients, strides, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import backend
from fastdiff.kernels.ada_layer_norm import ada_layer_norm
from tests.kernels import cases
from tests.kernels.interpreter import counting_traffic


def eager(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


cases.EAGER["ada_layer_norm"] = eager


def row(
    name: str,
    reason: str,
    shape: tuple[int, int, int],
    *,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    mean: float = 0.3,
    std: float = 1.0,
    packed: bool = False,
    **options: Any,
) -> cases.Case:
    def build(draw: cases.Draw) -> cases.Inputs:
        x = layout(draw(*shape, mean=mean, std=std))
        n, _, c = x.shape
        if packed:
            scale, shift = draw(n, 2 * c).chunk(2, dim=1)
        else:
            scale, shift = draw(n, c), draw(n, c)
        return (x, scale, shift), options

    return cases.Case(name, reason, build)


ROWS = [
    row("dit-1152", "DiT-XL: width 1152, halves of one projection", (2, 8, 1152), packed=True),
    row("dit-384", "DiT-S", (3, 16, 384), packed=True),
    row("odd", "no size is a power of two, no 16-byte loads", (3, 5, 37)),
    row("many-rows", "more rows than fit in a chunk or a share", (2, 150, 40)),
    row("one-row", "T = 1", (4, 1, 64)),
    row("one-sample", "no guidance, batch 1", (1, 7, 48)),
    row("one-number", "C = 1: y is the shift", (2, 3, 1)),
    row("sliced", "columns of a wider tensor", (2, 9, 80), layout=lambda x: x[..., 3:43]),
    row("transposed", "C is not contiguous", (2, 24, 6), layout=lambda x: x.mT),
    row("every-other", "gaps between rows", (2, 18, 24), layout=lambda x: x[:, ::2]),
    row("mean-100", "E[x^2] - E[x]^2 loses every digit", (2, 4, 64), mean=100, std=0.01),
    row("near-overflow", "squares overflow fp16", (2, 4, 64), mean=2e4, std=1e4),
    row("tiny-eps", "a wrong eps shows", (2, 4, 64), mean=0, std=1e-2),
    row("eps", "an explicit eps", (2, 4, 64), std=0.1, eps=1e-2),
    row("empty-batch", "nothing to do", (0, 4, 8)),
    row("empty-sequence", "nothing to do, gradients are zero", (2, 0, 8)),
]


@pytest.mark.parametrize(("case", "dtype", "backend"), cases.parity_rows(ROWS, cases.ALL_BACKENDS))
def test_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    cases.check("ada_layer_norm", case, dtype, backend)


@pytest.mark.parametrize("name", cases.ALL_BACKENDS)
def test_scale_and_shift_may_have_another_dtype(name: str) -> None:
    """In a bf16 network with fp32 scale and shift, their gradients have fp32 precision."""
    device = cases.device_of(name)
    x = torch.randn(2, 9, 72, device=device).bfloat16().requires_grad_()
    scale = torch.randn(2, 72, device=device, requires_grad=True)
    shift = torch.randn(2, 72, device=device).half().requires_grad_()
    leaves = x, scale, shift
    wide = [t.detach().double().requires_grad_() for t in leaves]
    context = cases.cuda_host.emulated() if _emulates(name) else backend(name)
    with context, backend(name):
        y = ada_layer_norm(*leaves)
        found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [g.dtype for g in (y, *found)] == [torch.bfloat16, *(t.dtype for t in leaves)]
    out = kernels.OPS["ada_layer_norm"].formula(*wide)
    expected = torch.autograd.grad(out, wide, torch.ones_like(out))
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-3, atol=1e-3)


def _emulates(name: str) -> bool:
    return name == "cuda" and not torch.cuda.is_available()


@cases.needs_native
def test_a_sample_has_the_same_bits_alone_and_on_any_number_of_threads() -> None:
    x, scale, shift = torch.randn(5, 300, 72), torch.randn(5, 72), torch.randn(5, 72)
    dy, before, results = torch.randn_like(x), torch.get_num_threads(), []

    def run(*tensors: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = ada_layer_norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    with backend("cpu"):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(x, scale, shift, dy=dy))
            torch.set_num_threads(before)
        alone = [
            run(*(t[i : i + 1] for t in (x, scale, shift)), dy=dy[i : i + 1]) for i in range(5)
        ]
    assert all(map(torch.equal, *results))
    for i, own in enumerate(alone):
        assert all(torch.equal(a[0], b[i]) for a, b in zip(own, results[0], strict=True))


@cases.needs_triton
def test_triton_compiles_without_break_for_any_batch() -> None:
    cases.check_compiles(
        ada_layer_norm, lambda n: (torch.randn(n, 5, 24), torch.randn(n, 24), torch.randn(n, 24))
    )


@cases.needs_triton
def test_triton_refuses_rows_that_registers_do_not_hold() -> None:
    x, own = torch.randn(1, 1, 8193), torch.randn(1, 8193)
    x, own = x.to(cases.device_of("triton")), own.to(cases.device_of("triton"))
    refused = pytest.raises(kernels.BackendError, match="rows of up to 8192 elements, got 8193")
    with backend("triton"), refused:
        ada_layer_norm(x, own, own)


def test_bad_input() -> None:
    x, own = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"x must be \(N, T, C\), got shape \(3, 8\)"):
        ada_layer_norm(x[0], own, own)
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 8\), got \(8,\)"):
        ada_layer_norm(x, own[0], own)
    with pytest.raises(ValueError, match=r"shift must have shape \(2, 8\), got \(2, 4\)"):
        ada_layer_norm(x, own, own[:, :4])
    with pytest.raises(ValueError, match=r"scale must be floating point, got torch\.int32"):
        ada_layer_norm(x, own.int(), own)
    with pytest.raises(ValueError, match="eps must be a number, got None"):
        ada_layer_norm(x, own, own, eps=None)


@cases.needs_interpreter
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_traffic_is_what_the_docstring_says(dtype: torch.dtype) -> None:
    n, length, c = 2, 64, 512
    x = torch.randn(n, length, c, dtype=dtype, requires_grad=True)
    scale, shift = torch.randn(2, n, c, dtype=dtype, requires_grad=True)
    with backend("triton"), counting_traffic() as forward:
        y = ada_layer_norm(x, scale, shift)
    own = 2 * n * length * c * x.itemsize  # scale and shift, read for every row, from the caches
    assert forward.total == pytest.approx(2 * x.nbytes + own, rel=0.05)
    with counting_traffic() as backward:
        torch.autograd.grad(y, x, torch.ones_like(y))
    chunks = 64
    shares, scales = 8 * n * chunks * c, n * chunks * c * x.itemsize
    assert backward.total == pytest.approx(3 * x.nbytes + shares + scales, rel=0.05)
