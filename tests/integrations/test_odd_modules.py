"""Modules that resemble what `fastdiff.accelerate` knows, and calls in an unusual order."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import AccelerateError
from fastdiff.integrations.known_blocks import proof
from tests.integrations import blocks
from tests.integrations.models import UNETS, VAE, Network, build
from tests.support.tiny import randomize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Choice(blocks.Block):
    """One class, two functions; an int says which."""

    def __init__(self, mode: int) -> None:
        super().__init__(16, 16)
        self.mode = mode

    def forward(self, x: Tensor, scale_shift: Any = None) -> Tensor:
        return super().forward(x, scale_shift) * (1.5 if self.mode == 2 else 1)


class NotANumber(blocks.Block):
    def forward(self, x: Tensor, scale_shift: Any = None) -> Tensor:
        return super().forward(x, scale_shift).log()


class Two(blocks.ResnetBlock):
    def forward(self, x: Tensor, temb: Tensor | None = None) -> Any:
        return super().forward(x, temb), x


class Particular(blocks.ResnetBlock):
    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        assert x.shape[2] == 64, "images of 64 pixels only"
        return super().forward(x, temb)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm, self.act = nn.Linear(16, 16), nn.GroupNorm(4, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.proj(x)))


def no_linear() -> nn.Module:
    block = blocks.ResBlock(16, 16, film=False)
    block.emb_layers = nn.Conv2d(16, 16, 1)  # type: ignore[assignment]
    return block


def uncopied() -> nn.Module:
    """PyTorch's older weight_norm: the weight is not a leaf, so it cannot be copied."""
    block = blocks.ResnetBlock(16, 16)
    nn.utils.weight_norm(block.conv1)
    block(torch.randn(1, 16, 4, 4), None)
    return block


def test_an_int_may_choose_what_a_block_computes() -> None:
    net = randomize(nn.Sequential(Choice(1), Choice(2), Choice(1)), 2)
    x = torch.randn(1, 16, 4, 4)
    wanted = net(x)
    report = fastdiff.accelerate(net)
    assert [e.name for e in report.left] == ["1"]
    torch.testing.assert_close(net(x), wanted)


