"""A swapped module accepts every argument of the original and returns the same."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations.planner import argument_objection
from fastdiff.kernels import record_backends
from tests.integrations import blocks
from tests.integrations.models import UNETS, build
from tests.support.tiny import randomize


class ScaledResnetBlock(blocks.ResnetBlock):
    def forward(
        self, x: Tensor, temb: Any = None, scale: float = 1.0, *, keep: Any = None
    ) -> Tensor:
        h = super().forward(x, temb)
        return scale * (h if keep is None else h * keep)


class MaskedTransformerBlock(blocks.BasicTransformerBlock):
    def forward(self, x: Tensor, context: Any = None, mask: Any = None) -> Tensor:
        return self._forward(x, context, mask=mask)

    def _forward(self, x: Tensor, context: Any = None, mask: Any = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context, mask=mask) + x
        return self.ff(self.norm3(x)) + x


class StrengthBlock(blocks.Block):
    def forward(self, x: Tensor, scale_shift: Any = None, strength: Any = None) -> Tensor:
        y = super().forward(x, scale_shift)
        return y if strength is None else y * strength


class OffsetNorm(nn.GroupNorm):
    def forward(self, x: Tensor, offset: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x) if offset is None else super().forward(x + offset)


class ClippedGEGLU(blocks.GEGLU):
    def forward(self, x: Tensor, limit: float = math.inf) -> Tensor:
        return super().forward(x).clamp(-limit, limit)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, TOKENS, CONTEXT, EMB = drawn(2, 16, 4, 3), drawn(2, 6, 16), drawn(2, 5, 20), drawn(2, 12)
MASK = torch.tensor([[True] * 5, [True, True, False, True, False]])
FILM = (drawn(2, 24, 1, 1), drawn(2, 24, 1, 1))
CASES: dict[
    str, tuple[nn.Module, tuple[Any, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]]
] = {
    # block, what it is usually called with, calls with more
    "attention of GLIDE": (
        blocks.GlideAttention(2, legacy=True),
        (drawn(2, 48, 5),),
        [
            ((drawn(2, 48, 5), drawn(2, 32, 3)), {}),
            ((drawn(2, 48, 5),), {"encoder_kv": drawn(2, 32, 3)}),
            ((), {"qkv": drawn(2, 48, 5), "mask": drawn(5, 5)}),
        ],
    ),
    "cross-attention with a mask": (
        blocks.CrossAttention(16, 20, 2),
        (TOKENS, CONTEXT),
        [((TOKENS, CONTEXT, MASK), {}), ((TOKENS,), {"context": CONTEXT, "mask": MASK})],
    ),
    "residual block": (
        ScaledResnetBlock(16, 24, temb=12),
        (X, EMB),
        [((X, EMB, 0.5), {}), ((X,), {"temb": EMB, "keep": drawn(2, 24, 1, 1)}), ((X,), {})],
    ),
    "transformer block": (
        MaskedTransformerBlock(16, 20),
        (TOKENS, CONTEXT),
        [((TOKENS,), {"context": CONTEXT, "mask": MASK})],
    ),
    "norm and activation": (
        StrengthBlock(16, 24),
        (X, FILM),
        [((X, FILM, 0.5), {}), ((X,), {"strength": 2.0, "scale_shift": FILM})],
    ),
    "norm": (OffsetNorm(4, 16), (X,), [((X, 1.5), {}), ((), {"x": X, "offset": drawn(16, 1, 1)})]),
    "geglu": (
        ClippedGEGLU(16, 8),
        (TOKENS,),
        [((TOKENS, 0.1), {}), ((), {"x": TOKENS, "limit": 0.2})],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_further_arguments_are_the_originals(name: str) -> None:
    block, usual, calls = CASES[name]
    block = copy.deepcopy(block)
    randomize(block, 3)
    plain = copy.deepcopy(block)
    fastdiff.accelerate(block, strict=True)
    with record_backends() as ran:
        torch.testing.assert_close(block(*usual), plain(*usual), rtol=1e-4, atol=1e-5)
    assert ran
    for args, kwargs in calls:
        wanted = plain(*args, **kwargs)
        torch.testing.assert_close(block(*args, **kwargs), wanted, rtol=1e-4, atol=1e-5)
        differs = wanted.shape != plain(*usual).shape or not torch.equal(wanted, plain(*usual))
        assert differs, "the further argument does nothing"
    with pytest.raises(TypeError, match="no_such_argument"):
        block(*usual, no_such_argument=1)


def test_arguments_by_name_and_their_defaults_are_still_ours() -> None:
    block = ScaledResnetBlock(16, 24, temb=12)
    randomize(block, 3)
    plain = copy.deepcopy(block)
    fastdiff.accelerate(block, strict=True)
    for kwargs in ({"temb": EMB}, {"temb": EMB, "scale": 1.0, "keep": None}):
        with record_backends() as ran:
            y = block(x=X, **kwargs)
        assert "add_group_norm_silu" in ran
        torch.testing.assert_close(y, plain(X, EMB), rtol=1e-4, atol=1e-5)


def test_none_where_the_original_refuses_it_is_refused() -> None:
    """The swapped block would have ignored the embedding silently."""

    class Strict(blocks.ResnetBlock):
        def forward(self, x: Tensor, temb: Any) -> Tensor:
            return super().forward(x, temb.clone())

    block = Strict(16, 16, temb=12)
    fastdiff.accelerate(block, strict=True)
    with pytest.raises(AttributeError, match="clone"):
        block(X, None)


def test_an_argument_that_a_later_diffusers_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is left alone: a swapped one would reject or ignore the argument."""
    from fastdiff.integrations import diffusers_blocks as ours

    for theirs, (mine, *_) in ours.BLOCKS.items():
        assert argument_objection(mine, theirs) is None
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    theirs = next(k for k in ours.BLOCKS if k.__name__ == "BasicTransformerBlock")
    before = theirs.forward

    def forward(self: Any, hidden_states: Tensor, rotary: Any = None, **others: Any) -> Any:
        return before(self, hidden_states, **others)

    monkeypatch.setattr(theirs, "forward", forward)
    report = fastdiff.accelerate(unet)
    assert {e.reason for e in report.left if e.op == "transformer block"} == {
        "the forward of BasicTransformerBlock in this version of diffusers also takes rotary"
    }
