"""add_group_norm_silu: parity, the rounded total, bad input, Triton's gradients and traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from fastdiff import kernels
from fastdiff.kernels import add_group_norm_silu, backend, group_norm_silu
from fastdiff.kernels.group_norm_silu.triton_forward import forward
from fastdiff.kernels.triton import recording_launches
from fastdiff.kernels.tuning import override_config
from fastdiff.kernels.tuning.configs import gpu_of, lookup
from tests.kernels import cases
from tests.kernels.interpreter import counting_traffic
from tests.kernels.norms import KERNELS, REGIMES, kernels_of, regime


@pytest.mark.parametrize(("case", "dtype", "backend"), cases.parity_rows(cases.ADD_GROUP_NORM_SILU))
def test_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    with regime("small"):
        cases.check("add_group_norm_silu", case, dtype, backend)


@cases.needs_triton
@pytest.mark.parametrize(("case", "dtype"), cases.in_turn(cases.ADD_GROUP_NORM_SILU), ids=str)
def test_parity_in_the_large_regime(case: cases.Case, dtype: torch.dtype) -> None:
    with regime("large", COLUMNS=256, FINALIZE=8192):
        cases.check("add_group_norm_silu", case, dtype, "triton")


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_parity_at_drawn_shapes(backend: str) -> None:
    def check(data: st.DataObject) -> None:
        n, groups, size, h, w = (data.draw(st.integers(1, top)) for top in (3, 9, 5, 7, 7))
        assume(n * groups * size * h * w >= 400)  # the largest error of a few numbers is chance
        case = cases.norm_case(
            "drawn",
            "any shape",
            (n, groups * size, h, w),
            groups,
            layout=data.draw(st.sampled_from([lambda x: x, cases.channels_last])),
            add=data.draw(st.sampled_from(["", "channel", "vector residual", "residual"])),
        )
        with regime(data.draw(st.sampled_from(REGIMES))):
            dtype = data.draw(st.sampled_from(cases.DTYPES))
            cases.check("add_group_norm_silu", case, dtype, backend)

    cases.check_draws(check, backend, 20)


@pytest.mark.parametrize("name", cases.BACKENDS)
@pytest.mark.parametrize("kind", REGIMES)
def test_addends_may_be_columns_of_a_wider_matrix(kind: str, name: str) -> None:
    x = torch.randn(3, 8, 5, 5).to(cases.device_of(name))
    wide = torch.randn(3, 24).to(x.device)
    for columns in (wide[:, 8:16], wide[:1, 8:16].expand(3, 8), wide[:, ::3]):
        with backend(name), regime(kind):
            y, total = add_group_norm_silu(x, 4, channel_add=columns)
            exact = (x.double() + columns.double()[:, :, None, None]).float()
            assert torch.equal(total, exact)
            assert torch.equal(y, group_norm_silu(total, 4))


@pytest.mark.parametrize("name", cases.BACKENDS)
@pytest.mark.parametrize("kind", REGIMES)
def test_y_is_the_norm_of_the_rounded_total(kind: str, name: str) -> None:
    x, residual = torch.randn(2, 2, 8, 5, 5).bfloat16().to(cases.device_of(name))
    channel_add = torch.randn(2, 8).to(x.device)
    with backend(name), regime(kind):
        y, total = add_group_norm_silu(x, 4, channel_add=channel_add, residual=residual)
        exact = x.double() + channel_add.double()[:, :, None, None] + residual.double()
        assert torch.equal(total, exact.bfloat16())  # the sum is rounded once
        assert torch.equal(y, group_norm_silu(total, 4))


@pytest.mark.parametrize("name", cases.BACKENDS)
@pytest.mark.parametrize("kind", REGIMES)
def test_channels_last_stays(kind: str, name: str) -> None:
    x = cases.channels_last(torch.randn(2, 8, 5, 6)).to(cases.device_of(name))
    channel_add = torch.ones(8, device=x.device)
    with backend(name), regime(kind):
        results = add_group_norm_silu(x, 4, channel_add=channel_add, residual=x)
    for result in results:
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert not result.is_contiguous()


@pytest.mark.parametrize("name", cases.BACKENDS)
@pytest.mark.parametrize("kind", REGIMES)
@pytest.mark.parametrize("shared", [False, True], ids=["(N, C)", "(C,)"])
@pytest.mark.parametrize("used", ["y", "total"])
def test_gradients_where_one_result_is_used(used: str, shared: bool, kind: str, name: str) -> None:
    device = cases.device_of(name)
    draw = lambda *shape: torch.randn(*shape, device=device, requires_grad=True)  # noqa: E731
    x, residual, weight = draw(3, 8, 4, 5), draw(3, 8, 4, 5), draw(8)
    channel_add = draw(8) if shared else draw(3, 8)
    leaves = x, residual, channel_add
    dy = torch.randn(3, 8, 4, 5, device=device)

    def gradients(op: Any, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, residual, channel_add = leaves
        options = {"channel_add": channel_add, "residual": residual}
        outputs = op(x, 4, weight.to(x.dtype), **options)
        output = outputs[0] if used == "y" else outputs[1]
        return torch.autograd.grad(output, leaves, dy.to(x.dtype))

    with backend(name), regime(kind):
        have = gradients(add_group_norm_silu, *leaves)
    doubled = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for got, want in zip(
        have, gradients(kernels.OPS["add_group_norm_silu"].formula, *doubled), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", cases.BACKENDS)
def test_each_gradient_has_the_dtype_of_its_tensor(name: str) -> None:
    device = cases.device_of(name)
    x = torch.randn(2, 8, 6, device=device).bfloat16().requires_grad_()
    residual = torch.randn(2, 8, 6, device=device).requires_grad_()
    channel_add = torch.randn(8, device=device).requires_grad_()
    leaves = x, residual, channel_add
    with backend(name):
        y, total = add_group_norm_silu(x, 4, channel_add=channel_add, residual=residual)
        assert y.dtype == total.dtype == torch.bfloat16
        found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [g.dtype for g in found] == [leaf.dtype for leaf in leaves]
    assert torch.equal(found[1].bfloat16(), found[0])


@cases.needs_triton
def test_gradients_that_are_not_needed_are_not_computed() -> None:
    x = torch.randn(2, 8, 4, 4, device=cases.device_of("triton"))
    weight = torch.randn(8, device=x.device)
    residual = torch.randn_like(x).requires_grad_()
    with backend("triton"), regime("small"):
        y, _ = add_group_norm_silu(x, 4, weight, residual=residual)
        ran = kernels_of(lambda: torch.autograd.grad(y, residual, torch.ones_like(y)))
    assert ran == ["_small_backward_kernel"]


@cases.needs_triton
@pytest.mark.parametrize("shared", [False, True], ids=["(N, C)", "(C,)"])
def test_large_batches_are_split_with_all_tensors_of_a_sample(shared: bool) -> None:
    device = cases.device_of("triton")
    draw = lambda *shape: torch.randn(*shape, device=device, requires_grad=True)  # noqa: E731
    x, residual, film, weight = draw(3, 32, 8, 8), draw(3, 32, 8, 8), draw(3, 64), draw(32)
    channel_add = draw(32) if shared else draw(3, 32)
    leaves = x, residual, film, weight, channel_add
    results = []
    for mebibytes in (0, 1):  # 0: sample by sample
        with backend("triton"), regime("large", L2_MIB=mebibytes):
            options = {"channel_add": channel_add, "residual": residual, "scale_shift": film}
            outputs = add_group_norm_silu(x, 8, weight, **options)
            ones = [torch.ones_like(output) for output in outputs]
            results.append((*outputs, *torch.autograd.grad(outputs, leaves, ones)))
    for together, apart in zip(*results, strict=True):
        assert torch.equal(together, apart)


@cases.needs_triton
def test_the_addends_take_registers_from_the_small_regime() -> None:
    x = torch.empty(2, 1920, 16, 16, dtype=torch.bfloat16, device="meta")
    x = cases.channels_last(x)
    for residual, kind in ((None, "small"), (x, "large")):
        with recording_launches() as launches:
            forward(x, 32, None, None, None, residual, None, 1e-5, "silu")
        assert {launch.kernel.__name__ for launch in launches} <= KERNELS[kind]


@cases.needs_triton
@pytest.mark.parametrize("kind", REGIMES)
def test_triton_ops_are_registered_right(kind: str) -> None:
    device = cases.device_of("triton")
    draw = lambda *shape: torch.randn(*shape, device=device, requires_grad=True)  # noqa: E731
    x, weight, film, add = draw(3, 12, 4, 5), draw(12), draw(3, 24), draw(12)
    residual = cases.channels_last(torch.randn(3, 12, 4, 5, device=device)).requires_grad_()
    options = (film, 1e-5, "silu")
    every = x, 3, weight, weight, add, residual, *options
    only_add = (
        x.detach(), 3, weight.detach(), None, add, residual.detach(), film.detach(), 1e-5, "none"
    )  # fmt: skip
    no_channel_add = x, 3, weight, weight, None, residual, *options
    no_residual = x, 3, weight, weight, add, None, *options
    with regime(kind):
        pair = (every, only_add) if kind == "large" else (no_channel_add, no_residual)
        for arguments in pair:
            cases.check_registration("add_group_norm_silu", "triton", *arguments)


@cases.needs_triton
def test_triton_compiles_without_break_for_any_batch() -> None:
    def call(x: torch.Tensor, channel_add: torch.Tensor, residual: torch.Tensor) -> Any:
        return add_group_norm_silu(x, 4, channel_add=channel_add, residual=residual)

    cases.check_compiles(
        call, lambda n: (torch.randn(n, 8, 5, 3), torch.randn(n, 8), torch.randn(n, 8, 5, 3))
    )


@cases.needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", REGIMES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_traffic_is_what_the_docstring_says(
    with_residual: bool, kind: str, dtype: torch.dtype
) -> None:
    size, groups = (16, 8) if kind == "small" else (64, 2)
    c = 32 if kind == "large" else 64 if with_residual else 128
    x = cases.channels_last(torch.randn(1, c, size, size)).to(dtype).requires_grad_()
    options = {"channel_add": torch.randn(c, dtype=dtype)}
    if with_residual:
        options["residual"] = torch.randn_like(x.detach())
    shape_class = f"nhwc/{kind}"
    config = lookup("group_norm_silu", gpu_of(x.device), dtype, shape_class)
    if kind == "small":  # else up to 8 programs read the same, which the L2 has
        config = config | {"FILL": 1}
    with override_config("group_norm_silu", config, shape_class):
        ran = kernels_of(lambda: add_group_norm_silu(x.detach(), groups, **options))
        with backend("triton"), counting_traffic() as forward:
            y, total = add_group_norm_silu(x, groups, **options)
    assert set(ran) <= KERNELS[kind]
    # 128 chunks: mean and squares of each group, 8 bytes, are written once and read by 128 programs
    merge = (1 + 128) * 8 * groups * 128 if kind == "large" else 0
    trips = 3 + with_residual + (kind == "large")
    assert forward.total == pytest.approx(trips * x.nbytes + merge, rel=0.05)
    with counting_traffic() as backward:
        torch.autograd.grad((y, total), x, (torch.ones_like(y), torch.ones_like(y)))
    trips, own = (4, 0.0) if kind == "small" else (6, 16 / 128 + 20 / 32)
    assert backward.total == pytest.approx(trips * x.nbytes + own * x.numel(), rel=0.05)


@cases.needs_interpreter
@pytest.mark.parametrize("kind", REGIMES)
@pytest.mark.parametrize("shared", [False, True], ids=["(N, C)", "(C,)"])
def test_traffic_of_the_gradient_of_channel_add(shared: bool, kind: str) -> None:
    """The large regime needs one more pass, to sum dtotal over space."""
    size, groups, c = (16, 8, 64) if kind == "small" else (64, 2, 32)
    x = cases.channels_last(torch.randn(1, c, size, size)).requires_grad_()
    channel_add = torch.randn(*(() if shared else (1,)), c, requires_grad=True)
    with backend("triton"):
        y, total = add_group_norm_silu(x, groups, channel_add=channel_add)
    gradients = torch.ones_like(y), torch.ones_like(y)
    with counting_traffic() as backward:
        torch.autograd.grad((y, total), (x, channel_add), gradients)
    trips, own = (4, 0.0) if kind == "small" else (7, 2 * 16 / 128 + 20 / 32)
    assert backward.total == pytest.approx(trips * x.nbytes + own * x.numel(), rel=0.05)


def test_fp64_gradients() -> None:
    x, residual = torch.randn(2, 1, 4, 3).double().requires_grad_().unbind()
    weight, bias, channel_add = torch.randn(3, 4).double().requires_grad_().unbind()

    def call(x: torch.Tensor, channel_add: torch.Tensor, residual: torch.Tensor) -> Any:
        return add_group_norm_silu(x, 2, weight, bias, channel_add=channel_add, residual=residual)

    assert torch.autograd.gradcheck(call, (x, channel_add, residual))


def test_bad_input() -> None:
    x = torch.zeros(2, 6, 4)
    with pytest.raises(
        ValueError, match=r"channel_add must have shape \(2, 6\) or \(6,\), got \(2,\)"
    ):
        add_group_norm_silu(x, 2, channel_add=torch.zeros(2))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 6, 4\), got \(1, 6, 4\)"):
        add_group_norm_silu(x, 2, residual=x[:1])
    with pytest.raises(ValueError, match="add_group_norm_silu: num_groups must divide"):
        add_group_norm_silu(x, 4)
