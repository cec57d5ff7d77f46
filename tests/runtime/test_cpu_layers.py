"""Convolutions and linear layers on the CPU: packed, folded, or in fp32 for half precision.

Results are compared with fp64 under the rule of parity.py. `kept.state` shows whether a layer has
its faster form: it is empty until one is made.
"""

from __future__ import annotations

import copy
import logging
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.cli.doctor import diagnose
from fastdiff.models.layers import ResBlock, Upsample, upsample_nearest
from fastdiff.runtime import cpu_layers
from fastdiff.runtime.prepare import prepare
from tests.support.parity import assert_parity, assert_parity_in_one_draw

HALF = [torch.bfloat16, torch.float16]
OBJECTION = cpu_layers.packing_objection()
# where packing works but gives wrong results, these tests must fail rather than be skipped
packing = pytest.mark.skipif(
    OBJECTION is not None and "wrong results" not in OBJECTION, reason=f"no packing: {OBJECTION}"
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Treat small layers as large, and clear caches of facts about the CPU, which tests change."""
    monkeypatch.setattr(cpu_layers, "PACK_NUMBERS", 1000)
    found_once = cpu_layers.cpu_features, cpu_layers.packing_objection, cpu_layers._say_fp32
    yield
    for function in found_once:
        function.cache_clear()


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (numbers + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)


def onednn(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution by oneDNN. PyTorch may choose im2col for small inputs, which sums in parts."""
    return torch.mkldnn_convolution(
        x, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
    )


def made(layer: nn.Module) -> bool:
    """Whether the layer has made its faster form."""
    return bool(layer.kept.state)  # type: ignore[union-attr]


CONVOLUTIONS = [
    pytest.param((1, 128, 8, 8), {"kernel_size": 3, "padding": 1}, id="res-block"),
    pytest.param((3, 128, 7, 9), {"kernel_size": 3, "padding": 1, "stride": 2}, id="downsample"),
    pytest.param((2, 512, 4, 4), {"kernel_size": 1, "bias": False}, id="skip"),
    pytest.param((1, 512, 5, 6), {"kernel_size": 3, "groups": 4, "dilation": 2}, id="grouped"),
    pytest.param((1, 128, 1, 1), {"kernel_size": 3, "padding": 1}, id="one-pixel"),
]


@packing
@pytest.mark.parametrize(("shape", "options"), CONVOLUTIONS)
def test_packed_convolution(shape: tuple[int, ...], options: dict[str, int]) -> None:
    eager = nn.Conv2d(shape[1], 128, **options)  # type: ignore[arg-type]
    layer, x = prepare(copy.deepcopy(eager)), image(*shape)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(y, onednn(layer, x))  # the same kernel gives the same bits
    assert made(layer)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_packed_only_where_it_wins() -> None:
    few_weights, many_pixels = nn.Conv2d(8, 8, 3), nn.Conv2d(256, 256, 1)
    contiguous, wide = nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1)
    for layer in (few_weights, many_pixels, contiguous):
        prepare(layer)
    prepare(wide, dtype=torch.float64)
    no_copies = prepare(nn.Conv2d(256, 256, 1), keep_copies=False)
    few_weights(image(1, 8, 8, 8))
    few = prepare(Upsample(8))
    few(image(1, 8, 32, 32))
    many_pixels(image(2, 256, 64, 64))
    contiguous(torch.randn(1, 256, 8, 8))
    no_copies(image(1, 256, 8, 8))
    wide(image(1, 256, 8, 8, dtype=torch.float64))
    assert not any(map(made, (few_weights, few, many_pixels, contiguous, wide, no_copies)))
    many_pixels(image(1, 256, 64, 64))
    assert made(many_pixels) == (cpu_layers.packing_objection() is None)


def check_folding(*shape: int) -> None:
    """Check a large image, for which the layer folds, and then a small one."""
    eager = Upsample(shape[1])
    layer, wide = prepare(copy.deepcopy(eager)), copy.deepcopy(eager).double()
    with torch.no_grad():
        for size in (shape, (1, shape[1], 3, 5)):
            assert_parity(
                lambda seed, size=size: layer(image(*size, seed=seed)),
                lambda seed, size=size: wide(image(*size, seed=seed).double()),
                lambda seed, size=size: onednn(
                    layer.conv, upsample_nearest(image(*size, seed=seed))
                ),
            )
            assert made(layer)


@packing
@pytest.mark.parametrize("shape", [(1, 64, 16, 18), (3, 32, 21, 5), (1, 16, 32, 8)])
def test_folded_upsampling(shape: tuple[int, ...]) -> None:
    check_folding(*shape)


