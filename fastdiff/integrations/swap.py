"""`fastdiff.accelerate`: somebody else's pipeline or module computes with our ops, in place.

A module is swapped by giving it a subclass of its own class (`Swap`): the object stays, with its
parameters, buffers, hooks, names and state_dict, and `isinstance` goes on answering as it did. All
is planned first; nothing is changed before the plan stands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from fastdiff import cpu
from fastdiff.extras import import_extra
from fastdiff.integrations.known_blocks import (
    GROUP_NORM,
    KINDS,
    TOLERANCE,
    Kind,
    difference,
    served_class,
)
from fastdiff.integrations.layers import (
    GroupNorm,
    GroupNormBeforeSiLU,
    LayerNorm,
    Sequential,
    SiLUInNorm,
    norm_objection,
    replaced_forward,
)
from fastdiff.integrations.report import AccelerateError, Entry, Report, Swap

LEAVES: dict[type[nn.Module], tuple[type[nn.Module], str]] = {
    nn.GroupNorm: (GroupNorm, "group norm"),
    nn.LayerNorm: (LayerNorm, "layer norm"),
}
ATTENTION_LAYERS = (("to_q", "to_k", "to_v"), ("q", "k", "v"), ("query", "key", "value"))


class Planner:
    """What will become of the modules below one root."""

    def __init__(self, prefix: str, root: nn.Module, *, pack: bool) -> None:
        self.entries: list[Entry] = []
        self.swaps: dict[int, Swap] = {}
        self.differences: dict[Any, float] = {}
        self.modules = {
            ".".join(part for part in (prefix, name) if part): module
            for name, module in root.named_modules()
        }
        for name, module in self.modules.items():
            self._norm(name, module)
        for name, module in self.modules.items():
            self._block(name, module)
        for name, module in self.modules.items():
            self._pairs(name, module)
            if pack:
                self._pack(name, module)

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
        """Enter a module, swapped if nothing stands against it."""
        before = type(module)
        objection = objection or replaced_forward(module)
        if objection is not None:
            self._left(name, module, op, objection)
            return
        new = not ours(module)
        if new:
            self.swaps[id(module)] = Swap(
                module=module, before=before, after=to, attributes=attributes
            )
        by = (to if new else before).__mro__[1 if hasattr(to, "served") else 0]
        self.entries.append(
            Entry(
                name=name,
                type=before.__name__,
                op=op,
                by=f"{by.__module__}.{by.__name__}".removeprefix("fastdiff.integrations."),
                pairs=pairs,
                new=new,
            )
        )

    def _left(self, name: str, module: nn.Module, op: str, reason: str) -> None:
        self.entries.append(Entry(name=name, type=type(module).__name__, op=op, reason=reason))

    def _norm(self, name: str, module: nn.Module) -> None:
        kind = original(module)
        if kind in LEAVES:
            self._add(name, module, LEAVES[kind][1], LEAVES[kind][0], norm_objection(module))
        elif isinstance(module, nn.GroupNorm):
            self._known(name, module, GROUP_NORM)

    def _block(self, name: str, module: nn.Module) -> None:
        blocks = diffusers_blocks()
        known = blocks.BLOCKS.get(original(module)) if blocks else None
        if known is not None:
            to, op, pairs, objection = known
            self._add(name, module, op, to, objection(module), pairs=pairs)
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
        """Swap a block that looks like a known one and computes the same; False: it does not."""
        if ours(module):
            if not isinstance(module, kind.ours):
                return False
            self._add(name, module, kind.op, type(module), None, pairs=kind.pairs)
            return True
        key = (kind.ours, signature(module))
        if key not in self.differences:
            self.differences[key] = difference(module, kind)
        moved = self.differences[key]
        if moved <= TOLERANCE:
            to = served_class(kind.ours, type(module))
            self._add(name, module, kind.op, to, None, pairs=kind.pairs)
            return True
        if last:
            reason = f"it has the layers of {kind.ours.__name__} but computes something else"
            self._left(name, module, kind.op, f"{reason} (relative difference {moved:.1g})")
        return False

    def _unknown(self, name: str, module: nn.Module) -> None:
        """Say what is left: an attention whose forward we do not know."""
        children = module._modules
        if isinstance(module, nn.MultiheadAttention):
            self._left(name, module, "attention", "PyTorch's own fused path serves it")
        elif any(all(children.get(part) for part in parts) for parts in ATTENTION_LAYERS):
            reason = f"no op of ours is known to fit the forward of {type(module).__name__}"
            self._left(name, module, "attention", reason)

    def _pairs(self, name: str, module: nn.Module) -> None:
        """GroupNorm followed by SiLU where no block has taken both."""
        children = module._modules
        if original(module) is nn.Sequential:
            layers = list(children.values())
            pairs = sum(
                self._is_norm(norm) and type(act) is nn.SiLU for norm, act in pairwise(layers)
            )
            if pairs:
                parent = name.rpartition(".")[0]  # a residual block that does them itself
                counted = any(e.name == parent and e.pairs for e in self.entries)
                pairs = 0 if counted else pairs
                self._add(name, module, "group norm + silu", Sequential, None, pairs=pairs)
            return
        if id(module) in self.swaps or ours(module):
            return
        norms = {key: m for key, m in children.items() if self._is_norm(m)}
        acts = {key: m for key, m in children.items() if isinstance(m, nn.SiLU)}
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
                f"how {type(module).__name__}'s forward uses {[*norms]} and {[*acts]} is not known"
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
        """A faster form of the weights on the CPU."""
        kind, blocks = original(module), diffusers_blocks()
        layer: Any = module
        if kind in (nn.Conv2d, nn.Linear):
            to, objection = cpu.PREPARED[kind], cpu.packing_objection()
        elif blocks and kind is blocks.UPSAMPLING:
            to = blocks.Upsample2D
            objection = blocks.upsample_objection(module) or cpu.packing_objection()
            if layer.conv is None:
                return
            layer = layer.conv
        else:
            return
        dtype, device = layer.weight.dtype, layer.weight.device.type
        if device != "cpu":
            objection = f"its weights are on {device}"
        elif kind is nn.Linear and dtype not in cpu.INSTRUCTIONS:
            return  # nothing to win
        plan = cpu.plan_for(dtype, keep_copies=True, half_as_fp32=None)
        self._add(name, module, "weights", to, objection, plan=plan, kept=cpu.Kept())


def ours(module: nn.Module) -> bool:
    """Whether an earlier call has swapped it."""
    return type(module) is not original(module)


def original(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was swapped."""
    kind = type(module)
    if kind.__module__.startswith("fastdiff.integrations") or kind in cpu.PREPARED.values():
        return next(
            c for c in kind.__mro__ if not c.__module__.startswith("fastdiff.") or c in cpu.PREPARED
        )
    return kind


