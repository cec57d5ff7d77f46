"""The CUDA kernels of geglu, the layer norms, sampler_step and philox_normal, beyond the tests that
all backends share. Their parity is tested in test_<op>.py, with the parameter "cuda"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import cuda as _cuda
from fastdiff.kernels.layer_norm import cuda as layer_norm_cuda
from tests.kernels import cases

pytestmark = pytest.mark.parametrize("backend", [cases.ALL_BACKENDS[-1]])
NORMS = {"layer_norm": cases.LAYER_NORM, "add_layer_norm": cases.ADD_LAYER_NORM}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(cases.device_of("cuda"))


def results(op: Callable[..., Any], *tensors: Tensor | None) -> list[Tensor]:
    """Outputs and gradients from the CUDA kernels."""
    with kernels.backend("cuda"):
        outputs, gradients = cases.run(op, cases.with_gradients((tensors, {})))
    return outputs + gradients


@pytest.fixture
def rows_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every row as too wide for registers."""
    monkeypatch.setattr(layer_norm_cuda, "WIDEST", 0)
    monkeypatch.setattr(layer_norm_cuda, "PROGRAMS", 3)


@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [(op, *pair) for op in NORMS for pair in cases.in_turn(NORMS[op])],
    ids=str,
)
def test_parity_of_wide_rows(
    op: str, case: cases.Case, dtype: torch.dtype, backend: str, rows_are_wide: None
) -> None:
    cases.check(op, case, dtype, backend)


