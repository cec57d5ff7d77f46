"""diffusers' schedulers with each step as one kernel: `accelerate(pipeline, scheduler="fused")`.

The scheduler's class becomes a subclass of itself in which only `step` is ours. It reads the row of
this step from diffusers' attributes (`scheduler_rows`), runs it with `sampler_step`, and writes the
attributes that diffusers' step would have written. Signatures, config, timesteps, `set_timesteps`,
`set_begin_index`, `scale_model_input`, `add_noise`, `from_config` and `save_pretrained` remain
diffusers' own. A step that our rows do not cover runs in diffusers' code and is counted, with the
reason, in `Report.scheduler_steps_left`.

Inside a step x is fp32 (fp64 if the sample is). By default the noise is Philox noise with seeds
drawn from the generators, which gives different images of the same distribution. With
noise="generator" the noise, and so the images, are the same as with diffusers.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.checkpoint.scheduler import DEFAULTS
from fastdiff.diffusion.samplers import COLUMN, NO_SLOT
from fastdiff.integrations.scheduler_multistep import IPNDM_OPTIONS, MULTISTEP
from fastdiff.integrations.scheduler_rows import KINDS as ROWS
from fastdiff.integrations.scheduler_rows import Call, Host, Kind, Predictor, Step, write_nothing
from fastdiff.integrations.scheduler_solvers import FLOW_OPTIONS, REFUSED, SOLVERS
from fastdiff.kernels import sampler_step
from fastdiff.kernels.choose import can_bypass_dispatcher
from fastdiff.kernels.sampler_step import HISTORY_SLOTS

KINDS = {**ROWS, **SOLVERS, **MULTISTEP}
Noise = Literal["philox", "generator"]
NOISES: tuple[str, ...] = ("philox", "generator")


@functools.cache
def _methods(kind: Any) -> frozenset[str]:
    """Names of the methods of a class."""
    return frozenset(name for name in dir(kind) if inspect.isfunction(getattr(kind, name)))


def replaced(scheduler: Any, *, but: str = "") -> str | None:
    """Which methods were replaced on the object itself, as a reason not to fuse it, or None.

    A replaced method named `but` is ignored.
    """
    kind: Any = type(scheduler)  # classes can be hashed, which mypy doubts
    names = _methods(kind)
    if names.isdisjoint(scheduler.__dict__):
        return None
    found = sorted(names.intersection(scheduler.__dict__) - {but})
    return f"its {', '.join(found)} was replaced on this object" if found else None


def objection(scheduler: Any) -> str | None:
    """Why one of diffusers' schedulers cannot be fused, or None."""
    theirs = type(scheduler)
    name, config = theirs.__name__, scheduler.config
    if not theirs.__module__.startswith("diffusers."):
        return f"{name} is not one of diffusers' schedulers"
    if name not in KINDS:
        reason = REFUSED.get(name)
        return f"{name}: {reason}" if reason else f"fastdiff has no sampler like {name}"
    known_options = IPNDM_OPTIONS if name == "IPNDMScheduler" else DEFAULTS.get(name, FLOW_OPTIONS)
    for option, parameter in inspect.signature(theirs.__init__).parameters.items():
        default, value = parameter.default, config.get(option)
        if option not in ("self", *known_options) and value not in (None, False, default):
            return f"fastdiff does not support {name}'s option {option}={value!r:.60}"
    if theirs.step.__module__ != theirs.__module__ and not isinstance(scheduler, FusedScheduler):
        return f"{name}.step was replaced by a function of {theirs.step.__module__}"
    for option, allowed in KINDS[name].allowed.items():
        value = config.get(option, allowed[0])
        if value in allowed:
            continue
        known = ", ".join(map(repr, allowed))
        return f"fastdiff does not support {name} with {option}={value!r:.60}, only with {known}"
    return None


