"""Plan what happens to each module of one root; nothing is changed while planning."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import jit, nn

from fastdiff.integrations.known_blocks import (
    GROUP_NORM,
    KINDS,
    Kind,
    proof,
    served_class,
)
from fastdiff.integrations.layers import (
    GroupNorm,
    GroupNormBeforeSiLU,
    LayerNorm,
    Sequential,
    SiLUInNorm,
    is_silu,
    norm_objection,
    original,
    ours,
    replaced_forward,
)
from fastdiff.integrations.report import Entry, Swap
from fastdiff.integrations.verify import fastdiff_class
from fastdiff.runtime import cpu_layers

LEAVES: dict[type[nn.Module], tuple[type[nn.Module], str]] = {
    nn.GroupNorm: (GroupNorm, "group norm"),
    nn.LayerNorm: (LayerNorm, "layer norm"),
}
ATTENTION_LAYERS = (
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("query", "key", "value"),
)
PACKED_LAYERS = ("to_qkv", "qkv", "in_proj")
NAMED_LIKE = {
    "attention": re.compile(r"attention|attn", re.IGNORECASE),
    "geglu": re.compile(r"geglu", re.IGNORECASE),
    "norm": re.compile(r"norm", re.IGNORECASE),
}
"""Class names that suggest a computation that we have an op for, whatever the layers are."""


class Planner:
    """The report entries and the swaps planned for one root."""

    def __init__(self, prefix: str, root: nn.Module, *, pack: bool) -> None:
        self.entries: list[Entry] = []
        self.swaps: dict[int, Swap] = {}
        self.proofs: dict[Any, Any] = {}
        self.modules = dict(self._enter(prefix, root))
        for name, module in self.modules.items():
            self._norm(name, module)
        for name, module in self.modules.items():
            self._block(name, module)
        for name, module in self.modules.items():
            self._pairs(name, module)
            if pack:
                self._pack(name, module)
        listed = {entry.name for entry in self.entries}
        for name, module in reversed(self.modules.items()):
            if name not in listed and not type(module).__module__.startswith(
                ("torch.", "fastdiff.")
            ):
                self._unlisted(name, module)

    def _enter(self, name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name, module) for each module that can be inspected, each one once."""
        seen: set[nn.Module] = set()
        todo = [(name, module)]
        while todo:
            name, module = todo.pop()
            if module in seen:
                continue
            seen.add(module)
            if isinstance(module, jit.ScriptModule):
                reason = "compiled by TorchScript; accelerate it before torch.jit.script or .trace"
                self._left(name, module, "module", reason)
                continue
            yield name, module
            children = [(f"{name}.{key}".lstrip("."), m) for key, m in module._modules.items() if m]
            todo += reversed(children)

    def _add(
        self,
        name: str,
        module: nn.Module,
        op: str,
        to: type[nn.Module],
        objection: str | None,
        *,
        pairs: int = 0,
        **attributes: Any,
    ) -> None:
        """Add an entry for a module: swapped to `to`, or left if there is an objection."""
        before = fastdiff_class(module)
        objection = objection or replaced_forward(module)
        if objection is not None:
            self._left(name, module, op, objection)
            return
        new = not isinstance(module, to)
        by = (to if new else before).__mro__[1 if hasattr(to, "served") else 0]
        entry = Entry(
            name=name,
            type=before.__name__,
            op=op,
            by=f"{by.__module__}.{by.__name__}".removeprefix("fastdiff.integrations."),
            pairs=pairs,
            new=new,
        )
        if new:
            self.swaps[id(module)] = Swap(
                module=module, before=original(module), after=to, attributes=attributes, entry=entry
            )
        self.entries.append(entry)

    def _left(self, name: str, module: nn.Module, op: str, reason: str) -> None:
        self.entries.append(Entry(name=name, type=type(module).__name__, op=op, reason=reason))

    def _norm(self, name: str, module: nn.Module) -> None:
        kind = original(module)
        if kind in LEAVES:
            self._add(name, module, LEAVES[kind][1], LEAVES[kind][0], norm_objection(module))
        elif isinstance(module, nn.GroupNorm):
            self._known(name, module, GROUP_NORM)
        elif isinstance(module, nn.LayerNorm):
            reason = "it is a subclass of LayerNorm, which may compute something else"
            self._left(name, module, "layer norm", reason)

    def _block(self, name: str, module: nn.Module) -> None:
        blocks = diffusers_blocks()
        known = blocks.BLOCKS.get(original(module)) if blocks else None
        if known is not None:
            to, op, pairs, objection = known
            reason = objection(module) or argument_objection(to, original(module))
            self._add(name, module, op, to, reason, pairs=pairs)
            return
        if type(module).__module__.startswith(("torch.", "diffusers.")):
            self._unknown(name, module)
            return
        kinds = [kind for kind in KINDS if kind.fits(module)]
        if not kinds:
            self._unknown(name, module)
        elif not any(self._known(name, module, kind, last=kind is kinds[-1]) for kind in kinds):
            return

    def _known(self, name: str, module: nn.Module, kind: Kind, *, last: bool = True) -> bool:
        """Swap a block if it computes the same as a known one; return whether it does."""
        if ours(module):
            if not isinstance(module, kind.ours):
                return False
            self._add(name, module, kind.op, type(module), None, pairs=kind.pairs)
            return True
        key = (kind.ours, signature(module))
        if key not in self.proofs:
            self.proofs[key] = proof(module, kind)
        found = self.proofs[key]
        if not isinstance(found, str):
            kinds: Any = kind.ours, type(module)
            to = served_class(*kinds, found)
            self._add(name, module, kind.op, to, None, pairs=kind.pairs)
        elif last:
            self._left(name, module, kind.op, found)
        return not isinstance(found, str)

    def _unknown(self, name: str, module: nn.Module) -> None:
        """Add an entry for an attention whose forward is unknown."""
        children = module._modules
        if isinstance(module, nn.MultiheadAttention):
            self._left(name, module, "attention", "it uses PyTorch's own fused path")
        elif any(all(children.get(part) for part in parts) for parts in ATTENTION_LAYERS):
            self._left(name, module, "attention", unfitting(module))

    def _unlisted(self, name: str, module: nn.Module) -> None:
        """Add entries for modules that only their names give away; inner ones come first."""
        kind, children = type(module).__name__, {k: m for k, m in module._modules.items() if m}
        found = [op for op in ("attention", "geglu") if NAMED_LIKE[op].search(kind)]
        if any(layer in children for layer in PACKED_LAYERS):
            found = ["attention"]
        norms = sorted({type(m).__name__ for m in children.values() if self._is_other(m)})
        if norms and any(is_silu(m) for m in children.values()):
            found.append("norm and activation")
        if not found:
            return
        inner = {e.op for e in self.entries if e.name.startswith(f"{name}." if name else "")}
        for op in found:
            if op in inner:
                continue  # it is only a wrapper around such a module
            reason = f"its norm is a {', '.join(norms)}, which fastdiff has no op for"
            self._left(name, module, op, reason if op.startswith("norm") else unfitting(module))

    def _is_other(self, module: nn.Module) -> bool:
        """Whether a module is called a norm but is neither PyTorch's nor one with its own entry."""
        kind = type(module)
        return bool(NAMED_LIKE["norm"].search(kind.__name__)) and not (
            kind.__module__.startswith("torch.") or isinstance(module, nn.GroupNorm | nn.LayerNorm)
        )

    def _pairs(self, name: str, module: nn.Module) -> None:
        """Plan GroupNorm + SiLU pairs that are not already part of a swapped block."""
        children: dict[str, Any] = dict(module._modules)
        if original(module) is nn.Sequential:
            layers = list(children.values())
            pairs = sum(self._is_norm(norm) and is_silu(act) for norm, act in pairwise(layers))
            if pairs:
                parent = name.rpartition(".")[0]  # a residual block may have counted them
                counted = any(e.name == parent and e.pairs for e in self.entries)
                pairs = 0 if counted else pairs
                self._add(name, module, "group norm + silu", Sequential, None, pairs=pairs)
            return
        if id(module) in self.swaps or ours(module):
            return
        norms = {key: m for key, m in children.items() if self._is_norm(m)}
        acts = {
            key: m
            for key, m in children.items()
            if isinstance(m, nn.SiLU) or (m is not None and is_silu(m))
        }
        if not norms or not acts or any(e.name == name for e in self.entries):
            return
        blocks = diffusers_blocks()
        if (
            blocks
            and type(module).__module__.startswith("diffusers.")
            and type(module).__name__ in blocks.NORM_THEN_ACT
            and set(norms) == {"conv_norm_out"}
            and set(acts) == {"conv_act"}
        ):
            self._norm_then_act(f"{name}.conv_norm_out".lstrip("."), norms, acts)
        else:
            reason = (
                f"it is unknown how {type(module).__name__}'s forward uses {[*norms]} and {[*acts]}"
            )
            self._left(name, module, "group norm + silu", reason)

    def _norm_then_act(self, name: str, norms: dict[str, Any], acts: dict[str, Any]) -> None:
        norm, act = norms["conv_norm_out"], acts["conv_act"]
        objection = replaced_forward(act)
        self.entries = [entry for entry in self.entries if entry.name != name]
        self.swaps.pop(id(norm), None)
        to = GroupNormBeforeSiLU
        self._add(name, norm, "group norm + silu", to, objection, pairs=1, partner=(act,))
        if id(norm) in self.swaps:
            self.swaps[id(act)] = Swap(
                module=act, before=type(act), after=SiLUInNorm, attributes={"partner": (norm,)}
            )

    def _is_norm(self, module: nn.Module | None) -> bool:
        return isinstance(module, nn.GroupNorm) and (ours(module) or id(module) in self.swaps)

    def _pack(self, name: str, module: nn.Module) -> None:
        """Plan a faster form of the weights on the CPU."""
        kind, blocks = original(module), diffusers_blocks()
        layer: Any = module
        if kind in (nn.Conv2d, nn.Linear):
            to, objection = cpu_layers.PREPARED[kind], cpu_layers.packing_objection()
        elif blocks and kind is blocks.UPSAMPLING:
            to = blocks.Upsample2D
            objection = blocks.upsample_objection(module) or cpu_layers.packing_objection()
            if layer.conv is None:
                return
            layer = layer.conv
        else:
            return
        dtype, device = layer.weight.dtype, layer.weight.device.type
        if device != "cpu":
            objection = f"its weights are on {device}"
        elif kind is nn.Linear and dtype not in cpu_layers.INSTRUCTIONS:
            return  # nothing to gain
        plan = cpu_layers.plan_for(dtype, keep_copies=True, half_as_fp32=None)
        self._add(name, module, "weights", to, objection, plan=plan, kept=cpu_layers.Kept())


