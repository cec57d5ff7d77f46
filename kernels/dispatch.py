"""Which implementation of an op runs: the order, the objections, the reasons.

Every op has a readable `reference` and may have faster implementations. In `auto` the first one in
`ORDER` runs that has no objection (`why_not`) and is not known to be `slower` than a later one,
unless the op knows better for its arguments (`Op.first`: what measured fastest); a backend that was
forced, by ``with fastdiff.backend("triton"):`` or by the environment variable ``FASTDIFF_BACKEND``,
runs or raises `BackendError`. A fallback is never silent: when an implementation made for the
tensor's device objects, `auto` warns once per (op, reason).

Under `torch.compile` the choice is made while tracing and stays in the compiled graph.

A native implementation has two ways in: calls that are `plain` go straight to the kernel
(`Implementation.direct`), since a call through PyTorch's own dispatcher costs more than a small
tensor's work; the others (autograd, `torch.compile`, dispatch modes) go through `function`, the op
that is registered with PyTorch. What a call costs here is Python: what depends on device and dtype
alone is worked out once per op (`Op.candidates`).
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ORDER = ("cuda", "triton", "cpu", "reference")
BACKENDS = (*ORDER, "auto")
ENVIRONMENT_VARIABLE = "FASTDIFF_BACKEND"
# os.environ says that a variable is not set by an exception, half a microsecond in every call
_environment: Any = getattr(os.environ, "_data", os.environ)
_variable: Any = ENVIRONMENT_VARIABLE
if _environment is not os.environ:
    _variable = os.environ.encodekey(ENVIRONMENT_VARIABLE)

_forced: ContextVar[str | None] = ContextVar("fastdiff_backend", default=None)
_served: ContextVar[dict[str, set[str]] | None] = ContextVar("fastdiff_served", default=None)
_warned: set[tuple[str, str]] = set()
UNAVAILABLE: dict[str, str] = {}
"""Backend -> why this installation has none of its implementations."""


class BackendError(RuntimeError):
    """The forced backend cannot run this op; `reasons` has one sentence per backend."""

    def __init__(self, message: str, reasons: dict[str, str | None]) -> None:
        super().__init__(message)
        self.reasons = reasons


class BackendWarning(UserWarning):
    """`auto` passed by an implementation made for this device; the message says why."""


def _no_objection(*args: Any, **kwargs: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run an op. `function` and `why_not` take the arguments of the public function."""

    backend: str
    function: Callable[..., Any]
    direct: Callable[..., Any] | None = None
    """What calls that are `plain` go to instead of `function`, past PyTorch's dispatcher."""
    why_not: Callable[..., str | None] = _no_objection
    """What stands against these arguments, as one sentence with got and expected, or None."""
    devices: tuple[str, ...] = ()
    """Device types it is made for; empty: all. On others it is no candidate: no fallback warns."""
    slower: Callable[..., str | None] = _no_objection
    """Where a later implementation was measured to be faster: the reason. No objection, so a forced
    backend runs; `auto` goes on to the next one without a warning."""
    emulated_on: tuple[str, ...] = ()
    """Device types on which it runs too, slowly, but only when it is forced by name."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Dtypes of the first tensor it is made for; empty: all. Others are treated as devices are."""

    def wrapped(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Implementation:
        """The same with ``wrap(function)`` in the place of what it calls, either way."""
        direct = None if self.direct is None else wrap(self.direct)
        return replace(self, function=wrap(self.function), direct=direct)

    def objection(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        x = first_tensor(args, kwargs)
        device = x.device.type
        emulates = device in self.emulated_on and selected_backend() == self.backend
        if not self.serves(device) and not emulates:
            return f"it runs on {' and '.join(self.devices)}, got tensors on {device}"
        if self.dtypes and x.dtype not in self.dtypes:
            *known, got = (str(d).removeprefix("torch.") for d in (*self.dtypes, x.dtype))
            return f"it takes {', '.join(known)}, got {got}"
        reason = self.why_not(*args, **kwargs)
        if reason is None and selected_backend() == "auto":
            return self.slower(*args, **kwargs)
        return reason

    def serves(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices

    def made_for(self, device_type: str, dtype: torch.dtype) -> bool:
        """True where `auto` considers it for such a first tensor, and has to say why not."""
        return self.serves(device_type) and (not self.dtypes or dtype in self.dtypes)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An op's first tensor."""
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work: only what is written in
    PyTorch has those derivatives, and an opaque kernel would give zeros without a word."""
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def plain(arguments: Iterable[Any], *, on_cpu: bool) -> bool:
    """True where PyTorch need not know of a call: no gradient is wanted and nothing is traced.

    on_cpu: where the tensors have to be, on a CPU or not; of others PyTorch says what is wrong.
    """
    if (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._get_tracing_state() is not None
        or transformed()
    ):
        return False
    wanted = torch.is_grad_enabled()
    for x in arguments:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if x.is_neg() or x.is_cpu is not on_cpu or (wanted and x.requires_grad):
                return False
        elif kind not in _NO_TENSORS and isinstance(x, Tensor):  # a subclass, which may do anything
            return False
    return True


_NO_TENSORS = frozenset({type(None), bool, int, float, str})


@dataclass
class Op:
    """A named op and its implementations in the order of preference; call it to run it."""

    name: str
    implementations: dict[str, Implementation] = field(default_factory=dict)
    first: Callable[..., str | None] = _no_objection
    """What `auto` tries before the others for these arguments; None: `ORDER` alone decides."""
    first_devices: tuple[str, ...] = ()
    """Device types for which `first` is asked; empty: all."""
    _candidates: dict[Any, tuple[Implementation, ...]] = field(default_factory=dict, repr=False)
    _candidates_of: Any = field(default=None, repr=False)

    def register(self, implementation: Implementation) -> None:
        """Add an implementation (a second one of the same backend replaces the first)."""
        if implementation.backend not in ORDER:
            raise ValueError(f"backend must be one of {ORDER}, got {implementation.backend!r}")
        known = {**self.implementations, implementation.backend: implementation}
        self.implementations = {name: known[name] for name in ORDER if name in known}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the op. The public functions do so: packing arguments once more takes 2 µs."""
        implementation = self.choose(args, kwargs)
        if not torch.compiler.is_compiling():  # Dynamo cannot trace a ContextVar
            served = _served.get()
            if served is not None:
                served.setdefault(self.name, set()).add(implementation.backend)
            direct = implementation.direct
            if direct is not None:
                on_cpu = first_tensor(args, kwargs).is_cpu
                if plain((*args, *kwargs.values()), on_cpu=on_cpu):
                    return direct(*args, **kwargs)
        return implementation.function(*args, **kwargs)

    def choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Implementation:
        """The implementation that these arguments get. Raises BackendError."""
        name = selected_backend()
        if not torch.compiler.is_compiling() and transformed():
            if name in ("auto", "reference"):
                return self.implementations["reference"]
            raise BackendError(
                f"backend {name!r} cannot run {self.name} under torch.func or forward-mode "
                "differentiation, whose derivatives only the reference has; use backend='auto'",
                {name: "it has no such derivatives"},
            )
        if name == "auto":
            for implementation in self.candidates(args, kwargs):
                why_not, slower = implementation.why_not, implementation.slower
                reason = None if why_not is _no_objection else why_not(*args, **kwargs)
                if reason is not None:
                    self._warn_once(implementation.backend, reason)
                elif slower is _no_objection or slower(*args, **kwargs) is None:
                    if implementation.backend == "reference":
                        _warn_of_missing(first_tensor(args, kwargs).device.type)
                    return implementation
        elif name in self.implementations:
            implementation = self.implementations[name]
            if implementation.objection(args, kwargs) is None:
                return implementation
        reasons = self.reasons(args, kwargs)
        listed = "; ".join(f"{key}: {value or 'would run'}" for key, value in reasons.items())
        raise BackendError(
            f"backend {name!r} cannot run {self.name} ({listed}); use backend='auto'", reasons
        )

    def candidates(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Implementation, ...]:
        """What `auto` goes through: those made for the device and dtype of the first tensor."""
        x = first_tensor(args, kwargs)
        device = "cpu" if x.is_cpu else x.device.type
        first = None
        if not self.first_devices or device in self.first_devices:
            first = self.first(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._made_for(device, x.dtype, first)
        if self._candidates_of is not self.implementations:
            self._candidates_of, self._candidates = self.implementations, {}
        key = device, x.dtype, first
        found = self._candidates.get(key)
        if found is None:
            found = self._candidates[key] = self._made_for(device, x.dtype, first)
        return found

    def _made_for(
        self, device: str, dtype: torch.dtype, first: str | None
    ) -> tuple[Implementation, ...]:
        known = self.implementations
        names = known if first not in known else (first, *(n for n in known if n != first))
        return tuple(known[n] for n in names if known[n].made_for(device, dtype))

    def reasons(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str | None]:
        """Backend -> why it would not run these arguments, None where it would."""
        return {
            name: self.implementations[name].objection(args, kwargs)
            if name in self.implementations
            else self.missing(name)
            for name in ORDER
        }

    def missing(self, backend_name: str) -> str:
        return UNAVAILABLE.get(
            backend_name, f"no {backend_name} implementation of {self.name} is registered"
        )

    def _warn_once(self, backend_name: str, reason: str) -> None:
        if (self.name, reason) not in _warned:
            _warned.add((self.name, reason))
            message = f"{self.name}: {backend_name} does not run here, the next one does: {reason}"
            warnings.warn(message, BackendWarning, stacklevel=5)


def _warn_of_missing(backend_name: str) -> None:
    """Once, if there is a reason why it is missing: pip does not show what a build warned of."""
    if (
        backend_name in UNAVAILABLE
        and not torch.compiler.is_compiling()
        and ("", backend_name) not in _warned
    ):
        _warned.add(("", backend_name))
        reason = UNAVAILABLE[backend_name]
        message = f"fastdiff runs without its {backend_name} kernels, slower: {reason}"
        warnings.warn(message, BackendWarning, stacklevel=5)


OPS: dict[str, Op] = {}


def define_op(name: str, reference: Callable[..., Any]) -> Op:
    """A new op in OPS, with its reference implementation."""
    assert name not in OPS, f"op {name} is defined twice"
    op = OPS[name] = Op(name)
    op.register(Implementation(backend="reference", function=reference))
    return op


# Dynamo cannot trace a ContextVar: it runs this function while tracing and keeps the answer
@torch.compiler.assume_constant_result
def selected_backend() -> str:
    """The backend asked for: the innermost `backend()`, else FASTDIFF_BACKEND, else "auto"."""
    name = _forced.get()
    if name is None:
        if _variable not in _environment:
            return "auto"
        name = os.environ[ENVIRONMENT_VARIABLE] or "auto"
        if name not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {BACKENDS}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend; "auto" gives the choice back.

    It holds for the thread or asyncio task that entered it, and comes before FASTDIFF_BACKEND.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def record_backends() -> Iterator[dict[str, set[str]]]:
    """Op -> the backends that ran it inside the ``with`` block; filled as the ops are called.

    What a graph of `torch.compile` runs is not recorded: it does not come by the dispatcher.
    """
    served: dict[str, set[str]] = {}
    token = _served.set(served)
    try:
        yield served
    finally:
        _served.reset(token)


@dataclass(frozen=True)
class Explanation:
    """Which backend would run (None: it would raise BackendError), and why each other one not."""

    op: str
    selected: str
    chosen: str | None
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op} (backend {self.selected!r}): {self.chosen or 'cannot run'}"]
        for name, reason in self.reasons.items():
            if name != self.chosen:
                lines.append(
                    f"  {name:<9} {reason or 'could run; it comes later or was not asked'}"
                )
        return "\n".join(lines)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementation of `op` these arguments would get, and why the others would not run.

    Args:
        op: name of the op or its public function; args, kwargs: what the public function takes.

    Raises:
        ValueError: there is no such op, or no arguments are given.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"op must be one of {tuple(sorted(OPS))}, got {name!r}")
    if not args and not kwargs:
        raise ValueError(
            f"explain({name!r}) needs the arguments of {name}: the choice depends on them"
        )
    args, kwargs = _as_passed_on(name, args, kwargs)
    selected, reasons = selected_backend(), OPS[name].reasons(args, kwargs)
    candidates = (i.backend for i in OPS[name].candidates(args, kwargs))
    order = tuple(candidates) if selected == "auto" else (selected,)
    chosen = next((candidate for candidate in order if reasons[candidate] is None), None)
    return Explanation(name, selected, chosen, reasons)


def _as_passed_on(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as the public function hands them to the op, defaults filled in.

    Raises:
        ValueError: they are not what the function takes.
    """
    function = getattr(import_module(__package__), name, None)
    if function is None:
        return args, kwargs
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"explain({name!r}) takes the arguments of {name}: {error}") from None
    bound.apply_defaults()
    if not isinstance(first_tensor(bound.args, bound.kwargs), torch.Tensor):
        got = type(first_tensor(bound.args, bound.kwargs)).__name__
        raise ValueError(f"{name}: the first argument must be a tensor, got {got}")
    return bound.args, bound.kwargs


def available() -> dict[str, dict[str, str | None]]:
    """Op -> backend -> why it is not there, None where an implementation is registered."""
    return {
        op.name: {name: None if name in op.implementations else op.missing(name) for name in ORDER}
        for op in OPS.values()
    }


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype in which every op takes its sums and statistics."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_floating(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless x is a floating-point tensor."""
    if not x.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}; use {name}.float()")


def check_number(op: str, name: str, value: object, *, whole: bool = False) -> None:
    """Raise ValueError unless value is a real number, or where `whole` an integer."""
    kinds = (int, torch.SymInt) if whole else (float, int, torch.SymFloat, torch.SymInt)
    if not isinstance(value, kinds):
        expected = "an integer" if whole else "a number"
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")


def check_shape(op: str, name: str, x: torch.Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless x is None or has one of the shapes."""
    if x is not None and x.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(x.shape)}")