@packing
@pytest.mark.parametrize("tap", [(0, 0), (1, 2), (3, 3)])
def test_folding_with_a_wrong_tap_is_detected(
    tap: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of 1e-5 in one of 16 taps, between one input and one output channel."""
    folded = cpu_layers.folded

    def wrong(weight: Tensor) -> Tensor:
        kernel = folded(weight)
        kernel[3, 5][tap] += 1e-5
        return kernel

    assert cpu_layers.packing_objection() is None  # cached now, since it calls `folded` as well
    monkeypatch.setattr(cpu_layers, "folded", wrong)
    with pytest.raises(AssertionError, match="error"):
        check_folding(1, 64, 16, 18)


@packing
@pytest.mark.parametrize("kind", ["convolution", "upsampling"])
def test_bits_depend_only_on_the_sample(kind: str) -> None:
    """They do not depend on its position, the other samples, the number of threads, or the shape
    that weights were packed for."""
    layer = prepare(nn.Conv2d(128, 128, 3, padding=1) if kind == "convolution" else Upsample(128))
    again = copy.deepcopy(layer)
    x, threads = image(2, 128, 16, 16), torch.get_num_threads()
    with torch.inference_mode():
        again(image(1, 128, 24, 24))  # packs for another shape
        y = layer(x)
        assert made(layer)
        assert made(again)
        assert torch.equal(again(x), y)
        assert torch.equal(layer(x.flip(0)).flip(0), y)
        assert torch.equal(
            layer(torch.stack([x[0], 3 * x[1]]).contiguous(memory_format=torch.channels_last))[0],
            y[0],
        )
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                assert torch.equal(layer(x), y)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("half_as_fp32", [False, True])
def test_changed_weights_take_effect(half_as_fp32: bool) -> None:
    dtype = torch.bfloat16 if half_as_fp32 else torch.float32
    layers: list[nn.Module] = [nn.Conv2d(128, 128, 3, padding=1), Upsample(128)]
    if half_as_fp32:
        layers.append(nn.Linear(128, 128))
    changes: list[Callable[[nn.Module], object]] = [
        lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
        lambda m: [p.mul_(0.5) for p in m.parameters()],
        lambda m: m.to(torch.float64).to(dtype),
        lambda m: [setattr(p, "data", p.data - 0.25) for p in m.parameters()],
    ]
    for layer in layers:
        plain_layer = copy.deepcopy(layer).to(dtype)
        prepare(layer, dtype=dtype, half_as_fp32=half_as_fp32)
        x = image(1, 128, 16, 16, dtype=dtype)
        x = x.flatten(2).mT if isinstance(layer, nn.Linear) else x
        for change in (lambda m: None, *changes):
            with torch.no_grad():
                change(layer)
                change(plain_layer)
                fresh = prepare(copy.deepcopy(plain_layer), dtype=dtype, half_as_fp32=half_as_fp32)
                assert torch.equal(layer(x), fresh(x)), type(layer)
        assert made(layer) == (half_as_fp32 or cpu_layers.packing_objection() is None)


@pytest.mark.parametrize("keep_copies", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_in_fp32(dtype: torch.dtype, keep_copies: bool) -> None:
    """As accurate as native instructions: fp32 sums of exact products, rounded once."""
    layers: list[tuple[nn.Module, Tensor]] = [
        (nn.Conv2d(48, 40, 3, padding=1), image(2, 48, 9, 7, dtype=dtype)),
        (nn.Linear(96, 40), torch.randn(2, 12, 96).to(dtype)),
        (Upsample(32), image(1, 32, 16, 16, dtype=dtype)),
        (
            nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect"),
            image(1, 8, 9, 7, dtype=dtype),
        ),
    ]
    for eager, x in layers:
        eager.to(dtype)
        layer = prepare(
            copy.deepcopy(eager), dtype=dtype, keep_copies=keep_copies, half_as_fp32=True
        )
        with torch.no_grad():
            y, reference = layer(x), copy.deepcopy(eager).double()(x.double())
            assert y.dtype is dtype
            # compared with the exact result rounded once, which is stricter than eager's error
            assert_parity_in_one_draw(y, reference, reference.to(dtype))


@pytest.mark.parametrize("half_as_fp32", [False, True])
def test_gradients_and_compile_are_pytorchs(half_as_fp32: bool) -> None:
    dtype = torch.bfloat16 if half_as_fp32 else torch.float32
    eager = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), Upsample(128), nn.Conv2d(128, 4, 1))
    layer = prepare(copy.deepcopy(eager), dtype=dtype, half_as_fp32=half_as_fp32)
    x = image(1, 128, 16, 16).to(dtype)
    with torch.no_grad():
        layer(x)
    gradients = []
    for module, leaf in ((layer, x.clone()), (eager.to(dtype).float(), x.float().clone())):
        leaf.requires_grad_()
        module(leaf).square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.float())
    ulp = torch.finfo(dtype).eps * float(gradients[1].abs().max())
    torch.testing.assert_close(*gradients, rtol=0, atol=8 * ulp)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, wanted = compiled(x).float(), eager(x.float())
    assert (found - wanted).abs().max() <= 8 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize(
    ("features", "limit", "bf16", "fp16"),
    [
        ({"avx2"}, None, False, False),
        ({"avx512_f", "avx512_bw"}, None, False, False),
        ({"avx512_bf16"}, None, True, False),
        ({"avx512_bf16", "avx512_fp16", "amx_bf16"}, None, True, True),
        ({"avx512_bf16", "avx512_fp16"}, "AVX2", False, False),
        ({"avx512_bf16", "avx512_fp16"}, "avx512_core", False, False),
        ({"avx512_bf16", "avx512_fp16"}, "AVX512_CORE_BF16", True, False),
        ({"avx512_bf16", "avx512_fp16"}, "ALL", True, True),
        ({"neon", "bf16", "fp16_arith"}, None, True, True),
        (set(), None, False, False),
    ],
)
def test_which_cpu_is_fast_at_half_precision(
    features: set[str],
    limit: str | None,
    bf16: bool,
    fp16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_layers, "cpu_features", lambda: frozenset(features))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_layers.fast_half(torch.bfloat16) == bf16
    assert cpu_layers.fast_half(torch.float16) == fp16
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu_layers.fast_half(torch.bfloat16)


@pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not report CPU features"
)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/cpuinfo")
def test_linux_and_pytorch_report_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = cpu_layers.cpu_features()
    cpu_layers.cpu_features.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    read = cpu_layers.cpu_features()
    assert read
    assert read != reported
    for dtype in HALF:
        assert bool(reported & cpu_layers.INSTRUCTIONS[dtype]) == bool(
            read & cpu_layers.INSTRUCTIONS[dtype]
        )


def test_fp32_instead_of_half_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_layers, "cpu_features", frozenset)
    with caplog.at_level(logging.WARNING, logger="fastdiff.runtime.cpu_layers"):
        for _ in range(2):
            block = prepare(
                ResBlock(32, 32, num_groups=8, eps=1e-5, emb_dim=16), dtype=torch.bfloat16
            )
        prepare(nn.Linear(4, 4))
        prepare(nn.Linear(4, 4), dtype=torch.bfloat16, half_as_fp32=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no fast bfloat16 arithmetic" in caplog.text
    assert isinstance(block.conv1, cpu_layers.PreparedConv2d)
    assert block.conv1.plan.half_as_fp32


def test_onednns_own_limit_is_honoured() -> None:
    """A process under this limit warns on stderr and computes in fp32."""
    code = (
        "import torch\n"
        "from fastdiff.runtime.prepare import prepare\n"
        "layer = prepare(torch.nn.Linear(8, 8), dtype=torch.bfloat16)\n"
        "print(layer.plan.half_as_fp32)\n"
    )
    command = ["env", "ONEDNN_MAX_CPU_ISA=AVX2", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert done.stderr.count("no fast bfloat16 arithmetic") == 1


def test_a_prepared_module_can_be_copied_and_saved() -> None:
    eager = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), Upsample(128))
    layer, x = prepare(copy.deepcopy(eager)), image(1, 128, 16, 16)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)  # noqa: S301 - trusted bytes
        assert torch.equal(prepare(layer)(x), y)
    assert list(layer.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(layer.state_dict())


def test_subclasses_are_left_alone() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = prepare(Doubled(8, 8, 1), dtype=torch.bfloat16, half_as_fp32=True)
    assert type(layer) is Doubled


def test_autocast_and_wrong_dtypes_are_pytorchs() -> None:
    layer, x = prepare(nn.Conv2d(128, 128, 3, padding=1)), image(1, 128, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    with torch.no_grad(), pytest.raises(RuntimeError, match="type"):
        layer(x.double())
    assert layer(x[:0]).shape == (0, 128, 8, 8)
    for eager, shape in ((nn.Conv2d(8, 8, 1), (2, 8, 16, 16)), (nn.Linear(8, 8), (2, 8))):
        half = torch.ones(shape).bfloat16()
        with torch.no_grad(), pytest.raises(RuntimeError, match="type"):
            prepare(copy.deepcopy(eager), half_as_fp32=True)(half)
        empty = prepare(eager, dtype=torch.bfloat16, half_as_fp32=True)(half[:0])
        assert empty.shape == (0, *shape[1:])


@packing
@pytest.mark.parametrize("move", ["dtype", "device"])
def test_copies_do_not_outlive_a_move(move: str) -> None:
    """They would waste memory, since no later call uses them."""
    network = prepare(nn.Sequential(nn.Conv2d(128, 128, 3), Upsample(128)))
    linear = prepare(nn.Linear(64, 64), dtype=torch.bfloat16, half_as_fp32=True)
    with torch.no_grad():
        network(image(1, 128, 34, 34))
        linear(torch.ones(2, 64, dtype=torch.bfloat16))
    layers = *network, linear
    assert all(map(made, layers))
    for layer in (network, linear):
        layer.to(torch.float64) if move == "dtype" else layer.to("meta")
    assert all(layer.kept.form is None and not layer.kept.sources for layer in layers)
    if move == "dtype":
        network.float()
        with torch.no_grad():
            network(image(1, 128, 34, 34))
        assert all(map(made, network))


@pytest.mark.parametrize("fault", ["operators of PyTorch", "wrong results"])
def test_a_torch_without_these_operators(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is packed, the log and doctor say why once, and half precision is still widened."""

    def broken(x: Tensor, weight: Tensor, options: object) -> Tensor:
        if fault == "operators of PyTorch":
            raise RuntimeError("expected at most 9 arguments\nbut got 10")
        return torch.zeros(1, 16, 4, 4)

    monkeypatch.setattr(cpu_layers, "packed_conv", broken)
    cpu_layers.packing_objection.cache_clear()
    for _ in range(2):
        assert fault in str(cpu_layers.packing_objection())
    assert [fault in record.getMessage() for record in caplog.records] == [True]
    assert fault in diagnose()["cpu"]["unpacked_convolutions"]
    x = image(1, 128, 16, 16)
    for eager in (nn.Conv2d(128, 128, 3), Upsample(128)):
        layer = prepare(copy.deepcopy(eager))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), eager(x))
        assert not made(layer)
    eager = nn.Conv2d(128, 128, 3)
    layer = prepare(copy.deepcopy(eager), dtype=torch.bfloat16, half_as_fp32=True)
    with torch.no_grad():
        half = x.bfloat16()
        wide = F.conv2d(half.float(), layer.weight.float(), layer.bias.float())
        torch.testing.assert_close(layer(half), wide.bfloat16())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_not_faulted_in_again() -> None:
    """Counts page faults: 64 MiB are 16,384 pages of 4 KiB, or 32 pages of 2 MiB."""
    code = (
        "import resource, torch\n"
        "from fastdiff.runtime.cpu_layers import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(1 << 24)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(min(faults() for _ in range(3)))\n"
        "keep_freed_memory()\n"
        "faults()\n"
        "print(min(faults() for _ in range(3)))\n"
    )
    for _ in range(6):  # glibc keeps nothing in some processes
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, after = map(int, done.stdout.split())
        assert before >= 32
        if after <= before / 10:
            break
    else:
        pytest.fail(f"{after} of {before} pages faulted in again, in each of six processes")