@pytest.mark.parametrize("shape", [(70, 33), (300, 24), (40, 1040), (5, 4100), (3, 8192)], ids=str)
@pytest.mark.parametrize("op", NORMS)
def test_parity_with_many_tiles_to_a_program(
    op: str, shape: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program gets several tiles, the last one partial; a row is processed by a warp, by a
    block, or is too wide for registers."""
    monkeypatch.setattr(layer_norm_cuda, "PROGRAMS", 2)
    case = cases.layer_norm_case("tiles", "as above", shape, residual=op == "add_layer_norm")
    for dtype in cases.DTYPES:
        cases.check(op, case, dtype, backend)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_of_layer_norms_at_drawn_widths(backend: str, data: st.DataObject) -> None:
    """Widths near the limits of a row per warp, of a pack, and of the warps in a block."""
    border = data.draw(st.sampled_from([32, 256, 512, 768, 1024, 2048]))
    d, rows = border + data.draw(st.integers(-9, 9)), data.draw(st.integers(8, 12))
    options = {"parameters": data.draw(st.sampled_from(["weight bias", "weight", "bias", ""]))}
    assume(d * rows >= 100)
    residual = data.draw(st.booleans())
    case = cases.layer_norm_case("drawn", "any width", (rows, d), residual=residual, **options)
    op = "add_layer_norm" if residual else "layer_norm"
    cases.check(op, case, data.draw(st.sampled_from(cases.DTYPES)), backend)


def misaligned(t: Tensor) -> Tensor:
    """A copy that starts one element past a multiple of 16 bytes."""
    wide = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    assert wide.data_ptr() % 16
    return wide.view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("which", range(4))
def test_unaligned_tensors_are_served(dtype: torch.dtype, which: int, backend: str) -> None:
    tensors = [draw(*s, dtype=dtype) for s in ((9, 80), (9, 80), (80,), (80,))]
    expected = results(kernels.add_layer_norm, *tensors)
    tensors[which] = misaligned(tensors[which])
    tolerance = 4 * torch.finfo(dtype).eps
    for have, want in zip(results(kernels.add_layer_norm, *tensors), expected, strict=True):
        torch.testing.assert_close(have, want, rtol=tolerance, atol=20 * tolerance)
    if which == 0:
        x = draw(9, 160, dtype=dtype)
        for have, want in zip(
            results(kernels.geglu, misaligned(x)), results(kernels.geglu, x), strict=True
        ):
            assert torch.equal(have, want)


@pytest.mark.parametrize("d", [40, 37, 1000, 9000])
def test_bits_repeat_and_do_not_depend_on_the_batch(d: int, backend: str) -> None:
    x, residual = (draw(5, 3, d, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = draw(d), draw(d)
    for op, tensors in (
        (kernels.add_layer_norm, (x, residual, weight, bias)),
        (kernels.geglu, (torch.cat([x, residual], -1),)),
    ):
        together = results(op, *tensors)
        assert all(map(torch.equal, together, results(op, *tensors)))
        for i in range(5):
            own = [t[i : i + 1] if t.ndim == 3 else t for t in tensors]
            alone = results(op, *own)
            outputs = len(alone) - len(tensors)
            for have, want in zip(alone[:outputs], together[:outputs], strict=True):
                assert torch.equal(have[0], want[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_parameters_and_residual_of_any_dtype(dtype: torch.dtype, backend: str) -> None:
    """Values that every dtype represents give the same bits, and gradients in their own dtype."""
    x = draw(6, 40, dtype=torch.bfloat16)
    residual, weight, bias = (draw(*s).half() for s in ((6, 40), (40,), (40,)))
    with kernels.backend("cuda"):
        y, total = kernels.add_layer_norm(x, *(t.to(dtype) for t in (residual, weight, bias)))
        wanted = kernels.add_layer_norm(x, *(t.float() for t in (residual, weight, bias)))
    assert torch.equal(y, wanted[0])
    assert torch.equal(total, wanted[1])
    found = results(kernels.add_layer_norm, x, *(t.to(dtype) for t in (residual, weight, bias)))
    assert [g.dtype for g in found[2:]] == [torch.bfloat16, dtype, dtype, dtype]


def test_ops_are_registered_right(backend: str) -> None:
    x, residual, weight, bias = draw(3, 5, 74), draw(3, 5, 74), draw(74), draw(74)
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]

    def check(op: str, *arguments: Any) -> None:
        torch.library.opcheck(kernels.OPS[op].known, arguments)

    seeds, step = (torch.tensor(n, device=x.device) for n in ([3, 4, 5], 0))
    with kernels.backend("cuda"):
        check("geglu", leaves[0])
        check("geglu", x.mT.contiguous().mT)
        check("layer_norm", leaves[0], leaves[2], None, 1e-5)
        check("layer_norm", x[:0], None, None, 1e-5)
        check("add_layer_norm", *leaves, 1e-5)
        check("philox_normal", seeds, [3, 5], None, 7, 1)
        check("philox_normal", seeds[:0], [3, 5], step, 0, 1)
        table, rows = torch.ones(2, 20, device=x.device), torch.zeros_like(seeds)
        finite = torch.ones(3, dtype=torch.bool, device=x.device)
        log_prob = torch.zeros(3, device=x.device)
        options = rows, rows + 1, torch.empty_like(x), finite, log_prob, True
        tensors = x, draw(6, 5, 74), draw(3, 3, 5, 74), table, rows, seeds
        check("sampler_step", *tensors, *options)


def test_gradients_and_gradients_of_gradients(backend: str) -> None:
    x, residual, weight, bias = draw(3, 6), draw(3, 6), draw(6), draw(6)
    with kernels.backend("cuda"):
        cases.check_gradients(kernels.geglu, x)
        cases.check_gradients(kernels.layer_norm, x, weight, bias)
        cases.check_gradients(kernels.add_layer_norm, x, residual, weight, bias)
    x.requires_grad_()
    for op in (kernels.geglu, kernels.layer_norm):
        second = []
        for name in ("cuda", "reference"):
            with kernels.backend(name):
                (dx,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
                second.append(torch.autograd.grad(dx.square().sum(), x)[0])
        torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4)


def test_ops_compile_without_break_for_any_batch(backend: str) -> None:
    weight, bias = draw(24), draw(24)
    cases.check_compiles(kernels.geglu, lambda n: (draw(n, 5, 24),), backend)
    cases.check_compiles(kernels.layer_norm, lambda n: (draw(n, 5, 24), weight, bias), backend)
    cases.check_compiles(
        kernels.add_layer_norm, lambda n: (draw(n, 5, 24), draw(n, 5, 24), weight, bias), backend
    )


def test_tensors_elsewhere_and_doubles_are_objected_to(backend: str) -> None:
    """A kernel that reads an address of another device would kill the process."""
    x, elsewhere = draw(2, 6), torch.empty(6, device="meta")

    def why_not(op: str, *args: Any) -> str:
        return str(kernels.OPS[op].backends["cuda"].why_not(*args))

    assert why_not("layer_norm", x, None, None, 1e-5) == "None"
    assert "bias must be on the device of x" in why_not("layer_norm", x, None, elsewhere, 1e-5)
    assert "residual must be on" in why_not("add_layer_norm", x, elsewhere, None, None, 1e-5)
    seeds, step = torch.arange(2), torch.empty((), dtype=torch.int64, device="meta")
    assert "step must be on the device" in why_not("philox_normal", seeds, (3,), step, 0, 0)
    for op in (kernels.geglu, kernels.layer_norm):
        with kernels.backend("cuda"), pytest.raises(kernels.BackendError, match="got float64"):
            op(x.double())


def test_a_failed_launch_is_an_error_with_the_shape(backend: str) -> None:
    x = draw(2, 6)
    with pytest.raises(RuntimeError, match=r"geglu: dtype must be .* \(x: float32 \(2, 6\) on"):
        _cuda.launch("geglu", x, 3, x.data_ptr(), x.data_ptr(), 2, 3, 6)
    with pytest.raises(RuntimeError, match=r"geglu: .*invalid.* \(x: float32 \(2, 6\) on"):
        _cuda.launch("geglu", x, 0, x.data_ptr(), x.data_ptr(), 2**42, 3, 6)
