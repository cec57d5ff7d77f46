"""`accelerate(verify=True)`: what differs from its original is found at first use and restored."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import known_blocks
from fastdiff.integrations.verify import VerificationWarning, Verified
from fastdiff.kernels import record_backends
from tests.integrations import blocks
from tests.integrations.models import NETWORKS, Network, build
from tests.support.tiny import randomize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

X, EMB = torch.randn(2, 16, 4, 3, generator=torch.Generator().manual_seed(1)), torch.randn(2, 12)


def known(dropout: float = 0.0) -> nn.Module:
    """Blocks of three repositories, one after another."""
    net = Known()
    randomize(net, 3)
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    return net


class Known(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.residual = blocks.ResBlock(16, 16, film=True)
        self.attention = blocks.AttentionBlock(16, 2, legacy=True)
        self.gated = blocks.GEGLU(16, 16)
        self.head = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.residual(x, EMB[: len(x)]))
        return self.head(self.gated(x.movedim(1, -1)).movedim(-1, 1))


def quietly(call: Callable[[], Any]) -> Any:
    """Whatever it returns; a module that is restored would be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", VerificationWarning)
        return call()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_pass(name: str) -> None:
    network = Network(*NETWORKS[name])
    twin, inputs = copy.deepcopy(network), network.inputs()
    fastdiff.accelerate(twin)
    report = fastdiff.accelerate(network, verify=True)
    with torch.no_grad():
        wanted = twin(*inputs)
        for _ in range(2):
            assert torch.equal(quietly(lambda: network(*inputs)), wanted)
    assert not report.left
    assert set(report.verified.values()) == {1}
    swapped = {e.name for e in report.swapped if e.op != "memory format"}
    assert {*report.verified, *report.unverified} == swapped
    assert {*report.unverified.values()} <= {
        "called with fused arguments: compared as part of the block around it",
        "not called, or only in graphs of torch.compile",
    }
    parts = {e.op for e in report.swapped if e.name in report.verified}
    assert {"residual block", "attention"} <= parts


