"""CUDA graphs for diffusers' U-Nets: ``fastdiff.accelerate(pipeline, graphs=True)``.

A call of the U-Net launches some 480 kernels, and diffusers' Python between them takes longer than
the kernels of a small batch. The first call with inputs of new shapes records a graph, which it and
all further calls with such inputs replay: inputs are copied to fixed addresses, outputs from there.

A graph repeats what the recorded call launched; Python code inside the U-Net no longer runs. If
that code could have done something else this time, the call runs without a graph and its reason is
counted in `report.graph_calls_left`: hooks, a replaced `forward`, attention processors that
diffusers does not define, adapters with a scale of their own. Graphs are recorded again when a
module or the address of a weight has changed; weights that change in place take effect as they are.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastdiff.integrations.layers import has_other_forward
from fastdiff.integrations.networks import ATTRIBUTE as NETWORK
from fastdiff.integrations.networks import (
    FREEU,
    PROJECTED,
    ModuleNetwork,
    WholeUNet,
    standing_for,
    whole_class,
)
from fastdiff.integrations.report import Entry, Swap
from fastdiff.kernels import selected_backend
from fastdiff.runtime.graphs import LIMIT, CudaRecorder, Recorder, StepGraphs

SERVED = ("UNet2DConditionModel", "UNet2DModel")
"""The classes of diffusers that are recorded."""
PROCESSORS = (
    *("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "XFormersAttnProcessor"),
    *("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"),
)
"""The attention processors of diffusers that are functions of their tensors."""
NUMBERS = (bool, int, float, str, type(None), torch.dtype)
"""Types of arguments that may be part of a graph's key."""
ATTRIBUTE = "_fastdiff_graphs"


def recorder_for(device: torch.device) -> Recorder | None:
    """The recorder for a device, or None if it has no graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None


def graph_entry(name: str, root: nn.Module) -> Entry:
    """The line of a denoiser in the report of `accelerate`."""
    already = ATTRIBUTE in root.__dict__
    reason = None if already else why_not(root)
    return Entry(
        name=name,
        type=type(root).__name__,
        op="graph",
        by=None if reason else "graphs.GraphedUNet",
        reason=reason,
        new=not already,
    )


def graph_entries(obj: Any, roots: list[tuple[str, nn.Module]]) -> list[tuple[Entry, nn.Module]]:
    """The denoisers among a pipeline's models, with their lines in the report.

    Raises:
        TypeError: there is none.
    """
    found = [(graph_entry(name, root), root) for name, root in roots if is_denoiser(root)]
    if not found:
        raise TypeError(
            f"graphs=True needs a pipeline's denoiser, got {type(obj).__name__} without one; "
            "leave it out to accelerate the modules alone"
        )
    return found


def graph_swap(root: nn.Module) -> Swap:
    """The change of a U-Net's class, after all other changes."""
    before: Any = type(root)
    whole = isinstance(root, WholeUNet)
    after = graphed_class(before.whole if whole else before, whole)
    return Swap(module=root, before=before, after=after, attributes={ATTRIBUTE: ModuleGraphs()})


def is_denoiser(root: nn.Module) -> bool:
    """Whether a model runs in every step, as far as its name tells."""
    name = type(root).__name__.lower()
    return any(word in name for word in ("unet", "transformer", "optimizedmodule"))


def why_not(root: nn.Module) -> str | None:
    """Why the calls of a model cannot be recorded, or None if they can."""
    if hasattr(root, "_orig_mod"):
        return (
            "it is compiled; torch.compile(..., mode='reduce-overhead') records graphs of its own"
        )
    kinds = [c.__name__ for c in type(root).__mro__ if c.__module__.startswith("diffusers.")]
    if not any(name in SERVED for name in kinds):
        return f"graphs serve diffusers' {' and '.join(SERVED)}"
    return _python_inside(root, list(root.named_modules()))


def _python_inside(root: nn.Module, modules: list[tuple[str, nn.Module]]) -> str | None:
    """The code inside a model that a graph would run only while recording, if there is any."""
    if "_hf_hook" in root.__dict__:
        return "its weights are offloaded, so they have other addresses each time"
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return "hooks of all modules are set, which a graph would run only while recording"
    own = (_python_of(*each) for each in modules if each[1] is not root)  # the root's run outside
    return next((reason for reason in own if reason is not None), None)


