"""group_norm_silu: parity, layouts, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiff.kernels import group_norm_silu
from tests.kernels import cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.GROUP_NORM_SILU, ids=str)
def test_parity(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check("group_norm_silu", case, dtype, "reference")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_at_drawn_shapes(data: st.DataObject) -> None:
    n, groups, size, h, w = (data.draw(st.integers(1, top)) for top in (3, 9, 5, 7, 7))
    assume(n * groups * size * h * w >= 100)  # the largest error of a handful is luck
    layout = data.draw(st.sampled_from([lambda x: x, cases.channels_last, lambda x: x.mT]))
    options = {"film": data.draw(st.booleans()), "affine": data.draw(st.booleans())}
    case = cases.norm_case(
        "drawn", "any shape", (n, groups * size, h, w), groups, layout=layout, **options
    )
    cases.check("group_norm_silu", case, data.draw(st.sampled_from(cases.DTYPES)), "reference")


def test_fp64_is_exact() -> None:
    (x, *rest), kwargs = cases.GROUP_NORM_SILU[6].inputs(torch.float64)
    expected = cases.group_norm_silu_formula(x, *rest, **kwargs)
    torch.testing.assert_close(
        group_norm_silu(x, *rest, **kwargs), expected, rtol=1e-12, atol=1e-12
    )


def test_second_derivative() -> None:
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    film = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 4, dtype=torch.float64).unbind()
    call = lambda x, film: group_norm_silu(x, 2, weight, bias, scale_shift=film)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, film))
    assert torch.autograd.gradgradcheck(call, (x, film))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("film", [False, True])
def test_channels_last_stays(dtype: torch.dtype, film: bool) -> None:
    x = cases.channels_last(torch.randn(2, 8, 5, 6)).to(dtype)
    scale_shift = torch.randn(2, 16).to(dtype) if film else None
    y = group_norm_silu(x, 4, torch.ones(8), torch.zeros(8), scale_shift=scale_shift)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    assert group_norm_silu(x.contiguous(), 4).is_contiguous()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x = torch.randn(7, 32, 9, 9)
    for layout in (torch.contiguous_format, torch.channels_last):
        together = group_norm_silu(x.contiguous(memory_format=layout), 8)
        for i in range(7):
            alone = group_norm_silu(x[i : i + 1].contiguous(memory_format=layout), 8)
            assert torch.equal(together[i : i + 1], alone)


def test_parameters_in_fp32_serve_half_precision_input() -> None:
    x, weight, bias = torch.randn(2, 8, 4, 4), torch.randn(8), torch.randn(8)
    y = group_norm_silu(x.bfloat16(), 4, weight, bias)
    expected = group_norm_silu(x.bfloat16().float(), 4, weight, bias)
    assert torch.equal(y, expected.bfloat16())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2, 6, 4), 4), {}, "num_groups must divide the 6 channels of x, got 4"),
        ((torch.zeros(2, 6, 4), 0), {}, "num_groups must divide"),
        ((torch.zeros(6), 2), {}, r"x must be \(N, C, \*spatial\), got shape \(6,\)"),
        ((torch.zeros(2, 6, dtype=torch.int64), 2), {}, "floating point, got torch.int64"),
        ((torch.zeros(2, 6), 2, torch.ones(5)), {}, r"weight must have shape \(6,\), got \(5,\)"),
        ((torch.zeros(2, 6), 2, None, torch.ones(1)), {}, r"bias must have shape \(6,\)"),
        (
            (torch.zeros(2, 6), 2),
            {"scale_shift": torch.ones(2, 6)},
            r"scale_shift must have shape \(2, 12\)",
        ),
        ((torch.zeros(2, 6), 2), {"activation": "relu"}, "activation must be one of .* got 'relu'"),
    ],
)
def test_bad_input(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        group_norm_silu(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_training_a_norm_of_a_channels_last_constant() -> None:
    """PyTorch 2.13's own backward pass writes through a null pointer here."""
    x, weight = cases.channels_last(torch.randn(2, 8, 4, 4)), torch.ones(8, requires_grad=True)
    group_norm_silu(x, 4, weight).sum().backward()
    twin = weight.detach().double().requires_grad_()
    cases.group_norm_silu_formula(x.double(), 4, twin).sum().backward()
    torch.testing.assert_close(weight.grad.double(), twin.grad, rtol=1e-5, atol=1e-5)
