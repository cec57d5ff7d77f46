"""attention: parity, masks, strides, bad input, and the Triton kernels' regimes and traffic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import attention, backend
from fastdiff.kernels import triton as _triton
from fastdiff.kernels.attention import triton_forward
from fastdiff.kernels.attention.cpu import Call
from fastdiff.kernels.attention.triton_backward import attention_backward
from fastdiff.kernels.attention.triton_forward import CONTEXTS, attention_forward
from fastdiff.kernels.attention.triton_tiles import HEAD_DIMS, aligned, pieces_of, room_for_sums
from fastdiff.kernels.tuning import configs
from tests.kernels import cases
from tests.kernels.interpreter import counting_traffic

UNSERVED = {
    "odd": "multiples of 8 up to 256, and 512, got 7",
    "cin-384": "and 512, got 384",
    "all-alike": "supports a scale > 0, got 0.0",
    "turned-round": "supports a scale > 0, got -0.7; negate q",
}
"""Cases that no Triton kernel supports, and why."""

BACKENDS = cases.BACKENDS


@pytest.mark.parametrize(("case", "dtype", "backend"), cases.parity_rows(cases.ATTENTION))
def test_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and case.name in UNSERVED:
        args, kwargs = case.inputs(dtype, cases.device_of(backend))
        with kernels.backend(backend):
            reason = kernels.explain("attention", *args, **kwargs).reasons["triton"]
        assert UNSERVED[case.name] in str(reason)
    else:
        cases.check("attention", case, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_at_drawn_shapes(backend: str) -> None:
    dims = st.integers(1, 33) if backend == "reference" else st.integers(1, 12).map(lambda i: 8 * i)

    def check(data: st.DataObject) -> None:
        shape = (*(data.draw(st.integers(1, top)) for top in (2, 40, 40, 3)), data.draw(dims))
        # the largest error of a few numbers is chance
        assume(shape[0] * shape[1] * shape[3] * shape[4] >= 100)
        mask = data.draw(st.sampled_from([None, cases.additive, cases.padding]))
        # a single sample would see one key, and gradients of exactly 0 give no scale for the error
        assume(mask is not cases.padding or shape[0] > 1)
        extra = data.draw(st.sampled_from([0, 0, 3]))
        case = cases.attention_case("drawn", "any shape", shape, mask=mask, extra=extra)
        cases.check("attention", case, data.draw(st.sampled_from(cases.DTYPES)), backend)

    cases.check_draws(check, backend, 15)


def test_fp64_is_exact() -> None:
    q, k, v = torch.randn(3, 2, 9, 3, 5, dtype=torch.float64)
    expected = kernels.OPS["attention"].formula(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_may_see_nothing_gets_zeros(kind: str, dtype: torch.dtype, name: str) -> None:
    device = cases.device_of(name)
    leaf = torch.randn(3, 2, 5, 3, 8, device=device).to(dtype).requires_grad_()
    q, k, v = leaf.unbind()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=device)
    mask[1, :, 3] = False
    with backend(name):
        out = attention(q, k, v, mask=mask if kind == "bool" else mask.float().log().to(dtype))
    assert torch.equal(out[1, 3], torch.zeros(3, 8, dtype=dtype, device=device))
    assert out[1, 2].abs().min() > 0
    assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_whose_every_key_has_the_smallest_number_sees_them_all(
    dtype: torch.dtype, name: str
) -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8, device=cases.device_of(name)).to(dtype).unbind()
    v.requires_grad_()
    mask = torch.full((5, 5), torch.finfo(dtype).min, dtype=dtype, device=q.device)
    with backend(name):
        out = attention(q, k, v, mask=mask)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))
    if name != "reference":  # PyTorch 2.13 computes 1 instead of 1 / 5 on a CPU
        (dv,) = torch.autograd.grad(out.sum(), v)
        torch.testing.assert_close(dv, torch.ones_like(dv))  # five queries, each a fifth


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_is_not_hidden(name: str) -> None:
    q, k, v = torch.randn(3, 1, 5, 1, 8, device=cases.device_of(name)).unbind()
    mask = torch.zeros(5, 5, device=q.device)
    mask[1, 2] = float("nan")
    with backend(name):
        assert attention(q, k, v, mask=mask).isnan().any(3).flatten().tolist() == [0, 1, 0, 0, 0]
        k[0, 2] = float("nan")
        assert attention(q, k, v).isnan().all()


@cases.needs_triton
def test_a_mask_may_have_another_dtype() -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8, device=cases.device_of("triton")).bfloat16().unbind()
    mask = torch.randn(3, 1, 5, device=q.device).bfloat16().requires_grad_()
    with backend("triton"):
        out, same = (attention(q, k, v, mask=m) for m in (mask, mask.float()))
    assert torch.equal(out, same)
    wide = mask.detach().float().requires_grad_()
    with backend("triton"):
        (dmask,) = torch.autograd.grad(attention(q, k, v, mask=wide).sum(), wide)
    (expected,) = torch.autograd.grad(out.sum(), mask)
    assert dmask.dtype == torch.float32
    assert torch.equal(dmask.bfloat16(), expected)


@cases.needs_native
def test_the_queries_of_a_head_in_several_pieces_on_the_cpu() -> None:
    """Several threads share a head; each writes to its own place in the result and in the sums."""
    before = torch.get_num_threads()
    case = cases.attention_case("pieces", "five tiles of one head", (1, 190, 50, 1, 24))
    try:
        torch.set_num_threads(3)
        for dtype in cases.DTYPES:
            cases.check("attention", case, dtype, "cpu")
    finally:
        torch.set_num_threads(before)


@cases.needs_native
def test_the_result_is_contiguous_for_every_layout() -> None:
    packed = torch.randn(2, 9, 3, 4, 8)
    views = packed.unbind(2)
    assert attention(*views).is_contiguous()
    turned = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in views]
    assert turned[0].stride(3) != 1
    torch.testing.assert_close(attention(*turned), attention(*views))
    assert attention(*turned).is_contiguous()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    for length, dim in ((64, 16), (17, 40), (1, 128)):
        q, k, v = torch.randn(3, 3, length, 2, dim, device=cases.device_of(name))
        with backend(name):
            together = attention(q, k, v)
            for i in range(3):
                alone = attention(*(t[i : i + 1] for t in (q, k, v)))
                assert torch.equal(together[i : i + 1], alone)


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
    # a tokenizer's mask of 0 and 1 must not be added to the scores
    with pytest.raises(ValueError, match=r"bool or floating point, got torch.int64; use mask.bool"):
        attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="broadcast"):
        attention(q, q, q, mask=torch.ones(1, 1, 1, 1, 4))
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 7\), got \(4, 4\); S counts the extra keys"):
        attention(q, q, q, extra_k=q[:, :3], extra_v=q[:, :3], mask=torch.ones(4, 4))
    with pytest.raises(ValueError, match="must be given together, got only one"):
        attention(q, q, q, extra_k=q)
    with pytest.raises(ValueError, match=r"with N=2, H=2, D=8 as in q, got \(2, 4, 2, 4\)"):
        attention(q, q, q, extra_k=q[..., :4], extra_v=q[..., :4])
    with pytest.raises(ValueError, match=r"dtype of q, torch.float32, got torch.float16"):
        attention(q, q, q, extra_k=q.half(), extra_v=q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_inside(dtype: torch.dtype) -> None:
    """Autocast must not turn the fp32 scores and sums into bf16."""
    q, k, v = torch.randn(3, 2, 9, 3, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention(q, k, v)
    assert inside.dtype == dtype
    assert torch.equal(inside, attention(q, k, v))


def test_a_head_dim_is_cut_into_powers_of_two() -> None:
    assert pieces_of(40) == (32, 8)
    assert pieces_of(40, 16) == (32, 16)
    assert pieces_of(72) == (64, 8)
    assert pieces_of(120) == (64, 32, 16, 8)
    assert pieces_of(160) == (128, 32)
    assert pieces_of(77, 16) == (64, 16)
    for d in range(8, 520, 8):
        assert sum(pieces_of(d)) == d
        assert sum(pieces_of(d, 16)) == -(-d // 16) * 16


def kernels_of(*shape: int, dtype: torch.dtype = torch.bfloat16, **options: Tensor) -> list[str]:
    """The kernels that the forward pass of shape (N, L, S, H, D) would launch."""
    n, length, keys, heads, d = shape
    q = torch.empty(n, length, heads, d, dtype=dtype, device="meta")
    k = torch.empty(n, keys, heads, d, dtype=dtype, device="meta")
    extra = options.get("extra_k")
    with _triton.recording_launches("sm_90") as launches:
        attention_forward(q, k, k, extra, extra, options.get("mask"), 0.1)
    return [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in launches]


@cases.needs_triton
def test_few_keys_stay_on_the_chip() -> None:
    for keys in (1, 64, 77, 154, 256 + 77):
        assert kernels_of(2, 4096, keys, 8, 40) == ["context"]
    assert kernels_of(2, 4096, CONTEXTS[-1] + 1, 8, 40) == ["forward"]
    assert kernels_of(2, 4096, 4096, 8, 40) == ["forward"]
    assert kernels_of(1, 4096, 77, 1, 512) == ["forward"]  # too wide to keep on the chip
    assert kernels_of(2, 4096, 77, 8, 40, dtype=torch.float32) == ["forward"]
    assert kernels_of(0, 4096, 77, 8, 40) == kernels_of(2, 0, 77, 8, 40) == []
    text = torch.empty(2, 77, 8, 64, dtype=torch.bfloat16, device="meta")
    assert kernels_of(2, 1024, 77, 8, 64, extra_k=text) == ["forward"]
    for keys, kernel in ((77, "context"), (154, "forward")):  # a mask takes registers
        mask = torch.empty(keys, dtype=torch.bool, device="meta")
        assert kernels_of(2, 1024, keys, 8, 64, mask=mask) == [kernel]


def test_rows_that_do_not_begin_at_16_bytes_are_copied() -> None:
    room = torch.randn(2, 5, 3, 4, 24).bfloat16()
    for fits in (
        *room.unbind(2),
        room[:, ::2, 0],
        room[0:1, :, 0],
        room[:, :, 0, :1].expand(2, 5, 3, 24),
    ):
        assert aligned(fits) is fits
    alone = torch.randn(29).bfloat16()[1:25].view(1, 1, 1, 24)
    steps = torch.randn(2, 5, 4, 25).bfloat16()[..., :24]
    for odd in (room[..., 0, 1:17], room[..., 0, ::3], torch.randn(2, 5, 24, 8).mT, alone, steps):
        copy = aligned(odd)
        assert torch.equal(copy, odd)
        assert aligned(copy) is copy


@cases.needs_interpreter
@pytest.mark.parametrize("strides", [(0, 2**30, 4, 1), (0, 4, 1, 2**30)], ids=["heads", "keys"])
def test_a_mask_may_have_more_elements_than_32_bits_can_index(strides: tuple[int, ...]) -> None:
    """As with 16 heads of 16,384 by 16,384 tokens, but only a few of the bytes are touched."""
    q, k, v = torch.randn(3, 1, 4, 3, 8).unbind()
    room = torch.empty(2**32, dtype=torch.bool)
    far = room.as_strided((1, 3, 4, 4), strides)
    far.copy_(torch.ones(4, 4, dtype=torch.bool).tril())
    with backend("triton"):
        assert torch.equal(attention(q, k, v, mask=far), attention(q, k, v, mask=far.clone()))


def why_not(*tensors: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> str | None:
    """Triton's objection to these arguments."""
    objection = kernels.OPS["attention"].backends["triton"].why_not
    assert objection is not None
    return objection(*tensors, None, None, mask, scale)