def diffusers_blocks() -> Any:
    """Our blocks for diffusers; None where nobody has imported diffusers, so nothing can be its."""
    if sys.modules.get("diffusers") is None:
        return None
    from fastdiff.integrations import diffusers_blocks as blocks

    return blocks


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What decides the function that a block computes, beside its sizes."""
    flags = tuple(
        (key, value)
        for key, value in sorted(module.__dict__.items())
        if isinstance(value, bool | str | float | None) and key != "training"
    )
    children = tuple((key, signature(child)) for key, child in module.named_children())
    return type(module), flags, children


def is_diffusion_model(component: nn.Module) -> bool:
    """Whether a pipeline's component is diffusers' or its user's, not another library's encoder."""
    inner = getattr(component, "_orig_mod", component)
    return not any(c.__module__.startswith("transformers.") for c in type(inner).__mro__)


def roots(obj: Any, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each module to enter; nested pipelines and lists are entered too."""
    if isinstance(obj, nn.Module):
        yield prefix, obj
    elif isinstance(getattr(obj, "components", None), dict):
        for name, component in obj.components.items():
            yield from roots(component, f"{prefix}.{name}".lstrip("."))
    elif isinstance(obj, list | tuple):
        for index, component in enumerate(obj):
            yield from roots(component, f"{prefix}.{index}".lstrip("."))


def in_other_formats(root: nn.Module) -> list[nn.Parameter]:
    """The convolutions' weights that are not in channels_last."""
    return [
        p
        for m in root.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
        for p in m.parameters(recurse=False)
        if p.ndim == 4 and not p.is_contiguous(memory_format=torch.channels_last)
    ]


def layout_entry(name: str, root: nn.Module, new: bool) -> Entry:
    kind = type(root).__name__
    return Entry(name=name, type=kind, op="memory format", by="channels_last", new=new)


def to_channels_last(parameter: nn.Parameter) -> Callable[[], None]:
    """Change a weight's memory format; returns what undoes it."""
    stride = parameter.stride()
    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def undo() -> None:
        parameter.data = torch.empty_strided(
            parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
        ).copy_(parameter.data)

    return undo


