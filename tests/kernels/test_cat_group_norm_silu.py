"""cat_group_norm_silu: parity, groups with channels of both inputs, registration, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import backend, cat_group_norm_silu, group_norm_silu
from fastdiff.kernels.group_norm_silu import cuda as group_norm_cuda
from tests.kernels import cases
from tests.kernels.norms import regime


def eager(
    x: Tensor, skip: Tensor, *norm: Any, eps: float = 1e-5, **addends: Any
) -> tuple[Tensor, Tensor]:
    for name, a in addends.items():
        x = x + (a.reshape(*a.shape, *[1] * (x.ndim - 2)) if name == "channel_add" else a)
    joined = torch.cat([x, skip], dim=1)
    return cases.group_norm_silu_eager(joined, *norm, eps=eps), x


cases.EAGER["cat_group_norm_silu"] = eager


def case(
    name: str,
    reason: str,
    shape: tuple[int, ...],
    right: int,
    groups: int,
    *,
    layout: Any = lambda x: x,
    add: str = "",
    mean: float = 0.3,
    std: float = 1.0,
    affine: bool = True,
) -> cases.Case:
    """x has the shape, skip has `right` channels instead."""

    def build(draw: cases.Draw) -> cases.Inputs:
        n, left, *space = shape
        x = layout(draw(*shape, mean=mean, std=std))
        skip = layout(draw(n, right, *space, mean=mean, std=std))
        parameters = (draw(left + right, mean=1.0), draw(left + right)) if affine else ()
        options = {}
        if "channel" in add:
            options["channel_add"] = draw(n, left)
        if "vector" in add:
            options["channel_add"] = draw(left)
        if "residual" in add:
            options["residual"] = layout(draw(*shape))
        return (x, skip, groups, *parameters), options

    return cases.Case(name, reason, build)


NHWC = cases.channels_last
ROWS = [
    case("sd-1920", "SD 1.5: group 21 of 60 channels has 20 of x and 40 of skip", (1, 1280, 3, 3),
         640, 32, layout=NHWC, add="vector residual"),
    case("sd-960", "SD 1.5: groups of 30, of which 8 channels fill a load", (2, 640, 5, 3), 320, 32,
         layout=NHWC, add="residual"),
    case("sd-960-nchw", "the same in NCHW", (1, 640, 4, 2), 320, 32, add="vector residual"),
    case("plain", "nothing to add: total is x", (2, 48, 8, 8), 16, 4, layout=NHWC),
    case("plain-nchw", "a group of both", (2, 40, 4, 8), 24, 4),
    case("odd", "the border is inside of any load", (3, 13, 5, 7), 8, 7, layout=NHWC,
         add="channel residual"),
    case("odd-nchw", "no size is a power of two", (3, 13, 5, 7), 8, 7, add="channel"),
    case("narrow", "x within one group", (2, 2, 9, 9), 30, 2, layout=NHWC, add="channel"),
    case("no-space", "(N, C)", (5, 32), 16, 6, add="channel residual"),
    case("sliced", "views", (2, 16, 6, 10), 8, 4, layout=lambda x: x[..., ::2], add="residual"),
    case("mean-100", "E[x^2] - E[x]^2 loses every digit", (2, 24, 8, 8), 8, 4, layout=NHWC,
         mean=100, std=0.01, affine=False),
    case("many-chunks", "several chunks and a short last one", (1, 72, 43, 29), 24, 8, layout=NHWC,
         add="vector"),
    case("empty-batch", "nothing to do", (0, 8, 4, 4), 8, 4, add="channel"),
]  # fmt: skip
ON_A_GPU = {
    "as planned": {},
    "parts": {"ON_CHIP": 0},
    "cluster": {"CLUSTER": 4},
}


@pytest.mark.parametrize(("case", "dtype", "backend"), cases.parity_rows(ROWS))
def test_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    with regime("large", COLUMNS=512, FINALIZE=8192):
        cases.check("cat_group_norm_silu", case, dtype, backend)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_parity_at_drawn_shapes(backend: str) -> None:
    def check(data: st.DataObject) -> None:
        n, groups, size, h, w = (data.draw(st.integers(1, top)) for top in (3, 9, 5, 7, 7))
        channels = groups * size
        assume(channels >= 2)
        assume(n * channels * h * w >= 400)  # the largest error of a few numbers is chance
        right = data.draw(st.integers(1, channels - 1))
        drawn = case(
            "drawn", "any shape and border", (n, channels - right, h, w), right, groups,
            layout=data.draw(st.sampled_from([lambda x: x, NHWC])),
            add=data.draw(st.sampled_from(["", "channel", "vector residual", "residual"])),
        )  # fmt: skip
        dtype = data.draw(st.sampled_from(cases.DTYPES))
        cases.check("cat_group_norm_silu", drawn, dtype, backend)

    cases.check_draws(check, backend, 20)


@cases.needs_cuda
@pytest.mark.parametrize("way", ON_A_GPU)
@pytest.mark.parametrize(("case", "dtype"), cases.in_turn(ROWS), ids=str)
def test_parity_of_cuda(
    case: cases.Case, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "cluster" and cases.needs_clusters.args[0]:
        pytest.skip(cases.needs_clusters.kwargs["reason"])
    for name, value in ON_A_GPU[way].items():
        monkeypatch.setattr(group_norm_cuda, name, value)
    cases.check("cat_group_norm_silu", case, dtype, "cuda")


@pytest.mark.parametrize("backend_name", cases.ALL_BACKENDS)
@pytest.mark.parametrize("layout", [NHWC, lambda x: x], ids=["NHWC", "NCHW"])
def test_y_has_the_bits_of_the_norm_of_the_concatenation(layout: Any, backend_name: str) -> None:
    device = cases.device_of(backend_name)
    x, skip = (layout(torch.randn(2, c, 6, 5)).to(device) for c in (40, 24))
    residual = torch.randn(2, 40, 6, 5, device=device)
    with backend(backend_name):
        y, total = cat_group_norm_silu(x, skip, 4, residual=residual)
        joined = layout(torch.cat([total, skip], 1))
        assert torch.equal(y, group_norm_silu(joined, 4))
        assert cat_group_norm_silu(x, skip, 4)[1] is x
    assert torch.equal(total, x + residual)
    assert y.stride() == joined.stride()


@pytest.mark.parametrize(("name", "adds"), [("triton", False), ("cpu", True)])
def test_registration(name: str, adds: bool) -> None:
    if absent := kernels.available()["cat_group_norm_silu"][name]:
        pytest.skip(absent)
    device = cases.device_of(name)
    draw = lambda *shape: torch.randn(*shape, device=device, requires_grad=True)  # noqa: E731
    x, skip, weight = draw(2, 10, 4, 3), NHWC(draw(2, 6, 4, 3)).detach().requires_grad_(), draw(16)
    addends = (draw(10), draw(2, 10, 4, 3)) if adds else (None, None)
    cases.check_registration("cat_group_norm_silu", name, x, skip, 4, weight, None, *addends, 1e-5)


@cases.needs_native
def test_compiles_without_break_for_any_batch() -> None:
    def call(x: Tensor, skip: Tensor, channel_add: Tensor) -> Any:
        y, total = cat_group_norm_silu(x, skip, 4, channel_add=channel_add)
        return y, cat_group_norm_silu(total, skip, 4)[0]

    cases.check_compiles(
        call,
        lambda n: (torch.randn(n, 10, 5, 3), torch.randn(n, 6, 5, 3), torch.randn(n, 10)),
        "cpu",
    )


def test_second_derivative() -> None:
    x, skip = (torch.randn(1, c, 2, 2).double().requires_grad_() for c in (3, 1))
    add = torch.randn(3).double().requires_grad_()
    call = lambda x, skip, add: cat_group_norm_silu(x, skip, 2, channel_add=add)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, skip, add))
    assert torch.autograd.gradgradcheck(call, (x, skip, add))


@pytest.mark.parametrize("name", cases.BACKENDS)
def test_gradient_of_the_total_alone(name: str) -> None:
    device = cases.device_of(name)
    x, skip = (torch.randn(2, 8, 3, 3, device=device, requires_grad=True) for _ in range(2))
    add = torch.randn(8, device=device, requires_grad=True)
    with backend(name):
        _, total = cat_group_norm_silu(x, skip, 4, channel_add=add)
    dx, dskip, dadd = torch.autograd.grad(
        total.sum(), (x, skip, add), allow_unused=True, materialize_grads=True
    )
    assert torch.equal(dx, torch.ones_like(x))
    assert not dskip.any()
    assert torch.equal(dadd, torch.full_like(add, 18))


def test_bad_input() -> None:
    x, skip = torch.zeros(2, 6, 4), torch.zeros(2, 2, 4)
    with pytest.raises(ValueError, match=r"x and skip must be .* got \(2, 6, 4\) and \(2, 2, 3\)"):
        cat_group_norm_silu(x, skip[..., :3], 2)
    with pytest.raises(ValueError, match="num_groups must divide the 8 channels of x, got 3"):
        cat_group_norm_silu(x, skip, 3)
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\), got \(6,\)"):
        cat_group_norm_silu(x, skip, 2, torch.ones(6))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 6, 4\)"):
        cat_group_norm_silu(x, skip, 2, residual=skip)
    with pytest.raises(ValueError, match=r"channel_add must have shape \(2, 6\) or \(6,\)"):
        cat_group_norm_silu(x, skip, 2, channel_add=torch.ones(8))
    assert kernels.OPS["cat_group_norm_silu"].public is cat_group_norm_silu
