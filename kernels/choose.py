"""Choose which backend of an op runs, and explain the choice.

Every op has a readable `reference` and may have faster backends. `auto` runs the first backend in
`ORDER` that accepts the arguments (`why_not` returns None) and is not known to be `slower` than a
later one, unless another measured fastest for these arguments (`Choosable.first`). A backend forced
by ``with fastdiff.backend("triton"):`` or by the environment variable ``FASTDIFF_BACKEND`` runs or
raises `BackendError`. A fallback is never silent: if a backend made for the tensor's device cannot
run the call, `auto` warns once per (op, reason).

The choice is made when the op runs, also inside a graph of `torch.compile`. Tracing decides only
whether the graph contains the op, or the operations of its reference for Inductor to fuse
(`traces_reference`). Dynamo guards on that, so switching to or from the reference recompiles.

The cost of a call here is Python overhead, so whatever depends only on device and dtype is computed
once per op.
"""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .tracing import constant_in_graphs

ORDER = ("cuda", "triton", "library", "cpu", "reference")
BACKENDS = (*ORDER, "auto")
DEVICES = {
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "library": ("cuda",),
    "cpu": ("cpu",),
    "reference": (),
}
"""Backend -> the device types it is made for; empty: all. On other devices it is not a candidate,
and skipping it does not warn."""
OPTIONAL = ("library",)
"""Backends that an op need not have; messages do not mention it if they are absent."""
EMULATED: dict[str, tuple[str, ...]] = {"library": ("cpu",)}
"""Backend -> other device types on which it runs, but only when the backend is forced."""
UNAVAILABLE: dict[str, str] = {}
"""Backend -> why its kernels are missing from this installation."""
ENVIRONMENT_VARIABLE = "FASTDIFF_BACKEND"
# looking up an unset variable in os.environ raises internally, half a microsecond in every call
_environment: Any = getattr(os.environ, "_data", os.environ)
_variable: Any = ENVIRONMENT_VARIABLE
if _environment is not os.environ:
    _variable = os.environ.encodekey(ENVIRONMENT_VARIABLE)

_tracing_state = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
_transformation = torch._C._functorch.peek_interpreter_stack

_forced: ContextVar[str | None] = ContextVar("fastdiff_backend", default=None)
SERVED: ContextVar[dict[str, set[str]] | None] = ContextVar("fastdiff_served", default=None)
_warned: set[tuple[str, str]] = set()


class _Forced(threading.local):
    """A copy of `_forced` that Dynamo can guard on, which it cannot do for a ContextVar."""

    def __init__(self) -> None:  # runs in every thread; Dynamo guards on instance attributes
        self.any = False
        """A backend is forced, possibly "auto"."""
        self.reference = False
        self.kernel = False


_traced = _Forced()


class BackendError(RuntimeError):
    """The forced backend cannot run this op; `reasons` has one sentence per backend."""

    def __init__(self, message: str, reasons: dict[str, str | None]) -> None:
        super().__init__(message)
        self.reasons = reasons