def accelerate(
    obj: Any,
    *,
    channels_last: bool = True,
    pack_cpu_weights: bool = False,
    scheduler: Literal["fused"] | None = None,
    strict: bool = False,
) -> Report:
    """Let a diffusers pipeline or model, or any module, compute with fastdiff's ops, in place.

    GroupNorm (with the SiLU, time embedding and scale and shift around it), LayerNorm (with the
    residual before it), attention and GEGLU are swapped in diffusers' blocks, in `nn.Sequential`,
    and in blocks that have the layers of CompVis', OpenAI's or lucidrains' and prove, on a copy, to
    compute the same. Objects, parameters, names, state_dict and hooks stay. In half precision the
    norms and the softmax are exacter than before; otherwise only rounding changes.

    Args:
        obj: a diffusers pipeline (its `transformers` components are left), a model, an `nn.Module`,
            or a list of them.
        channels_last: give the convolutions' weights that memory format, so that the network's
            tensors take it from the first convolution on.
        pack_cpu_weights: on a CPU, keep a second form of large convolutions' weights, and fold
            upsamplings into their convolutions (`fastdiff.cpu`). For Stable Diffusion 1.5's U-Net
            2.3 GB beside 3.4.
        scheduler: "fused" replaces a pipeline's scheduler by one with the same call signature that
            runs each step as one kernel (`fastdiff.integrations.scheduler`).
        strict: raise rather than leave a module that we have an op for. A pipeline's components
            that are other libraries' (text encoders) are not meant.

    Returns:
        what was swapped, what was left and why; `report.restore()` undoes it.

    Raises:
        TypeError: there is no module in `obj`.
        AccelerateError: `strict` and something would be left. Nothing was changed.
    """
    if scheduler not in (None, "fused"):
        raise ValueError(f"scheduler must be None or 'fused', got {scheduler!r}")
    found = list(roots(obj))
    if not found:
        raise TypeError(
            f"accelerate takes a diffusers pipeline, an nn.Module or a list of them, "
            f"got {type(obj).__name__}"
        )
    entries: list[Entry] = []
    swaps: list[Swap] = []
    undo: list[Callable[[], None]] = []
    weights: list[nn.Parameter] = []
    entered: dict[int, nn.Module] = {}
    for name, module in found:
        if module is not obj and not is_diffusion_model(module):
            reason = "not a diffusion model; it runs once per prompt or image"
            entries.append(
                Entry(name=name, type=type(module).__name__, op="component", reason=reason)
            )
        elif id(module) not in entered:
            entered[id(module)] = module
            planner = Planner(name, module, pack=pack_cpu_weights)
            entries += planner.entries
            swaps += planner.swaps.values()
            if channels_last:
                weights += (found_here := in_other_formats(module))
                entries.append(layout_entry(name, module, bool(found_here)))
    changes = scheduler_change(obj, entries) if scheduler == "fused" else []
    if strict and any(e.by is None and e.op != "component" for e in entries):
        raise AccelerateError(Report(entries, []))
    for swap in swaps:
        swap.do()
        undo.append(swap.undo)
    for weight in weights:
        undo.append(to_channels_last(weight))
    undo += [change() for change in changes]
    return Report(entries, undo)


def scheduler_change(pipeline: Any, entries: list[Entry]) -> list[Callable[[], Callable[[], None]]]:
    """What gives a pipeline's scheduler its fused step: a function that returns what undoes it."""
    import_extra("diffusers", extra="diffusers")
    from fastdiff.integrations import scheduler as fused

    current = getattr(pipeline, "scheduler", None)
    if current is None:
        raise TypeError(
            f"scheduler='fused' wants a pipeline with a scheduler, got {type(pipeline).__name__}"
        )
    new = not isinstance(current, fused.FusedScheduler)
    reason = fused.objection(current)
    entries.append(
        Entry(
            name="scheduler",
            type=type(current).__name__,
            op="scheduler",
            by=None if reason else "scheduler.FusedScheduler",
            reason=reason,
            new=new,
        )
    )
    if reason or not new:
        return []

    def change() -> Callable[[], None]:
        before: Any = type(current)
        current.__class__ = fused.fused_class(before)

        def undo() -> None:
            current.__class__ = before
            current.__dict__.pop("_fused", None)

        return undo

    return [change]
