"""diffusers' U-Nets computed as a whole by fastdiff's own network, on the same weights.

Between the blocks of diffusers every sum and every concatenated skip connection is a tensor, each
convolution adds its own bias, and each residual block projects the time embedding itself. On a GPU
each of these is a launch. fastdiff's U-Net computes the same function with fewer of them, so on a
GPU it runs in place of diffusers' blocks. Its parameters are views of diffusers' parameters, which
are only moved next to each other in memory where one product serves several of them; names, shapes
and values stay, and changes in place (a merged LoRA) are seen.

A call that needs something else (ControlNet's residuals, attention masks, gradients) and a model
with hooks, adapters, other attention processors or layers of other classes runs block by block as
before, and its reason is counted in `report.network_calls_left`. Every call checks this again. On a
CPU, where launches cost little, blocks run as before. The network is built for the device that the
model is on, and again when it moves, so `accelerate` may come before or after `.to("cuda")`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fastdiff.checkpoint.build import check_names
from fastdiff.checkpoint.layouts.diffusers.read import names, unet_config
from fastdiff.checkpoint.weights import Sources
from fastdiff.integrations.kept_text import KeptText
from fastdiff.integrations.layers import has_other_forward, original, under_transform
from fastdiff.integrations.report import Entry, Swap
from fastdiff.models import layers
from fastdiff.models.network import Context, Network, kind_of, network_family

SERVED = "UNet2DConditionModel"
"""The class of diffusers that is computed as a whole."""
ARGUMENTS = (
    *("sample", "timestep", "encoder_hidden_states", "class_labels", "added_cond_kwargs"),
    "return_dict",
)
"""The arguments of its forward that our network knows; others must be None or empty."""
LEAVES = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
"""The layers with parameters of which such a model consists."""
ATTRIBUTE = "_fastdiff_network"
PROJECTED = "_fastdiff_projected"
"""The argument by which graphs hand on the projected text."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FREEU = ("s1", "s2", "b1", "b2")
"""Attributes that diffusers' FreeU sets on the blocks of a U-Net."""
VALUES = ("processor", "_chunk_size", "forward", *FREEU)
"""Attributes of modules on which it depends whether our network computes the same."""


def network_entry(name: str, root: nn.Module) -> Entry | None:
    """The line of a U-Net in the report of `accelerate`, or None for any other model.

    The model may be on another device now; it is served whenever it is called on a GPU.
    """
    kinds = {c.__name__ for c in type(root).__mro__ if c.__module__.startswith("diffusers.")}
    if SERVED not in kinds:
        return None
    return Entry(
        name=name,
        type=type(root).__name__,
        op="U-Net as a whole, on a GPU",
        by="networks.WholeUNet",
        new=ATTRIBUTE not in root.__dict__,
    )


def network_swap(root: nn.Module, *, verify: bool, keep_text: bool) -> Swap:
    """The change of a U-Net's class, after those of its blocks."""
    before: Any = type(root)
    attributes = {ATTRIBUTE: ModuleNetwork(verify=verify, keep_text=keep_text)}
    return Swap(module=root, before=before, after=whole_class(before), attributes=attributes)


def keep_text_of(root: nn.Module) -> Callable[[], None]:
    """Keep the text's projections of a U-Net that an earlier call has accelerated. Returns a
    function that undoes it."""
    network: ModuleNetwork = root.__dict__[ATTRIBUTE]
    before, network.text = network.text, network.text or KeptText()
    there = weakref.ref(network)

    def undo() -> None:
        if (calls := there()) is not None:
            calls.text = before

    return undo


