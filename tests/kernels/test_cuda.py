"""The CUDA kernels in the cases of all backends: on a GPU, else under the host emulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiff import kernels
from fastdiff.kernels import _cuda, _group_norm_cuda
from tests import cuda_host
from tests.kernels import cases

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and bool(cuda_host.needs_compiler.args[0]),
    reason="neither a GPU nor g++ for the emulation",
)
NORMS = {
    "group_norm_silu": cases.GROUP_NORM_SILU,
    "add_group_norm_silu": cases.ADD_GROUP_NORM_SILU,
}


def rows(ops: dict[str, list[cases.Case]]) -> list[object]:
    """(op, case) for parametrize."""
    return [pytest.param(op, case, id=f"{op}-{case}") for op in ops for case in ops[op]]


@contextmanager
def in_parts() -> Iterator[None]:
    """The norms as if a block had no shared memory to keep a group in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_group_norm_cuda, "ON_CHIP", 0)
        yield


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), rows(NORMS))
def test_parity(op: str, case: cases.Case, dtype: torch.dtype) -> None:
    cases.check(op, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), rows(NORMS))
def test_parity_of_norms_in_parts(op: str, case: cases.Case, dtype: torch.dtype) -> None:
    with in_parts():
        cases.check(op, case, dtype, "cuda")


@pytest.mark.parametrize("size", [6, 7, 10, 14, 20, 21, 28, 30, 35, 40, 60, 80])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_parity_at_every_group_size_of_the_presets(size: int, layout: str) -> None:
    view = cases.channels_last if layout == "NHWC" else (lambda x: x)
    case = cases.norm_case("size", "channels a group", (2, 4 * size, 5, 6), 4, layout=view)
    for dtype in cases.DTYPES:
        cases.check("group_norm_silu", case, dtype, "cuda")
        with in_parts():
            cases.check("group_norm_silu", case, dtype, "cuda")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_parity_with_many_chunks_and_column_blocks(layout: str) -> None:
    view = cases.channels_last if layout == "NHWC" else (lambda x: x)
    wide = cases.norm_case("wide", "two blocks of columns", (1, 2304, 3, 5), 32, layout=view)
    tall = cases.norm_case("tall", "chunks, the last one short", (2, 24, 67, 61), 3, layout=view)
    with in_parts():
        for case in (wide, tall):
            cases.check("group_norm_silu", case, torch.bfloat16, "cuda")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_norm_parity_at_drawn_shapes(data: st.DataObject) -> None:
    n, groups, size, h, w = (data.draw(st.integers(1, top)) for top in (3, 9, 5, 7, 7))
    # the largest error of a handful is luck, of dweight's C numbers too
    assume(n * groups * size * h * w >= 100 and groups * size >= 20)
    layout = data.draw(st.sampled_from([lambda x: x, cases.channels_last, lambda x: x.mT]))
    options = {"film": data.draw(st.booleans()), "affine": data.draw(st.booleans())}
    case = cases.norm_case(
        "drawn", "any shape", (n, groups * size, h, w), groups, layout=layout, **options
    )
    cases.check("group_norm_silu", case, data.draw(st.sampled_from(cases.DTYPES)), "cuda")


def run_cuda(call: object) -> torch.Tensor:
    """The call on the backend "cuda", emulated without a GPU."""
    if torch.cuda.is_available():
        with kernels.backend("cuda"):
            return call()  # type: ignore[operator]
    with cuda_host.emulated(), kernels.backend("cuda"):
        return call()  # type: ignore[operator]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sample_does_not_depend_on_its_batch(layout: torch.memory_format) -> None:
    x = torch.randn(5, 32, 9, 9, device=cases.device_of("cuda"))
    x = x.contiguous(memory_format=layout)
    together = run_cuda(lambda: kernels.group_norm_silu(x, 8))
    assert together.is_contiguous(memory_format=layout)
    for i in range(5):
        part = x[i : i + 1].contiguous(memory_format=layout)
        alone = run_cuda(lambda part=part: kernels.group_norm_silu(part, 8))
        assert torch.equal(together[i : i + 1], alone)


def test_unaligned_views_are_served() -> None:
    numbers = torch.randn(2 * 16 * 64 + 1, device=cases.device_of("cuda"))
    x = numbers[1:].view(2, 16, 8, 8)
    assert x.data_ptr() % 16
    y = run_cuda(lambda: kernels.group_norm_silu(x, 4))
    torch.testing.assert_close(y, run_cuda(lambda: kernels.group_norm_silu(x.clone(), 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_parameters_of_any_dtype(dtype: torch.dtype) -> None:
    device = cases.device_of("cuda")
    x = torch.randn(2, 8, 4, 4, device=device).bfloat16()
    weight, bias = torch.randn(2, 8, device=device).half().to(dtype).unbind()
    y = run_cuda(lambda: kernels.group_norm_silu(x, 4, weight, bias))
    assert torch.equal(
        y, run_cuda(lambda: kernels.group_norm_silu(x, 4, weight.float(), bias.float()))
    )


def test_fp64_goes_to_another_backend() -> None:
    with pytest.raises(kernels.BackendError, match="float16, bfloat16, got float64"):
        run_cuda(lambda: kernels.group_norm_silu(torch.zeros(2, 8, 4).double(), 4))


def test_without_kernels_the_backend_is_missing() -> None:
    if _cuda._library is not None:
        pytest.skip("the compiled module has CUDA kernels")
    assert "cuda" not in kernels.OPS["group_norm_silu"].implementations
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        _cuda.function("group_norm_silu")


def plan(n: int, c: int, s: int, groups: int, *, last: bool, limit: int = 227 * 1024) -> list[int]:
    import ctypes

    fields = (ctypes.c_int64 * 9)()
    sizes = (0, _cuda.DTYPES[torch.bfloat16], last, n, c, s, groups, True, limit)
    run_cuda(lambda: _cuda.function("group_norm_plan")(*sizes, ctypes.addressof(fields)))
    return list(fields)


def test_which_norms_of_the_presets_stay_on_chip() -> None:
    for c, s in ((640, 32 * 32), (1280, 16 * 16), (1280, 8 * 8), (2560, 8 * 8)):  # SD 1.5
        assert plan(2, c, s, 32, last=True)[0] == 1, (c, s)
    assert plan(2, 320, 64 * 64, 32, last=True)[0] == 0  # 40 channels of it take 320 KiB
    assert plan(1, 128, 512 * 512, 32, last=True)[0] == 0  # the VAE
    assert plan(2, 320, 64 * 64, 32, last=False)[0] == 1  # a group alone takes 80 KiB
    assert plan(2, 640, 32 * 32, 32, last=True, limit=48 * 1024)[0] == 0


def test_plans_depend_on_one_sample_only() -> None:
    for last in (False, True):
        for limit in (0, 227 * 1024):
            assert (
                plan(1, 320, 64 * 64, 32, last=last, limit=limit)[:8]
                == plan(16, 320, 64 * 64, 32, last=last, limit=limit)[:8]
            )