class Ring:
    """The history slots that `sampler_step` reads: copies of the scheduler's own tensors.

    The kernel writes the result that a step keeps into a slot, where the next step finds it. A slot
    is valid only while the scheduler's tensor is the same object and has not been modified.
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self._holds: list[tuple[weakref.ref[Tensor], int] | None] = [None] * HISTORY_SLOTS

    def place(self, x: Tensor, older: list[Tensor], *, keep: bool) -> tuple[list[int], int]:
        """Put `older` into slots. Returns their slots and the slot to write to (NO_SLOT: none).

        If `keep` is set without `older`, the slots are newly allocated, so that tensors kept by
        earlier steps do not change.
        """
        if self.slots is None or not self._fits(x) or (keep and not older):
            self.slots = x.new_empty(HISTORY_SLOTS, *x.shape)
            self._holds = [None] * HISTORY_SLOTS
        places = [self._find(tensor) for tensor in older]
        for number, tensor in enumerate(older):
            if places[number] == NO_SLOT:
                free = next(slot for slot in range(HISTORY_SLOTS) if slot not in places)
                self.slots[free].copy_(tensor)
                self.holds(free, tensor)
                places[number] = free
        if not keep:
            return places, NO_SLOT
        unused = [slot for slot in range(HISTORY_SLOTS) if slot not in places]
        free = unused[0] if unused else places[-1]  # the kernel reads the oldest before it writes
        self._holds[free] = None
        return places, free

    def holds(self, slot: int, tensor: Tensor) -> None:
        """Record that a slot now contains the values of this tensor."""
        counted = not tensor.is_inference()  # inference tensors have no version counter
        self._holds[slot] = (weakref.ref(tensor), tensor._version) if counted else None

    def _find(self, tensor: Tensor) -> int:
        for slot, held in enumerate(self._holds):
            if held is not None and held[0]() is tensor and held[1] == tensor._version:
                return slot
        return NO_SLOT

    def _fits(self, x: Tensor) -> bool:
        slots = self.slots
        assert slots is not None
        same = (slots.shape[1:], slots.dtype, slots.device) == (x.shape, x.dtype, x.device)
        return same and (torch.is_inference_mode_enabled() or not slots.is_inference())


class Fused:
    """The caches that a fused scheduler adds to diffusers' attributes; copies get new ones."""

    def __init__(self) -> None:
        self.host = Host()
        self.ring = Ring()
        self.left: Counter[str] = Counter()
        """Reason -> number of steps that diffusers' own code has run."""
        self.checked: tuple[Any, str | None] = (None, None)
        """The config checked last, and why it cannot be fused (None if it can)."""

    def objection(self, scheduler: Any) -> str | None:
        """`objection`, evaluated again if a pipeline has replaced the config."""
        if self.checked[0] is not scheduler.config:
            self.checked = scheduler.config, objection(scheduler)
        return self.checked[1]


class FusedScheduler:
    """Base that `fused_class` puts in front of one of diffusers' schedulers."""

    served: type
    noise: Noise

    @property
    def fused(self) -> Fused:
        """The caches, created if they are missing: after `from_config`, or in a copy."""
        found: Fused = self.__dict__.setdefault("_fused", Fused())
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != "_fused"}
        return _empty, (self.served, self.noise), state


@functools.cache
def fused_class(theirs: Any, noise: Noise = "philox") -> Any:
    """Create a subclass of one of diffusers' schedulers with our `step` of the same signature."""
    signature = inspect.signature(theirs.step)

    @functools.wraps(theirs.step)  # pipelines inspect its signature for eta and generator
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return theirs.step(self, *args, **kwargs)
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            return theirs.step(self, *args, **kwargs)  # raises its own TypeError
        bound.apply_defaults()
        given = {name: bound.arguments[name] for name in list(bound.arguments)[1:]}
        found = _step(self, given)
        if isinstance(found, str):
            self.fused.left[found] += 1
            return theirs.step(self, *args, **kwargs)
        return found

    step.__signature__ = signature  # type: ignore[attr-defined]  # inspect.getfullargspec reads it
    # pipelines write a component's module and class name to model_index.json: keep diffusers' own
    members = {"step": step, "served": theirs, "noise": noise, "__module__": theirs.__module__}
    return type(theirs.__name__, (FusedScheduler, theirs), members)


def _empty(theirs: type, noise: Noise) -> Any:
    fused = fused_class(theirs, noise)
    return fused.__new__(fused)