def unfitting(module: nn.Module) -> str:
    return f"fastdiff does not know what the forward of {type(module).__name__} computes"


def argument_objection(to: type[nn.Module], theirs: type[nn.Module]) -> str | None:
    """Why our forward cannot replace theirs: it lacks an argument. None if it takes all of them.

    New releases of diffusers add arguments to its blocks.
    """
    mine, other = (inspect.signature(kind.forward).parameters for kind in (to, theirs))
    if any(p.kind is p.VAR_KEYWORD for p in mine.values()):
        return None
    named = [n for n, p in other.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in named if name not in mine]
    if missing:
        return (
            f"the forward of {theirs.__name__} in this version of diffusers also takes "
            f"{', '.join(missing)}"
        )
    return None


def diffusers_blocks() -> Any:
    """Our blocks for diffusers, or None if diffusers is not imported, so no module can be its."""
    if sys.modules.get("diffusers") is None:
        return None
    from fastdiff.integrations import diffusers_blocks as blocks

    return blocks


def signature(module: nn.Module, sizes: frozenset[int] = frozenset()) -> tuple[Any, ...]:
    """Key of the function that a block computes, without its sizes.

    An integer attribute may be a size or an option. It counts as an option if it is small or is not
    a size of any weight of the block (`sizes` are those of the enclosing blocks).
    """
    sizes |= {size for parameter in module.parameters() for size in parameter.shape if size >= 8}
    flags = tuple(
        (key, value)
        for key, value in sorted(module.__dict__.items())
        if isinstance(value, int | str | float | None) and key != "training" and value not in sizes
    )
    children = tuple((key, signature(child, sizes)) for key, child in module.named_children())
    return type(module), flags, children
