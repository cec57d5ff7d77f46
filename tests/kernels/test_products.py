"""linear_geglu, linear_add and cat_linear: parity, the choice of a backend, strides, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import kernels
from fastdiff.bench.ops import products as bench_products
from fastdiff.bench.predict import H200
from fastdiff.kernels import cat_linear, linear_add, linear_geglu
from fastdiff.kernels.tuning import products
from tests.kernels import cases

cases.EAGER |= {
    subject.op: subject.eager
    for subject in (bench_products.GEGLU, bench_products.ADD, bench_products.CAT)
}


def inputs(
    draw: cases.Draw,
    op: str,
    rows: tuple[int, ...],
    k: int,
    n: int,
    *,
    bias: bool = True,
    only: str = "",
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    std: float = 1.0,
) -> cases.Inputs:
    """Arguments of an op with K = k features (for `cat_linear` of x; skip has a third of them) and
    N = n results. only: the addend that `linear_add` has; "": both. layout: of x and the weight."""
    wide = k + -(-k // 3) if op == "cat_linear" else k
    columns = 2 * n if op == "linear_geglu" else n
    x, b = layout(draw(*rows, k, std=std)), draw(columns) if bias else None
    weight = layout(draw(columns, wide, mean=0, std=wide**-0.5))
    if op == "linear_geglu":
        return (x, weight, b), {}
    if op == "cat_linear":
        return (x, draw(*rows, wide - k, std=std), weight, b), {}
    more = {"addend": lambda: draw(*rows, k, std=std), "residual": lambda: draw(*rows, n)}
    return (x, weight, b), {name: make() for name, make in more.items() if only in ("", name)}


def row(op: str, name: str, reason: str, *sizes: Any, **options: Any) -> cases.Case:
    return cases.Case(name, reason, lambda draw: inputs(draw, op, *sizes, **options))


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


SHARED: list[tuple[Any, ...]] = [
    ("sd-320", "several tiles of features, whole ones", (2, 40), 320, 72),
    ("odd", "no size is a power of two or a multiple of a tile", (3, 5), 37, 29),
    ("tiles", "several tiles of rows and columns", (3, 45), 24, 70),
    ("one-row", "fewer rows than a tile", (1,), 64, 128),
]
ROWS = {
    op: [
        *(row(op, *shared) for shared in SHARED),
        row(op, "no-bias", "bias is optional", (2, 9), 48, 40, bias=False),
        row(op, "transposed", "features are not contiguous", (2, 9), 48, 40, layout=transposed),
        row(op, "empty", "nothing to do", (0, 4), 8, 8),
    ]
    for op in ("linear_geglu", "linear_add", "cat_linear")
}
ROWS["linear_add"] += [
    row("linear_add", "addend", "nothing after the product", (2, 20), 40, 24, only="addend"),
    row("linear_add", "residual", "nothing before it", (2, 20), 40, 24, only="residual"),
    row("linear_add", "neither", "a linear layer", (2, 20), 40, 24, only="neither"),
]


@pytest.mark.parametrize(
    ("op", "case", "dtype", "backend"),
    [
        pytest.param(op, *p.values, id=f"{op}-{p.id}", marks=p.marks)
        for op, rows in ROWS.items()
        for p in cases.parity_rows(rows, cases.ALL_BACKENDS)
    ],
)
def test_parity(op: str, case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    cases.check(op, case, dtype, backend)


@pytest.mark.parametrize("backend", cases.BACKENDS[1:])
def test_parity_at_drawn_shapes(backend: str) -> None:
    def check(data: st.DataObject) -> None:
        op = data.draw(st.sampled_from(list(ROWS)))
        rows, k, n, dtype = data.draw(
            st.tuples(*[st.integers(1, 90)] * 3, st.sampled_from(cases.DTYPES))
        )
        assume(rows * n >= 100)  # the largest error of a few numbers is chance
        cases.check(op, row(op, "drawn", "any shape", (rows,), k, n), dtype, backend)

    cases.check_draws(check, backend, 12)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def first(op: str, *args: Any, **options: Any) -> str | None:
    """The backend that `auto` tries first on a GPU that was not measured."""
    found = kernels.OPS[op].unmeasured(*kernels.choose.bound_arguments(op, args, options))
    return None if found is None else str(found)


def test_where_triton_is_counted_to_be_faster() -> None:
    """By hand, for (512, 5120) results of 1280 features at 0.85 of cuBLAS's speed: 13.4 GFLOP take
    17.0 us in cuBLAS and 20.0 us in Triton, the pass of GEGLU 3 * 512 * 5120 * 2 bytes / 4.3 TB/s =
    3.7 us. So Triton wins, but not at 0.8: 21.2 us."""
    x, weight = meta(512, 1280), meta(2 * 5120, 1280)
    assert first("linear_geglu", x, weight) == "triton"
    assert products.apart_seconds(4 * 512 * 5120 * 1280, 0, [3 * 512 * 5120 * 2]) == pytest.approx(
        17.0e-6 + 3.66e-6, rel=1e-2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "SHARE", 0.8)
        assert first("linear_geglu", x, weight) is None
    # fp32 has no tensor cores, and a deep product gains little from what is fused
    assert first("linear_geglu", x.float(), weight.float()) is None
    deep = meta(8192, 16384), meta(4096, 16384), None
    assert first("linear_add", *deep, residual=meta(8192, 4096)) is None
    assert (
        first("linear_add", meta(8192, 320), meta(320, 320), residual=meta(8192, 320)) == "triton"
    )
    assert first("cat_linear", meta(8192, 640), meta(8192, 320), meta(320, 960)) == "triton"
    assert first("cat_linear", meta(2048, 1280), meta(2048, 640), meta(640, 1920)) is None


def test_the_rates_are_those_of_predict() -> None:
    rates = products.FLOPS, products.BYTES, products.LAUNCH
    assert rates == (H200.matmul, H200.copy, H200.launch)


@pytest.mark.parametrize("op", ROWS)
def test_fp64_gradients(op: str) -> None:
    draw = cases.Draw(torch.float64, "cpu", torch.Generator().manual_seed(0))
    given = cases.with_gradients(inputs(draw, op, (2, 3), 6, 4))
    names = list(given[1])

    def function(*leaves: Tensor) -> Tensor:
        count = len(leaves) - len(names)
        options = dict(zip(names, leaves[count:], strict=True))
        result: Tensor = getattr(kernels, op)(*leaves[:count], **options)
        return result

    leaves = *given[0], *given[1].values()
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@cases.needs_triton
@pytest.mark.parametrize("op", ROWS)
def test_triton_op_is_registered_right(op: str) -> None:
    draw = cases.Draw(torch.float32, cases.device_of("triton"), torch.Generator().manual_seed(0))
    args, options = cases.with_gradients(inputs(draw, op, (2, 5), 12, 9))
    cases.check_registration(op, "triton", *kernels.choose.bound_arguments(op, args, options))


@cases.needs_triton
@pytest.mark.parametrize("op", ROWS)
def test_triton_compiles_without_break_for_any_batch(op: str) -> None:
    def arguments(n: int) -> tuple[Any, ...]:
        draw = cases.Draw(torch.float32, "cpu", torch.Generator().manual_seed(0))
        return inputs(draw, op, (n, 5), 12, 9, only="neither")[0]

    cases.check_compiles(getattr(kernels, op), arguments)


def test_a_residual_that_all_rows_share() -> None:
    x, weight, residual = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    y = linear_add(x, weight, residual=residual.expand(3, 5))
    torch.testing.assert_close(y, F.linear(x, weight, residual))


def test_bad_input() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(6, 8)
    with pytest.raises(ValueError, match=r"must be even, got shape \(5, 8\)"):
        linear_geglu(x, weight[:5])
    with pytest.raises(ValueError, match=r"weight must be \(N, K\).* got x of shape \(2, 7\)"):
        linear_geglu(x[:, :7], weight)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        linear_add(x, weight, torch.zeros(5))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 6\), got \(2, 8\)"):
        linear_add(x, weight, residual=x)
    with pytest.raises(ValueError, match=r"addend must have shape \(2, 8\), got \(6, 8\)"):
        linear_add(x, weight, addend=weight)
    with pytest.raises(ValueError, match=r"addend must have the dtype of x, .*float32, got .*64"):
        linear_add(x, weight, addend=x.double())
    with pytest.raises(ValueError, match="weight must have the dtype of x"):
        linear_add(x, weight.double())
    with pytest.raises(ValueError, match=r"skip must be .* got \(3, 8\) and \(2, 8\)"):
        cat_linear(x, torch.zeros(3, 8), weight)
    with pytest.raises(ValueError, match=r"got x of shape \(2, 12\) and weight of shape \(6, 8\)"):
        cat_linear(x, x[:, :4], weight)
    with pytest.raises(ValueError, match="x must be floating point"):
        cat_linear(x.int(), x, weight)
