"""Modules that are wrapped, parametrized, shared, hooked or converted, before or after the swap.

Each computes what the original computes when the same is done to it, against fp64, or is left and
listed with the reason.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, parametrize, prune

import fastdiff
from fastdiff.kernels import record_backends
from tests.integrations import blocks
from tests.integrations.models import UNETS, Network
from tests.support.parity import assert_gradient_parity, assert_parity
from tests.support.tiny import randomize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Net(nn.Module):
    """Blocks of three repositories, and a norm before a SiLU in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.residual = blocks.ResnetBlock(16, 16, temb=12)
        self.attention = blocks.AttentionBlock(16, 2, legacy=True)
        self.attention.norm = nn.GroupNorm(4, 16)  # GroupNorm32 would round fp64 to fp32
        self.transformer = blocks.BasicTransformerBlock(16, 20)
        self.head = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.attention(self.residual(x, emb))
        tokens = self.transformer(x.flatten(2).mT, context)
        return self.head(tokens.mT.reshape(x.shape))


@cache
def made() -> Net:
    whole = Net()
    randomize(whole, 3)
    return whole


def net() -> Net:
    """A model with the same weights each time."""
    return copy.deepcopy(made())


def call(module: nn.Module, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    shapes = (2, 16, 4, 3), (2, 12), (2, 5, 20)
    inputs = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    return module(*inputs)


def slopes(module: nn.Module, seed: int) -> Tensor:
    """The gradient of the sum of squares for all parameters, each over its rms."""
    found = torch.autograd.grad(
        call(module, seed).square().sum(),
        [p for p in module.parameters() if p.requires_grad],
        allow_unused=True,
    )
    return torch.cat([g.flatten() for g in found if g is not None])


def on_every(kind: type[nn.Module], do: Callable[[nn.Module], Any]) -> Callable[[Net], nn.Module]:
    """Something done to each layer of a kind."""

    def wrap(whole: Net) -> nn.Module:
        for layer in list(whole.modules()):
            if isinstance(layer, kind):
                do(layer)
        return whole

    return wrap


class Sharded(nn.Module):
    """As FSDP does: attributes are the inner module's, and the weights are there in calls only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        inner.register_forward_pre_hook(self.gather)
        inner.register_forward_hook(self.scatter)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def gather(self, module: nn.Module, args: Any) -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.mul(2)

    def scatter(self, module: nn.Module, args: Any, y: Any) -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.div(2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def low_rank(whole: Net) -> nn.Module:
    """A LoRA by hand: the layer is inside another module."""
    for block in (whole.transformer.attn1, whole.transformer.attn2):
        for name in ("to_q", "to_v"):
            setattr(block, name, LowRank(getattr(block, name)))
    return whole


class LowRank(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.in_features = layer, layer.in_features
        draw = torch.Generator().manual_seed(1)
        kwargs: Any = {"generator": draw, "dtype": torch.float64}
        self.down = nn.Parameter(0.1 * torch.randn(2, layer.in_features, **kwargs).to(layer.weight))
        self.up = nn.Parameter(0.1 * torch.randn(layer.out_features, 2, **kwargs).to(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.mT @ self.up.mT


def hooked(whole: Net) -> nn.Module:
    """Pre-hooks and hooks, with keyword arguments and without, which change what passes."""
    whole.residual.register_forward_pre_hook(
        lambda m, args, kwargs: ((1.5 * args[0], *args[1:]), kwargs), with_kwargs=True
    )
    whole.residual.norm2.register_forward_pre_hook(lambda m, args: (0.5 * args[0],))
    whole.transformer.norm2.register_forward_hook(lambda m, args, y: 2 * y)
    whole.attention.register_forward_hook(lambda m, a, k, y: 0.5 * y, with_kwargs=True)
    whole.head[1].register_forward_hook(lambda m, args, y: y + 1)
    return whole


def shared(whole: Net) -> nn.Module:
    """One norm in two blocks, one SiLU, one attention twice in a block."""
    whole.head[0] = whole.residual.norm1 = whole.residual.norm2
    whole.transformer.norm1 = whole.transformer.norm3
    return whole


def norms_without_weights(whole: Net) -> nn.Module:
    whole.residual.norm1 = nn.GroupNorm(4, 16, affine=False)
    whole.transformer.norm1 = nn.LayerNorm(16, elementwise_affine=False)
    whole.transformer.norm2 = nn.LayerNorm(16, bias=False).to(whole.transformer.norm2.weight)
    whole.head[1] = nn.SiLU(inplace=True)
    return whole


def spectral(layer: nn.Module) -> None:
    """Its first singular vectors are drawn: the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(layer.weight.numel()))  # type: ignore[union-attr,operator]
        parametrizations.spectral_norm(layer, n_power_iterations=20)