@cases.needs_triton
def test_head_dims_with_a_config_are_the_ones_supported() -> None:
    for d in range(1, 600):
        q = torch.empty(1, 4, 1, d, device="meta")
        reason = why_not(q, q, q)
        assert (reason is None) == (d % 8 == 0 and (d <= 256 or d == 512)), d
    assert max(d for d in HEAD_DIMS if d != 512) == 256


@cases.needs_triton
def test_triton_names_what_it_does_not_support() -> None:
    q = torch.empty(1, 4, 1, 8, device="meta")
    assert why_not(q, q, q, scale=0.3) is None
    assert "scale > 0, got -0.3; negate q" in str(why_not(q, q, q, scale=-0.3))
    assert "supports fp32, fp16 and bf16, got float64" in str(why_not(*[q.double()] * 3))
    many = torch.empty(1, 2**16, 1, 8, device="meta")
    mask = torch.empty(2**16, dtype=torch.bool, device="meta")
    assert why_not(many, many, many) is None
    assert "got 65536 x 65536; split" in str(why_not(many, many, many, mask=mask))
    assert "pad the heads" in str(why_not(*[q[..., :7]] * 3))


@cases.needs_triton
def test_triton_op_is_registered_right() -> None:
    device = cases.device_of("triton")
    q, k, v = (torch.randn(2, 5, 1, 8, device=device, requires_grad=True) for _ in range(3))
    text = torch.randn(2, 3, 1, 8, device=device)
    bias = torch.randn(5, 8, device=device, requires_grad=True)
    seen = bias.detach() > 0
    cases.check_registration("attention", "triton", q, k, v, text, text + 1, bias, 0.3)
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    cases.check_registration("attention", "triton", *half, None, None, seen[:, :5], 0.3)


