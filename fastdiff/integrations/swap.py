"""`fastdiff.accelerate`: make an existing pipeline or module use our ops, in place.

A module is swapped by changing its class to a subclass of that class (`Swap`). The object stays,
with its parameters, buffers, hooks, names and state_dict, and `isinstance` gives the same answers.
Everything is planned first; nothing is changed before the plan is complete.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from fastdiff.extras import import_extra
from fastdiff.integrations.graphs import ATTRIBUTE, graph_entries, graph_swap
from fastdiff.integrations.networks import ATTRIBUTE as NETWORK
from fastdiff.integrations.networks import keep_text_of, network_entry, network_swap
from fastdiff.integrations.planner import Planner
from fastdiff.integrations.report import AccelerateError, Entry, Report, Swap
from fastdiff.integrations.verify import Verification, verified

NHWC = torch.channels_last


def is_diffusion_model(component: nn.Module) -> bool:
    """Whether a pipeline's component is a diffusion model, not an encoder from transformers."""
    inner = getattr(component, "_orig_mod", component)
    return not any(c.__module__.startswith("transformers.") for c in type(inner).__mro__)


def roots(obj: Any, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for each top-level module, also of nested pipelines and lists."""
    if isinstance(obj, nn.Module):
        yield prefix, obj
    elif isinstance(getattr(obj, "components", None), dict):
        for name, component in obj.components.items():
            yield from roots(component, f"{prefix}.{name}".lstrip("."))
    elif isinstance(obj, list | tuple):
        for index, component in enumerate(obj):
            yield from roots(component, f"{prefix}.{index}".lstrip("."))


def convolution_weights(root: nn.Module) -> list[tuple[nn.Module, str]]:
    """List the convolution weights whose memory format can be changed, as (layer, parameter name).

    The layers of adapters such as LoRA are excluded: peft and diffusers save their weights with
    safetensors, which rejects tensors that are not contiguous. So are weights that sequential
    offload keeps elsewhere, because it loads its own copies.
    """
    peft = sys.modules.get("peft.tuners.tuners_utils")
    adapters: set[int] = set()
    for tuner in root.modules() if peft else ():
        if isinstance(tuner, peft.BaseTunerLayer):  # type: ignore[union-attr]
            parts = (tuner._modules.get(name) for name in tuner.adapter_layer_names)
            adapters.update(id(layer) for part in parts if part for layer in part.modules())
    return [
        (m, name)
        for m in root.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and id(m) not in adapters
        for name, p in m.named_parameters(recurse=False)
        if p.ndim == 4 and not (p.is_meta and "_hf_hook" in m.__dict__)
    ]


def in_nhwc(layer: nn.Module, name: str) -> bool:
    return bool(getattr(layer, name).is_contiguous(memory_format=NHWC))


def to_channels_last(layer: nn.Module, name: str) -> Callable[[], None]:
    """Change a weight's memory format. Returns a function that undoes it without a reference to it.

    Offloading replaces parameters by others of the same name, so the weight is looked up again.
    """
    weight: nn.Parameter = getattr(layer, name)
    there, shape, stride = weakref.ref(layer), weight.shape, weight.stride()
    weight.data = weight.data.contiguous(memory_format=NHWC)

    def undo() -> None:
        now = getattr(there(), name, None)
        if now is not None and now.shape == shape:
            now.data = torch.empty_strided(shape, stride, dtype=now.dtype, device=now.device).copy_(
                now.data
            )

    return undo


def accelerate(
    obj: Any,
    *,
    channels_last: bool = True,
    pack_cpu_weights: bool = False,
    scheduler: Literal["fused"] | None = None,
    noise: Literal["philox", "generator"] = "philox",
    graphs: bool = False,
    keep_text: bool = False,
    strict: bool = False,
    verify: bool = False,
) -> Report:
    """Make a diffusers pipeline or model, or any module, use fastdiff's ops, in place.

    GroupNorm (with the SiLU, time embedding and scale and shift around it), LayerNorm (with the
    residual before it), attention and GEGLU are swapped in diffusers' blocks, in `nn.Sequential`,
    and in blocks that have the layers of CompVis', OpenAI's or lucidrains' if a copy of the block
    computes the same result both ways. Objects, parameters, names, state_dict and hooks stay. In
    half precision the norms and the softmax become more accurate; otherwise only rounding changes.

    Args:
        obj: a diffusers pipeline (its `transformers` components are left alone), a model, an
            `nn.Module`, or a list of them.
        channels_last: convert the convolutions' weights to this memory format, so that activations
            have it from the first convolution on. `save_pretrained` still works;
            `safetensors.torch.save_file` of a state_dict accepts contiguous weights only.
        pack_cpu_weights: on a CPU, keep a second, faster form of the weights of large convolutions,
            and fold upsampling into the convolution that follows (`fastdiff.runtime.cpu_layers`).
            For Stable Diffusion 1.5's U-Net this takes 2.3 GB in addition to 3.4 GB.
        scheduler: "fused" makes a pipeline's scheduler run each step as one kernel
            (`fastdiff.integrations.scheduler`). Its signatures, attributes and results stay. A step
            that the kernel does not cover, such as one with a gradient, runs in diffusers' own code
            and is counted in `report.scheduler_steps_left`.
        noise: how a fused scheduler draws noise, if it draws any. "philox" generates it inside the
            kernel, from seeds drawn from the generators, which gives different images of the same
            distribution. "generator" draws the same noise as diffusers, so that the images are the
            same; it costs one more kernel per step.
        graphs: on a GPU, replay each call of a U-Net as one CUDA graph, recorded in the first call
            with inputs of the same shapes (`fastdiff.integrations.graphs`). A U-Net with hooks,
            adapters that are not merged, or a `forward` or attention processors of its own is left;
            a call that cannot be replayed runs as before and is counted in
            `report.graph_calls_left`.
        keep_text: on a GPU, let a `UNet2DConditionModel` compute the keys and values of the text
            once per prompt rather than in every step, for as long as it is given the same tensor
            and neither that nor a weight changes. A write through ``tensor.data`` to a weight is
            not noticed, unless diffusers' `fuse_lora` or `unfuse_lora` does it; pass the text as a
            new tensor then, as pipelines do in every call (`fastdiff.integrations.kept_text`).
        strict: raise an error instead of leaving a module that fastdiff has an op for. This does
            not apply to a pipeline's components from other libraries (text encoders).
        verify: compare each module swapped by this call with its original on the first call with
            each input signature. A module that differs gets its original class back, with a
            `VerificationWarning` and the reason in `report.left`. This costs one evaluation of the
            original per module and signature, and a copy of its inputs. Results are compared,
            gradients are not; calls inside `torch.compile` graphs are not either
            (`report.unverified`). The scheduler is not compared.

    Returns:
        A report of what was swapped, what was left and why; `report.restore()` undoes the changes.

    Raises:
        TypeError: `obj` contains no module, with `graphs` no denoiser, or with `keep_text` no
            U-Net that reads text.
        ValueError: an unknown `scheduler` or `noise`, or `noise` without a fused scheduler.
        AccelerateError: with `strict`, a module would be left. Nothing was changed.
    """
    if scheduler not in (None, "fused"):
        raise ValueError(f"scheduler must be None or 'fused', got {scheduler!r}")
    if noise not in ("philox", "generator"):
        raise ValueError(f"noise must be 'philox' or 'generator', got {noise!r}")
    if noise != "philox" and scheduler is None:
        raise ValueError(f"noise={noise!r} needs a fused scheduler; add scheduler='fused'")
    found = list(roots(obj))
    if not found:
        own = type(obj).__module__.startswith("fastdiff.")
        hint = "; fastdiff's own models already run on its ops" if own else ""
        raise TypeError(
            "accelerate expects a diffusers pipeline, an nn.Module or a list of them, "
            f"got {type(obj).__name__} without a module in it{hint}"
        )
    entries: list[Entry] = []
    swaps: list[Swap] = []
    undo: list[Callable[[], None]] = []
    weights: list[tuple[nn.Module, str]] = []
    entered: dict[int, nn.Module] = {}
    for name, module in found:
        if module is not obj and not is_diffusion_model(module):
            reason = "not a diffusion model: it runs only once per prompt or image"
            entries.append(
                Entry(name=name, type=type(module).__name__, op="component", reason=reason)
            )
        elif id(module) not in entered:
            entered[id(module)] = module
            planner = Planner(name, module, pack=pack_cpu_weights)
            entries += planner.entries
            swaps += planner.swaps.values()
            if channels_last and (found_here := convolution_weights(module)):
                other = [weight for weight in found_here if not in_nhwc(*weight)]
                weights += other
                entries.append(
                    Entry(
                        name=name,
                        type=type(module).__name__,
                        op="memory format",
                        by="channels_last",
                        new=bool(other),
                    )
                )
    names = {id(m): name for name, m in reversed(found)}  # a model may be there twice
    whole = whole_networks(obj, {names[key]: m for key, m in entered.items()}, keep_text=keep_text)
    recorded = graph_entries(obj, found) if graphs else []
    entries += [entry for entry, _ in (*whole, *recorded)]
    changes = scheduler_change(obj, entries, noise) if scheduler == "fused" else []
    if strict and any(e.by is None and e.op != "component" for e in entries):
        raise AccelerateError(Report(entries, []))
    checks: dict[int, Verification] = {}
    for planned in swaps:
        swap = planned
        if verify and planned.entry is not None:
            swap, checks[id(planned.entry)] = verified(planned)
        undo.append(swap.do())
    for layer, name in weights:
        undo.append(to_channels_last(layer, name))
    undo += [change() for change in changes]
    undo += [
        network_swap(m, verify=verify, keep_text=keep_text).do() if e.new else keep_text_of(m)
        for e, m in whole
        if e.new or keep_text
    ]
    undo += [graph_swap(module).do() for entry, module in recorded if entry.by and entry.new]
    calls = [module.__dict__[ATTRIBUTE] for entry, module in recorded if entry.by]
    fused = obj.scheduler if scheduler == "fused" else None
    networks = [module.__dict__[NETWORK].prepared_on_gpu(module) for _, module in whole]
    return Report(entries, undo, scheduler=fused, checks=checks, graphs=calls, networks=networks)


def whole_networks(
    obj: Any, models: dict[str, nn.Module], *, keep_text: bool
) -> list[tuple[Entry, nn.Module]]:
    """The models that run as a whole on a GPU, with their lines in the report.

    Raises:
        TypeError: `keep_text`, but there is none.
    """
    entries = [(network_entry(name, model), model) for name, model in models.items()]
    whole = [(entry, model) for entry, model in entries if entry is not None]
    if keep_text and not whole:
        raise TypeError(
            f"keep_text=True needs a UNet2DConditionModel, got {type(obj).__name__} without one; "
            "leave it out"
        )
    return whole


def scheduler_change(
    pipeline: Any, entries: list[Entry], noise: Literal["philox", "generator"]
) -> list[Callable[[], Callable[[], None]]]:
    """Plan the change to a fused scheduler: functions that do it and return how to undo it."""
    import_extra("diffusers", extra="diffusers")
    from fastdiff.integrations import scheduler as fused

    current = getattr(pipeline, "scheduler", None)
    if current is None:
        raise TypeError(
            f"scheduler='fused' needs a pipeline with a scheduler, got {type(pipeline).__name__}; "
            "leave it out to accelerate the modules alone"
        )
    served = isinstance(current, fused.FusedScheduler)
    new = not served or current.noise != noise
    reason = fused.objection(current) or fused.replaced(current)
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
        current.__class__ = fused.fused_class(current.served if served else before, noise)

        def undo() -> None:
            current.__class__ = before
            current.__dict__.pop("_fused", None)

        return undo

    return [change]
