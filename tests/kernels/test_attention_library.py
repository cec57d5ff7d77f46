"""attention on the "library" backend, that is, PyTorch's own kernels.

On a CPU, `auto` never selects this backend, so these tests select it by name.
"""

from __future__ import annotations

import pytest
import torch

from fastdiff import kernels
from fastdiff.kernels import attention, backend
from fastdiff.kernels import choose as choosing
from fastdiff.kernels.attention import _unmeasured, library
from fastdiff.kernels.tuning import configs
from tests.kernels import cases

HALF = (torch.float16, torch.bfloat16)
OP = kernels.OPS["attention"]


def serves(case: cases.Case) -> bool:
    args, kwargs = case.inputs(torch.bfloat16, "cpu")
    with backend("library"):
        return kernels.explain("attention", *args, **kwargs).reasons["library"] is None


SERVED = [case for case in cases.ATTENTION if serves(case)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_parity(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check_case("attention", case, dtype, "library")


def test_most_shapes_of_networks_are_served() -> None:
    names = {case.name for case in SERVED}
    assert {"sd-40-text", "turned-round"} <= names
    assert "extra-mask" not in names


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask": torch.ones(5, 6, dtype=torch.bool)}, "it supports no mask or extra keys"),
        ({"extra": True}, "got extra_k"),
        ({"dim": 12}, "multiples of 8 up to 256, got 12"),
        ({"dim": 264}, "multiples of 8 up to 256, got 264"),
        ({"dtype": torch.float32}, "it supports float16, bfloat16, got float32"),
    ],
    ids=["mask", "extra keys", "odd head dim", "wide head dim", "fp32"],
)
def test_unsupported_arguments_are_named(change: dict, reason: str) -> None:
    dtype, dim = change.get("dtype", torch.bfloat16), change.get("dim", 16)
    q, k = torch.randn(1, 5, 2, dim, dtype=dtype), torch.randn(1, 6, 2, dim, dtype=dtype)
    more = {"mask": change["mask"]} if "mask" in change else {}
    if "extra" in change:
        more = {"extra_k": k, "extra_v": k}
    with backend("library"), pytest.raises(kernels.BackendError, match=reason):
        attention(q, k, k, **more)


def test_autocast_leaves_the_dtype_alone() -> None:
    q, k = torch.randn(1, 5, 2, 16, dtype=torch.float16), torch.randn(1, 6, 2, 16).half()
    with backend("library"):
        expected = attention(q, k, k)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attention(q, k, k), expected)


def test_a_graph_holds_the_op_and_its_gradient() -> None:
    inputs = [torch.randn(2, 9, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def loss(*qkv: torch.Tensor) -> torch.Tensor:
        return attention(*qkv).float().square().sum()

    with backend("library"):
        expected = torch.autograd.grad(loss(*inputs), inputs)
        with kernels.record_backends() as ran:
            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
            found = torch.autograd.grad(compiled(*inputs), inputs)
    assert ran["attention"] == {"library"}
    torch.testing.assert_close(found, expected)


@pytest.fixture
def _candidate_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `auto` select it on the CPU, ahead of the CPU kernels."""
    monkeypatch.setitem(choosing.DEVICES, "library", ("cpu",))
    OP.candidates.clear()
    yield
    OP.candidates.clear()


@pytest.mark.usefixtures("_candidate_on_the_cpu")
def test_auto_selects_it_only_without_gradients() -> None:
    q = torch.randn(1, 9, 2, 16, dtype=torch.bfloat16)
    with kernels.record_backends() as ran:
        attention(q, q, q)
    assert ran["attention"] == {"library"}
    wanted = q.clone().requires_grad_()
    with kernels.record_backends() as ran:
        attention(wanted, wanted, wanted)
    assert "library" not in ran["attention"]  # its backward pass would rerun the forward pass


@pytest.mark.parametrize(
    ("architecture", "dim", "first"),
    [
        ("sm_90", 40, "triton"),
        ("sm_90", 64, "library"),
        ("sm_90", 128, "library"),
        ("sm_90", 160, "triton"),
        ("sm_80", 64, None),
    ],
)
def test_what_comes_first_on_a_gpu_that_was_not_measured(
    architecture: str, dim: int, first: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = configs.Gpu(name="", architecture=architecture)
    monkeypatch.setitem(_unmeasured.__globals__, "gpu_of", lambda device: gpu)
    q = torch.empty(1, 9, 2, dim, dtype=torch.bfloat16)
    assert _unmeasured(q, q, q) == first


def test_flash_attention_comes_first_once_it_is_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(library, "sdpa_kernel", lambda kinds, set_priority: asked.append(kinds))
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    library._fused(type("OnAGpu", (), {"is_cuda": True})())
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    library._fused(type("OnAGpu", (), {"is_cuda": True})())
    assert [kinds[0].name for kinds in asked] == ["FLASH_ATTENTION", "CUDNN_ATTENTION"]