BROKEN: dict[str, tuple[str, Any, list[str]]] = {
    # what is replaced, by what, the modules that have to be restored
    "geglu": ("known_blocks.geglu", lambda x: 1.01 * torch.ones_like(x[..., ::2]), ["gated"]),
    "attention": (
        "known_blocks.attention",
        lambda q, k, v, **options: torch.roll(v, 1, dims=1),
        ["attention.attention"],
    ),
    "norm": (
        "layers.group_norm_silu",
        lambda x, groups, *args, **options: 1.02 * x,
        [
            "residual",
            "residual.in_layers",
            "residual.in_layers.0",
            "residual.out_layers.0",
            "attention.norm",
            "head",
            "head.0",
        ],  # a restored block calls its norms as they were
    ),
    "an error": ("known_blocks.geglu", lambda x: x.no_such_method(), ["gated"]),
    "another dtype": ("known_blocks.geglu", lambda x: x[..., ::2].double(), ["gated"]),
    "another shape": ("known_blocks.geglu", lambda x: x, ["gated"]),
    "not a number": ("known_blocks.geglu", lambda x: x[..., ::2] * float("nan"), ["gated"]),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_swap_is_restored(
    fault: str,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where, function, names = BROKEN[fault]
    net = known(dropout=0.3 if training else 0.0).train(training)
    plain = copy.deepcopy(net)
    report = fastdiff.accelerate(net, verify=True)
    monkeypatch.setattr(f"fastdiff.integrations.{where}", function)
    torch.manual_seed(5)
    x = X.clone().requires_grad_()
    with pytest.warns(VerificationWarning) as caught:
        found = net(x)
    assert {str(w.message).split()[2] for w in caught} == set(names)
    assert {e.name for e in report.left} == set(names)
    assert all(str(e.reason).startswith("restored: ") for e in report.left)
    assert report.data["counts"]["group norm"]["swapped"] == report.count("group norm")[0]
    for name in names:
        assert type(net.get_submodule(name)) is type(plain.get_submodule(name))
    if not training:  # masks of dropout lie in memory as the tensors do
        y = X.clone().requires_grad_()
        wanted = plain(y)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for got, right in zip(
            torch.autograd.grad(found.square().sum(), [x, *net.parameters()]),
            torch.autograd.grad(wanted.square().sum(), [y, *plain.parameters()]),
            strict=True,
        ):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)
    quietly(lambda: net(X))
    report.print()
    assert "modules matched their originals" in capsys.readouterr().out
    report.restore()
    assert not any("fastdiff" in type(m).__module__ for m in net.modules())
    assert [sorted(m.__dict__) for m in net.modules()] == [
        sorted(m.__dict__) for m in plain.modules()
    ]


def test_the_last_norm_of_a_unet_is_restored_with_its_silu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are two modules and one op."""
    network = Network(*NETWORKS["sd15"])
    inputs = network.inputs()
    with torch.no_grad():
        wanted = network(*inputs)
        report = fastdiff.accelerate(network, verify=True)
        norm = network.inner.conv_norm_out
        before = type(norm).__mro__[2].forward  # of GroupNormBeforeSiLU
        monkeypatch.setattr(type(norm).__mro__[2], "forward", lambda self, x: 1.1 * before(self, x))
        with pytest.warns(VerificationWarning, match="conv_norm_out"):
            found = network(*inputs)
    assert type(norm) is nn.GroupNorm
    assert type(network.inner.conv_act) is nn.SiLU
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    report.restore()
    with torch.no_grad():
        assert torch.equal(network(*inputs), wanted)


def test_random_numbers_are_those_of_an_unverified_call() -> None:
    """Dropout is switched off for the comparison, and the generators stay where they were."""
    outcomes, one = [], known(dropout=0.4).train()
    for verify in (False, True):
        net = copy.deepcopy(one)
        fastdiff.accelerate(net, verify=verify)
        torch.manual_seed(3)
        outcomes.append((quietly(lambda net=net: net(X)).detach(), torch.get_rng_state()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_hooks_are_called_as_often_as_without() -> None:
    """One of them changes what a layer inside a block returns."""
    net = known()
    plain, calls = copy.deepcopy(net), []
    report = fastdiff.accelerate(net, verify=True)
    for one in (net, plain):
        one.residual.register_forward_hook(lambda m, args, y: calls.append("outer"))
        one.residual.out_layers[3].register_forward_hook(
            lambda m, args, y: calls.append("in") or -y
        )
    found = quietly(lambda: net(X))
    assert calls == ["in", "outer"]
    torch.testing.assert_close(found, plain(X), rtol=1e-4, atol=1e-5)
    assert report.verified["residual"] == 1


def test_a_changed_input_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the same, but what the caller holds is not; it gets it back."""
    net = known()
    tokens = torch.randn(2, 5, 16)
    wanted, kept = net.gated(tokens), tokens.clone()
    report = fastdiff.accelerate(net, verify=True)
    before = known_blocks.GatedGELU.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        y = before(self, x)
        x.add_(1)
        return y

    monkeypatch.setattr(type(net.gated).verifies, "forward", forward)
    with pytest.warns(VerificationWarning, match="changes its inputs in a different way"):
        found = net.gated(tokens)
    assert torch.equal(found, wanted)
    assert torch.equal(tokens, kept)
    assert [e.name for e in report.left] == ["gated"]


def test_each_signature_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, dtypes, strides, gradients, training: each may choose another kernel."""
    net = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU())
    report = fastdiff.accelerate(net, verify=True)
    runs: list[int] = []
    before = nn.Sequential.forward
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: runs.append(1) or before(self, x))
    calls: list[tuple[Callable[[], Any], int]] = [
        (lambda: net(X), 1),
        (lambda: net(X + 1), 0),
        (lambda: net(X[:1]), 1),
        (lambda: net(X.contiguous(memory_format=torch.channels_last)), 1),
        (lambda: net(X.clone().requires_grad_()), 1),
        (lambda: torch.no_grad()(net)(X), 1),
        (lambda: torch.no_grad()(net)(X), 0),
        (lambda: net.eval()(X), 1),
    ]
    for call, new in calls:
        runs.clear()
        quietly(call)
        assert len(runs) == new
    assert report.verified[""] == 6


def test_half_precision_and_autocast_and_packed_weights() -> None:
    network = Network(*NETWORKS["sd15"]).bfloat16()
    inputs = [x.bfloat16() for x in network.inputs()]
    report = fastdiff.accelerate(network, verify=True, pack_cpu_weights=True)
    with torch.no_grad():
        quietly(lambda: network(*inputs))
        network.float()
        quietly(lambda: network(*network.inputs()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            quietly(lambda: network(*network.inputs()))
    assert not report.left
    assert max(report.verified.values()) == 3
    assert {"weights", "attention"} <= {e.op for e in report.swapped if e.name in report.verified}


def test_what_cannot_be_compared_says_so() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = known()
    report = fastdiff.accelerate(net, verify=True)
    torch.vmap(lambda x: net(x[None])[0])(X)
    assert report.unverified["residual"].startswith("called under torch.func")
    assert not report.verified
    net = known().to("meta")
    report = fastdiff.accelerate(net.gated, verify=True)
    net.gated(torch.empty(2, 16, device="meta"))
    assert report.unverified[""] == "called with tensors on the meta device"
    network = Network(*NETWORKS["sd15"]).requires_grad_(False)
    report = fastdiff.accelerate(network, verify=True)
    accelerate.cpu_offload(network.inner, execution_device="cpu")
    with record_backends() as ran:
        quietly(lambda: network(*network.inputs()))
    assert "attention" in ran
    reason = report.unverified["inner.mid_block.attentions.0"]
    assert reason.startswith("Hugging Face's accelerate loads the weights")


@pytest.mark.slow
def test_compiled_graphs_are_not_compared() -> None:
    net = known()
    wanted = net(X)
    report = fastdiff.accelerate(net, verify=True)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), wanted, rtol=1e-4, atol=1e-5)
    assert not report.verified
    assert report.unverified["residual"] == "not called, or only in graphs of torch.compile"
    torch._dynamo.reset()
    quietly(lambda: net(X))
    assert report.verified["residual"] == 1


def test_copies_are_swapped_but_not_verified() -> None:
    net = build(*NETWORKS["sd15"])
    report = fastdiff.accelerate(net, verify=True)
    assert any(isinstance(m, Verified) for m in net.modules())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert not any(isinstance(m, Verified) for m in other.modules())
        assert list(other.state_dict()) == list(net.state_dict())
        again = fastdiff.accelerate(other, verify=True)
        assert again.changed == 0
        assert [(e.name, e.by) for e in again.swapped] == [(e.name, e.by) for e in report.swapped]
        assert not again.unverified
    again = fastdiff.accelerate(net)
    assert [(e.name, e.by) for e in again.swapped] == [(e.name, e.by) for e in report.swapped]
    report.restore()
    assert not any("fastdiff" in type(m).__module__ for m in net.modules())