class _Snapshot:
    """What a model consisted of when its network was built, in lists that compare quickly: every
    call on a GPU does it, for hundreds of modules."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self._kinds = list(map(type, self._modules))
        self._states = [module.__dict__ for module in self._modules]
        self._sizes = list(map(len, self._states))  # a new attribute, such as forward, changes it
        self._children = [state["_modules"] for state in self._states]
        self._child_ids = self._ids(self._children)
        self._parameters = [state["_parameters"] for state in self._states]
        self._parameter_ids = self._ids(self._parameters)
        self._tensors = [p for each in self._parameters for p in each.values() if p is not None]
        self._addresses = [p.data_ptr() for p in self._tensors]
        self._hooks = [state[name] for state in self._states[1:] for name in HOOKS]
        self._values = [
            (state, name, state[name]) for state in self._states for name in VALUES if name in state
        ]

    def same(self) -> bool:
        """Whether the model has the same modules, parameters and options, and still no hooks."""
        return (
            not any(self._hooks)
            and list(map(type, self._modules)) == self._kinds
            and list(map(len, self._states)) == self._sizes
            and all(state.get(name) is value for state, name, value in self._values)
            and self._ids(self._children) == self._child_ids
            and self._ids(self._parameters) == self._parameter_ids
            and [p.data_ptr() for p in self._tensors] == self._addresses
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters."""
        return self._tensors

    def _ids(self, tables: list[dict[str, Any]]) -> list[int]:
        return list(map(id, itertools.chain.from_iterable(map(dict.values, tables))))


