"""Modules of unknown origin: recognised by their layers, verified by their results."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import AccelerateError, known_blocks
from fastdiff.kernels import record_backends
from tests.integrations import blocks
from tests.support.parity import assert_gradient_parity, assert_parity
from tests.support.tiny import randomize

IMAGE, EMB, TOKENS = (2, 16, 6, 5), (2, 12), (2, 7, 16)
FILM = ((2, 24, 1, 1), (2, 24, 1, 1))


def drawn(shape: Any) -> Any:
    if shape is None:
        return None
    if isinstance(shape[0], tuple):
        return tuple(map(drawn, shape))
    return torch.randn(shape) + 0.3


CASES: dict[str, tuple[nn.Module, tuple[Any, ...], int, int]] = {
    # block, inputs, GroupNorm+SiLU pairs, attentions
    "sequential": (
        nn.Sequential(
            nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 1), nn.GroupNorm(2, 8), nn.ReLU()
        ),
        (IMAGE,),
        1,
        0,
    ),
    "compvis resnet": (blocks.ResnetBlock(16, 24), (IMAGE, None), 2, 0),
    "compvis resnet, time": (blocks.ResnetBlock(16, 16, temb=12), (IMAGE, EMB), 2, 0),
    "compvis attention": (blocks.AttnBlock(16), (IMAGE,), 0, 1),
    "openai": (blocks.ResBlock(16, 24, film=False), (IMAGE, EMB), 2, 0),
    "openai film": (blocks.ResBlock(16, 24, film=True), (IMAGE, EMB), 2, 0),
    "openai film up": (blocks.ResBlock(16, 16, film=True, updown=True), (IMAGE, EMB), 2, 0),
    "openai attention, legacy": (blocks.AttentionBlock(16, 2, legacy=True), (IMAGE,), 0, 1),
    "openai attention, new": (blocks.AttentionBlock(16, 2, legacy=False), (IMAGE,), 0, 1),
    "glide attention": (blocks.GlideBlock(16, 2, 12), (IMAGE, (2, 12, 3)), 0, 1),
    "glide attention, no text": (blocks.GlideBlock(16, 2, 12), (IMAGE, None), 0, 1),
    "compvis transformer": (blocks.BasicTransformerBlock(16, 20), (TOKENS, (2, 5, 20)), 0, 2),
    "lucidrains": (blocks.Block(16, 24), (IMAGE,), 1, 0),
    "lucidrains film": (blocks.Block(16, 24), (IMAGE, FILM), 1, 0),
}


def wide(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(wide, x))
    return x.double() if isinstance(x, Tensor) else x


def gradients(module: nn.Module, y: Tensor) -> Tensor:
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    found = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    module.zero_grad()
    return found


@pytest.mark.parametrize("name", CASES)
def test_known_block(name: str) -> None:
    block, shapes, pairs, attentions = CASES[name]
    block = copy.deepcopy(block)

    def inputs(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        return tuple(map(drawn, shapes))

    fresh = fastdiff.accelerate(copy.deepcopy(block), strict=True)  # zeros in its last layer
    randomize(block, 3)
    reference_block = copy.deepcopy(block).double()
    for module in reference_block.modules():
        if isinstance(module, blocks.GroupNorm32):  # it would go back to fp32
            module.__class__ = nn.GroupNorm
    plain = copy.deepcopy(block)
    results = (
        lambda seed: block(*inputs(seed)),
        lambda seed: reference_block(*wide(inputs(seed))),
        lambda seed: plain(*inputs(seed)),
    )
    state, kinds = list(block.state_dict()), [type(m) for m in block.modules()]

    report = fastdiff.accelerate(block, strict=True)
    assert (report.pairs, report.count("attention")) == (pairs, (attentions, 0))
    assert report.data["counts"] == fresh.data["counts"]
    assert all(isinstance(m, kind) for m, kind in zip(block.modules(), kinds, strict=True))
    with record_backends() as ran:
        y = block(*inputs(0))
    assert_parity(*results)
    if attentions:
        assert "attention" in ran
    if pairs:
        assert {"group_norm_silu", "add_group_norm_silu"} & set(ran)
    assert_gradient_parity(
        *(
            lambda seed, m=module, result=result: gradients(m, result(seed))
            for module, result in zip((block, reference_block, plain), results, strict=True)
        )
    )
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):  # noqa: S301 - ours
        assert torch.equal(again(*inputs(0)), y)
        assert [type(m) for m in again.modules()] == [type(m) for m in block.modules()]
    assert list(block.state_dict()) == state
    assert fastdiff.accelerate(block).changed == 0
    report.restore()
    assert [type(m) for m in block.modules()] == kinds
    assert torch.equal(block(*inputs(0)), plain(*inputs(0)))


def test_the_text_of_glide_goes_through_our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    block = randomize(blocks.GlideBlock(16, 2, 12), 1)
    fastdiff.accelerate(block, strict=True)
    seen: list[Any] = []
    real = known_blocks.attention
    monkeypatch.setattr(
        known_blocks, "attention", lambda *a, **k: seen.append(k.get("extra_k")) or real(*a, **k)
    )
    block(drawn(IMAGE), drawn((2, 12, 3)))
    assert [tuple(k.shape) for k in seen] == [(2, 3, 2, 8)]


def test_what_only_looks_like_a_block_is_left() -> None:
    block = nn.Sequential(randomize(blocks.Impostor(16, 24), 1))
    x = drawn(IMAGE)
    wanted = block(x)
    with pytest.raises(AccelerateError, match=r"(?s)0 \(Impostor\).*computes something else"):
        fastdiff.accelerate(block, strict=True)
    assert type(block[0].norm) is nn.GroupNorm
    report = fastdiff.accelerate(block)
    assert [e.name for e in report.left] == ["0"]
    torch.testing.assert_close(block(x), wanted)


def test_a_listener_sees_what_it_saw() -> None:
    """A hook on an inner layer gets that layer's own output."""
    block = randomize(blocks.ResnetBlock(16, 24), 1)
    pair = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU())
    x = drawn(IMAGE)
    for module, layer in ((block, block.norm2), (pair, pair[0])):  # type: ignore[attr-defined]
        arguments = (x, None) if module is block else (x,)
        seen: list[Tensor] = []
        with_hook = layer.register_forward_hook(lambda m, i, o, s=seen: s.append(o) or None)
        module(*arguments)
        fastdiff.accelerate(module)
        module(*arguments)
        with_hook.remove()
        assert len(seen) == 2
        torch.testing.assert_close(*seen)


def test_a_replaced_forward_is_left() -> None:
    norm = nn.GroupNorm(4, 16)
    norm.forward = lambda input: 2 * input  # type: ignore[method-assign]
    report = fastdiff.accelerate(norm)
    assert report.left[0].reason == "its forward was replaced on this object"
    assert torch.equal(norm(torch.ones(1, 16, 2, 2)), torch.full((1, 16, 2, 2), 2.0))


def test_what_cannot_be_accelerated() -> None:
    with pytest.raises(TypeError, match="got int"):
        fastdiff.accelerate(3)
    with pytest.raises(ValueError, match="scheduler must be None or 'fused', got 'quick'"):
        fastdiff.accelerate(nn.Linear(2, 2), scheduler="quick")
    assert str(fastdiff.accelerate(nn.ReLU(), channels_last=False)).startswith("found no module")
    assert fastdiff.accelerate(nn.MultiheadAttention(8, 2)).count("attention") == (0, 1)