class BackendWarning(UserWarning):
    """`auto` skipped a backend made for this device; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to run an op: two plain functions, and when they can run."""

    name: str
    """One of `ORDER`."""
    forward: Callable[..., Any]
    """Takes the op's arguments and `keep`, returns (outputs, statistics). keep: whether a backward
    pass will need the statistics; if not, or if the op has none, they are None."""
    backward: Callable[..., Any] | None = None
    """Takes the gradients of the outputs, the saved arguments (see `Op.keep`), the statistics if
    the op has any, and `needs`; returns a gradient, or None, per tensor argument."""
    why_not: Callable[..., str | None] | None = None
    """Why it cannot run these arguments, as one sentence with expected and got, or None."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Dtypes of the first tensor it is made for; empty: all. With another dtype it is not a
    candidate, as with another device (`DEVICES`)."""
    slower: Callable[..., str | None] | None = None
    """The reason why a later backend measured faster, or None. It still runs if forced; `auto`
    moves on to the next backend without a warning."""
    planned: bool = False
    """Whether `forward` starts its kernels in a way that plans.py can record and repeat."""
    settings: Callable[[], Hashable] | None = None
    """Whatever else `forward` depends on, besides its arguments and the launch configs. A plan made
    under other settings is not used."""

    def __post_init__(self) -> None:
        if self.name not in ORDER:
            raise ValueError(f"backend must be one of {ORDER}, got {self.name!r}")

    def wrapped(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Backend:
        """A copy whose forward pass is ``wrap(forward)``, called each time."""
        return replace(self, forward=wrap(self.forward), planned=False)

    def made_for(self, device: str, dtype: torch.dtype) -> bool:
        """Whether `auto` considers it for such a first tensor, and warns if it has to skip it."""
        devices = DEVICES[self.name]
        return (not devices or device in devices) and (not self.dtypes or dtype in self.dtypes)


def without(wide: Backend, places: slice, gradients: slice = slice(0, 0)) -> Backend:
    """Adapt a backend of an op with two outputs to the op that has only the first output.

    Args:
        places: the arguments that the narrower op lacks; the backend receives None for them.
        gradients: the positions of their gradients among all gradients.
    """
    first, absent = places.start, (None,) * (places.stop - places.start)
    unwanted = (False,) * (gradients.stop - gradients.start)

    def forward(*args: Any) -> tuple[Any, Tensor | None]:
        (y, _), statistics = wide.forward(*args[:first], *absent, *args[first:])
        return y, statistics

    def backward(dy: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        needs = *rest[-1][: gradients.start], *unwanted, *rest[-1][gradients.start :]
        assert wide.backward is not None
        found = wide.backward(dy, None, *rest[:first], *absent, *rest[first:-1], needs)
        return *found[: gradients.start], *found[gradients.stop :]

    def why_not(*args: Any) -> str | None:
        why_not = wide.why_not
        return None if why_not is None else why_not(*args[:first], *absent, *args[first:])

    return replace(wide, forward=forward, backward=backward, why_not=wide.why_not and why_not)


class Choosable(Protocol):
    """An op as far as the choice is concerned: a name and its backends."""

    name: str
    backends: dict[str, Backend]
    """In the order of `ORDER`."""
    candidates: dict[Any, tuple[Backend, ...]]
    """(device, dtype, first) -> the backends `auto` tries; cleared when `backends` changes."""
    plans: dict[Any, Any]
    """What is remembered of earlier calls, see plans.py; replaced when anything they depend on
    changes, so that a plan in the making is lost with the old ones."""

    def first(self, args: tuple[Any, ...]) -> str | None:
        """The backend `auto` tries first for these arguments; None: the order is `ORDER`."""


OPS: dict[str, Any] = {}
"""Name -> op, each a `Choosable` with a reference."""


def forget_candidates() -> None:
    """Clear the cached candidates and plans of all ops; call this after changing `UNAVAILABLE`."""
    for op in OPS.values():
        op.candidates.clear()
    forget_plans()


def forget_plans() -> None:
    """Clear the plans of all ops; call this after changing what a launch depends on."""
    for op in OPS.values():
        op.plans = {}


def objection(op: Choosable, name: str, args: tuple[Any, ...]) -> str | None:
    """Why a backend would not run these arguments now, or None if it would."""
    backend = op.backends.get(name)
    if backend is None or name in UNAVAILABLE:
        return missing(op, name)
    x, devices = args[0], DEVICES[name]
    device = x.device.type
    if devices and device not in devices and not _emulated(name, device):
        return f"it runs on {' and '.join(devices)}, got tensors on {device}"
    if backend.dtypes and x.dtype not in backend.dtypes:
        *known, got = (str(d).removeprefix("torch.") for d in (*backend.dtypes, x.dtype))
        return f"it supports {', '.join(known)}, got {got}"
    reason = None if backend.why_not is None else backend.why_not(*args)
    if reason is None and backend.slower is not None and selected_backend() == "auto":
        return backend.slower(*args)
    return reason


def _emulated(name: str, device: str) -> bool:
    return device in EMULATED.get(name, ()) and selected_backend() == name


def elsewhere(names: Sequence[str], args: Sequence[Any]) -> str | None:
    """Why kernels cannot run these arguments: a tensor is on another device than the first."""
    device = args[0].device
    for i, t in enumerate(args[1:], start=1):
        if isinstance(t, Tensor) and t.device != device:
            return f"{names[i]} must be on the device of {names[0]}, {device}, got {t.device}"
    return None


def available_backends(op: Choosable) -> dict[str, Backend]:
    """The backends of an op that are available in this installation."""
    return {name: b for name, b in op.backends.items() if name not in UNAVAILABLE}


def missing(op: Choosable, name: str) -> str:
    """Why a backend of an op is not available."""
    return UNAVAILABLE.get(name, f"{op.name} has no {name} backend")


def reasons(op: Choosable, args: tuple[Any, ...]) -> dict[str, str | None]:
    """Backend -> why it would not run these arguments, or None if it would."""
    asked = selected_backend()
    shown = [n for n in ORDER if n in op.backends or n not in OPTIONAL or n == asked]
    return {name: objection(op, name, args) for name in shown}


def candidates(op: Choosable, args: tuple[Any, ...]) -> tuple[Backend, ...]:
    """The backends that `auto` tries: those made for the device and dtype of the first tensor."""
    x = args[0]
    device = "cpu" if x.is_cpu else x.device.type
    first = op.first(args) if device == "cuda" else None
    if is_compiling():
        return _candidates(op, device, x.dtype, first)
    key = device, x.dtype, first
    found = op.candidates.get(key)
    if found is None:
        found = op.candidates[key] = _candidates(op, device, x.dtype, first)
    return found


def _candidates(
    op: Choosable, device: str, dtype: torch.dtype, first: str | None
) -> tuple[Backend, ...]:
    known = available_backends(op)
    names = [first, *(n for n in known if n != first)] if first in known else [*known]
    return tuple(known[name] for name in names if known[name].made_for(device, dtype))


def choose(op: Choosable, args: tuple[Any, ...], selected: str | None = None) -> Backend:
    """The backend that runs these arguments. Raises BackendError.

    selected: the requested backend, if the caller has looked it up.
    """
    name = selected_backend() if selected is None else selected
    if transformed():
        if name in ("auto", "reference"):
            return op.backends["reference"]
        raise BackendError(
            f"backend {name!r} cannot run {op.name} under torch.func or forward-mode "
            "differentiation, which only the reference supports; use backend='auto'",
            {name: "it does not support torch.func or forward-mode differentiation"},
        )
    if name == "auto":
        backend = _first_of(op, args)
        if backend is not None:
            return backend
    elif objection(op, name, args) is None:
        return op.backends[name]
    why = reasons(op, args)
    listed = "; ".join(f"{key}: {value or 'would run'}" for key, value in why.items())
    raise BackendError(f"backend {name!r} cannot run {op.name} ({listed}); use backend='auto'", why)


def _first_of(op: Choosable, args: tuple[Any, ...]) -> Backend | None:
    """The first candidate that can run these arguments and is not slower than a later one."""
    for backend in candidates(op, args):
        why_not, slower = backend.why_not, backend.slower
        reason = None if why_not is None else why_not(*args)
        if reason is not None:
            _warn_once(op.name, backend.name, reason)
        elif slower is None or slower(*args) is None:
            if backend.name == "reference":
                _warn_of_missing(args[0].device.type)
            return backend
    return None


def traces_reference(op: Choosable, args: tuple[Any, ...]) -> bool:
    """While tracing: whether the graph gets the reference instead of the op.

    True if the reference is forced, or in `auto` if no kernel can run these arguments. If a kernel
    is forced the graph contains the op, which raises `BackendError` when it runs, as in eager mode.
    """
    if _traced.reference:
        return True
    asked = _from_environment()
    if asked != "auto" and _traced.any:  # order matters: Dynamo guards on whatever is read here
        asked = "auto"
    found = _first_of(op, args)
    if asked != "reference" and found is not None and found.name != "reference":
        return False
    return not _traced.kernel and asked in ("auto", "reference")


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is active. Only the reference supports
    them; an opaque kernel would silently give zeros."""
    return forward_ad._current_level >= 0 or _transformation() is not None


def untraced(arguments: Iterable[Any]) -> bool:
    """Whether a call may bypass PyTorch's dispatcher: nothing is being compiled, transformed or
    traced, and the tensors are ordinary ones on one device."""
    return not (is_compiling() or transformed()) and unseen(arguments)


def ordinary() -> bool:
    """Whether no dispatch mode, tracing or transformation is active."""
    return not (transformed() or is_in_torch_dispatch_mode() or _tracing_state() is not None)


def unseen(arguments: Iterable[Any]) -> bool:
    """`untraced`, given that nothing is being compiled or transformed."""
    if is_in_torch_dispatch_mode() or _tracing_state() is not None:
        return False
    device = None
    for x in arguments:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            where = "cpu" if x.is_cpu else x.device
            if x.is_neg() or (device is not None and where != device):
                return False
            device = where
        elif kind not in NO_TENSORS and isinstance(x, Tensor):  # a subclass may override anything
            return False
    return True


def wants_gradient(arguments: Iterable[Any]) -> bool:
    """Whether autograd has to record a call."""
    return _grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def can_bypass_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call may bypass both PyTorch's dispatcher and autograd."""
    return untraced(tensors) and not wants_gradient(tensors)


NO_TENSORS = frozenset({type(None), bool, int, float, str})
"""Types of arguments that are neither tensors nor hold any."""


def _warn_once(op: str, backend_name: str, reason: str) -> None:
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        message = f"{op}: {backend_name} cannot run this call, so the next backend does: {reason}"
        warnings.warn(message, BackendWarning, stacklevel=6)


def _warn_of_missing(backend_name: str) -> None:
    """Warn once that a backend is missing, and why: pip hides the warnings of a build."""
    if backend_name in UNAVAILABLE and not is_compiling() and ("", backend_name) not in _warned:
        _warned.add(("", backend_name))
        reason = UNAVAILABLE[backend_name]
        message = f"fastdiff runs without its {backend_name} kernels, which is slower: {reason}"
        warnings.warn(message, BackendWarning, stacklevel=6)


# Dynamo cannot trace the environment either: its value during tracing is baked into the graph
@constant_in_graphs
def traced_choice() -> tuple[str, ...]:
    """Everything that decides whether a graph traced now contains an op or its reference.

    It is part of the key of graphs that are cached for later runs.
    """
    return tuple(map(str, (_from_environment(), _traced.reference, _traced.kernel, _traced.any)))


def _from_environment() -> str:
    """FASTDIFF_BACKEND, or "auto" if it is not set."""
    if _variable not in _environment:
        return "auto"
    name = os.environ[ENVIRONMENT_VARIABLE] or "auto"
    if name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {BACKENDS}, got {name!r}")
    return name


# Dynamo cannot trace a ContextVar: it runs this function while tracing and keeps the result
@constant_in_graphs
def selected_backend() -> str:
    """The requested backend: the innermost `backend()`, else FASTDIFF_BACKEND, else "auto"."""
    name = _forced.get()
    if name is None:
        return "auto" if _variable not in _environment else _from_environment()
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend; "auto" restores the automatic choice.

    Applies to the thread or asyncio task that entered the block, takes precedence over
    FASTDIFF_BACKEND, and also affects graphs of `torch.compile`, whenever they were compiled. A
    backward pass uses the backend of its forward pass, inside the block or not.

    Raises:
        ValueError: unknown backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    with _forcing(name):
        yield


@contextmanager
def _forcing(name: str | None) -> Iterator[None]:
    token = _forced.set(name)
    _tell_graphs(name)
    try:
        yield
    finally:
        _forced.reset(token)
        _tell_graphs(_forced.get())  # asyncio tasks may exit in a different order than they entered


def _tell_graphs(name: str | None) -> None:
    _traced.any, _traced.reference = name is not None, name == "reference"
    _traced.kernel = name not in (None, "reference", "auto")


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``torch.utils.checkpoint.checkpoint(..., context_fn=checkpoint_contexts)``: recomputation
    in the backward pass then uses the same backends as the forward pass."""
    return nullcontext(), _Reusable(_forced.get())


class _Reusable(AbstractContextManager[None]):
    """`_forcing` that can be entered again: nested backward passes each recompute."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(_forcing(self._name))
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


@contextmanager
def record_backends() -> Iterator[dict[str, set[str]]]:
    """Record which backends run each op inside the ``with`` block, as a dict that fills meanwhile.

    Ops inside graphs of `torch.compile` are recorded too, except a reference that was traced into
    the graph, where the op is no longer visible.
    """
    served: dict[str, set[str]] = {}
    token = SERVED.set(served)
    try:
        yield served
    finally:
        SERVED.reset(token)


def record(op: str, backend_name: str) -> None:
    """Tell `record_backends` that a backend runs an op."""
    served = SERVED.get()
    if served is not None:
        served.setdefault(op, set()).add(backend_name)


@dataclass(frozen=True)
class Explanation:
    """Which backend would run (None: BackendError), and why each of the others would not."""

    op: str
    selected: str
    chosen: str | None
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op} (backend {self.selected!r}): {self.chosen or 'cannot run'}"]
        for name, reason in self.reasons.items():
            if name != self.chosen:
                lines.append(
                    f"  {name:<9} {reason or 'could run, but comes later or is not selected'}"
                )
        return "\n".join(lines)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend of `op` these arguments would get, and why the others would not run.

    Args:
        op: name of the op or its public function.
        args, kwargs: the arguments of the public function.

    Raises:
        ValueError: unknown op, or no arguments given.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"op must be one of {tuple(sorted(OPS))}, got {name!r}")
    if not args and not kwargs:
        raise ValueError(
            f"explain({name!r}) needs the arguments of {name}: the choice depends on them"
        )
    passed = bound_arguments(name, args, kwargs)
    selected, why = selected_backend(), reasons(OPS[name], passed)
    names = (backend.name for backend in candidates(OPS[name], passed))
    order = tuple(names) if selected == "auto" else (selected,)
    chosen = next((candidate for candidate in order if why[candidate] is None), None)
    return Explanation(name, selected, chosen, why)


def bound_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The op's arguments for such a call of its public function. Raises ValueError."""
    op = OPS[name]
    try:
        bound = inspect.signature(op.public or op.reference).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"explain({name!r}) takes the arguments of {name}: {error}") from None
    bound.apply_defaults()
    given = tuple(bound.arguments.values())
    if not isinstance(given[0], Tensor):
        got = type(given[0]).__name__
        raise ValueError(f"{name}: the first argument must be a tensor, got {got}")
    passed: tuple[Any, ...] = op.arguments(*given)
    return passed


def available() -> dict[str, dict[str, str | None]]:
    """Op -> backend -> why it is not available, or None if it is."""
    return {
        op.name: {
            name: None if name in available_backends(op) else missing(op, name) for name in ORDER
        }
        for op in OPS.values()
    }