def _python_of(name: str, module: nn.Module) -> str | None:
    """`_python_inside` of one module."""
    if module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__:
        return f"{name} has a hook, which a graph would run only while recording"
    # in the two dicts, since a failing getattr of a module takes long
    processor = module.__dict__.get("processor", module._modules.get("processor"))
    if processor is not None and not _is_known(type(processor)):
        kind = type(processor).__name__
        return f"{name} has a {kind}, whose code a graph would run only while recording"
    if "base_layer" in module._modules:  # a layer of peft
        return (
            f"{name} has an adapter, whose scale a graph would keep; "
            "merge it with pipeline.fuse_lora() and pipeline.unload_lora_weights()"
        )
    if "forward" in module.__dict__ and has_other_forward(module):
        return f"{name} has a replaced forward, which a graph would run only while recording"
    return None


def _is_known(processor: type) -> bool:
    return processor.__name__ in PROCESSORS and processor.__module__.startswith("diffusers.")


class _Call:
    """A graph's inputs at fixed addresses, and the outputs it writes."""

    def __init__(self, leaves: list[Any], spec: TreeSpec, text: Any) -> None:
        parts = _ids(text)  # views of one product, which dense copies need not span

        def room(x: Tensor) -> Tensor:
            if id(x) in parts:
                return torch.empty(x.shape, dtype=x.dtype, device=x.device)
            return _at_own_address(x)

        self.leaves = [room(a) if isinstance(a, Tensor) else a for a in leaves]
        self.spec = spec
        self.outputs: Any = None
        self._text: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        return [a for a in self.leaves if isinstance(a, Tensor)]

    def load(self, leaves: list[Any], text: Any) -> None:
        """Copy other inputs in, except a projected text (see `PROJECTED`) that is already there."""
        loaded = _ids(text) if text is self._text else set()
        for kept, given in zip(self.leaves, leaves, strict=True):
            if isinstance(kept, Tensor) and id(given) not in loaded:
                kept.copy_(given)
        self._text = text

    def run(self, forward: Callable[..., Any]) -> None:
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        self.outputs = forward(*args, **kwargs)


def _ids(tree: Any) -> set[int]:
    return {id(leaf) for leaf in tree_leaves(tree)}