class Listed(nn.Module):
    def __init__(self, whole: Net) -> None:
        super().__init__()
        self.parts = nn.ModuleList(whole.children())
        self.scales = nn.ParameterList([torch.full((1,), 0.5).to(whole.head[2].weight)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        residual, attention, transformer, head = self.parts
        x = attention(residual(x, emb)) * self.scales[0]
        return head(transformer(x.flatten(2).mT, context).mT.reshape(x.shape))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


WAYS: dict[str, Callable[[Net], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "a wrapper that gathers weights": Sharded,
    "ModuleList": Listed,
    "weight norm of convolutions": on_every(nn.Conv2d, parametrizations.weight_norm),
    "weight norm of linear layers": on_every(nn.Linear, parametrizations.weight_norm),
    "spectral norm": on_every(nn.Conv2d, spectral),
    "weight norm of norms": on_every(
        nn.GroupNorm, lambda m: parametrize.register_parametrization(m, "weight", Halved())
    ),
    "pruning": on_every(nn.Linear, lambda m: prune.l1_unstructured(m, "weight", amount=0.3)),
    "low rank by hand": low_rank,
    "hooks": hooked,
    "shared layers": shared,
    "norms without weights": norms_without_weights,
    "frozen": lambda whole: whole.eval().requires_grad_(False),
    "training and back": lambda whole: whole.train().eval().train(),
    "backward hooks": on_every(
        nn.GroupNorm, lambda m: m.register_full_backward_hook(lambda m, given, out: None)
    ),
    "moved and back": lambda whole: whole.bfloat16().float().to(memory_format=torch.channels_last),
}


WITHOUT_GRADIENTS = ("frozen", "a wrapper that gathers weights")  # FSDP gathers them again


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_it_computes_what_the_original_does(way: str, when: str) -> None:
    wrap = WAYS[way]
    plain, wide = (wrap(one) for one in (net(), net().double()))
    if way == "moved and back":
        wide = wide.double()  # weights that were rounded to bf16
    module: Any = net()
    module = wrap(module) if when == "before" else module
    report = fastdiff.accelerate(module)
    module = wrap(module) if when == "after" else module
    assert report.swapped
    with record_backends() as ran, torch.no_grad():
        assert_parity(*(partial(call, m) for m in (module, wide, plain)))
    assert ran
    if way not in WITHOUT_GRADIENTS:
        assert_gradient_parity(*(partial(slopes, m) for m in (module, wide, plain)))
    assert list(module.state_dict()) == list(plain.state_dict())


def test_state_dicts_dtypes_and_modes_after_the_swap() -> None:
    """Loaded strictly, assigned, cast and cast back, trained and evaluated."""
    first, second = net(), Net()
    randomize(second, 4)
    state = second.state_dict()
    fastdiff.accelerate(first)
    for assign in (False, True):
        module = copy.deepcopy(first)
        module.load_state_dict(state, assign=assign)
        for change in (lambda m: m.double(), lambda m: m.float(), lambda m: m.eval().train()):
            change(module)
            change(second)
            with torch.no_grad():
                torch.testing.assert_close(call(module, 0), call(second, 0), rtol=1e-4, atol=1e-4)
    assert all(m.training for m in module.modules())


def test_copies_and_pickles_of_known_blocks() -> None:
    """Their classes are made when the block is swapped, and made again in another process."""
    module = net()
    report = fastdiff.accelerate(module)
    with torch.no_grad():
        wanted = call(module, 0)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for other in (
            copy.deepcopy(module),
            copy.copy(module),
            pickle.loads(pickle.dumps(module)),  # noqa: S301
            torch.load(file, weights_only=False),
        ):
            assert [type(m) for m in other.modules()] == [type(m) for m in module.modules()]
            assert torch.equal(call(other, 0), wanted)
        again = fastdiff.accelerate(copy.deepcopy(module))
        assert again.changed == 0
        report.restore()
        assert not any("fastdiff" in type(m).__module__ for m in module.modules())


class Positional(blocks.ResnetBlock):
    def forward(self, x: Tensor, /, temb: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, temb)


class Swallowing(blocks.ResnetBlock):
    """Anything may be passed; `scale` does something."""

    def forward(self, x: Tensor, temb: Any = None, *more: Any, **others: Any) -> Tensor:
        h = super().forward(x, temb)
        return sum(more, start=h * others.get("scale", 1.0))


class Ready(blocks.ResnetBlock):
    """Its embedding is not None by default."""

    def forward(self, x: Tensor, temb: Any = "half") -> Tensor:  # type: ignore[override]
        half = torch.full((len(x), 12), 0.5)
        return super().forward(x, half if isinstance(temb, str) else temb)


class Reporting(blocks.CrossAttention):
    """It returns more where that is asked for."""

    def forward(self, x: Tensor, context: Any = None, mask: Any = None, more: bool = False) -> Any:
        y = super().forward(x, context, mask)
        return (y, x.shape) if more else y


X, EMB, TOKENS = torch.randn(2, 16, 4, 3), torch.randn(2, 12), torch.randn(2, 6, 16)
Call = tuple[tuple[Any, ...], dict[str, Any]]
SIGNATURES: dict[str, tuple[type[nn.Module], dict[str, Any], list[Call]]] = {
    # class, its arguments, calls of which the first is served
    "positional only": (
        Positional,
        {"c": 16, "out": 16, "temb": 12},
        [((X, EMB), {}), ((X,), {"temb": EMB}), ((X,), {})],
    ),
    "more arguments": (
        Swallowing,
        {"c": 16, "out": 16, "temb": 12},
        [
            ((X, EMB), {}),
            ((X, EMB, 2.0), {}),
            ((X,), {"temb": EMB, "scale": 3.0}),
            ((X,), {"a": 1}),
        ],
    ),
    "a default that is not None": (
        Ready,
        {"c": 16, "out": 16, "temb": 12},
        [((X, EMB), {}), ((X,), {}), ((), {"x": X})],
    ),
    "more results": (
        Reporting,
        {"dim": 16, "context": None, "heads": 2},
        [((TOKENS,), {}), ((TOKENS,), {"more": True}), ((TOKENS, None, None, False), {})],
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_unusual_signatures(name: str) -> None:
    kind, options, calls = SIGNATURES[name]
    block = kind(**options)
    randomize(block, 3)
    plain = copy.deepcopy(block)
    fastdiff.accelerate(block, strict=True)
    for number, (args, kwargs) in enumerate(calls):
        with record_backends() as ran:
            found = block(*args, **kwargs)
        torch.testing.assert_close(found, plain(*args, **kwargs), rtol=1e-4, atol=1e-5)
        assert ran or number
    with pytest.raises(TypeError):
        block()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_quantized_layers(when: str) -> None:
    """int8 linear layers in the place of the blocks' own: the blocks that can call them do."""

    def quantized(module: nn.Module) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)

    plain, module = quantized(net()), net()
    module = quantized(module) if when == "before" else module
    report = fastdiff.accelerate(module)
    module = quantized(module) if when == "after" else module
    assert report.count("residual block") == (1, 0)
    if when == "before":
        reasons = {e.name: str(e.reason) for e in report.left}
        assert "attention" in {e.op for e in report.left if e.name == "transformer.attn1"}
        assert reasons["transformer.attn1"]
    with record_backends() as ran, torch.no_grad():
        found, wanted = call(module, 0), call(plain, 0)
    assert "group_norm_silu" in ran
    # a last digit more or less moves an int8 number by a step of 1/127 of the largest
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_module(when: str) -> None:
    """The object that `torch.compile` returns is entered, or made of an accelerated module; calls
    of equal shapes compile once."""
    torch._dynamo.reset()
    module, plain, graphs = net(), net(), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(module, backend=count)
    if when == "before":
        call(compiled, 0)
        assert fastdiff.accelerate(compiled).swapped
    else:
        assert fastdiff.accelerate(module).swapped
        compiled = torch.compile(module, backend=count)
    graphs.clear()
    with torch.no_grad():
        for seed in range(20):
            torch.testing.assert_close(
                call(compiled, seed), call(plain, seed), rtol=1e-4, atol=1e-4
            )
    assert len(graphs) == 1
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert any("group_norm_silu" in name for name in names)
    torch._dynamo.reset()


SMALL = {
    **UNETS["sd15"],
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"verify": True}, {"pack_cpu_weights": True}], ids=str)
def test_equal_shapes_compile_once_per_kind_of_backend(options: dict[str, Any]) -> None:
    """A U-Net of diffusers: a graph for the kernels and one for the reference, in 20 calls each."""
    network = Network("UNet2DConditionModel", SMALL)
    with torch.no_grad():
        wanted = [network(*network.inputs(seed)) for seed in range(20)]
        fastdiff.accelerate(network, **options)
        network(*network.inputs())  # eager before, between and after changes nothing
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        for graphs, backend in ((1, "auto"), (2, "reference"), (2, "auto")):
            for seed, right in enumerate(wanted):
                with fastdiff.backend(backend):
                    found = compiled(*network.inputs(seed))
                torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
                if seed == 3:
                    network(*network.inputs(seed))
            assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
