"""Blocks of well-known repositories, recognised by their layers and verified by their results.

The code of CompVis (latent-diffusion), OpenAI (improved-diffusion, guided-diffusion) and lucidrains
is copied into many projects, so the classes cannot be imported, and a class name proves little. A
block that has the layers of one of them is therefore copied, filled with random weights and called
both ways on a small input. Blocks like it are swapped only if the results agree (`difference`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations.layers import (
    GroupNorm,
    LayerNorm,
    Sequential,
    is_silu,
    needs_original,
    under_transform,
)
from fastdiff.kernels import attention, geglu
from fastdiff.models.layers import from_tokens, split_qkv, to_tokens

TOLERANCE = 1e-4
"""Largest relative difference, in fp32, between results of the same function."""


class _Block(nn.Module):
    """Base of the mixins below, which are combined with a class that has the attributes."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class CompVisResnetBlock(_Block):
    """ResnetBlock of latent-diffusion's autoencoders (and of DDPM's port to PyTorch)."""

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); temb: (N, E) or None -> (N, C', H, W)."""
        if needs_original(self.norm1, self.norm2):
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
        if needs_original(norm_in, norm_out, self.in_layers[1], self.out_layers[1]):
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
    """OpenAI's attention over a packed (N, 3C, L) whose channels are ordered (H, 3, d).

    improved-diffusion's class has no `n_heads`: its caller moves the heads into N.
    """

    order = "legacy"

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv: (N, 3C, L) -> (N, C, L)."""
        heads = getattr(self, "n_heads", 1)
        q, k, v = split_qkv(qkv.mT, heads, "new" if self.order == "new" else "legacy")
        return attention(q, k, v).flatten(2).mT


class OpenAIQKVAttentionNew(OpenAIQKVAttention):
    """OpenAI's attention with channels ordered (3, H, d)."""

    order = "new"


class GlideQKVAttention(_Block):
    """GLIDE's attention (glide-text2im): keys and values of a text, (H, 2, d), before the image's.

    Nichol et al. 2021, section 3.1.
    """

    def forward(self, qkv: Tensor, encoder_kv: Tensor | None = None) -> Tensor:
        """qkv: (N, 3C, L); encoder_kv: (N, 2C, T) -> (N, C, L)."""
        q, k, v = split_qkv(qkv.mT, self.n_heads, "legacy")
        if encoder_kv is None:
            return attention(q, k, v).flatten(2).mT
        text = encoder_kv.mT.unflatten(2, (self.n_heads, 2, -1))  # (N, T, H, 2, d)
        extra_k, extra_v = text.unbind(3)
        return attention(q, k, v, extra_k=extra_k, extra_v=extra_v).flatten(2).mT


class CompVisCrossAttention(_Block):
    """latent-diffusion's CrossAttention."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (N, L, C); context: (N, T, D)."""
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
    """latent-diffusion's BasicTransformerBlock, with the residual sums fused into the norms."""

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if needs_original(self.norm1, self.norm2, self.norm3) or getattr(
            self, "disable_self_attn", False
        ):
            return super()._forward(x, context)  # type: ignore[misc]
        h, x = self.norm2(self.attn1(self.norm1(x)), x)
        h, x = self.norm3(self.attn2(h, context=context), x)
        return self.ff(h) + x


class LucidrainsBlock(_Block):
    """denoising-diffusion-pytorch's Block: convolution, norm, scale and shift, SiLU."""

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: (N, C, H, W); scale_shift: two (N, C', 1, 1) -> (N, C', H, W)."""
        if needs_original(self.norm, self.act):
            return super().forward(x, scale_shift)
        film = None if scale_shift is None else torch.cat([*scale_shift], dim=1).flatten(1)
        h = self.norm(self.proj(x), scale_shift=film, activation="silu")
        return getattr(self, "dropout", nn.Identity())(h)


class Kind(NamedTuple):
    """A known block: how to recognise it, and example inputs to compare the results on."""

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
    silu = len(first) == 3 and len(last) >= 3 and all(is_silu(s[1]) for s in (first, last))
    norms = silu and all(isinstance(s[0], nn.GroupNorm) for s in (first, last))
    return norms and hasattr(m, "use_scale_shift_norm")


def _openai_examples(m: Any) -> list[tuple[Any, ...]]:
    linear = next(layer for layer in m.emb_layers if isinstance(layer, nn.Linear))
    x = torch.randn(2, m.in_layers[0].num_channels, 4, 4)
    return [(x, torch.randn(2, linear.in_features))]


def _tokens(m: Any) -> list[tuple[Any, ...]]:
    x, own = torch.randn(2, 5, m.to_q.in_features), m.to_k.in_features == m.to_q.in_features
    return [*([(x, None)] if own else []), (x, torch.randn(2, 3, m.to_k.in_features))]


def _lucidrains_examples(m: Any) -> list[tuple[Any, ...]]:
    x, film = torch.randn(2, m.proj.in_channels, 4, 4), torch.randn(2, m.norm.num_channels, 1, 1)
    return [(x, None), (x, (film, 0.5 * film.flip(1)))]


def _qkv(m: Any) -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 3 * 4 * getattr(m, "n_heads", 1), 6),)]


def _qkv_and_text(m: Any) -> list[tuple[Any, ...]]:
    (qkv,), width = _qkv(m)[0], 2 * 4 * m.n_heads
    return [(qkv, None), (qkv, torch.randn(2, width, 3))]


def _reads_text(m: Any) -> bool:
    parameters = [*inspect.signature(m.forward).parameters]
    return _is_qkv(m) and hasattr(m, "n_heads") and parameters[1:2] == ["encoder_kv"]


def _is_qkv(m: Any) -> bool:
    heads = getattr(m, "n_heads", None if "QKVAttention" not in type(m).__name__ else 1)
    return not [*m.children(), *m.parameters()] and isinstance(heads, int)


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
    Kind(GlideQKVAttention, "attention", 0, _reads_text, _qkv_and_text),
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
        lambda m: _has(m, "proj norm act") and isinstance(m.norm, nn.GroupNorm) and is_silu(m.act),
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
"""Subclasses of nn.GroupNorm such as OpenAI's GroupNorm32, which computes in fp32 like ours."""


Form = tuple[bool, ...]
"""For each argument of a call, whether it is given and not None."""


@functools.cache
def served_class(ours: Any, theirs: Any, forms: frozenset[Form] | None = None) -> Any:
    """Create a subclass of `theirs` with our forward; its objects can be copied and pickled.

    Our forward runs for calls of the given forms (None: for all calls). Any other call, such as one
    with more arguments or with a None that was not verified, runs the original.
    """
    served = (ours, theirs, forms)
    members = {"__reduce_ex__": _reduce, "__module__": __name__, "served": served}
    if forms is not None:
        name = "_forward" if "_forward" in ours.__dict__ else "forward"
        members[name] = _guarded(getattr(ours, name), getattr(theirs, name), forms)
    return type(theirs.__name__, (ours, theirs), members)


def _guarded(
    mine: Callable[..., Any], original: Callable[..., Any], forms: frozenset[Form]
) -> Callable[..., Any]:
    """Create a forward with the original's signature that chooses between the two."""
    count = max(map(len, forms))
    parameters = [*inspect.signature(original).parameters.values()][1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    fused = inspect.getfullargspec(mine).kwonlyargs  # arguments that our blocks pass to our norms

    def proven(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The arguments for our forward, or None if the original has to run."""
        if len(args) > len(names) or any(key in names[: len(args)] for key in kwargs):
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for key, value in given.items():
            if key not in names[:count] and not _is_default(value, key, defaults):
                return None
        taken = [given.get(key, defaults.get(key)) for key in names[:count]]
        missing = [key for key in names[:count] if key not in given]
        if any(key not in defaults or defaults[key] is not None for key in missing):
            return None
        return taken if tuple(value is not None for value in taken) in forms else None

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs and all(key in fused for key in kwargs):
            return mine(self, *args, **kwargs)
        if under_transform():  # PyTorch's jvp of a norm rejects channels_last
            args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
            return original(self, *args, **kwargs)
        taken = proven(args, kwargs)
        return original(self, *args, **kwargs) if taken is None else mine(self, *taken)

    return forward


def _is_default(value: Any, key: str, defaults: dict[str, Any]) -> bool:
    """Whether an argument has its default value."""
    if key not in defaults:
        return False
    plain = isinstance(value, bool | int | float | str)
    return value is defaults[key] or (plain and bool(value == defaults[key]))


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    return empty_instance, type(self).served, dict(self.__dict__)


def empty_instance(ours: type, theirs: type, forms: frozenset[Form] | None) -> Any:
    """An instance of `served_class`, before its state: copies and pickles begin with it."""
    kinds: Any = ours, theirs
    served = served_class(*kinds, forms)
    return served.__new__(served)


def serve_norms(module: nn.Module) -> None:
    """Swap the norms inside a copy, as `accelerate` does in the module itself."""
    for layer in module.modules():
        if type(layer) is nn.GroupNorm:
            layer.__class__ = GroupNorm
        elif isinstance(layer, nn.GroupNorm) and not isinstance(layer, GroupNorm):
            kinds: Any = GroupNorm, type(layer)
            layer.__class__ = served_class(*kinds)
        elif type(layer) is nn.LayerNorm:
            layer.__class__ = LayerNorm
        elif type(layer) is nn.Sequential:
            layer.__class__ = Sequential


def proof(module: nn.Module, kind: Kind) -> frozenset[Form] | str:
    """The forms of calls in which a module computes what `kind` does, or why it does not."""
    layers = f"it has the layers of {kind.ours.__name__}"
    try:
        moved = difference(module, kind)
    except Exception as error:  # noqa: BLE001 - an unknown forward may raise anything
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{layers}, but calling a copy like one fails ({said:.120})"
    worst = max(moved.values())
    if not worst <= TOLERANCE:  # also if it is NaN
        return f"{layers} but computes something else (relative difference {worst:.1g})"
    return frozenset(moved)


def difference(module: nn.Module, kind: Kind) -> dict[Form, float]:
    """Relative difference between a block's results and those of `kind`, per form of call.

    It is measured on a copy with random weights on the CPU, so that zero-initialised layers, hooks
    and the device do not matter; the module itself does not run. Errors of its forward propagate,
    except in calls without an optional argument: if such a call fails or differs, its form is left
    out.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also reseed the GPUs
        ours = copy.deepcopy(module)
        ours = ours.to_empty(device="cpu").float().eval()
        for tensor in [*ours.parameters(), *ours.buffers()]:
            if tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
                tensor.copy_(torch.randn(tensor.shape) / fan_in**0.5)
        for layer in ours.modules():  # drop hooks: the trial run must not trigger user callbacks
            for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
                hooks.clear()
        theirs, examples = copy.deepcopy(ours), kind.examples(module)
        serve_norms(ours)
        count = max(map(len, examples))
        all_forms = frozenset((True, *rest) for rest in product((True, False), repeat=count - 1))
        kinds: Any = kind.ours, type(theirs)  # Any: mypy does not know that classes are hashable
        ours.__class__ = served_class(*kinds, all_forms)
        moved = {form_of(example): _moved(ours, theirs, example) for example in examples}
        for example in examples:
            for place in range(1, len(example)):
                without = (*example[:place], None, *example[place + 1 :])
                if form_of(without) not in moved:
                    found = _moved_if_it_runs(ours, theirs, without)
                    moved |= {form_of(without): found} if found <= TOLERANCE else {}
        return moved


def form_of(example: tuple[Any, ...]) -> Form:
    return tuple(argument is not None for argument in example)


def _moved(ours: nn.Module, theirs: nn.Module, example: tuple[Any, ...]) -> float:
    found, wanted = ours(*example), theirs(*example)
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        raise TypeError("it does not return one tensor of the expected shape")
    scale = float(wanted.abs().max()) or 1.0
    return float((found - wanted).abs().max() / scale)  # NaN if any value is


def _moved_if_it_runs(ours: nn.Module, theirs: nn.Module, example: tuple[Any, ...]) -> float:
    try:
        return _moved(ours, theirs, example)
    except Exception:  # noqa: BLE001 - then calls without this argument run the original
        return float("inf")
