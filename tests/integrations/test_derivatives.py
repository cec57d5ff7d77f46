"""Higher and forward-mode derivatives of accelerated models: as the original's, at similar cost."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from tests.integrations import blocks
from tests.integrations.models import UNCONDITIONAL, UNETS, build
from tests.support.parity import assert_gradient_parity
from tests.support.tiny import randomize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

T, CONTEXT = (
    torch.tensor([321.0]),
    torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0)),
)


def unconditional() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    net = build("UNet2DModel", UNCONDITIONAL)
    return net, lambda x: net(x[None], T).sample[0], torch.randn(2, 3, 8, 8)


def conditional() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    net = build("UNet2DConditionModel", UNETS["film"])
    return net, lambda x: net(x[None], T, CONTEXT).sample[0], torch.randn(2, 4, 8, 8)


def known() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    parts = blocks.ResBlock(16, 16, film=True), blocks.AttentionBlock(16, 2, legacy=True)
    head = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 4, 3))
    net = nn.ModuleList([*parts, blocks.ResnetBlock(16, 16), blocks.AttnBlock(16), head])
    randomize(net, 3)
    emb = torch.randn(1, 12)

    def call(x: Tensor) -> Tensor:
        first, second, third, fourth, last = net
        return last(fourth(third(second(first(x[None], emb)), None)))[0]

    return net, call, torch.randn(2, 16, 6, 6)


@pytest.mark.parametrize("make", [unconditional, conditional, known])
def test_vmap_and_forward_mode_are_the_originals(make: Any) -> None:
    """channels_last is on: what vmap and jvp cannot do with it, the original never meets."""
    net, call, xs = make()
    plain_attention(net)
    uses: list[Callable[[], Tensor]] = [
        lambda: torch.vmap(call)(xs),
        lambda: torch.vmap(torch.func.grad(lambda x: call(x).square().sum()))(xs),
        lambda: torch.func.jvp(call, (xs[0],), (xs[1],))[1],
        lambda: torch.func.vjp(call, xs[0])[1](call(xs[1]))[0],
        lambda: torch.func.functional_call(Called(net, call), {}, (xs[0],)),
    ]
    wanted = [use().detach() for use in uses]
    report = fastdiff.accelerate(net)
    assert report.swapped
    for use, right in zip(uses, wanted, strict=True):
        bound = 1e-5 * float(right.abs().max())
        torch.testing.assert_close(use(), right, rtol=0, atol=bound)


def plain_attention(net: nn.Module) -> None:
    """Products and a softmax: PyTorch's fused attention has no forward mode and no second
    derivative."""
    from diffusers.models.attention_processor import AttnProcessor

    for layer in net.modules():
        if hasattr(layer, "set_processor"):
            layer.set_processor(AttnProcessor())


class Called(nn.Module):
    """A function of a network as a module of it."""

    def __init__(self, net: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def second_derivatives(net: nn.Module) -> list[Tensor]:
    """Derivatives of a gradient penalty for the input and all parameters."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=draw, requires_grad=True)
    y = net(x, T, CONTEXT).sample
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    leaves = [x, *net.parameters()]
    found = torch.autograd.grad(slope.square().sum(), leaves, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def compare_second_derivatives() -> None:
    """In a separate process, whose memory is limited to 2 GiB more than importing takes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    net = build("UNet2DConditionModel", UNETS["film"])
    plain_attention(net)
    wanted = second_derivatives(net)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastdiff.accelerate(net)
    found = second_derivatives(net)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < used + 200_000, "KiB"
    for got, right in zip(found, wanted, strict=True):
        bound = 1e-4 * max(1e-3, float(right.abs().max()))
        torch.testing.assert_close(got, right, rtol=0, atol=bound)
    print("equal")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_a_gradient_of_a_gradient_costs_what_the_original_costs() -> None:
    """One op saves its own output: its second derivative must not walk its own graph again."""
    code = "from tests.integrations import test_derivatives as t; t.compare_second_derivatives()"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stderr[-2000:]


def diffusers_attention() -> nn.Module:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    return Attention(16, 20, heads=2, dim_head=8, processor=AttnProcessor())


TOKENS, TEXT = (
    torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)),
    torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(2)),
)
IMAGE = torch.randn(2, 16, 3, 4, generator=torch.Generator().manual_seed(3))
WRITTEN_OUT: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    # blocks whose attention is products and a softmax, and what they are called with
    "CompVis, autoencoder": (lambda: blocks.AttnBlock(16), (IMAGE,)),
    "CompVis, self": (lambda: blocks.CrossAttention(16, None, 2), (TOKENS,)),
    "CompVis, cross": (lambda: blocks.CrossAttention(16, 20, 2), (TOKENS, TEXT)),
    "CompVis, transformer": (lambda: blocks.BasicTransformerBlock(16, 20), (TOKENS, TEXT)),
    "OpenAI, rows (H, 3, d)": (lambda: blocks.AttentionBlock(16, 2, legacy=True), (IMAGE,)),
    "OpenAI, rows (3, H, d)": (lambda: blocks.AttentionBlock(16, 2, legacy=False), (IMAGE,)),
    "improved-diffusion": (lambda: blocks.ImprovedAttentionBlock(16, 2), (IMAGE,)),
    "diffusers": (diffusers_attention, (TOKENS, TEXT)),
}


def gradient_penalty(block: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Second derivatives for the inputs and all parameters, one after another."""
    dtype = next(block.parameters()).dtype
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    slopes = torch.autograd.grad(block(*leaves).square().sum(), leaves, create_graph=True)
    penalty = sum(slope.square().sum() for slope in slopes)
    found = torch.autograd.grad(penalty, [*leaves, *block.parameters()], allow_unused=True)
    scale = float(inputs[0].numel())
    return torch.cat([g.flatten() for g in found if g is not None]) / scale


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_second_derivatives_of_an_attention_that_was_written_out(name: str, backend: str) -> None:
    """PyTorch's fused attention, which our reference calls, has none on a CPU."""
    make, inputs = WRITTEN_OUT[name]
    block = make()
    randomize(block, 3)
    plain, wide = copy.deepcopy(block), copy.deepcopy(block).double()
    for layer in wide.modules():
        if isinstance(layer, blocks.GroupNorm32):  # rounds to fp32
            layer.__class__ = nn.GroupNorm
    report = fastdiff.accelerate(block, strict=True)
    assert report.count("attention")[0]

    def drawn(seed: int) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(x.shape, generator=draw) for x in inputs)

    with fastdiff.backend(backend):
        assert_gradient_parity(
            lambda seed: gradient_penalty(block, drawn(seed)),
            lambda seed: gradient_penalty(wide, drawn(seed)),
            lambda seed: gradient_penalty(plain, drawn(seed)),
        )
        double = copy.deepcopy(wide)
        fastdiff.accelerate(double, strict=True)
        found, wanted = (gradient_penalty(m, inputs) for m in (double, wide))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_copies_of_a_model_differentiate_alone() -> None:
    """torch.func.stack_module_state's way: one accelerated network, many sets of weights."""
    net, call, xs = known()
    fastdiff.accelerate(net)
    other = copy.deepcopy(net)
    randomize(other, 4)
    states = [dict(m.named_parameters()) for m in (net, other)]
    stacked = {name: torch.stack([s[name].detach() for s in states]) for name in states[0]}

    def run(weights: dict[str, Tensor]) -> Tensor:
        named = {f"net.{name}": value for name, value in weights.items()}
        return torch.func.functional_call(Called(net, call), named, (xs[0],))

    found = torch.vmap(run)(stacked)
    wanted = torch.stack([run({k: v.detach() for k, v in s.items()}) for s in states])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
