"""attention's CUDA kernels, on a GPU or else under the host emulation, and their machine code."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import attention
from fastdiff.kernels import triton as _triton
from fastdiff.kernels.attention import cuda as attention_cuda
from fastdiff.kernels.attention.triton_backward import attention_backward
from fastdiff.kernels.attention.triton_tiles import room_for_sums
from tests import cuda_host
from tests.kernels import cases

needs_cuda = cases.needs_cuda
HALF = (torch.bfloat16, torch.float16)
ORDERS = ("a GPU",) if torch.cuda.is_available() else ("forward", "reverse", "shuffled")
UNSERVED = ("vae-512", "vae-512-tail", "ddpm-256", "cin-384", "odd", "dim-176", "dim-192",
            "dim-208", "dim-256", "all-alike", "turned-round")  # fmt: skip
"""Cases that no CUDA kernel supports."""
SERVED = [case for case in cases.ATTENTION if case.name not in UNSERVED]
EXACT = (40, 64, 80, 128, 160)


def fits_on_chip(case: cases.Case) -> bool:
    """Whether the keys stay on the chip: at most 160 of them, and no mask."""
    (_, k, _), options = case.inputs(torch.float16)
    extra = options.get("extra_k")
    count = k.shape[1] + (0 if extra is None else extra.shape[1])
    return count <= 160 and "mask" not in options


@contextmanager
def keys_on_chip(count: int) -> Iterator[None]:
    before = attention_cuda.ON_CHIP
    attention_cuda.ON_CHIP = count
    try:
        yield
    finally:
        attention_cuda.ON_CHIP = before


@contextmanager
def cuda(order: str = "forward") -> Iterator[None]:
    """Run on backend "cuda", which is emulated if there is no GPU."""
    if torch.cuda.is_available():
        with kernels.backend("cuda"):
            yield
    else:
        with cuda_host.emulated(order), kernels.backend("cuda"):
            yield


def check(case: cases.Case, dtype: torch.dtype, order: str) -> None:
    """`cases.check` with a given order of the threads."""
    if torch.cuda.is_available():
        cases.check("attention", case, dtype, "cuda")
    else:
        with cuda_host.emulated(order):
            cases.check_case("attention", case, dtype, "cuda")


def in_turn(rows: list[cases.Case]) -> list[tuple[cases.Case, torch.dtype, str]]:
    """(case, dtype, order): every case in both dtypes, with the thread orders in rotation."""
    pairs = [(case, dtype) for case in rows for dtype in HALF]
    return [(*pair, ORDERS[index % len(ORDERS)]) for index, pair in enumerate(pairs)]


@needs_cuda
@pytest.mark.parametrize(("case", "dtype", "order"), in_turn(SERVED), ids=str)
def test_parity(case: cases.Case, dtype: torch.dtype, order: str) -> None:
    check(case, dtype, order)


@needs_cuda
@pytest.mark.parametrize(
    ("case", "dtype", "order"), in_turn(list(filter(fits_on_chip, SERVED))), ids=str
)
def test_parity_of_streamed_keys(case: cases.Case, dtype: torch.dtype, order: str) -> None:
    with keys_on_chip(0):
        check(case, dtype, order)


@needs_cuda
@pytest.mark.parametrize("keys", [1, 31, 65, 77, 154, 161, 200])
@pytest.mark.parametrize("d", EXACT)
def test_parity_at_exact_head_dims(d: int, keys: int) -> None:
    """The last tiles of queries and keys are partial, in both kernels."""
    for length, dtype, order in ((130, HALF[0], "reverse"), (17, HALF[1], "shuffled")):
        case = cases.attention_case("exact", "ragged tiles", (1, length, keys, 2, d), packed=False)
        check(case, dtype, order)
        with keys_on_chip(0):
            check(case, dtype, order)


@needs_cuda
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_at_drawn_shapes(data: st.DataObject) -> None:
    d = 8 * data.draw(st.integers(1, 20))
    shape = (*(data.draw(st.integers(1, top)) for top in (2, 140, 140, 3)), d)
    # the largest error of a few numbers is chance
    assume(shape[0] * shape[1] * shape[3] * shape[4] >= 100)
    mask = data.draw(st.sampled_from([None, None, cases.additive, cases.padding]))
    extra = data.draw(st.sampled_from([0, 0, 3, 70]))
    case = cases.attention_case("drawn", "any shape", shape, mask=mask, extra=extra)
    with keys_on_chip(data.draw(st.sampled_from([0, 160]))):
        check(case, data.draw(st.sampled_from(HALF)), data.draw(st.sampled_from(list(ORDERS))))


def grown(draw: cases.Draw, keys: int, where: list[int], length: int = 20) -> cases.Inputs:
    """Inputs whose scores peak at the keys in `where`, each peak higher than the one before it in
    the list."""
    q, k, v = (draw(1, s, 1, 40) for s in (length, keys, keys))
    for height, place in enumerate(where):
        k[:, place] = q.mean(1) * (4.0 + 2.0 * height)
    return (q, k, v), {}


@needs_cuda
@pytest.mark.parametrize("where", [[3, 70, 135, 199], [199, 135, 70, 3], [64], [63]], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_parity_where_the_largest_score_moves_from_tile_to_tile(
    where: list[int], dtype: torch.dtype
) -> None:
    case = cases.Case("grown", "the sum is rescaled", lambda draw: grown(draw, 200, where))
    check(case, dtype, "shuffled again")


@needs_cuda
def test_parity_near_overflow_of_fp16() -> None:
    """Products above 3e4, and sums of values near 65504."""

    def build(draw: cases.Draw) -> cases.Inputs:
        q, k = draw(1, 33, 2, 40, std=60.0), draw(1, 100, 2, 40, std=60.0)
        return (q, k, draw(1, 100, 2, 40, mean=6e4, std=2e3).clamp(max=65504)), {}

    for on_chip in (0, 160):
        with keys_on_chip(on_chip):
            check(cases.Case("overflow", "3e4", build), torch.float16, "shuffled")


def packed(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    n, length, heads, d = shape
    qkv = torch.randn(n, length, 3, heads, d, device=cases.device_of("cuda"), dtype=dtype)
    return qkv.unbind(2)


def log_sum(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The base-2 log-sum-exp of the scores, (1, N, H, L), in fp64."""
    scores = scale * torch.einsum("nlhd,nshd->nhls", q.double(), k.double())
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.logsumexp(scores, -1)[None] * math.log2(math.e)


