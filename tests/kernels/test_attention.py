"""attention: parity, masks, strides, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiff.kernels import attention
from tests.kernels import cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_parity(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check("attention", case, dtype, "reference")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_at_drawn_shapes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, top)) for top in (3, 40, 40, 4, 33))
    assume(shape[0] * shape[1] * shape[3] * shape[4] >= 100)  # the largest of a handful is luck
    mask = data.draw(st.sampled_from([None, cases.additive, cases.padding]))
    case = cases.attention_case("drawn", "any shape", shape, mask=mask)
    cases.check("attention", case, data.draw(st.sampled_from(cases.DTYPES)), "reference")


def test_fp64_is_exact() -> None:
    q, k, v = torch.randn(3, 2, 9, 3, 5, dtype=torch.float64)
    expected = cases.attention_formula(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_may_see_nothing_gets_zeros(kind: str) -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8).requires_grad_().unbind()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, :, 3] = False
    out = attention(q, k, v, mask=mask if kind == "bool" else mask.float().log())
    assert torch.equal(out[1, 3], torch.zeros(3, 8))
    assert out[1, 2].abs().min() > 0
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_the_result_is_contiguous_for_every_layout() -> None:
    packed = torch.randn(2, 9, 3, 4, 8)
    views = packed.unbind(2)
    assert attention(*views).is_contiguous()
    turned = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in views]
    assert turned[0].stride(3) != 1
    torch.testing.assert_close(attention(*turned), attention(*views))
    assert attention(*turned).is_contiguous()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    for length, dim in ((64, 16), (17, 40), (1, 128)):
        q, k, v = torch.randn(3, 7, length, 2, dim)
        together = attention(q, k, v)
        for i in range(7):
            assert torch.equal(together[i : i + 1], attention(*(t[i : i + 1] for t in (q, k, v))))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 8), (2, 4, 8), (2, 4, 8)), "split the heads first"),
        (((2, 4, 2, 8), (2, 4, 3, 8), (2, 4, 3, 8)), "with N=2, H=2, D=8 as in q"),
        (((2, 4, 2, 8), (2, 4, 2, 8), (2, 5, 2, 8)), r"got \(2, 4, 2, 8\) and \(2, 5, 2, 8\)"),
        (((2, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "with N=2"),
    ],
)
def test_bad_shapes(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(s) for s in shapes))


def test_bad_dtypes_and_masks() -> None:
    q = torch.zeros(2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"one dtype, got torch.float32, torch.float16"):
        attention(q, q.half(), q)
    with pytest.raises(
        ValueError, match=r"broadcast to \(N, H, L, S\) = \(2, 2, 4, 4\), got \(3, 4\)"
    ):
        attention(q, q, q, mask=torch.ones(3, 4))
    # a tokenizer's 0 and 1 must not be added to the scores
    with pytest.raises(ValueError, match=r"bool or floating point, got torch.int64; use mask.bool"):
        attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="broadcast"):
        attention(q, q, q, mask=torch.ones(1, 1, 1, 1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_inside(dtype: torch.dtype) -> None:
    """Mixed-precision training must not take the fp32 scores and sums back to bf16."""
    q, k, v = torch.randn(3, 2, 9, 3, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention(q, k, v)
    assert inside.dtype == dtype
    assert torch.equal(inside, attention(q, k, v))