def test_without_glibc_kept_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layers.ctypes, "CDLL", lambda name: object())
    with pytest.raises(OSError, match="glibc"):
        cpu_layers.keep_freed_memory()


def test_a_folded_upsampling_respects_changes_of_its_convolution() -> None:
    """Hooks run, adapters that replace it are called, and other padding modes apply."""
    up = prepared_upsample()
    x = torch.randn(1, 320, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = up(x)
        hook = up.conv.register_forward_hook(lambda module, args, out: out * 0)
        assert not up(x).any()
        hook.remove()
        assert torch.equal(up(x), expected)
        up.conv.padding_mode = "circular"
        up.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
        assert (up(x) - expected).abs().max() > 0.1
        up.conv.padding_mode = "zeros"

        class Adapter(nn.Module):
            def __init__(self, base: nn.Conv2d) -> None:
                super().__init__()
                self.base, self.weight, self.bias = base, base.weight, base.bias

            def forward(self, x: Tensor) -> Tensor:
                return self.base(x) + 100

        up.conv = Adapter(up.conv)  # type: ignore[assignment]
        torch.testing.assert_close(up(x), expected + 100, rtol=1e-4, atol=1e-3)


def test_weights_made_in_inference_mode_are_read_in_every_call() -> None:
    with torch.inference_mode():
        up = prepared_upsample()
        x = torch.randn(1, 320, 32, 32).contiguous(memory_format=torch.channels_last)
        before = up(x) - up.conv.bias[:, None, None]
        up.conv.weight.mul_(2)
        after = up(x) - up.conv.bias[:, None, None]
    torch.testing.assert_close(after, 2 * before, rtol=1e-4, atol=1e-4)


def prepared_upsample() -> cpu_layers.PreparedUpsample:
    torch.manual_seed(0)
    return prepare(Upsample(320))  # type: ignore[return-value]