@cases.needs_triton
def test_triton_compiles_without_break_for_any_batch() -> None:
    cases.check_compiles(attention, lambda n: tuple(torch.randn(3, n, 5, 1, 16)))


@cases.needs_triton
def test_triton_compiles_with_a_mask_and_extra_keys_for_any_batch() -> None:
    def op(q: Tensor, k: Tensor, v: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, extra_k=text, extra_v=text, mask=mask)

    def arguments(n: int) -> tuple[Tensor, ...]:
        tokens = [torch.randn(n, s, 1, 16) for s in (5, 6, 6, 3)]
        return *(t.bfloat16() for t in tokens), torch.randn(n, 1, 1, 9).bfloat16()

    cases.check_compiles(op, arguments)


@pytest.mark.parametrize("name", BACKENDS[1:])
def test_gradients_of_any_strides_and_from_run_to_run(name: str) -> None:
    q, k, v = torch.randn(3, 2, 37, 2, 24, device=cases.device_of(name)).requires_grad_()
    results = []
    with backend(name):
        out = attention(q, k, v)
        expanded = torch.ones((), device=out.device).expand_as(out)
        turned = torch.randn(24, 2, 37, 2, device=out.device).permute(3, 2, 1, 0)
        for dout in (expanded, expanded.contiguous(), turned, turned.contiguous()):
            results.append(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    for strided, dense in (results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


@cases.needs_native
def test_a_packed_projection_is_not_copied() -> None:
    packed = torch.randn(2, 5, 3, 4, 8, dtype=torch.bfloat16)
    for dense in (True, False):
        x = packed if dense else packed.mT.contiguous().mT
        call = Call((*x.unbind(2), None, None), None, 1.0)
        taken = [t.data_ptr() for t in call.tensors if t is not None]
        assert (taken == [t.data_ptr() for t in x.unbind(2)]) == dense


@cases.needs_native
def test_auto_takes_the_reference_where_it_is_faster() -> None:
    q, text = torch.randn(1, 200, 2, 40), torch.randn(1, 77, 2, 40)
    wide = torch.randn(1, 161, 1, 264)
    leaf = text.clone().requires_grad_()

    def chosen(*tensors: Tensor, **options: Tensor) -> tuple[str | None, str]:
        explained = kernels.explain("attention", *tensors, **options)
        return explained.chosen, str(explained.reasons["cpu"])

    for tensors in ((q, q, q), (q, text, text), (wide, wide[:, 1:], wide[:, 1:])):
        assert chosen(*tensors)[0] == "cpu"
        attention(*tensors)
    assert chosen(wide, wide, wide)[0] == "reference"
    assert "above 256 with more than 160 keys, got 264 and 161" in chosen(wide, wide, wide)[1]
    extra = {"extra_k": wide[:, :1], "extra_v": wide[:, :1]}
    assert chosen(wide, wide[:, 1:], wide[:, 1:], **extra)[0] == "reference"
    assert chosen(*[wide.half()] * 3)[0] == "cpu"
    assert chosen(q, leaf, leaf)[0] == "reference"
    assert "gradient" in chosen(q, leaf, leaf)[1]
    attention(wide, wide, wide), attention(q, leaf, leaf)  # a warning would be an error
    with torch.no_grad():
        assert chosen(q, leaf, leaf)[0] == "cpu"
    with backend("cpu"):
        assert chosen(wide, wide, wide)[0] == "cpu"


@cases.needs_native
def test_cpu_op_is_registered_right() -> None:
    q, k, v = (torch.randn(2, 5, 2, 7, requires_grad=True) for _ in range(3))
    text = torch.randn(2, 3, 2, 7)
    bias = torch.randn(5, 8, requires_grad=True)
    cases.check_registration("attention", "cpu", q, k, v, None, None, None, 0.3)
    cases.check_registration("attention", "cpu", q, k, v, text, text + 1, bias, 0.3)


@cases.needs_native
def test_cpu_second_derivatives() -> None:
    """Second derivatives of a call with all arguments agree with those of the fp64 formula."""
    shapes = ((1, 3, 2, 5), *[(1, 4, 2, 5)] * 2, *[(1, 2, 2, 5)] * 2, (3, 6))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def twice(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        q, k, v, extra_k, extra_v, mask = tensors
        out = function(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=mask, scale=0.4)
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))

    with backend("cpu"):
        have = twice(attention, *leaves)
    exact = (x.detach().double().requires_grad_() for x in leaves)
    want = twice(kernels.OPS["attention"].formula, *exact)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@cases.needs_native
def test_cpu_compiles_without_break_for_any_batch() -> None:
    cases.check_compiles(attention, lambda n: tuple(torch.randn(3, n, 5, 4, 16)), "cpu")


@cases.needs_interpreter
def test_a_program_of_the_context_kernel_takes_several_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This happens when there are more tiles, samples and heads than fill a GPU."""
    case = cases.attention_case("rounds", "five tiles, two programs a head", (1, 300, 20, 2, 16))
    monkeypatch.setattr(triton_forward, "PROGRAMS", 4)
    q, k, v = (t.to("meta") for t in case.inputs(torch.bfloat16)[0])
    with _triton.recording_launches() as launches:
        attention_forward(q, k, v, None, None, None, 0.1)
    assert [(x.kernel.__name__, x.grid) for x in launches] == [("_context_kernel", (4,))]
    cases.check("attention", case, torch.bfloat16, "triton")
    with backend("triton"), counting_traffic() as forward:
        attention(*case.inputs(torch.bfloat16)[0])
    rows = 2 * 300 + 2 * 20 * 2  # each program reads the keys once; each query is read once
    assert forward.total == 2 * (rows * 16 * 2 + 300 * 4)


@cases.needs_interpreter
def test_the_keys_gradient_is_summed_over_stretches_of_queries() -> None:
    """The text keys of one sample do not fill a GPU, so queries are split and summed in parts."""
    case = cases.attention_case("stretches", "one key tile, many queries", (1, 600, 9, 1, 16))
    q, k, v = (t.to("meta") for t in case.inputs(torch.bfloat16)[0])
    with _triton.recording_launches() as launches:
        attention_backward(q, q, k, v, None, None, None, q, room_for_sums(q, None), 0.1, False)
    grids = {launch.kernel.__name__: launch.grid for launch in launches}
    assert grids["_keys_gradient_kernel"] > (1,)
    cases.check("attention", case, torch.bfloat16, "triton")


@cases.needs_interpreter
@pytest.mark.parametrize(("keys", "d"), [(512, 40), (384, 64), (77, 40)])
def test_traffic_is_what_the_docstring_says(keys: int, d: int) -> None:
    n, heads, length, dtype = 1, 2, 256, torch.bfloat16
    q, k, v = (
        torch.randn(n, s, heads, d, dtype=dtype).requires_grad_() for s in (length, keys, keys)
    )
    with backend("triton"), counting_traffic() as forward:
        out = attention(q, k, v)
    row, numbers = n * heads * d * 2, 4 * n * heads * length
    if keys == 77:
        config = configs.config("attention_context", q, f"80/{d}")
        programs = -(-length // config["BLOCK_M"])  # so few that each has one tile
    else:
        config = configs.config("attention", q, f"self/{d}")
        programs = -(-length // config["BLOCK_M"])
    expected = (2 * length + 2 * keys * programs) * row + numbers
    assert forward.total == pytest.approx(expected, rel=0.05)

    dout = torch.randn_like(out)
    with counting_traffic() as backward:
        torch.autograd.grad(out, (q, k, v), dout)
    of_keys = configs.config("attention_backward_keys", q, f"self/{d}")
    of_queries = configs.config("attention_backward_queries", q, f"self/{d}")
    key_tiles = -(-keys // of_keys["BLOCK_N"])
    expected = (
        2 * length
        + (2 * length * key_tiles + 4 * keys)
        + (3 * length + 2 * keys * -(-length // of_queries["BLOCK_M"]))
    ) * row + numbers * (1 + 2 * key_tiles + 2)
    assert backward.total == pytest.approx(expected, rel=0.05)


@cases.needs_interpreter
def test_traffic_of_rows_read_in_chunks() -> None:
    keys, d = 128, 512
    q, k, v = (torch.randn(1, s, 1, d, dtype=torch.bfloat16) for s in (192, keys, keys))
    config = configs.config("attention", q, f"self/{d}")
    query_tiles, key_tiles = -(-192 // config["BLOCK_M"]), keys // config["BLOCK_N"]
    with backend("triton"), counting_traffic() as forward:
        attention(q, k, v)
    rows = 192 + config["SPLIT"] * (192 * key_tiles + keys * query_tiles) + keys * query_tiles
    assert forward.total == pytest.approx(rows * d * 2, rel=0.05)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_triton_indexes_with_64_bits() -> None:
    n, length, heads, d = 2050, 1024, 16, 64
    q = torch.randn(1, length, heads, d, device="cuda", dtype=torch.bfloat16)
    many = q.repeat(n, 1, 1, 1)
    assert many.numel() > 2**31
    with backend("triton"):
        alone, together = attention(q, q, q), attention(many, many, many)
    assert torch.equal(together[-1:], alone)
