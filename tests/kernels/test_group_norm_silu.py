"""group_norm_silu: parity, layouts, bad input, the Triton regimes, their traffic and bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from fastdiff import kernels
from fastdiff.kernels import BackendError, add_group_norm_silu, backend, group_norm_silu
from fastdiff.kernels.group_norm_silu.triton import forward
from fastdiff.kernels.triton import recording_launches
from fastdiff.kernels.tuning import override_config
from fastdiff.kernels.tuning.configs import gpu_of, lookup
from tests.kernels import cases
from tests.kernels.interpreter import counting_traffic
from tests.kernels.norms import KERNELS, REGIMES, kernels_of, regime

COSTLY = ("sd-320", "sd-1280", "sd-skip-1920", "ldm-224", "adm-film")
"""Cases of many channels; `test_parity_at_every_group_size` covers them with fewer pixels."""
LAYOUTS = {"nchw": lambda x: x, "nhwc": cases.channels_last}
GROUP_SIZES = {
    4: "KL-f8, ADM: 128 channels",
    6: "cin256: 192",
    7: "LDM-4: 224",
    8: "ADM: 256",
    10: "SD: 320",
    14: "LDM-4: 448",
    20: "SD: 640",
    21: "LDM-4: 672",
    28: "LDM-4: 896",
    30: "SD: 960, after the skip joins",
    35: "LDM-4: 1120",
    40: "SD: 1280",
    60: "SD: 1920",
    80: "SD: 2560",
}


@pytest.mark.parametrize(("case", "dtype", "backend"), cases.parity_rows(cases.GROUP_NORM_SILU))
def test_parity(case: cases.Case, dtype: torch.dtype, backend: str) -> None:
    with regime("small"):
        cases.check("group_norm_silu", case, dtype, backend)


@cases.needs_triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    cases.in_turn([case for case in cases.GROUP_NORM_SILU if case.name not in COSTLY]),
    ids=str,
)
def test_parity_in_the_large_regime(case: cases.Case, dtype: torch.dtype) -> None:
    with regime("large"):
        cases.check("group_norm_silu", case, dtype, "triton")


@cases.needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_parity_at_every_group_size(size: int, layout: str) -> None:
    groups = 32 if layout == "nhwc" else 8  # in NCHW a program handles one group, so few suffice
    for index, name in enumerate(REGIMES):
        shape = (2, groups * size, 2, 3)
        case = cases.norm_case("size", GROUP_SIZES[size], shape, groups, layout=LAYOUTS[layout])
        with regime(name, COLUMNS=512, FINALIZE=8192):
            cases.check("group_norm_silu", case, cases.DTYPES[(size + index) % 3], "triton")


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_parity_at_drawn_shapes(backend: str) -> None:
    def check(data: st.DataObject) -> None:
        n, groups, size, h, w = (data.draw(st.integers(1, top)) for top in (3, 9, 5, 7, 7))
        assume(n * groups * size * h * w >= 400)  # the largest error of a few numbers is chance
        layout = data.draw(st.sampled_from([lambda x: x, cases.channels_last, lambda x: x.mT]))
        options = {"film": data.draw(st.booleans()), "affine": data.draw(st.booleans())}
        case = cases.norm_case(
            "drawn", "any shape", (n, groups * size, h, w), groups, layout=layout, **options
        )
        with regime(data.draw(st.sampled_from(REGIMES))):
            cases.check("group_norm_silu", case, data.draw(st.sampled_from(cases.DTYPES)), backend)

    cases.check_draws(check, backend, 25)


def test_fp64_is_exact() -> None:
    (x, *rest), kwargs = cases.GROUP_NORM_SILU[6].inputs(torch.float64)
    expected = kernels.OPS["group_norm_silu"].formula(x, *rest, **kwargs)
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


@pytest.mark.parametrize("name", cases.BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("film", [False, True])
def test_channels_last_stays(dtype: torch.dtype, film: bool, name: str) -> None:
    device = cases.device_of(name)
    x = cases.channels_last(torch.randn(2, 8, 5, 6)).to(device, dtype).requires_grad_()
    scale_shift = torch.randn(2, 16).to(x) if film else None
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    with backend(name):
        y = group_norm_silu(x, 4, weight, bias, scale_shift=scale_shift)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not y.is_contiguous()
        assert group_norm_silu(x.contiguous(), 4).is_contiguous()
        if name == "triton":
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", cases.BACKENDS)
@pytest.mark.parametrize("kind", REGIMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_does_not_depend_on_its_batch(layout: str, kind: str, name: str) -> None:
    x = LAYOUTS[layout](torch.randn(7, 32, 9, 9)).to(cases.device_of(name))
    film = torch.randn(7, 64).to(x)
    with backend(name), regime(kind):
        together = group_norm_silu(x, 8, scale_shift=film)
        assert torch.equal(together, group_norm_silu(x, 8, scale_shift=film))
        for i in range(7):
            part = slice(i, i + 1)
            alone = group_norm_silu(LAYOUTS[layout](x[part]), 8, scale_shift=film[part])
            assert torch.equal(together[part], alone)


@pytest.mark.parametrize("name", cases.BACKENDS)
@pytest.mark.parametrize("kind", REGIMES)
def test_parameters_in_fp32_serve_half_precision_input(kind: str, name: str) -> None:
    x, weight, bias = torch.randn(2, 8, 4, 4), torch.randn(8), torch.randn(8)
    x, weight, bias = (t.to(cases.device_of(name)) for t in (x.bfloat16(), weight, bias))
    weight.requires_grad_()
    with backend(name), regime(kind):
        y = group_norm_silu(x, 4, weight, bias)
        assert torch.equal(y, group_norm_silu(x.float(), 4, weight, bias).bfloat16())
        (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    twin = weight.detach().double().requires_grad_()
    kernels.OPS["group_norm_silu"].formula(x.double(), 4, twin, bias.double()).sum().backward()
    torch.testing.assert_close(dweight, twin.grad.float(), rtol=1e-5, atol=1e-5)


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
    kernels.OPS["group_norm_silu"].formula(x.double(), 4, twin).sum().backward()
    torch.testing.assert_close(weight.grad.double(), twin.grad, rtol=1e-5, atol=1e-5)


@cases.needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_in_fp32_is_good_to_the_last_places(layout: str) -> None:
    """With a mean far from 0, its rounding error must not reach the result of a small sample."""
    device = cases.device_of("triton")
    x = LAYOUTS[layout](torch.randn(1, 64, 16, 16) * 0.1 + 1000).to(device)
    with backend("triton"), regime("small"):
        y = group_norm_silu(x, 8, activation="none")
    expected = kernels.OPS["group_norm_silu"].formula(x.double(), 8, activation="none")
    assert (y - expected).abs().max() < 2e-6


def expected_regimes() -> list[tuple[tuple[int, ...], str]]:
    """Shapes of SD 1.5, SDXL and KL-f8, and the regime expected for bf16 in NHWC."""
    return [
        ((2, 1280, 8, 8), "small"),
        ((2, 2560, 8, 8), "small"),
        ((2, 1280, 16, 16), "small"),
        ((2, 128, 32, 32), "small"),
        ((2, 640, 32, 32), "large"),  # padded to a power of two of columns, it has 65536 numbers
        ((2, 320, 64, 64), "large"),
        ((1, 320, 128, 128), "large"),
        ((1, 128, 512, 512), "large"),
    ]


@cases.needs_triton
@pytest.mark.parametrize(("shape", "kind"), expected_regimes(), ids=str)
def test_regime_at_real_sizes(shape: tuple[int, ...], kind: str) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    ran = kernels_of(lambda: forward(x, 32, *[None] * 5, 1e-5, "silu"))
    assert ran
    assert set(ran) <= KERNELS[kind]


@cases.needs_triton
def test_large_batches_are_split_to_fit_the_l2_cache() -> None:
    x = torch.randn(5, 32, 8, 8).to(cases.device_of("triton")).requires_grad_()
    weight = torch.randn(32).to(x).requires_grad_()
    results = []
    for mebibytes in (0, 1):  # 0: sample by sample
        with backend("triton"), regime("large", L2_MIB=mebibytes):
            ran = kernels_of(lambda: group_norm_silu(x.detach(), 8))
            assert ran.count("_apply_kernel") == (1 if mebibytes else 5)
            y = group_norm_silu(x, 8, weight)
            results.append((y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))))
    for together, apart in zip(*results, strict=True):
        assert torch.equal(together, apart)


@cases.needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adds", [False, True])
def test_programs_that_share_a_sample_change_no_bit(adds: bool, layout: str) -> None:
    """With few samples, up to 8 programs compute the same statistics and a share of the result."""
    x = LAYOUTS[layout](torch.randn(1, 24, 5, 7)).to(cases.device_of("triton"), torch.bfloat16)
    weight, bias = torch.randn(2, 24).to(x).unbind()
    results: list[tuple[torch.Tensor, ...]] = []
    for fill in (1, 64):
        with regime("small", FILL=fill), recording_launches() as launches:
            forward(x.to("meta"), 4, None, None, None, None, None, 1e-5, "silu")
        assert {launch.arguments["SPLIT"] for launch in launches} == {1 if fill == 1 else 8}
        with backend("triton"), regime("small", FILL=fill):
            if adds:
                options = {"channel_add": weight, "residual": x}
                results.append(add_group_norm_silu(x, 4, weight, bias, **options))
            else:
                results.append((group_norm_silu(x, 4, weight, bias),))
    for whole, shared in zip(*results, strict=True):
        assert torch.equal(whole, shared)


@cases.needs_triton
@pytest.mark.parametrize("kind", REGIMES)
def test_triton_takes_gradients_of_any_strides(kind: str) -> None:
    device = cases.device_of("triton")
    x = cases.channels_last(torch.randn(2, 12, 3, 4)).to(device).requires_grad_()
    twin = x.detach().double().requires_grad_()
    for gradient in (torch.ones(1, 1, 1, 1).expand(2, 12, 3, 4), torch.randn(2, 12, 4, 3).mT):
        dy = gradient.to(device)
        with backend("triton"), regime(kind):
            (dx,) = torch.autograd.grad(group_norm_silu(x, 3), x, dy)
        expected = kernels.OPS["group_norm_silu"].formula(twin, 3)
        (expected,) = torch.autograd.grad(expected, twin, dy.double())
        torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-5)


@cases.needs_triton
@pytest.mark.parametrize("kind", REGIMES)
def test_groups_wider_than_a_tile(kind: str) -> None:
    """G = 1 over 300 channels, so the merge needs several steps over the columns."""
    case = cases.norm_case("wide", "LayerNorm over C, H, W", (2, 300, 2, 3), 1, film=True)
    with regime(kind, FINALIZE=64):
        cases.check("group_norm_silu", case, torch.float32, "triton")


@cases.needs_triton
def test_triton_objects_to_fp64() -> None:
    x = torch.randn(2, 8, 4, device=cases.device_of("triton"))
    with backend("triton"):
        for arguments in ((x.double(), 4), (x, 4, torch.ones(8).double().to(x.device))):
            with pytest.raises(BackendError, match="supports fp32, fp16 and bf16, got float64"):
                group_norm_silu(*arguments)


@cases.needs_triton
@pytest.mark.parametrize("kind", REGIMES)
def test_triton_ops_are_registered_right(kind: str) -> None:
    device = cases.device_of("triton")
    leaf = lambda *shape: torch.randn(*shape, device=device, requires_grad=True)  # noqa: E731
    x, weight, film = leaf(3, 12, 4, 5), leaf(12), leaf(3, 24)
    nhwc = cases.channels_last(x.detach()).requires_grad_()
    every = nhwc, 3, weight, None, film, 1e-5, "silu"
    only_x = x, 3, weight.detach(), None, film.detach(), 1e-5, "silu"
    with regime(kind):
        arguments = every if kind == "large" else only_x
        cases.check_registration("group_norm_silu", "triton", *arguments)


@cases.needs_triton
def test_triton_compiles_without_break_for_any_batch() -> None:
    def call(x: torch.Tensor, weight: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(cases.channels_last(x), 4, weight, None, scale_shift=film)

    cases.check_compiles(
        call, lambda n: (torch.randn(n, 8, 5, 3), torch.randn(8), torch.randn(n, 16))
    )


@cases.needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_of_a_small_tensor(layout: str, dtype: torch.dtype) -> None:
    """Where the samples fill the GPU; else up to 8 programs read the same, which the L2 has."""
    x = LAYOUTS[layout](torch.randn(2, 64, 16, 16)).to(dtype).requires_grad_()
    config = lookup("group_norm_silu", gpu_of(x.device), dtype, f"{layout}/small")
    with override_config("group_norm_silu", config | {"FILL": 1}, f"{layout}/small"):
        forward, backward = count_traffic(x, 8, "small")
    assert forward == pytest.approx(2 * x.nbytes, rel=0.05)
    assert backward == pytest.approx(3 * x.nbytes, rel=0.05)


@cases.needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_of_a_large_tensor(layout: str, dtype: torch.dtype) -> None:
    groups = 2 if layout == "nhwc" else 1  # each group is too large for the small regime
    x = LAYOUTS[layout](torch.randn(1, 16 * groups, 64, 64)).to(dtype).requires_grad_()
    forward, backward = count_traffic(x, groups, "large")
    if layout == "nhwc":
        programs, parts, own = 128, 128, 16 / 128 + 20 / 32
    else:  # in the backward pass a chunk is 4096 positions, a tile 2048
        programs, parts, own = 64, 4 * 16, 16 / 4096 + 20 / 2048
    moments = 8 * groups * parts  # each program reads all
    assert forward == pytest.approx(3 * x.nbytes + (1 + programs) * moments, rel=0.05)
    assert backward == pytest.approx(5 * x.nbytes + own * x.numel(), rel=0.05)


def count_traffic(x: torch.Tensor, groups: int, kind: str) -> tuple[int, int]:
    """Bytes moved by the forward pass and by the backward pass."""
    weight, bias = torch.randn(2, x.shape[1], dtype=x.dtype).requires_grad_().unbind()
    assert set(kernels_of(lambda: group_norm_silu(x.detach(), groups))) <= KERNELS[kind]
    with backend("triton"), counting_traffic() as forward:
        y = group_norm_silu(x, groups, weight, bias)
    with counting_traffic() as backward:
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    return forward.total, backward.total