def test_blocks_of_other_sizes_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model has many widths and few kinds of block; each comparison takes time."""
    compared: list[str] = []

    def counted(module: nn.Module, kind: Any) -> str | None:
        compared.append(type(module).__name__)
        return proof(module, kind)

    monkeypatch.setattr("fastdiff.integrations.planner.proof", counted)
    net = nn.Sequential(
        *(blocks.ResBlock(c, c, film=True, updown=True) for c in (16, 32, 64)),
        *(blocks.ResnetBlock(16, c) for c in (24, 48)),
    )
    for c, block in zip((16, 32, 64), net, strict=False):
        block.x_upd.channels = c  # as guided-diffusion's Upsample has it, without a weight
    assert fastdiff.accelerate(net, strict=True).pairs == 10
    assert sorted(compared) == ["GroupNorm32", "ResBlock", "ResnetBlock"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: NotANumber(16, 16), "computes something else .*nan"),
        (lambda: Two(16, 16), "calling a copy like one fails .*does not return one tensor"),
        (lambda: Particular(16, 16), "calling a copy like one fails .*images of 64 pixels only"),
        (Linear, "calling a copy like one fails .*in_channels"),
        (no_linear, "calling a copy like one fails .*not iterable"),
        (uncopied, "calling a copy like one fails .*deepcopy"),
    ],
)
def test_what_cannot_be_compared_is_left(make: Callable[[], nn.Module], reason: str) -> None:
    module = make()
    with pytest.raises(AccelerateError, match=reason):
        fastdiff.accelerate(module, strict=True)
    assert len(fastdiff.accelerate(module).left) == 1


def test_the_comparison_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded GPUs"))
    module = blocks.ResnetBlock(16, 16)
    state = torch.get_rng_state()
    fastdiff.accelerate(module, strict=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_torchscript_is_left() -> None:
    pair = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    x = torch.randn(2, 4, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about TorchScript
        both = nn.ModuleDict({"traced": torch.jit.trace(pair, x), "plain": nn.GroupNorm(2, 4)})
    report = fastdiff.accelerate(both)
    assert [e.name for e in report.swapped] == ["plain"]
    assert [(e.name, "TorchScript" in str(e.reason)) for e in report.left] == [("traced", True)]
    torch.testing.assert_close(both["traced"](x), pair(x))
    assert str(fastdiff.accelerate(both["traced"])) == "0 modules swapped, 1 left"


def test_a_norm_restored_before_its_block() -> None:
    block = randomize(blocks.ResnetBlock(16, 24), 1)
    x = torch.randn(2, 16, 4, 4)
    wanted = block(x, None)
    first = fastdiff.accelerate(block.norm1)
    second = fastdiff.accelerate(block, strict=True)
    first.restore()
    torch.testing.assert_close(block(x, None), wanted)
    second.restore()
    assert torch.equal(block(x, None), wanted)
    assert not any("fastdiff" in type(m).__module__ for m in block.modules())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_last_norm_that_an_earlier_call_has_swapped(order: tuple[int, int]) -> None:
    network = Network("UNet2DConditionModel", UNETS["sd15"])
    inputs = network.inputs()
    with torch.no_grad():
        wanted = network(*inputs)
        reports = [fastdiff.accelerate(network.inner.conv_norm_out), fastdiff.accelerate(network)]
        entry = next(e for e in reports[1].entries if e.name == "inner.conv_norm_out")
        assert (entry.pairs, entry.by) == (1, "layers.GroupNormBeforeSiLU")
        assert type(network.inner.conv_norm_out).__name__ == "GroupNormBeforeSiLU"
        torch.testing.assert_close(network(*inputs), wanted, rtol=1e-4, atol=1e-4)
        for index in order:
            reports[index].restore()
        assert not any("fastdiff" in type(m).__module__ for m in network.modules())
        assert torch.equal(network(*inputs), wanted)


def test_layers_replaced_afterwards_are_called() -> None:
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    block, transformer = unet.down_blocks[0].resnets[0], unet.mid_block.attentions[0]
    twin = copy.deepcopy(unet)
    fastdiff.accelerate(unet, strict=True)
    for net in (unet, twin):
        net.down_blocks[0].resnets[0].nonlinearity = nn.GELU()
        net.down_blocks[0].resnets[0].norm2 = nn.Identity()
        net.mid_block.attentions[0].transformer_blocks[0].norm2 = nn.Identity()
    x, emb, tokens = torch.randn(2, 32, 4, 4), torch.randn(2, 128), torch.randn(2, 6, 64)
    context = torch.randn(2, 5, 24)
    theirs = twin.down_blocks[0].resnets[0], twin.mid_block.attentions[0]
    torch.testing.assert_close(block(x, emb), theirs[0](x, emb))
    ours, wanted = (t.transformer_blocks[0] for t in (transformer, theirs[1]))
    torch.testing.assert_close(
        ours(tokens, encoder_hidden_states=context), wanted(tokens, encoder_hidden_states=context)
    )


def test_a_report_does_not_keep_what_was_deleted() -> None:
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    report = fastdiff.accelerate(unet, pack_cpu_weights=True)
    there = [weakref.ref(m) for m in unet.modules()] + [weakref.ref(p) for p in unet.parameters()]
    del unet
    gc.collect()
    assert not any(ref() is not None for ref in there)
    report.restore()
    report.restore()
    assert "residual block" in report.json


def test_nothing_to_do_is_said() -> None:
    assert str(fastdiff.accelerate(nn.ReLU())).startswith("found no module")
    for nothing in ([], None, "unet", torch.zeros(2)):
        with pytest.raises(TypeError, match=f"got {type(nothing).__name__} without a module"):
            fastdiff.accelerate(nothing)
    with pytest.raises(TypeError, match="needs a pipeline with a scheduler, got Linear"):
        fastdiff.accelerate(nn.Linear(2, 2), scheduler="fused")


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_diffusers_with_other_private_methods(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    unet = build("UNet2DConditionModel", UNETS["sd15"])
    name = "_operate_on_continuous_inputs"
    if change == "gone":
        monkeypatch.delattr(Transformer2DModel, name)
    else:
        monkeypatch.setattr(Transformer2DModel, name, lambda self, hidden_states, more: None)
    report = fastdiff.accelerate(unet)
    assert {(e.op, e.reason) for e in report.left} == {
        ("transformer", f"this diffusers has no {name}(self, hidden_states)")
    }


def test_strict_changes_nothing() -> None:
    decoder = build("AutoencoderKL", {**VAE, "act_fn": "mish"})
    kinds = [type(m) for m in decoder.modules()]
    with pytest.raises(AccelerateError, match="its activation is Mish, not SiLU") as caught:
        fastdiff.accelerate(decoder, strict=True)
    assert [type(m) for m in decoder.modules()] == kinds
    assert caught.value.report.pairs == 2  # its two conv_act are SiLU whatever act_fn says


def test_without_diffusers() -> None:
    """Modules are served; a pipeline's scheduler says what to install."""
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import torch, fastdiff\n"
        "pair = torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU())\n"
        "print(fastdiff.accelerate(pair).pairs)\n"
        "fastdiff.accelerate(pair, scheduler='fused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n"
    assert "pip install 'fastdiff[diffusers]'" in done.stderr.splitlines()[-1]