class ModuleNetwork:
    """Our network for one U-Net of diffusers; a copy of the model builds its own.

    Attributes:
        left: reason -> number of calls on a GPU that ran block by block.
        text: the projections of the text; None: they are computed in each call.
    """

    def __init__(self, *, verify: bool = False, keep_text: bool = False) -> None:
        self.left: Counter[str] = Counter()
        self.text = KeptText() if keep_text else None
        self._verify = verify
        self._built: Network | str | None = None
        self._snapshot: _Snapshot | None = None

    def __reduce__(self) -> Any:
        options = {"verify": self._verify, "keep_text": self.text is not None}
        return functools.partial(ModuleNetwork, **options), ()

    @property
    def built(self) -> bool:
        """Whether it is known if our network serves the model on its present device."""
        return self._built is not None

    def forget(self) -> None:
        """Drop the network, which would keep the memory of weights that are about to move."""
        self._built = self._snapshot = None
        self.forget_text()

    def forget_text(self) -> None:
        """Drop the projections of all prompts."""
        if self.text is not None:
            self.text.forget()

    def prepared_on_gpu(self, root: nn.Module) -> ModuleNetwork:
        """Build the network now rather than in the first call, if the model is on a GPU."""
        weight = next(root.parameters(), None)
        if weight is not None and weight.device.type in layers.BIAS_IS_A_LAUNCH:
            self.prepare(root)
        return self

    def prepare(self, root: nn.Module) -> Network | str:
        """Our network, built again if a module or the address of a weight has changed, or why there
        is none."""
        if self._verify:
            return "verify=True compares its blocks with diffusers', which have to run for that"
        if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return "hooks of all modules are set"
        if self._snapshot is None or self._built is None or not self._snapshot.same():
            self.forget_text()
            with torch.inference_mode(False), torch.no_grad():
                self._built = _network_of(root)
                self._snapshot = _Snapshot(root)
        return self._built

    def __call__(
        self, root: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The result of ``forward(*args, **kwargs)``.

        kwargs: also `PROJECTED`, if the caller has it from `projected`.
        """
        kwargs = dict(kwargs)
        context = kwargs.pop(PROJECTED, None)
        given = _arguments(type(root), (root, *args), kwargs)
        found = self._serving(root, given)
        if found is None:
            return forward(*args, **kwargs)
        if isinstance(found, str):
            self.left[found] += 1
            return forward(*args, **kwargs)
        if context is None:
            context = self._projected(found, given)
        return _evaluated(root, found, given, context)

    def projected(self, root: nn.Module, args: Any, kwargs: dict[str, Any]) -> Context | None:
        """The kept projection of the text of a call; None if none is kept for such a call."""
        if self.text is None:
            return None
        given = _arguments(type(root), (root, *args), kwargs)
        found = self._serving(root, given)
        return None if found is None or isinstance(found, str) else self._projected(found, given)

    def _serving(self, root: nn.Module, given: Mapping[str, Any]) -> Network | str | None:
        """Our network, why it cannot run this call, or None for a call that is not on a GPU."""
        sample = given.get("sample")
        if not isinstance(sample, Tensor) or sample.device.type not in layers.BIAS_IS_A_LAUNCH:
            return None
        found = _now(root, given) or self.prepare(root)
        return found if isinstance(found, str) else _misfit(found, given) or found

    def _projected(self, network: Network, given: Mapping[str, Any]) -> Context:
        context = given["encoder_hidden_states"]
        if self.text is None:
            return network.project_context(context)
        assert self._snapshot is not None
        return self.text(network, context, self._snapshot.tensors)


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _arguments(kind: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, without those that are None or empty; {} if they do not fit."""
    try:
        bound = _signature(kind).bind(*args, **kwargs).arguments
    except TypeError:  # diffusers' forward raises it again
        return {}
    return {
        name: value
        for name, value in bound.items()
        if value is not None and not (isinstance(value, dict) and not value)
    }


def _now(root: nn.Module, given: Mapping[str, Any]) -> str | None:
    """Why this call runs block by block, whatever the model's modules."""
    if torch.is_grad_enabled():
        return "gradients are enabled; use torch.no_grad()"
    kind = given["sample"].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "autocast is enabled; convert the model instead"
    if root.training:
        return "the model is in training mode; use its .eval()"
    if under_transform():
        return "it is called under a transform of torch.func"
    others = [name for name in given if name not in ("self", *ARGUMENTS)]
    return f"the call has {' and '.join(others)}" if others else None


def _misfit(network: Network, given: Mapping[str, Any]) -> str | None:
    """Why our network cannot be given these tensors; diffusers' forward may know better."""
    x, context, config = given["sample"], given.get("encoder_hidden_states"), network.config
    dtype, width = next(network.parameters()).dtype, config.context_dim
    if x.dtype is not dtype or x.ndim != 4 or x.shape[1] != config.in_channels:
        return f"the sample is {x.dtype} of shape {tuple(x.shape)}"
    if not isinstance(context, Tensor) or context.ndim != 3 or context.shape[2] != width:
        return f"encoder_hidden_states are not (N, T, {width})"
    if context.dtype is not dtype or len(context) != len(x):
        return f"encoder_hidden_states are {context.dtype} of shape {tuple(context.shape)}"
    if config.num_classes is not None and given.get("class_labels") is None:
        return "class_labels are missing"
    more = given.get("added_cond_kwargs", {})
    if config.added_condition_dim is not None and not {"text_embeds", "time_ids"} <= more.keys():
        return "added_cond_kwargs lacks text_embeds or time_ids"
    return None


def _evaluated(root: Any, network: Network, given: Mapping[str, Any], context: Context) -> Any:
    """The result of the model's forward, by our network.

    context: its projected text.
    """
    x, config = given["sample"], network.config
    t = given["timestep"]
    if not isinstance(t, Tensor):
        dtype = torch.float64 if isinstance(t, float) else torch.int64  # as in diffusers
        t = torch.tensor(t, dtype=dtype, device=x.device)
    y = None if config.num_classes is None else given["class_labels"].to(x.device)
    added = None
    if config.added_condition_dim is not None:
        more = given["added_cond_kwargs"]
        sizes = root.add_time_proj(more["time_ids"].flatten()).reshape(len(x), -1)
        added = torch.cat([more["text_embeds"], sizes], dim=-1)
    emb = network.embed(t.to(x.device).expand(len(x)), y, added)
    result = network.body(x, emb, context)
    if not given.get("return_dict", True):
        return (result,)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return UNet2DConditionOutput(sample=result)


# What the network is built from


def _network_of(root: nn.Module) -> Network | str:
    """Our network on a model's parameters, or why there is none."""
    own = ((name, module) for name, module in root.named_modules() if module is not root)
    reason = next(filter(None, (_layer_of(name, module) for name, module in own)), None)
    if reason is not None:
        return reason
    theirs = dict(root.named_parameters())
    try:
        config = unet_config({**root.config, "_class_name": SERVED})  # type: ignore[dict-item]
        with torch.device("meta"):
            network: Network = network_family(kind_of(config)).network(config).eval()
        sources = names(network)
        check_names(network, sources, {key: tuple(p.shape) for key, p in theirs.items()})
    except ValueError as error:
        return f"fastdiff's U-Net is another: {error}"
    if len({(p.dtype, p.device) for p in theirs.values()}) != 1:
        return "its parameters differ in dtype or device"
    for group in _neighbours(network, sources):
        layers.move_together([theirs[key] for key in group])
    for name, keys in sources.items():
        path, _, leaf = name.rpartition(".")
        parts = [theirs[key] for key in keys]
        whole = parts[0] if len(parts) == 1 else layers.joined(parts)
        assert whole is not None, f"{name} is not in one piece"
        owner = network.get_submodule(path)
        shape = owner.get_parameter(leaf).shape
        setattr(owner, leaf, nn.Parameter(whole.detach().view(shape), requires_grad=False))
    return network


def _neighbours(network: Network, sources: Sources) -> Iterator[list[str]]:
    """Lists of diffusers' parameters that have to lie next to each other in memory."""
    paths = {parameter: name for name, parameter in network.named_parameters()}
    done: set[str] = set()
    for parameters in network.together():
        together = [paths[cast(nn.Parameter, parameter)] for parameter in parameters]
        done.update(together)
        yield [key for name in together for key in sources[name]]
    for name, keys in sources.items():
        if len(keys) > 1 and name not in done:
            yield [*keys]


def _layer_of(name: str, module: nn.Module) -> str | None:
    """Why a module within a model computes something that our network does not, or None."""
    from fastdiff.integrations.diffusers_blocks import attention_objection

    kind = original(module)
    reason = _python_of(module)
    if reason is not None:
        return f"{name}: {reason}"
    known = kind.__module__.startswith(("diffusers.", "torch."))
    if not known or (module._parameters and kind not in LEAVES):
        return f"{name} is a {kind.__module__}.{kind.__name__}"
    if "processor" in module.__dict__ or "processor" in module._modules:
        objection = attention_objection(module)
        if objection is not None:
            return f"{name}: {objection}"
        if getattr(module, "added_kv_proj_dim", None) is not None:
            return f"{name}: its keys and values are appended to those of the pixels"
    return None


def _python_of(module: nn.Module) -> str | None:
    """Code or options that somebody has set on a module, which only its own call would run."""
    state = module.__dict__
    if (
        any(state[name] for name in HOOKS)
        or "_hf_hook" in state
        or ("forward" in state and has_other_forward(module))
    ):
        return "a module has a hook or a replaced forward"
    if state.get("_chunk_size") is not None:
        return "feed-forward chunking is on"
    if any(state.get(name) is not None for name in FREEU):
        return "FreeU is on"
    return None


@functools.cache
def standing_for(theirs: Any) -> Any:
    """A metaclass whose classes are equal to `theirs`, a class of diffusers. `from_pipe` looks the
    class of a component up among those that a pipeline takes, where a subclass is not found."""

    class StandIn(type(theirs)):  # type: ignore[misc]
        def __eq__(cls, other: object) -> bool:
            return other is theirs or type(other) is StandIn

        def __hash__(cls) -> int:
            return hash(theirs)

    return StandIn


class WholeUNet(nn.Module):
    """Marks the classes of `whole_class`."""


@functools.cache
def whole_class(theirs: Any) -> Any:
    """A subclass of a U-Net's class that our network computes; its objects can be copied and
    pickled."""

    @functools.wraps(theirs.forward)  # pipelines inspect its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(theirs.forward, self)
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        return self.__dict__[ATTRIBUTE](self, own, args, kwargs)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[ATTRIBUTE].forget()
        return theirs._apply(self, *args, **kwargs)

    def apply(self: Any, fn: Callable[[nn.Module], None]) -> Any:
        found = theirs.apply(self, fn)  # by which diffusers merges LoRAs, through .data
        self.__dict__[ATTRIBUTE].forget_text()
        return found

    members = {
        "forward": forward,
        "_apply": _apply,
        "apply": apply,
        "__module__": theirs.__module__,  # pipelines write module and name to model_index.json
        "__reduce_ex__": _reduce,
        "whole": theirs,
    }
    return standing_for(theirs)(theirs.__name__, (WholeUNet, theirs), members)


def _reduce(self: Any, protocol: int) -> Any:
    return _empty, (type(self).whole,), self.__dict__.copy()


def _empty(theirs: Any) -> Any:
    whole = whole_class(theirs)
    return whole.__new__(whole)