def _at_own_address(x: Tensor) -> Tensor:
    """Room for a tensor: with its strides, or dense if they may put two elements in one place."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return torch.empty_like(x)
        reach += (size - 1) * stride
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


class ModuleGraphs:
    """The graphs of one model; a copy of the model begins without any.

    Attributes:
        left: reason -> number of calls that ran without a graph.
    """

    def __init__(self) -> None:
        self.left: Counter[str] = Counter()
        self._graphs: StepGraphs | None = None
        self._device: torch.device | None = None
        self._calls: dict[Hashable, _Call] = {}
        self._state: Any = None

    def __reduce__(self) -> Any:
        return ModuleGraphs, ()

    def __call__(
        self, root: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The result of ``forward(*args, **kwargs)``, by a graph if it can be recorded."""
        network: ModuleNetwork | None = root.__dict__.get(NETWORK)
        if network is not None and not network.built:
            network.prepared_on_gpu(root)  # which moves weights, that a graph must find in place
        text = None if network is None else network.projected(root, args, kwargs)
        if text is not None:
            kwargs = {**kwargs, PROJECTED: text}
        found = self._prepared(root, args, kwargs)
        if isinstance(found, str):
            self.left[found] += 1
            return forward(*args, **kwargs)
        key, leaves, spec = found
        assert self._graphs is not None
        # buffers made in inference mode could not be written outside of it
        with torch.inference_mode(False), torch.no_grad():
            call = self._calls.pop(key, None) or _Call(leaves, spec, text)
            self._calls[key] = call  # at the end, as the most recently used
            if len(self._calls) > LIMIT:
                del self._calls[next(iter(self._calls))]
            call.load(leaves, text)
            work = functools.partial(call.run, forward)
            self._graphs.run(call, work, reads=call.tensors, state=[])
        return tree_map(lambda y: y.clone() if isinstance(y, Tensor) else y, call.outputs)

    def _prepared(
        self, root: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> str | tuple[Hashable, list[Any], TreeSpec]:
        """Key, leaves and structure of the arguments, or why there is no graph."""
        sample = args[0] if args else kwargs.get("sample")
        if not isinstance(sample, Tensor):
            return "the sample is not a tensor"
        device, modules = sample.device, list(root.named_modules())
        leaves, spec = tree_flatten(_with_timestep(args, kwargs, device))
        reason = (
            self._no_recorder(device)
            or _now(root, kwargs, device)
            or _unfit(leaves, device)
            or _python_inside(root, modules)
        )
        if reason is not None:
            return reason
        self._forget_if_changed([module for _, module in modules])
        described = tuple(
            (a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in leaves
        )
        return (described, str(spec), selected_backend(), tuple(_freeu(root))), leaves, spec

    def _no_recorder(self, device: torch.device) -> str | None:
        """Make room for the graphs of a device, or say why there are none."""
        if self._graphs is None or self._device != device:
            recorder = recorder_for(device)
            if recorder is None:
                return f"there are no graphs on device {device.type}"
            self._graphs, self._device = StepGraphs(recorder), device
            self._calls.clear()
        return None

    def _forget_if_changed(self, modules: list[nn.Module]) -> None:
        """Drop all graphs if a module was replaced or a weight has moved."""
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        state = [(id(m), type(m)) for m in modules], addresses
        if state != self._state:
            self._state = state
            self._calls.clear()
            if self._graphs is not None:
                self._graphs.forget()


def _now(root: nn.Module, kwargs: dict[str, Any], device: torch.device) -> str | None:
    """Why this call cannot be recorded or replayed, whatever the model's modules."""
    if torch.is_grad_enabled():
        return "gradients are enabled; use torch.no_grad()"
    if torch.is_autocast_enabled(device.type):
        return "autocast is enabled, whose casts a graph cannot cache; convert the model instead"
    if root.training:
        return "the model is in training mode; use its .eval()"
    if kwargs.get("cross_attention_kwargs"):
        return "cross_attention_kwargs go to code that a graph would run only while recording"
    return None


def _unfit(leaves: list[Any], device: torch.device) -> str | None:
    """Why these arguments cannot be those of a graph, or None if they can."""
    for a in leaves:
        if isinstance(a, Tensor) and a.device != device:
            return f"a tensor is on {a.device}, the sample on {device}"
        if not isinstance(a, (Tensor, *NUMBERS)):
            return f"an argument is a {type(a).__name__}"
    return None


def _with_timestep(args: Any, kwargs: dict[str, Any], device: torch.device) -> tuple[Any, Any]:
    """The arguments with the timestep as a tensor on the device, so that one graph serves all."""

    def tensor(t: Any) -> Any:
        if isinstance(t, (int, float)) and not isinstance(t, bool):
            dtype = torch.float64 if isinstance(t, float) else torch.int64  # as in diffusers
            return torch.tensor(t, dtype=dtype, device=device)
        return t.to(device) if isinstance(t, Tensor) and t.ndim == 0 else t

    if len(args) > 1:
        return (args[0], tensor(args[1]), *args[2:]), kwargs
    if "timestep" in kwargs:
        return args, {**kwargs, "timestep": tensor(kwargs["timestep"])}
    return args, kwargs


def _freeu(root: nn.Module) -> Iterator[Any]:
    """The numbers of FreeU, which diffusers' blocks read in every call."""
    for block in getattr(root, "up_blocks", ()):
        yield from (getattr(block, name, None) for name in FREEU)


class GraphedUNet(nn.Module):
    """Marks the classes of `graphed_class`."""


@functools.cache
def graphed_class(theirs: Any, whole: bool = False) -> Any:
    """A subclass of a U-Net's class that replays graphs; its objects can be copied and pickled.

    whole: of its `whole_class`.
    """
    base = whole_class(theirs) if whole else theirs

    @functools.wraps(theirs.forward)  # pipelines inspect its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(base.forward, self)
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        return self.__dict__[ATTRIBUTE](self, own, args, kwargs)

    members = {
        "forward": forward,
        "__module__": theirs.__module__,  # pipelines write module and name to model_index.json
        "__reduce_ex__": _reduce,
        "recorded": (theirs, whole),
    }
    return standing_for(theirs)(theirs.__name__, (GraphedUNet, base), members)


def _reduce(self: Any, protocol: int) -> Any:
    return _empty, type(self).recorded, self.__dict__.copy()


def _empty(theirs: Any, whole: bool) -> Any:
    graphed = graphed_class(theirs, whole)
    return graphed.__new__(graphed)
