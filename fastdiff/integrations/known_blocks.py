"""Blocks of well-known repositories, recognised by their layers and proven by their results.

CompVis (latent-diffusion), OpenAI (improved-diffusion, guided-diffusion) and lucidrains are copied
into many projects, so their classes cannot be imported, and a name says little. A block that has
the layers of one of them is copied, filled with random weights and called both ways on a small
input: only where the results agree is its kind of block swapped (`difference`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations.layers import GroupNorm, LayerNorm, Sequential, watched
from fastdiff.kernels import attention, geglu
from fastdiff.models.layers import from_tokens, split_qkv, to_tokens

TOLERANCE = 1e-4
"""Relative difference, in fp32, up to which two results are the same function's."""


class _Block(nn.Module):
    """What the mixins below stand in front of: the attributes are the other class's."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class CompVisResnetBlock(_Block):
    """latent-diffusion's ResnetBlock of the autoencoders (and DDPM's in PyTorch)."""

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); temb: (N, E) or None -> (N, C', H, W)."""
        if watched(self.norm1, self.norm2):
            return super().forward(x, temb)
        h = self.conv1(self.norm1(x, activation="silu"))
        emb = None if temb is None else self.temb_proj(F.silu(temb))
        h = self.conv2(self.dropout(self.norm2(h, channel_add=emb, activation="silu")))
        shortcut = getattr(self, "conv_shortcut", None) or getattr(self, "nin_shortcut", None)
        return (x if shortcut is None else shortcut(x)) + h


class CompVisAttnBlock(_Block):
    """latent-diffusion's AttnBlock: one head over all channels."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        h = self.norm(x)
        q, k, v = (to_tokens(layer(h)).unsqueeze(2) for layer in (self.q, self.k, self.v))
        h = from_tokens(attention(q, k, v).flatten(2), x)  # (N, C, H, W)
        return x + self.proj_out(h)


class OpenAIResBlock(_Block):
    """guided-diffusion's ResBlock, latent-diffusion's copy of it, improved-diffusion's ancestor."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm_in, norm_out = self.in_layers[0], self.out_layers[0]
        if watched(norm_in, norm_out, self.in_layers[1], self.out_layers[1]):
            return super()._forward(x, emb)  # type: ignore[misc]
        h = norm_in(x, activation="silu")
        if getattr(self, "updown", False):
            h, x = self.h_upd(h), self.x_upd(x)
        h = self.in_layers[-1](h)
        out = self.emb_layers(emb).type(h.dtype)
        extra = {"scale_shift" if self.use_scale_shift_norm else "channel_add": out}
        h = norm_out(h, activation="silu", **extra)
        for layer in [*self.out_layers][2:]:
            h = layer(h)
        return self.skip_connection(x) + h


class OpenAIQKVAttention(_Block):
    """OpenAI's attention over a packed (N, 3C, L); the rows are (H, 3, d)."""

    order = "legacy"

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv: (N, 3C, L) -> (N, C, L)."""
        q, k, v = split_qkv(qkv.mT, self.n_heads, "new" if self.order == "new" else "legacy")
        return attention(q, k, v).flatten(2).mT


class OpenAIQKVAttentionNew(OpenAIQKVAttention):
    """The same with rows (3, H, d)."""

    order = "new"


class CompVisCrossAttention(_Block):
    """latent-diffusion's CrossAttention."""

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Any = None) -> Tensor:
        """x: (N, L, C); context: (N, T, D)."""
        if mask is not None:
            return super().forward(x, context, mask)
        tokens = x if context is None else context
        projected = self.to_q(x), self.to_k(tokens), self.to_v(tokens)
        q, k, v = (p.unflatten(2, (self.heads, -1)) for p in projected)
        return self.to_out(attention(q, k, v, scale=self.scale).flatten(2))


class GatedGELU(_Block):
    """A projection to [x | gate] and x * gelu(gate), as latent-diffusion's GEGLU."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., D)."""
        return geglu(self.proj(x))


