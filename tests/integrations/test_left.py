"""What `accelerate` leaves it says: a test for each way in which a module could be passed over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import AccelerateError
from fastdiff.kernels import record_backends
from tests.integrations import blocks
from tests.support.tiny import randomize


def module(name: str, **children: nn.Module) -> nn.Module:
    """A module with this class name and these layers, but an unknown forward."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x

    made = type(name, (nn.Module,), {"forward": forward})()
    for key, child in children.items():
        made.add_module(key, child)
    return made


class Fp32LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class FunctionalGEGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, gate = x.chunk(2, dim=-1)
        return a * F.gelu(gate)


def replaced() -> nn.Module:
    norm = nn.GroupNorm(2, 8)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    return norm


def linear(c: int = 8) -> nn.Linear:
    return nn.Linear(c, c)


SILENCES: dict[str, tuple[Any, str, str]] = {
    # a module that is left, the op that is listed, why
    "PyTorch's attention": (nn.MultiheadAttention(8, 2), "attention", "PyTorch's own fused path"),
    "to_q, to_k, to_v": (
        module("Mixer", to_q=linear(), to_k=linear(), to_v=linear()),
        "attention",
        "fastdiff does not know what the forward of Mixer computes",
    ),
    "q, k, v": (module("Mixer", q=linear(), k=linear(), v=linear()), "attention", "Mixer"),
    "query, key, value": (
        module("Mixer", query=linear(), key=linear(), value=linear()),
        "attention",
        "Mixer",
    ),
    "to_qkv": (module("Mixer", to_qkv=nn.Linear(8, 24)), "attention", "Mixer"),
    "qkv": (module("Mixer", qkv=nn.Linear(8, 24)), "attention", "Mixer"),
    "in_proj": (module("Mixer", in_proj=nn.Linear(8, 24)), "attention", "Mixer"),
    "attention by its name alone": (module("FlashSelfAttention"), "attention", "FlashSelf"),
    "attention by a short name": (module("XAttn", out=linear()), "attention", "XAttn"),
    "linear attention": (blocks.LinearAttention(8, 2), "attention", "LinearAttention"),
    "a cross-attention that computes something else": (
        type(
            "Bent", (blocks.CrossAttention,), {"forward": lambda s, x, context=None: 2 * s.to_q(x)}
        )(8, None, 2),
        "attention",
        "computes something else",
    ),
    "geglu without a projection": (FunctionalGEGLU(), "geglu", "FunctionalGEGLU"),
    "a subclass of LayerNorm": (Fp32LayerNorm(8), "layer norm", "subclass of LayerNorm"),
    "a norm over two dimensions": (
        nn.LayerNorm((4, 8)),
        "layer norm",
        "normalizes over 2 dimensions",
    ),
    "a forward on the object": (replaced(), "group norm", "replaced on this object"),
    "norm and SiLU in an unknown forward": (
        module("Head", norm=nn.GroupNorm(2, 8), act=nn.SiLU()),
        "group norm + silu",
        "how Head's forward uses",
    ),
    "another SiLU in an unknown forward": (
        module("Head", norm=nn.GroupNorm(2, 8), act=blocks.ImprovedSiLU()),
        "group norm + silu",
        "how Head's forward uses",
    ),
    "RMSNorm and SiLU": (blocks.RMSBlock(8, 8), "norm and activation", "its norm is a RMSNorm"),
    "a block that computes something else": (
        blocks.Impostor(8, 8),
        "norm and activation",
        "computes something else",
    ),
    "TorchScript": (
        lambda: nn.Sequential(torch.jit.script(nn.GroupNorm(2, 8))),
        "module",
        "compiled by TorchScript",
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", SILENCES)
@pytest.mark.parametrize("nested", [False, True])
def test_it_is_listed(name: str, nested: bool) -> None:
    left, op, reason = SILENCES[name]
    left = copy.deepcopy(left) if isinstance(left, nn.Module) else left()
    whole = nn.ModuleDict({"inner": nn.ModuleList([left])}) if nested else left
    with pytest.raises(AccelerateError, match="would be left") as error:
        fastdiff.accelerate(whole, strict=True)
    entries = [e for e in error.value.report.left if e.op == op]
    assert len(entries) == 1, error.value
    assert reason in str(entries[0].reason)
    assert entries[0].name.startswith("inner.0" if nested else "")


def test_what_is_served_inside_is_not_listed_outside() -> None:
    """A block around an attention, a container with a norm and an activation of its blocks."""
    served = module("AttentionStack", inner=blocks.AttentionBlock(16, 2, legacy=True))
    report = fastdiff.accelerate(served, strict=True)
    assert report.count("attention") == (1, 0)
    perceptron = module("Mlp", norm=nn.LayerNorm(8), act=nn.SiLU(), out=linear())
    assert fastdiff.accelerate(perceptron, strict=True).count("layer norm") == (1, 0)


def test_a_unet_of_improved_diffusion() -> None:
    """Its own SiLU, and an attention with the heads in the batch: served, both."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = (blocks.ImprovedResBlock(16, 16, film) for film in (True, False))
            self.middle = blocks.ImprovedAttentionBlock(16, 4)

        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            return self.up(self.middle(self.down(x, emb)), emb)

    net = Net()
    randomize(net, 3)
    x, emb = torch.randn(2, 16, 4, 3), torch.randn(2, 12)
    wanted = net(x, emb)
    report = fastdiff.accelerate(net, strict=True)
    assert report.count("residual block") == (2, 0)
    assert report.count("attention") == (1, 0)
    assert report.pairs == 4
    with record_backends() as ran:
        torch.testing.assert_close(net(x, emb), wanted, rtol=1e-4, atol=1e-4)
    assert {"add_group_norm_silu", "group_norm_silu", "attention"} <= set(ran)


def test_a_unet_of_lucidrains_with_rms_norms() -> None:
    """No op of ours computes its norms: every block and every attention is listed."""
    net = nn.ModuleList([blocks.RMSResnetBlock(8), blocks.RMSResnetBlock(8)])
    net.append(blocks.LinearAttention(8, 2))
    with pytest.raises(AccelerateError, match="its norm is a RMSNorm") as error:
        fastdiff.accelerate(net, strict=True)
    report = error.value.report
    assert report.count("norm and activation") == (0, 4)
    assert report.count("attention") == (0, 1)
    assert [e.name for e in report.left if e.op == "attention"] == ["2"]


@pytest.mark.parametrize(
    "act", [nn.SiLU(), blocks.ImprovedSiLU(), type("Swish", (blocks.ImprovedSiLU,), {})()]
)
def test_another_silu_is_fused_with_its_norm(act: nn.Module) -> None:
    pair = nn.Sequential(nn.GroupNorm(2, 8), act)
    x = torch.randn(2, 8, 3, 3)
    wanted = pair(x)
    assert fastdiff.accelerate(pair, strict=True).pairs == 1
    torch.testing.assert_close(pair(x), wanted)


def test_what_is_only_named_so_is_not_a_silu() -> None:
    class Swish(nn.Module):
        def __init__(self, beta: float) -> None:
            super().__init__()
            self.beta = beta

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    class OtherSiLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * F.silu(x)

    for act in (Swish(2.0), OtherSiLU(), nn.Hardswish()):
        pair = nn.Sequential(nn.GroupNorm(2, 8), act)
        x = torch.randn(2, 8, 3, 3)
        wanted = pair(x)
        assert fastdiff.accelerate(pair).pairs == 0
        torch.testing.assert_close(pair(x), wanted)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_report_is_never_cut(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every name is whole in 80 columns, and nothing is lost in 40."""
    monkeypatch.setenv("COLUMNS", str(columns))
    deep = nn.ModuleDict(
        {"a_rather_long_name": nn.ModuleDict({"of_a_module": blocks.Impostor(8, 8)})}
    )
    report = fastdiff.accelerate(deep)
    report.print()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    squeezed = "".join(printed.split())
    for entry in report.entries:
        for word in (entry.by or str(entry.reason)).split():
            assert word in (squeezed if columns < 80 else printed)
    assert "a_rather_long_name.of_a_module" in (squeezed if columns < 80 else printed)
    assert "\u2026" not in printed
