"""`fastdiff.compile_pass`: the patterns are really replaced, by Inductor on the installed torch."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations.inductor import HOOK
from fastdiff.kernels import record_backends
from tests.support.parity import assert_gradient_parity, assert_parity


class Layers(nn.Module):
    """Two pairs, one norm that is read twice, attention with a mask, and one that is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.GroupNorm(4, 16), nn.SiLU()
        self.second = nn.GroupNorm(2, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = F.silu(self.second(self.act(self.first(x)) + x))
        twice = self.second(h)
        q = (F.silu(twice) + twice).flatten(2).mT.unflatten(2, (2, 8)).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, q, 0.5 * q, attn_mask=mask)
        return F.scaled_dot_product_attention(h, h, h, is_causal=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor wants a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_patterns_are_replaced() -> None:
    config = torch._inductor.config
    module, mask = Layers(), torch.randn(2, 1, 12, 12)
    wide = copy.deepcopy(module).double()

    @cache
    def run(function: Callable[..., Tensor], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
        """The result and the gradient of its squares."""
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 16, 3, 4, generator=draw).to(dtype).requires_grad_()
        y = function(x, mask.to(dtype))
        return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    earlier: list[int] = []
    config.pre_grad_custom_pass = lambda graph: earlier.append(len(graph.nodes))
    before = config.pre_grad_custom_pass
    registered = fastdiff.compile_pass()
    try:
        assert fastdiff.compile_pass() is registered
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True)
        run(compiled, torch.float32, 0)
        assert registered.replaced == {"group_norm_silu": 2, "attention": 1}
        assert earlier
        single, double = torch.float32, torch.float64
        for index, check in enumerate((assert_parity, assert_gradient_parity)):
            check(
                lambda seed, i=index: run(compiled, single, seed)[i],
                lambda seed, i=index: run(wide, double, seed)[i],
                lambda seed, i=index: run(module, single, seed)[i],
            )
        registered.remove()
        assert config.pre_grad_custom_pass is before
    finally:
        config.pre_grad_custom_pass = None
        torch._dynamo.reset()


def test_an_inductor_without_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr("fastdiff.integrations.inductor.HOOK", "no_such_pass")
    assert not hasattr(config, "no_such_pass")
    with pytest.raises(RuntimeError, match=r"no no_such_pass, .* use fastdiff\.accelerate"):
        fastdiff.compile_pass()


@pytest.fixture
def config() -> Iterator[Any]:
    """Inductor's config, whose hook is put back afterwards."""
    from torch._inductor import config

    with config.patch({HOOK: None}):
        yield config


def test_removed_below_a_later_pass(config: Any) -> None:
    """Somebody's pass that calls ours before it: ours cannot be taken out, but does nothing."""
    seen: list[int] = []
    setattr(config, HOOK, lambda graph: seen.append(1))
    registered = fastdiff.compile_pass()

    def later(graph: torch.fx.Graph) -> None:
        registered(graph)
        seen.append(2)

    setattr(config, HOOK, later)
    registered.remove()
    assert getattr(config, HOOK) is later
    graph = torch.fx.symbolic_trace(Pair()).graph
    later(graph)
    assert seen == [1, 2]
    assert not registered.replaced
    again = fastdiff.compile_pass()
    assert again is not registered
    again(graph)
    assert again.replaced == {"group_norm_silu": 1}


class Pair(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 2))


def test_the_pass_names_itself_for_inductors_caches(config: Any) -> None:
    """What changes the graphs it makes changes the name, and an unnamed pass leaves none."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    registered = fastdiff.compile_pass()
    assert isinstance(registered, CustomGraphPass)
    name = registered.uuid()
    assert name
    registered.remove()
    assert registered.uuid() != name
    again = fastdiff.compile_pass()
    assert again.uuid() == name
    with fastdiff.kernels.backend("reference"):
        assert again.uuid() != name
    again.remove()
    setattr(config, HOOK, lambda graph: None)
    assert fastdiff.compile_pass().uuid() is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor wants a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_graph_that_was_compiled_before_is_found(
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Inductor keeps the graph and finds it, with what the pass has put into it."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(2, 4, 3, 3)
    registered = fastdiff.compile_pass()
    try:
        for hits in (0, 1):
            torch._dynamo.reset()
            counters.clear()
            with record_backends() as ran:
                y = torch.compile(Pair(), fullgraph=True)(x)
            torch.testing.assert_close(y, Pair()(x))
            assert "group_norm_silu" in ran
            found = counters["aot_autograd"]["autograd_cache_hit"]
            assert max(found, counters["inductor"]["fxgraph_cache_hit"]) == hits
        assert "uuid" not in caplog.text
        assert registered.replaced == {"group_norm_silu": 1}
    finally:
        torch._dynamo.reset()