def _step(scheduler: Any, given: dict[str, Any]) -> Any:
    """The result of diffusers' step, or the reason that diffusers' own step has to run."""
    fused: Fused = scheduler.fused
    reason = fused.objection(scheduler) or replaced(scheduler, but="step")
    if reason is not None:
        return reason
    names = ("model_output", "timestep", "sample", "generator")
    others = {name: value for name, value in given.items() if name not in names}
    call = Call(others=others, **{name: given[name] for name in names if name in given})
    kind = KINDS[type(scheduler).__name__]
    if (reason := _unfit(call, kind)) is not None:
        return reason
    row = kind.read(scheduler, call, fused.host)
    if isinstance(row, str):
        return row
    x, *older = [call.sample if row.sample is None else row.sample, *(t for t, _ in row.older)]
    if row.then is not None:
        older += [row.then.last, *(t for t, _ in row.then.older)]
    if any(t.shape != call.sample.shape for t in (x, *older)) or not can_bypass_dispatcher(
        call.sample, x, *older
    ):
        return "its history has another shape or device, or requires a gradient"
    if row.draws and row.log_variance is not None and scheduler.noise == "generator":
        return "the variance is learned and its noise is drawn from the generator"
    after, denoised, kept = _run(scheduler, kind, row, call, x)
    output = _output_class(scheduler.served)
    to, estimate = _dtypes(kind, row, call)
    fields = {"prev_sample": after.to(to)}
    if "pred_original_sample" in output.__dataclass_fields__:
        fields["pred_original_sample"] = denoised.to(estimate)
    if kind.second is not None:
        assert kept is not None, "every row of such a scheduler keeps its second result"
        fields[kind.second] = kept.to(to)
    return output(**fields) if given["return_dict"] else tuple(fields.values())


def _dtypes(kind: Kind, row: Step, call: Call) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which diffusers returns the next sample and the estimate of x0."""
    of_output, of_sample = call.model_output.dtype, call.sample.dtype
    if kind.dtype == "output":
        of_sample = torch.float32
    widest = torch.promote_types(of_output, of_sample)
    estimate = of_output if (row.u, row.v) == (0, 1) else widest  # the output itself
    dtypes = {"widest": widest, "output": of_output, "estimate": estimate, "sample": of_sample}
    return dtypes[kind.dtype], estimate


def _unfit(call: Call, kind: Kind) -> str | None:
    """Why the tensors of a call cannot go into the kernel, or None."""
    x, f = call.sample, call.model_output
    if not isinstance(x, Tensor) or not isinstance(f, Tensor):
        return "sample or model_output is not a tensor"
    if not can_bypass_dispatcher(x, f):
        return "a gradient, a transform, tracing or a tensor subclass is in use"
    if not (x.is_floating_point() and f.is_floating_point() and x.numel() and x.ndim >= 2):
        return "the tensors do not have shape (N, C, ...) or are not floating-point"
    doubled = kind.doubled and f.ndim > 1 and f.shape[1] == 2 * x.shape[1]
    if (x[:, :0] if doubled else x).shape != (f[:, :0] if doubled else f).shape:
        return "sample and model_output differ in shape"
    if isinstance(call.generator, list) and len(call.generator) not in (1, len(x)):
        return "the number of generators is neither 1 nor the number of samples"
    return None


@functools.cache
def _output_class(theirs: Any) -> Any:
    """The class that a scheduler's step returns with return_dict=True."""
    module = sys.modules[theirs.__module__]
    return getattr(module, f"{theirs.__name__}Output", SchedulerOutput)


