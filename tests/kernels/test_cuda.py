"""The CUDA kernels in the parity cases, run on a GPU or else under the host emulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from fastdiff import kernels
from fastdiff.kernels import choose, compiled, cuda
from fastdiff.kernels.cuda import library
from fastdiff.kernels.group_norm_silu import cuda as group_norm_cuda
from tests import cuda_host
from tests.kernels import cases

pytestmark = cases.needs_cuda
NORMS = {
    "group_norm_silu": cases.GROUP_NORM_SILU,
    "add_group_norm_silu": cases.ADD_GROUP_NORM_SILU,
}


def rows(ops: dict[str, list[cases.Case]]) -> list[object]:
    """(op, case) for parametrize."""
    return [pytest.param(op, case, id=f"{op}-{case}") for op in ops for case in ops[op]]


def rows_in_turn(ops: dict[str, list[cases.Case]], first: int) -> list[object]:
    """(op, case, dtype) for parametrize."""
    return [
        pytest.param(op, case, dtype, id=f"{op}-{case}-{dtype}")
        for op in ops
        for case, dtype in cases.in_turn(ops[op], first)
    ]


@contextmanager
def in_parts() -> Iterator[None]:
    """Run norms as if blocks had no shared memory to keep a group in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_norm_cuda, "ON_CHIP", 0)
        yield


needs_clusters = cases.needs_clusters
CLUSTERS = dict(zip(cases.DTYPES, (2, 8, 4), strict=True))
"""Blocks per cluster: a different size for each dtype, and so for each order of the threads."""


