"""`accelerate(..., verify=True)`: compare each swapped module with its original at first use.

A verified module's class is a subclass of its fastdiff class. The first call with each input
signature (shapes, dtypes, strides, flags) also runs the original on copies of the inputs, in a
"shadow" of the module: the original classes, the same parameters, no hooks. If the results differ,
the module gets its original class back, the call returns the original's result, and the report
says why.

Calls that cannot be compared run as if `verify` were off, and are counted in `report.unverified`:
under `torch.compile`, CUDA graph capture, tracing, `torch.func` and dispatch modes, and modules
whose children are loaded by Hugging Face's accelerate during the call. Gradients are not compared.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations.compare import copied, described, difference, leaves, same, tolerance
from fastdiff.integrations.known_blocks import empty_instance
from fastdiff.integrations.layers import GroupNormBeforeSiLU, original, under_transform, watched
from fastdiff.integrations.report import Swap, change_class
from fastdiff.kernels.choose import selected_backend, unseen

KEY = "_verification"
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class VerificationWarning(UserWarning):
    """A swapped module differed from its original and was restored."""


class Verification:
    """The comparisons of one swapped module."""

    def __init__(self, swap: Swap) -> None:
        self.before, self.after = swap.before, swap.after
        self.attributes = [*swap.attributes]
        self.name = "" if swap.entry is None else swap.entry.name
        self.seen: set[Any] = set()
        self.compared = 0
        """Number of input signatures for which the results agreed."""
        self.skipped: Counter[str] = Counter()
        """Reason that calls were not compared -> number of calls."""
        self.miss: str | None = None
        """How the module differed from its original; None unless it was restored."""
        self._lock = threading.Lock()

    @property
    def unverified(self) -> str | None:
        """Reason that nothing was compared; None if something was."""
        if self.compared or self.miss is not None:
            return None
        most = self.skipped.most_common(1)
        return most[0][0] if most else "not called, or only in graphs of torch.compile"

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward of a verified module."""
        ours: Any = self.after.forward
        if not self._is_call_of_original(module, args, kwargs):
            self.skipped[
                "called with fused arguments: compared as part of the block around it"
            ] += 1
            return ours(module, *args, **kwargs)
        tensors = [*leaves((args, kwargs), Tensor)]
        key = signature(module, args, kwargs)
        if key in self.seen:
            return ours(module, *args, **kwargs)
        if (reason := incomparable(module, tensors)) is not None:
            self.skipped[reason] += 1
            return ours(module, *args, **kwargs)
        with self._lock:
            if key in self.seen:
                return ours(module, *args, **kwargs)
            self.seen.add(key)
        return self._first(module, args, kwargs, tensors)

    def _is_call_of_original(self, module: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
        try:
            inspect.signature(self.before.forward).bind(module, *args, **kwargs)
        except TypeError:
            return False
        return True

    def _first(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
    ) -> Any:
        """Run a call and compare it with the original."""
        given = copied((args, kwargs))
        before = RandomState(sorted({t.device.index or 0 for t in tensors if t.is_cuda}))
        try:
            found: Any = self.after.forward(module, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the original may succeed
            found = error
        after = before.now()
        try:
            reason = self._compare(module, found, given, tensors, before)
        except Incomparable as error:
            self.skipped[str(error)] += 1
            reason = None
        else:
            self.compared += reason is None
        after.restore()
        if reason is None and isinstance(found, Exception):
            raise found
        if reason is None:
            return found
        before.restore()
        for live, saved in zip(tensors, leaves(given, Tensor), strict=True):
            if not same(live, saved):  # changed in place
                with torch.no_grad():
                    live.copy_(saved)
        self._restore(module, reason)
        return self.before.forward(module, *args, **kwargs)

    def _compare(
        self, module: nn.Module, found: Any, given: Any, tensors: list[Tensor], state: RandomState
    ) -> str | None:
        """How the result differs from the original's; None if it agrees.

        With dropout, or with hooks on inner modules that may change their results, two shadows in
        eval mode are compared instead.

        Raises:
            Incomparable: the original cannot be run on a shadow of the module.
        """
        failed = isinstance(found, Exception)
        quiet = has_hooks(module)
        wanted, changed = self._shadowed(module, given, original, state, quiet=quiet)
        if failed:
            return f"{type(found).__name__} where the original has a result: {found}"[:300]
        if not quiet and not state.is_current():  # it drew random numbers, as dropout does
            quiet = True
            wanted, changed = self._shadowed(module, given, original, state, quiet=True)
        if quiet:
            found, tensors = self._shadowed(module, given, fastdiff_class, state, quiet=True)
        bound = tolerance((found, wanted, tensors, [*module.parameters()]))
        reason = difference(found, wanted, bound)
        if reason is None and any(
            difference(ours, theirs, bound) for ours, theirs in zip(tensors, changed, strict=True)
        ):
            reason = "changes its inputs in a different way than the original"
        if reason is None:
            return None
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
        return f"{reason}, for inputs {shapes}".replace("torch.", "")

    @torch.no_grad()
    def _shadowed(
        self,
        module: nn.Module,
        given: Any,
        kind: Callable[[nn.Module], type[nn.Module]],
        state: RandomState,
        *,
        quiet: bool,
    ) -> tuple[Any, list[Tensor]]:
        """The result of a shadow, and its copies of the inputs after the call.

        quiet: run in eval mode, without dropout.
        """
        args, kwargs = copied(given)
        state.restore()
        try:
            twin = shadow(module, kind, {}, quiet=quiet)
            y = type(twin).forward(twin, *args, **kwargs)
        except Exception as error:
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            raise Incomparable(
                f"the original cannot be run for comparison ({message:.120})"
            ) from error
        if isinstance(module, GroupNormBeforeSiLU) and kind is original:
            y = y if watched(module, *module.partner) else F.silu(y)
        return y, [*leaves((args, kwargs), Tensor)]

    def _restore(self, module: nn.Module, reason: str) -> None:
        self.miss = reason
        pair: tuple[nn.Module, ...] = module.__dict__.get("partner", ())
        for one in (module, *pair):
            change_class(one, original(one))
            for name in (*self.attributes, "partner", KEY):
                one.__dict__.pop(name, None)
        warnings.warn(
            f"fastdiff.accelerate restored {self.name or 'the module'} "
            f"({self.before.__name__}): {reason}",
            VerificationWarning,
            stacklevel=5,
        )


class Incomparable(Exception):
    """The original of a module cannot be run for comparison."""


class Verified(nn.Module):
    """Base class of the classes that `verified_class` returns."""

    verifies: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and unpickled modules stay swapped, but are not verified."""
        kind: Any = self.verifies
        state = {name: value for name, value in self.__dict__.items() if name != KEY}
        if hasattr(kind, "served"):
            return empty_instance, kind.served, state
        return object.__new__, (kind,), state


@functools.cache
def verified_class(after: Any) -> Any:
    """A subclass of a fastdiff class whose forward is compared with the original's."""

    @functools.wraps(after.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return after.forward(self, *args, **kwargs)
        verification = self.__dict__.get(KEY)
        if verification is None:  # a slice of a Sequential has the same class
            return after.forward(self, *args, **kwargs)
        return verification.run(self, args, kwargs)

    members = {"forward": forward, "verifies": after, "__module__": __name__}
    return type(after.__name__, (Verified, after), members)


def verified(swap: Swap) -> tuple[Swap, Verification]:
    """A swap that also compares, and its `Verification`."""
    served: Any = swap.after  # mypy does not know that classes are hashable
    check, after = Verification(swap), verified_class(served)
    attributes = {**swap.attributes, KEY: check}
    return Swap(
        module=swap.module, before=swap.before, after=after, attributes=attributes, entry=swap.entry
    ), check


def fastdiff_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the verification."""
    kind = type(module)
    return kind.verifies if issubclass(kind, Verified) else kind


def shadow(
    module: nn.Module,
    kind: Callable[[nn.Module], type[nn.Module]],
    made: dict[int, nn.Module],
    *,
    quiet: bool,
) -> nn.Module:
    """Copy a tree of modules: classes as `kind` returns them, the same parameters, no hooks.

    Buffers are copied, since a forward may update them.
    """
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        return module
    if id(module) not in made:
        to: Any = kind(module)
        twin = made[id(module)] = to.__new__(to)
        moved = "_hf_hook" in module.__dict__
        left_out = {KEY, "_hf_hook", "_old_forward", "forward"} if moved else {KEY}
        twin.__dict__.update({k: v for k, v in module.__dict__.items() if k not in left_out})
        twin.__dict__.update({k: OrderedDict() for k in HOOKS if k in module.__dict__})
        twin.__dict__["_buffers"] = {
            k: None if b is None else b.clone() for k, b in module._buffers.items()
        }
        twin.__dict__["_modules"] = {
            k: None if m is None else shadow(m, kind, made, quiet=quiet)
            for k, m in module._modules.items()
        }
        if quiet:
            twin.__dict__["training"] = False
    return made[id(module)]


def signature(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Key of a call: everything that decides which computation it runs."""
    autocast = tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )
    state = module.training, torch.is_grad_enabled(), autocast, selected_backend()
    return state, described(args), described(kwargs)


def incomparable(module: nn.Module, tensors: list[Tensor]) -> str | None:
    """Reason that a call cannot be compared; None if it can."""
    if under_transform():
        return "called under torch.func or forward-mode differentiation"
    if not unseen(tensors):
        return "called while tracing, in a dispatch mode or with tensor subclasses"
    if any(t.is_meta for t in tensors):
        return "called with tensors on the meta device"
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return "called while a CUDA graph is captured"
    if any("_hf_hook" in m.__dict__ for m in module.modules() if m is not module):
        return "Hugging Face's accelerate loads the weights of its layers during the call"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks on inner modules may change what they return."""
    inner = (m for m in module.modules() if m is not module)
    return any(m._forward_hooks or m._forward_pre_hooks for m in inner)


class RandomState:
    """State of PyTorch's generators on the CPU and some GPUs."""

    def __init__(self, devices: list[int]) -> None:
        self.cpu = torch.get_rng_state()
        self.gpus = {device: torch.cuda.get_rng_state(device) for device in devices}

    def now(self) -> RandomState:
        return RandomState([*self.gpus])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.gpus.items():
            torch.cuda.set_rng_state(state, device)

    def is_current(self) -> bool:
        now = self.now()
        return torch.equal(now.cpu, self.cpu) and all(
            torch.equal(now.gpus[device], state) for device, state in self.gpus.items()
        )