@torch.no_grad()
def _run(
    scheduler: Any, kind: Kind, row: Step, call: Call, start: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take the step and update the scheduler's state. Returns (next sample, x0 estimate, kept)."""
    prediction = call.model_output
    # a scheduler without state may be shared by several threads
    ring = Ring() if kind.write is write_nothing else scheduler.fused.ring
    widest = torch.promote_types(start.dtype, prediction.dtype)
    x = start.to(torch.float64 if widest is torch.float64 else torch.float32, copy=True)
    places: list[int] = []
    slots, slot, denoised = None, NO_SLOT, torch.empty_like(x)
    if row.older or row.keep is not None:
        older = [tensor for tensor, _ in row.older]
        places, slot = ring.place(x, older, keep=row.keep is not None)
        slots = ring.slots
    if slots is None:
        slots = x.new_empty(HISTORY_SLOTS, *x.shape)
    from_generator = scheduler.noise == "generator"
    columns = _columns(row, places, slot, noise=not from_generator)
    none = _zeros(len(x), x.device)
    seeds = none
    if columns[COLUMN["S"]]:
        seeds = seeds_of(call.generator, len(x)).to(x.device)
    table = _table(columns, x.dtype, x.device)
    sampler_step(x, prediction, slots, table, none, seeds, denoised=denoised)
    if row.draws and from_generator:
        dtype = torch.float32 if kind.dtype == "estimate" else prediction.dtype
        if kind.second is not None:
            dtype = widest
        x.add_(
            randn_tensor(
                prediction.shape, generator=call.generator, device=prediction.device, dtype=dtype
            ),
            alpha=row.s,
        )
    kept = None if slot == NO_SLOT else slots[slot].data  # .data: with its own version counter
    state = kind.state(call, denoised)
    if kept is not None and kind.copies:
        kept = kept.clone()
    if kept is not None:
        ring.holds(slot, kept if state is None else state)
    if row.then is not None:
        corrected = _predict(row.then, ring, x, denoised)
        call = replace(call, sample=corrected.to(call.sample.dtype))
    kind.write(scheduler, call, denoised, kept)
    return x, denoised, kept


def _predict(then: Predictor, ring: Ring, x: Tensor, denoised: Tensor) -> Tensor:
    """Take the second row, in place of x. Returns the sample that it starts from."""
    terms = [(denoised, then.of_estimate), *then.older]
    places, slot = ring.place(x, [tensor for tensor, _ in terms], keep=False)
    row = Step(u=1.0, v=then.of_last, a=0.0, b=then.b, older=tuple(terms))
    table = _table(_columns(row, places, slot, noise=False), x.dtype, x.device)
    none, corrected = _zeros(len(x), x.device), torch.empty_like(x)
    assert ring.slots is not None, "`place` has allocated them"
    sampler_step(x, then.last, ring.slots, table, none, none, denoised=corrected)
    return corrected


def _columns(row: Step, places: list[int], slot: int, *, noise: bool) -> tuple[float, ...]:
    low, high = row.log_variance or (0.0, 0.0)
    p, q = row.keep or (0.0, 0.0)
    values = {
        "U": row.u,
        "V": row.v,
        "A": row.a,
        "B": row.b,
        "S": row.s if noise else 0.0,
        "P": p,
        "Q": q,
        "SLOT": slot,
        "W": 1.0,
        "CLAMP": row.clamp,
        "LOGVAR_MIN": low,
        "LOGVAR_MAX": high,
    }
    factors = {f"C{place + 1}": c for place, (_, c) in zip(places, row.older, strict=True)}
    return tuple(float({**values, **factors}.get(name, 0.0)) for name in COLUMN)


@functools.lru_cache(maxsize=1024)
def _table(columns: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 20): one row, cached on its device because the next image takes the same steps."""
    with torch.inference_mode(False):
        return torch.tensor([columns], dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _zeros(count: int, device: torch.device) -> Tensor:
    """(count,) int64 zeros: the index of a table's only row, or the seeds if nothing is drawn."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int64, device=device)


def seeds_of(generator: Any, count: int) -> Tensor:
    """Draw seeds, (count,) int64, from the generators, which advance as for diffusers' noise.

    The seeds are on the generator's device, so that nothing waits for it. None is PyTorch's default
    generator.
    """
    several = generator if isinstance(generator, list) else [generator]
    each = count if len(several) == 1 else 1
    drawn = [
        torch.randint(2**62, (each,), generator=g, device="cpu" if g is None else g.device)
        for g in several
    ]
    return torch.cat([seeds.to(drawn[0].device) for seeds in drawn])