class CompVisTransformerBlock(_Block):
    """latent-diffusion's BasicTransformerBlock; the sums are formed in the norms."""

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if watched(self.norm1, self.norm2, self.norm3) or getattr(self, "disable_self_attn", False):
            return super()._forward(x, context)  # type: ignore[misc]
        h, x = self.norm2(self.attn1(self.norm1(x)), x)
        h, x = self.norm3(self.attn2(h, context=context), x)
        return self.ff(h) + x


class LucidrainsBlock(_Block):
    """denoising-diffusion-pytorch's Block: convolution, norm, scale and shift, SiLU."""

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: (N, C, H, W); scale_shift: two (N, C', 1, 1) -> (N, C', H, W)."""
        if watched(self.norm, self.act):
            return super().forward(x, scale_shift)
        film = None if scale_shift is None else torch.cat([*scale_shift], dim=1).flatten(1)
        h = self.norm(self.proj(x), scale_shift=film, activation="silu")
        return getattr(self, "dropout", nn.Identity())(h)


class Kind(NamedTuple):
    """A block we know: how it is recognised, and inputs to compare on."""

    ours: type[nn.Module]
    op: str
    pairs: int
    fits: Callable[[Any], bool]
    examples: Callable[[Any], list[tuple[Any, ...]]]


def _has(module: Any, names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names.split())


def _compvis_examples(m: Any) -> list[tuple[Any, ...]]:
    x = torch.randn(2, m.norm1.num_channels, 4, 4)
    proj = getattr(m, "temb_proj", None)
    return [(x, None if proj is None else torch.randn(2, proj.in_features))]


def _openai_fits(m: Any) -> bool:
    if not _has(m, "in_layers emb_layers out_layers skip_connection") or not hasattr(m, "_forward"):
        return False
    first, last = [*m.in_layers], [*m.out_layers]
    silu = len(first) == 3 and len(last) >= 3 and all(type(s[1]) is nn.SiLU for s in (first, last))
    norms = silu and all(isinstance(s[0], nn.GroupNorm) for s in (first, last))
    return norms and hasattr(m, "use_scale_shift_norm")


def _openai_examples(m: Any) -> list[tuple[Any, ...]]:
    linear = next(layer for layer in m.emb_layers if isinstance(layer, nn.Linear))
    x = torch.randn(2, m.in_layers[0].num_channels, 4, 4)
    return [(x, torch.randn(2, linear.in_features))]


def _tokens(m: Any) -> list[tuple[Any, ...]]:
    x, own = torch.randn(2, 5, m.to_q.in_features), m.to_k.in_features == m.to_q.in_features
    return [*([(x,)] if own else []), (x, torch.randn(2, 3, m.to_k.in_features))]


def _lucidrains_examples(m: Any) -> list[tuple[Any, ...]]:
    x, film = torch.randn(2, m.proj.in_channels, 4, 4), torch.randn(2, m.norm.num_channels, 1, 1)
    return [(x,), (x, (film, 0.5 * film.flip(1)))]


def _qkv(m: Any) -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 3 * 4 * m.n_heads, 6),)]


def _is_qkv(m: Any) -> bool:
    return not [*m.children()] and isinstance(getattr(m, "n_heads", None), int)


KINDS = (
    Kind(
        CompVisResnetBlock,
        "residual block",
        2,
        lambda m: (
            _has(m, "norm1 conv1 norm2 dropout conv2")
            and isinstance(m.norm1, nn.GroupNorm)
            and isinstance(m.norm2, nn.GroupNorm)
        ),
        _compvis_examples,
    ),
    Kind(
        CompVisAttnBlock,
        "attention",
        0,
        lambda m: _has(m, "norm q k v proj_out") and isinstance(m.norm, nn.GroupNorm),
        lambda m: [(torch.randn(2, m.norm.num_channels, 3, 4),)],
    ),
    Kind(OpenAIResBlock, "residual block", 2, _openai_fits, _openai_examples),
    Kind(OpenAIQKVAttention, "attention", 0, _is_qkv, _qkv),
    Kind(OpenAIQKVAttentionNew, "attention", 0, _is_qkv, _qkv),
    Kind(
        CompVisCrossAttention,
        "attention",
        0,
        lambda m: (
            _has(m, "to_q to_k to_v to_out")
            and isinstance(getattr(m, "heads", None), int)
            and isinstance(getattr(m, "scale", None), float)
            and isinstance(m.to_q, nn.Linear)
        ),
        _tokens,
    ),
    Kind(
        GatedGELU,
        "geglu",
        0,
        lambda m: [n for n, _ in m.named_children()] == ["proj"] and isinstance(m.proj, nn.Linear),
        lambda m: [(torch.randn(2, m.proj.in_features),)],
    ),
    Kind(
        CompVisTransformerBlock,
        "transformer block",
        0,
        lambda m: (
            _has(m, "attn1 attn2 ff norm1 norm2 norm3")
            and hasattr(m, "_forward")
            and isinstance(m.norm1, nn.LayerNorm)
            and _has(m.attn2, "to_k")
        ),
        lambda m: [
            (
                torch.randn(2, 5, m.norm1.normalized_shape[0]),
                torch.randn(2, 3, m.attn2.to_k.in_features),
            )
        ],
    ),
    Kind(
        LucidrainsBlock,
        "norm and activation",
        1,
        lambda m: (
            _has(m, "proj norm act") and isinstance(m.norm, nn.GroupNorm) and type(m.act) is nn.SiLU
        ),
        _lucidrains_examples,
    ),
)
GROUP_NORM = Kind(
    GroupNorm,
    "group norm",
    0,
    lambda m: isinstance(m, nn.GroupNorm),
    lambda m: [(torch.randn(2, m.num_channels, 3, 4) + 0.5,)],
)
"""Subclasses of nn.GroupNorm, such as OpenAI's GroupNorm32, which computes in fp32 as ours does."""