def with_sums(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output, and the sums in the layout of Triton's backward pass."""
    out, statistics = attention_cuda.forward(*arguments, True)
    assert statistics is not None
    return out, room_for_sums(arguments[0], arguments[5], statistics)


@needs_cuda
@pytest.mark.parametrize("on_chip", [0, 160])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_log_sum_exp(dtype: torch.dtype, on_chip: int) -> None:
    q, k, v = packed(2, 77, 3, 40, dtype=dtype)
    mask = torch.ones(2, 1, 77, 77, dtype=torch.bool, device=q.device).tril()
    mask[1, :, 5] = False
    with cuda("reverse"), keys_on_chip(on_chip):
        for scale in (40**-0.5, 2.5):
            lse = with_sums(q, k, v, None, None, None, scale)[1]
            # a score is a sum of 40 fp32 numbers, each up to the size of the largest score
            torch.testing.assert_close(lse.double(), log_sum(q, k, scale), rtol=2e-6, atol=1e-5)
        out, lse = with_sums(q, k, v, None, None, mask, 0.2)
    seen = log_sum(q, k, 0.2, mask)[:, 0]
    torch.testing.assert_close(lse.double()[:, 0], seen, rtol=2e-6, atol=1e-5)
    assert bool((lse[0, 1, :, 5] == math.inf).all())
    assert bool((out[1, 5] == 0).all())


@needs_cuda
def test_log_sum_exp_under_an_added_mask_is_in_two_numbers() -> None:
    """Added to -3e38 in one number, the log of the sum would lose every digit."""
    q, k, v = packed(2, 20, 2, 40)
    mask = torch.randn(20, 20, device=q.device)
    mask[2], mask[3] = -2e38, -math.inf
    with cuda():
        lse = with_sums(q, k, v, None, None, mask, 0.2)[1].double()
    scores = 0.2 * torch.einsum("nlhd,nshd->nhls", q.double(), k.double()) + mask.double()
    rows = [i for i in range(20) if i not in (2, 3)]
    expected = torch.logsumexp(scores, -1) * math.log2(math.e)
    torch.testing.assert_close(lse.sum(0)[:, :, rows], expected[:, :, rows], rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(lse[0, :, :, 2], torch.full_like(lse[0, :, :, 2], math.log2(20)))
    assert bool((lse[0, :, :, 3] == math.inf).all())
    assert bool((lse[1, :, :, 3] == 0).all())


@needs_cuda
@pytest.mark.parametrize("masked", ["no mask", "bool", "added"])
def test_triton_can_go_on_from_the_log_sum_exp(masked: str) -> None:
    """Triton's backward pass, after this forward pass, gives the same gradients."""
    if not torch.cuda.is_available() and not _triton.INTERPRETED:
        pytest.skip("Triton kernels need a GPU, or triton and TRITON_INTERPRET=1")
    q, k, v = packed(2, 33, 2, 40)
    text = torch.randn(2, 2, 5, 2, 40, device=q.device).to(q.dtype).unbind()
    dout = torch.randn_like(q)
    mask = None if masked == "no mask" else torch.randn(2, 1, 33, 38, device=q.device)
    if mask is not None:
        mask[:, :, 4] = -1e38
        mask = mask if masked == "added" else mask > -1
    with cuda():
        out, lse = with_sums(q, k, v, *text, mask, 0.2)
    expected = attention_cuda.gradients_written_out(dout, q, k, v, *text, mask, lse, 0.2)
    found = attention_backward(dout, q, k, v, *text, mask, out, lse, 0.2, masked == "added")
    for have, want in zip(found, expected, strict=True):
        if want is not None:
            torch.testing.assert_close(have.float(), want.float(), rtol=2e-2, atol=2e-2)


@needs_cuda
def test_zeros_where_nothing_is_seen() -> None:
    q, k, v = packed(2, 20, 2, 64)
    for kind in (torch.bool, torch.float32, torch.bfloat16):
        mask = torch.ones(2, 1, 20, 20, dtype=torch.bool, device=q.device)
        mask[1, :, 3] = False
        added = mask if kind == torch.bool else mask.float().log().to(kind)
        with cuda():
            out = attention(q, k, v, mask=added)
            smallest = attention(q, k, v, mask=torch.full_like(mask, -1e38, dtype=torch.float32))
        assert bool((out[1, 3] == 0).all())
        assert out[1, 2].abs().min() > 0
        want = v.float().mean(1, keepdim=True).expand_as(v)
        torch.testing.assert_close(smallest.float(), want, rtol=2e-2, atol=2e-3)


@needs_cuda
def test_packed_rows_are_read_where_they_are() -> None:
    q = packed(2, 40, 2, 40)[0]
    for x in (q, q[:, ::2], q.transpose(1, 2).contiguous().transpose(1, 2), q[:, :1, :, ::]):
        assert attention_cuda._in_place_or_copied(x) is x
    numbers = torch.randn(q.numel() + 1, device=q.device).to(q.dtype)
    unaligned = numbers[1:].view(q.shape)
    wider = torch.randn(2, 40, 2, 43, device=q.device).to(q.dtype)[..., :40]
    for x in (unaligned, wider, q.mT.contiguous().mT):
        copied = attention_cuda._in_place_or_copied(x)
        assert copied is not None
        assert copied.data_ptr() % 16 == 0
        assert copied.is_contiguous()
        assert torch.equal(copied, x)


@needs_cuda
def test_bits_do_not_depend_on_the_batch_or_the_run() -> None:
    for length, keys, d in ((70, 77, 40), (70, 200, 64), (9, 12, 160)):
        q = torch.randn(3, length, 2, d, device=cases.device_of("cuda")).half()
        k, v = torch.randn(2, 3, keys, 2, d, device=q.device).half()
        with cuda("shuffled"):
            together = attention(q, k, v)
        with cuda("shuffled again"):
            assert torch.equal(attention(q, k, v), together)
            for i in range(3):
                alone = attention(*(t[i : i + 1] for t in (q, k, v)))
                assert torch.equal(together[i : i + 1], alone)


@needs_cuda
def test_the_context_kernel_walks_over_many_queries() -> None:
    """1088 tiles for 384 blocks: a warp processes three, and reuses its first buffer."""
    q = torch.randn(8, 1030, 8, 8, device=cases.device_of("cuda")).half()
    k, v = torch.randn(2, 8, 5, 8, 8, device=q.device).half()
    with cuda("shuffled"):
        out = attention(q, k, v)
    expected = attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)


@needs_cuda
def test_unsupported_arguments_are_named() -> None:
    q = torch.zeros(1, 4, 1, 8, device=cases.device_of("cuda")).half()

    def reason(*args: Tensor, **kwargs: Any) -> str:
        with cuda():
            return str(kernels.explain("attention", *args, **kwargs).reasons["cuda"])

    assert reason(q, q, q) == "None"
    assert "multiples of 8 up to 160, got 7" in reason(*[q[..., :7]] * 3)
    assert "got 168" in reason(*[torch.zeros(1, 4, 1, 168, device=q.device).half()] * 3)
    assert "scale > 0, got -0.3; negate q" in reason(q, q, q, scale=-0.3)
    assert "float16, bfloat16, got float32" in reason(*[q.float()] * 3)
    elsewhere = torch.ones(4, 4, dtype=torch.bool, device="meta")
    assert "mask must be on the device of q, " in reason(q, q, q, mask=elsewhere)
    for case in cases.ATTENTION:
        args, kwargs = case.inputs(torch.float16, cases.device_of("cuda"))
        assert (reason(*args, **kwargs) == "None") == (case.name not in UNSERVED), case


@cuda_host.needs_compiler
def test_the_op_is_registered_right() -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 5, 2, 8).half())
    text = torch.randn(2, 3, 2, 8).half()
    bias = torch.randn(5, 8, requires_grad=True)
    with cuda_host.emulated():
        cases.check_registration("attention", "cuda", q, k, v, text, text + 1, bias, 0.3)