@contextmanager
def in_clusters(blocks: int) -> Iterator[None]:
    """Run norms on chip in clusters of this many blocks; where that is impossible, raise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_norm_cuda, "CLUSTER", blocks)
        yield


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), rows(NORMS))
def test_parity(op: str, case: cases.Case, dtype: torch.dtype) -> None:
    cases.check(op, case, dtype, "cuda")


@pytest.mark.parametrize(("op", "case", "dtype"), rows_in_turn(NORMS, 0))
def test_parity_of_norms_in_parts(op: str, case: cases.Case, dtype: torch.dtype) -> None:
    with in_parts():
        cases.check(op, case, dtype, "cuda")


@needs_clusters
@pytest.mark.parametrize(("op", "case", "dtype"), rows_in_turn(NORMS, 1))
def test_parity_of_norms_in_clusters(op: str, case: cases.Case, dtype: torch.dtype) -> None:
    with in_clusters(CLUSTERS[dtype]):
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


@needs_clusters
@pytest.mark.parametrize("size", [6, 7, 10, 14, 20, 21, 28, 30, 35, 40, 60, 80])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_parity_in_clusters_at_every_group_size(size: int, layout: str) -> None:
    view = cases.channels_last if layout == "NHWC" else (lambda x: x)
    case = cases.norm_case("size", "channels a group", (2, 4 * size, 5, 6), 4, layout=view)
    for dtype in cases.DTYPES:
        with in_clusters(CLUSTERS[dtype]):
            cases.check("group_norm_silu", case, dtype, "cuda")


@needs_clusters
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("blocks", [2, 8, 16])
def test_parity_in_clusters_of_ragged_stretches(layout: str, blocks: int) -> None:
    view = cases.channels_last if layout == "NHWC" else (lambda x: x)
    options = {"layout": view, "film": True, "add": "channel residual"}
    few = cases.norm_case("few", "some ranks get no positions", (2, 24, 3, 3), 3, **options)
    slabs = cases.norm_case("slabs", "the last slab is narrow", (1, 2304, 3, 5), 72, **options)
    rest = cases.norm_case("rest", "4087 positions: an odd rest", (1, 16, 67, 61), 2, **options)
    large = cases.norm_case(
        "large", "a mean of 100 over many parts", (1, 16, 40, 40), 2, mean=100, std=0.01, **options
    )
    for case in (few, slabs, rest, large):
        dtype = {2: torch.float32, 8: torch.bfloat16, 16: torch.float16}[blocks]
        with in_clusters(blocks):
            cases.check("add_group_norm_silu", case, dtype, "cuda")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_first_number_of_a_group_may_be_far_from_the_others(layout: str) -> None:
    """As the pivot of all 16,384 numbers it would make 1 / std wrong by 1e-5 of its value."""
    x = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = 1e4
    x = x.to(cases.device_of("cuda"))
    if layout == "NHWC":
        x = cases.channels_last(x)
    expected = torch.nn.functional.group_norm(x.double(), 1)[:, 0, 0, 0]

    def result() -> torch.Tensor:
        y = run_cuda(lambda: kernels.group_norm_silu(x, 1, activation="none"))
        return y.double()[:, 0, 0, 0]

    torch.testing.assert_close(result(), expected, rtol=1e-6, atol=0)
    with in_parts():
        torch.testing.assert_close(result(), expected, rtol=1e-6, atol=0)


@needs_clusters
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_parity_where_the_plan_asks_for_clusters(layout: str) -> None:
    view = cases.channels_last if layout == "NHWC" else (lambda x: x)
    case = cases.norm_case("planned", "128 KiB a slab", (2, 32, 32, 32), 1, layout=view)
    if not torch.cuda.is_available():
        how = plan(2, 32, 32 * 32, 1, last=layout == "NHWC", dtype=torch.float32, cluster=16)
        assert (how.on_chip, how.cluster) == (1, 16)
    cases.check("group_norm_silu", case, torch.float32, "cuda")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_norm_parity_at_drawn_shapes(data: st.DataObject) -> None:
    n, groups, size, h, w = (data.draw(st.integers(1, top)) for top in (3, 9, 5, 7, 7))
    # the largest error of a few numbers is chance, and dweight has only C of them
    assume(n * groups * size * h * w >= 100 and groups * size >= 20)
    layout = data.draw(st.sampled_from([lambda x: x, cases.channels_last, lambda x: x.mT]))
    options = {"film": data.draw(st.booleans()), "affine": data.draw(st.booleans())}
    case = cases.norm_case(
        "drawn", "any shape", (n, groups * size, h, w), groups, layout=layout, **options
    )
    cluster = None if needs_clusters.args[0] else data.draw(st.sampled_from([None, 2, 4, 8, 16]))
    with nullcontext() if cluster is None else in_clusters(cluster):
        cases.check("group_norm_silu", case, data.draw(st.sampled_from(cases.DTYPES)), "cuda")


def run_cuda(call: Callable[[], Any]) -> Any:
    """Run the call on backend "cuda", which is emulated if there is no GPU."""
    if torch.cuda.is_available():
        with kernels.backend("cuda"):
            return call()
    with cuda_host.emulated(), kernels.backend("cuda"):
        return call()


@pytest.mark.parametrize("cluster", [None, pytest.param(4, marks=needs_clusters)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sample_does_not_depend_on_its_batch(
    layout: torch.memory_format, cluster: int | None
) -> None:
    x, dy = (torch.randn(5, 32, 9, 9, device=cases.device_of("cuda")) for _ in range(2))

    def result(samples: slice) -> tuple[torch.Tensor, ...]:
        leaf = x[samples].contiguous(memory_format=layout).requires_grad_()
        y = run_cuda(lambda: kernels.group_norm_silu(leaf, 8))
        assert y.is_contiguous(memory_format=layout)
        return y.detach(), *run_cuda(lambda: torch.autograd.grad(y, leaf, dy[samples]))

    with nullcontext() if cluster is None else in_clusters(cluster):
        together = result(slice(None))
        for i in range(5):
            alone = result(slice(i, i + 1))
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@needs_clusters
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_order_of_threads_and_blocks_does_not_change_a_bit(
    layout: torch.memory_format,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU's order cannot be set")
    x = torch.randn(2, 24, 9, 7).contiguous(memory_format=layout)
    results = []
    for order in cuda_host.ORDERS:
        with in_clusters(8), cuda_host.emulated(order), kernels.backend("cuda"):
            results.append(kernels.group_norm_silu(x, 3))
    assert all(torch.equal(results[0], other) for other in results)


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


def test_tensors_must_share_a_device() -> None:
    x, weight = torch.zeros(2, 8, 4, device=cases.device_of("cuda")), torch.zeros(8, device="meta")
    with pytest.raises(kernels.BackendError, match=r"weight must be on .* got meta"):
        run_cuda(lambda: kernels.group_norm_silu(x, 4, weight))
    with pytest.raises(kernels.BackendError, match="channel_add must be on"):
        run_cuda(lambda: kernels.add_group_norm_silu(x, 4, channel_add=weight))


def test_a_parameter_of_an_unknown_dtype_is_named() -> None:
    x = torch.zeros(2, 8, 4, device=cases.device_of("cuda"))
    with pytest.raises(ValueError, match=r"one of float32, float16, bfloat16, float64, got .*int8"):
        run_cuda(lambda: kernels.group_norm_silu(x, 4, torch.zeros(8, device=x.device).char()))


def test_a_gpu_that_the_kernels_do_not_fit_is_an_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    message = b"no kernel image is available for execution on the device"
    native = SimpleNamespace(build=lambda: {"cuda_architectures": "8.0;9.0a"})
    monkeypatch.setattr(compiled, "native", native)
    monkeypatch.setattr(library, "function", lambda name: {"usable": lambda device: message}[name])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a future GPU")
    library._refusal.cache_clear()
    try:
        with FakeTensorMode(), cuda_host.emulated():
            x = torch.empty(2, 8, 4, device="cuda:0")
            given = choose.bound_arguments("group_norm_silu", (x, 4), {})
            reason = str(choose.objection(kernels.OPS["group_norm_silu"], "cuda", given))
    finally:
        library._refusal.cache_clear()
    assert "on cuda:0 (a future GPU): no kernel image" in reason
    assert "8.0;9.0a" in reason


def test_a_module_older_than_its_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_library", object())
    monkeypatch.setattr(library, "_functions", {})
    monkeypatch.setattr(compiled, "stale", lambda: True)
    with pytest.raises(RuntimeError, match="run 'make build'"):
        library.function("group_norm_silu")


def test_without_kernels_the_backend_is_missing() -> None:
    if cuda.built():
        pytest.skip("the compiled module has CUDA kernels")
    assert kernels.available()["group_norm_silu"]["cuda"] is not None
    with pytest.raises(RuntimeError, match="without CUDA kernels"):
        library.function("group_norm_silu")


@dataclass(frozen=True)
class Plan:
    """The fields of NormPlan in csrc/cuda/norm_plan.h."""

    on_chip: int
    vector: int
    slab: int
    threads: int
    shared: int
    chunks: int
    length: int
    columns: int
    workspace: int
    cluster: int


KIB = 1024
PLANS = ("group_norm_plan", "group_norm_backward_plan")
SM_80 = {"limit": 163 * KIB, "cluster": 1}
SM_90 = {"limit": 227 * KIB, "cluster": 16}
SM_120 = {"limit": 99 * KIB, "cluster": 8}


def plan(
    n: int,
    c: int,
    s: int,
    groups: int,
    *,
    last: bool,
    limit: int = 227 * KIB,
    cluster: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "group_norm_plan",
) -> Plan:
    sizes = (name, 0, cuda.DTYPES[dtype], last, n, c, s, groups, True, limit, cluster, False)
    return Plan(*run_cuda(lambda: group_norm_cuda.cuda_plan(*sizes)))


def way(c: int, side: int, device: dict[str, int], *, last: bool = True, name: str = "") -> int:
    """The number of blocks that share a slab on chip; 0 if the norm runs in parts."""
    found = plan(2, c, side * side, 32, last=last, name=name or PLANS[0], **device)
    return found.cluster if found.on_chip else 0


@pytest.mark.parametrize(
    ("name", "c", "side", "sm_80", "sm_90"),
    [
        ("SD 1.5 in", 320, 64, 0, 16),
        ("SD 1.5 up", 640, 64, 0, 8),
        ("SD 1.5 up, widest at 64", 960, 64, 0, 16),
        ("SD 1.5 down", 640, 32, 1, 8),
        ("SD 1.5 up, widest at 32", 1920, 32, 0, 8),
        ("SD 1.5 down", 1280, 16, 1, 8),
        ("SD 1.5 up, widest at 16", 2560, 16, 1, 4),
        ("SD 1.5 middle", 1280, 8, 1, 8),
        ("SDXL in", 320, 128, 0, 16),
        ("SDXL up", 640, 128, 0, 16),
        ("SDXL up, widest at 128", 960, 128, 0, 0),
        ("SDXL middle", 1280, 32, 1, 8),
        ("VAE middle", 512, 64, 1, 8),
        ("VAE up", 512, 128, 0, 16),
        ("VAE up", 512, 256, 0, 0),
        ("VAE out", 128, 512, 0, 0),
        ("ADM-256 in", 256, 256, 0, 0),
        ("ADM-256", 256, 128, 0, 16),
        ("ADM-256", 512, 64, 1, 8),
        ("ADM-256 middle", 1024, 8, 1, 8),
    ],
)
def test_plans_of_norms_in_the_presets(
    name: str, c: int, side: int, sm_80: int, sm_90: int
) -> None:
    assert (way(c, side, SM_80), way(c, side, SM_90)) == (sm_80, sm_90), name


@pytest.mark.parametrize(
    ("c", "side"),
    [
        *((c, 64) for c in (320, 512, 640, 960, 1280, 1920)),
        *((c, 32) for c in (320, 640, 960, 1280, 1920, 2560)),
        *((c, 16) for c in (640, 1280, 1920, 2560)),
        *((c, 8) for c in (1280, 2560)),
        *((c, 128) for c in (320, 512, 640, 960)),
        *((c, 256) for c in (256, 512)),
        *((c, 512) for c in (128, 256)),
    ],
)
def test_one_sample_fills_an_h200(c: int, side: int) -> None:
    """Every norm of SD 1.5, SDXL and KL-f8 in bf16."""
    found = plan(1, c, side * side, 32, last=True, **SM_90)
    slabs = -(-32 // found.slab) if found.on_chip else -(-c // found.columns)
    assert slabs * (found.cluster if found.on_chip else found.chunks) >= 128


def test_plans_keep_to_the_device() -> None:
    shapes = [(c, side) for c in (128, 256, 320, 640, 960, 1280) for side in (8, 32, 64, 128, 512)]
    shapes += [(7, 3), (97, 100), (33000, 4)]
    devices = (SM_80, SM_90, SM_120, {"limit": 48 * KIB, "cluster": 1})
    for (c, side), device, last, name in product(shapes, devices, (False, True), PLANS):
        groups = 32 if c % 32 == 0 else 1
        found = plan(1, c, side * side, groups, last=last, name=name, **device)
        assert found.cluster <= device["cluster"]
        assert found.shared <= device["limit"]
        assert found.threads <= (256 if found.cluster > 1 else 512)
        packs = side * side * (1 if last else c // groups // found.vector)
        assert not found.on_chip or found.cluster * found.length >= packs


def test_plans_of_norm_gradients_in_the_presets() -> None:
    """x and dy need twice the shared memory of the forward pass."""
    name = "group_norm_backward_plan"
    shapes = [(320, 64), (640, 32), (1280, 16), (1280, 8), (128, 512)]
    ways = [[way(*shape, device, name=name) for shape in shapes] for device in (SM_80, SM_90)]
    assert ways == [[0, 0, 1, 1, 0], [16, 8, 8, 8, 0]]
    assert way(320, 64, SM_90, name=name, last=False) == 0


def test_norms_in_channel_order_keep_a_group_alone_on_chip() -> None:
    assert way(320, 64, SM_80, last=False) == 1  # 80 KiB
    assert way(320, 64, SM_90, last=False) == 4
    assert way(128, 512, SM_90, last=False) == 16  # 2 MiB
    assert way(256, 512, SM_90, last=False) == 0


def test_without_room_for_a_cluster_the_plan_takes_a_smaller_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("the room of a GPU cannot be set")
    set_clusters = cuda_host.library().emulation_set_clusters
    bf16 = cuda.DTYPES[torch.bfloat16]
    sizes = ("group_norm_plan", 0, bf16, 1, 2, 320, 64 * 64, 32, 1, 227 * KIB, 0)
    found = []
    try:
        for limit, room in ((16, 16), (8, 8), (16, 4), (16, 1), (1, 1)):
            set_clusters(limit, room)
            group_norm_cuda.cuda_plan.cache_clear()
            found.append(Plan(*run_cuda(lambda: group_norm_cuda.cuda_plan(*sizes, 0))))
        with pytest.raises(RuntimeError, match="cannot keep a group on chip"):
            run_cuda(lambda: group_norm_cuda.cuda_plan(*sizes[:-1], 8, 1))
    finally:
        set_clusters(16, 16)
        group_norm_cuda.cuda_plan.cache_clear()
    assert [(p.on_chip, p.cluster) for p in found] == [(1, 16), (1, 8), (1, 4), (0, 1), (0, 1)]


def test_a_cluster_that_does_not_fit_is_an_error() -> None:
    with in_clusters(2), pytest.raises(RuntimeError, match="cannot keep a group on chip"):
        run_cuda(
            lambda: kernels.group_norm_silu(
                torch.zeros(1, 64, 256, 256, device=cases.device_of("cuda")), 1
            )
        )


def test_plans_depend_on_one_sample_only() -> None:
    for last, limits, name in product((False, True), ({"limit": 0}, SM_80, SM_90), PLANS):
        one = plan(1, 320, 64 * 64, 32, last=last, name=name, **limits)
        many = plan(16, 320, 64 * 64, 32, last=last, name=name, **limits)
        assert replace(many, workspace=0) == replace(one, workspace=0)