_SERVED: dict[tuple[type, type], Any] = {}


def served_class(ours: type, theirs: type) -> Any:
    """A subclass of `theirs` with our forward; objects of it can be copied and pickled."""
    if (ours, theirs) not in _SERVED:
        members = {"__reduce_ex__": _reduce, "__module__": __name__, "served": (ours, theirs)}
        _SERVED[ours, theirs] = type(theirs.__name__, (ours, theirs), members)
    return _SERVED[ours, theirs]


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    return _empty, type(self).served, dict(self.__dict__)


def _empty(ours: type, theirs: type) -> Any:
    served = served_class(ours, theirs)
    return served.__new__(served)


def serve_norms(module: nn.Module) -> None:
    """Make a copy's own norms ours, as `accelerate` will have done."""
    for layer in module.modules():
        if type(layer) is nn.GroupNorm:
            layer.__class__ = GroupNorm
        elif isinstance(layer, nn.GroupNorm) and not isinstance(layer, GroupNorm):
            layer.__class__ = served_class(GroupNorm, type(layer))
        elif type(layer) is nn.LayerNorm:
            layer.__class__ = LayerNorm
        elif type(layer) is nn.Sequential:
            layer.__class__ = Sequential


def difference(module: nn.Module, kind: Kind) -> float:
    """How far a block's results move if it is served as `kind`, relative, inf if it fails.

    Measured on a copy with random weights on the CPU, so that layers that begin at zero, hooks and
    the device do not matter; nothing of the module itself runs.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        ours = copy.deepcopy(module)
        ours = ours.to_empty(device="cpu").float().eval()
        for tensor in [*ours.parameters(), *ours.buffers()]:
            if tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
                tensor.copy_(torch.randn(tensor.shape) / fan_in**0.5)
        for layer in ours.modules():  # nobody shall hear of this
            for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
                hooks.clear()
        theirs, examples = copy.deepcopy(ours), kind.examples(module)
        serve_norms(ours)
        ours.__class__ = served_class(kind.ours, type(theirs))
        worst = 0.0
        for example in examples:
            try:
                found, wanted = ours(*example), theirs(*example)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                return float("inf")  # called otherwise than the block that it resembles
            if found.shape != wanted.shape:
                return float("inf")
            scale = float(wanted.abs().max()) or 1.0
            worst = max(worst, float((found - wanted).abs().max()) / scale)
        return worst