@needs_cuda
def test_compiles_without_break_for_any_batch() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with cuda():
        for n in (2, 3, 7):
            numbers = torch.randn(3, n, 5, 4, 16, device=cases.device_of("cuda")).half()
            q, k, v = (x.requires_grad_() for x in numbers)
            found = torch.autograd.grad(compiled(q, k, v).float().square().sum(), (q, k, v))
            want = torch.autograd.grad(attention(q, k, v).float().square().sum(), (q, k, v))
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_it_indexes_with_64_bits() -> None:
    q = torch.randn(1, 1024, 16, 64, device="cuda", dtype=torch.bfloat16)
    many = q.repeat(2050, 1, 1, 1)
    assert many.numel() > 2**31
    with kernels.backend("cuda"):
        for keys in (64, 1024):
            alone = attention(q, q[:, :keys], q[:, :keys])
            together = attention(many, many[:, :keys], many[:, :keys])
            assert torch.equal(together[-1:], alone)


# Machine code


def machine_code(
    source: str, architecture: str, patch: pytest.MonkeyPatch
) -> tuple[Path, list[str]]:
    """The object file of a CUDA source, and the disassembly of each of its kernels. After
    `make build`, this compiles nothing; where it cannot be had, the test is skipped."""
    # imported here because it needs tyro, which GPU machines may lack
    from benchmarks.resources import cuda as cuda_resources

    if _triton.triton is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    tool = Path(_triton.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    try:
        objects = cuda_resources.compiled()
    except cuda_resources.NoCompilerError as error:
        pytest.skip(f"CUDA kernels are not compiled here: {error}")
    (compiled,) = (path for path in objects if path.name == f"{source}.o")
    command = [str(tool), "-sass", "-arch", architecture, str(compiled)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return compiled, text.split("Function : ")[1:]


@pytest.mark.slow
def test_the_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel multiplies on the matrix unit, loads with ldmatrix and copies asynchronously."""
    _, functions = machine_code("attention.cu", "sm_80", monkeypatch)
    # 2 dtypes: streaming in 5 widths, with and without a mask; and 8 context kernels
    assert len(functions) == 36
    for function in functions:
        name = function.splitlines()[0]
        for word in ("HMMA.16816", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"):
            assert word in function, (name, word)
        assert ("HMMA.1688.F32" in function) == ("Li40E" in name), name
        assert "LDL" not in function, name  # no local memory
