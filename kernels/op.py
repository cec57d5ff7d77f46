"""The definition of an op: its schema, shapes, derivative and backends, registered once.

An op is one `torch.library` op, ``fastdiff::<name>``, plus one for its backward pass. Both choose
the backend when they run, so ``with backend(...)`` affects graphs of `torch.compile` too. The
tensors saved by the forward pass have the same shape on all backends, and every output has the
strides of `fake`.

In eager mode a call goes straight to the backend's function, or through an `autograd.Function` of
ours if a gradient is needed, because PyTorch's dispatcher takes longer than the work on a small
tensor. The backward pass uses the backend of its forward pass and finds it in its autograd context:
it may run in autograd's own threads or after the ``with`` block, where a `ContextVar` is not set.

Only graphs, dispatch modes and transformations see the op registered with PyTorch. If it is
differentiable, it returns a mark after its outputs and its statistics, which identifies the backend
that ran. The mark is an empty tensor whose stride is the backend's number: it can pass through a
graph, reading it does not synchronize with the GPU, and it holds no memory
(docs/decisions/kernels.md discusses the alternatives). If a saved-tensor hook replaced the mark by
another tensor, the gradients are those of the reference, which does not need the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling

from .choose import (
    OPS,
    ORDER,
    SERVED,
    Backend,
    choose,
    elsewhere,
    record,
    selected_backend,
    traces_reference,
    unseen,
    untraced,
    wants_gradient,
)
from .plans import LIMIT, Plan, signature
from .plans import record as record_plan
from .tuning import measured

NAMESPACE = __name__.partition(".")[0]
"""Of the registered ops: "fastdiff", or the name under which an exported package is loaded
(fastdiff/integrations/kernel_package.py), so that both can be in one process."""
MARKS = {name: 2 + number for number, name in enumerate(ORDER)}
"""Backend -> its mark's stride. 1 is reserved: it is the default stride of an empty tensor."""

_is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Detects the tensors that ``torch.autograd.grad(..., is_grads_batched=True)`` passes in."""

_shapes_only: ContextVar[bool] = ContextVar("fastdiff_shapes_only", default=False)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Work:
    """The least work that a call has to do; computed from shapes, not measured."""

    bytes: int
    """Bytes read from and written to memory, each element once."""
    flops: int = 0
    """FLOPs of matrix products, 2 per multiply-add; other ops are memory bound and leave it 0."""


def _same(*args: Any) -> tuple[Any, ...]:
    return args


@dataclass(eq=False, kw_only=True)
class Op:
    """An op. Call it with the arguments of its schema to run it on the selected backend."""

    name: str
    schema: str
    """Arguments and outputs, as in ``(Tensor x, Tensor? weight, float eps) -> Tensor``. The first
    argument must be a tensor; its device and dtype determine the candidate backends."""
    reference: Callable[..., Any]
    """The op in plain PyTorch: readable, differentiable any number of times, traceable."""
    formula: Callable[..., Any] | None = None
    """The paper's formula, evaluated in fp64; all backends are tested against it."""
    fake: Callable[..., Any]
    """Takes the arguments, returns empty (outputs, statistics); statistics may be None."""
    work: Callable[..., Work]
    """The op's arguments -> the work of a call; with ``backward=True``, of the backward pass."""
    shape_class: Callable[..., str] | None = None
    """The class by which the fastest backend of a GPU is looked up; None: never measured."""
    unmeasured: Callable[..., str | None] | None = None
    """The op's arguments -> the backend to try first on a GPU without measurements; None: the order
    is `ORDER`."""
    example: Callable[[Callable[..., Tensor]], dict[str, Any]]
    """Takes a function that makes a tensor of a shape, returns small example arguments."""
    kernels: Sequence[Backend] = ()
    statistics: bool = False
    """Whether the forward pass saves a tensor for the backward pass, besides its outputs."""
    differentiable: bool = True
    traceable: bool = True
    """Whether Dynamo can trace the reference; if not, graphs always contain the op."""
    arguments: Callable[..., tuple[Any, ...]] = _same
    """The public function's arguments, in its order -> the op's."""
    check: Callable[..., None] = lambda *args: None
    """Raises ValueError for arguments that the public function refuses. Not called again for
    arguments of the same shapes, strides, dtypes and values if the call is planned (plans.py)."""

    # What the backward pass needs
    keep: Callable[..., tuple[Any, ...]] = lambda args, outputs: args
    """(arguments, outputs) -> what is saved in place of the arguments for the backward pass."""
    kept_outputs: tuple[int, ...] = ()
    """Outputs that are saved too, after the arguments."""
    passed_on: dict[str, str] = field(default_factory=dict)
    """Argument -> another argument, whose gradient is also its own."""
    straight: dict[str, int] = field(default_factory=dict)
    """Argument -> the output whose gradient is its own; no kernel computes or copies it."""
    gradient_like: Callable[[Tensor], Tensor] = lambda x: torch.empty(
        x.shape, dtype=x.dtype, device=x.device
    )
    """Allocates the gradient of an argument."""
    again: Callable[..., Any] | None = None
    """(gradients of the outputs, saved arguments) -> the gradients of the arguments, themselves
    differentiable; None: differentiate `reference`."""
    without_first: Callable[..., Any] | None = None
    """Like `again`, for the case that the gradient of the first output is None."""
    reference_once: bool = False
    """PyTorch cannot differentiate `reference` twice; `again` gives the second derivative."""

    # Derived from the above
    public: Callable[..., Any] | None = field(default=None, init=False)
    """The function that checks its arguments and calls the op."""
    types: dict[str, str] = field(init=False)
    """Argument -> its type in the schema."""
    tensors: list[int] = field(init=False)
    """Positions of the tensors among the arguments."""
    own: list[int] = field(init=False)
    """Positions of the tensors whose gradients a backend computes (not in `passed_on` or
    `straight`)."""
    takers: list[list[int]] = field(init=False)
    """For each of `own`: the positions of the arguments that get its gradient."""
    outputs: int = field(init=False)
    known: Any = field(init=False)
    """The op registered with PyTorch."""
    known_backward: Any = field(default=None, init=False)
    backends: dict[str, Backend] = field(init=False)
    candidates: dict[Any, tuple[Backend, ...]] = field(default_factory=dict, init=False)
    plans: dict[Any, Plan | bool] = field(default_factory=dict, init=False)
    """Signature -> its plan, or whether the next such call is to be recorded."""
    writable: list[int] = field(init=False)
    """Positions of the tensors that the op changes."""

    def __post_init__(self) -> None:
        assert self.name not in OPS, f"op {self.name} is defined twice"
        arguments, _, returns = self.schema.removeprefix("(").partition(") -> ")
        pairs = [part.rpartition(" ") for part in arguments.split(", ")]
        self.types = {name: kind for kind, _, name in pairs}
        self.outputs = returns.count("Tensor")
        names = list(self.types)
        self.tensors = [i for i, name in enumerate(names) if "Tensor" in self.types[name]]
        self._maps = self.arguments is not _same
        self.writable = [i for i in self.tensors if "!" in self.types[names[i]]]
        given_on = self.passed_on.keys() | self.straight.keys()
        self.own = [i for i in self.tensors if names[i] not in given_on]
        self.takers = [
            [i for i in self.tensors if names[i] == a or self.passed_on.get(names[i]) == a]
            for a in (names[place] for place in self.own)
        ]
        given = {kernel.name: kernel for kernel in (*self.kernels, _reference_backend(self))}
        self.use({name: given[name] for name in ORDER if name in given})
        OPS[self.name] = self
        self._register(arguments)

    def use(self, backends: dict[str, Backend]) -> None:
        """Replace the op's backends; they must be in the order of `ORDER`."""
        self.backends = backends
        self.candidates.clear()
        self.plans = {}

    def exposes(self, function: F) -> F:
        """Decorator for the public function, which checks its arguments and calls the op."""
        self.public = function
        return function

    def __call__(self, *given: Any) -> Any:  # noqa: PLR0911 - one for each way to run it
        """Run the op. given: the public function's arguments, in its order, not yet checked."""
        if is_compiling():
            self.check(*given)
            return self._while_compiling(self.arguments(*given))
        selected, plans, found = selected_backend(), self.plans, None
        if not given[0].is_cpu or selected in ("triton", "cuda"):
            found = signature(selected, given, self.differentiable)
            if found is not None:
                key, pointers = found
                plan = plans.get(key)
                if isinstance(plan, Plan) and plan.valid(self.backends):
                    if SERVED.get() is not None:
                        record(self.name, plan.backend)
                    return plan.run(given, pointers)
        self.check(*given)
        args = self.arguments(*given) if self._maps else given
        backend = choose(self, args, selected)
        if found is not None and backend.planned:
            record(self.name, backend.name)
            return self._run_and_remember(backend, given, plans, found[0])
        if backend.name != "reference" or _shapes_only.get():
            if not unseen(args):
                return self._through_pytorch(args)
            if self.differentiable and wants_gradient(args):
                record(self.name, backend.name)
                return _Differentiable.apply(self, backend, *args)
        elif self.reference_once and wants_gradient(args) and untraced(args):
            record(self.name, backend.name)
            return _ByReference.apply(self, backend, *args)
        if SERVED.get() is not None:
            record(self.name, backend.name)
        return backend.forward(*args, False)[0]

    def _while_compiling(self, args: tuple[Any, ...]) -> Any:
        if self.traceable and traces_reference(self, args):
            return self.backends["reference"].forward(*args, False)[0]
        return self._through_pytorch(args)

    def _run_and_remember(
        self,
        backend: Backend,
        given: tuple[Any, ...],
        plans: dict[Any, Plan | bool],
        key: Any,
    ) -> Any:
        """Record the second call of a signature: many occur once, and recording takes a while."""

        def call(*given: Any) -> Any:
            return backend.forward(*self.arguments(*given), False)[0]

        seen = plans.get(key)
        if seen is None or seen is False:
            if len(plans) >= LIMIT:
                plans.clear()
            plans.setdefault(key, True)
            return call(*given)
        outputs, plan = record_plan(backend, call, given, self.writable)
        plans[key] = False if plan is None else plan
        return outputs

    def first(self, args: tuple[Any, ...]) -> str | None:
        """The backend that measured fastest for these arguments on their GPU, or None."""
        if self.shape_class is None:
            return None
        x = args[0]
        # graphs must not depend on the batch size
        of = measured.ANY if is_compiling() else self.shape_class(*args)
        found = measured.fastest(self.name, x.device, x.dtype, of)
        if found is None and self.unmeasured is not None:
            return self.unmeasured(*args)
        return found

    # The op registered with PyTorch

    def _register(self, arguments: str) -> None:
        more = self.statistics + self.differentiable
        returns = ", ".join(["Tensor"] * (self.outputs + more))
        known = torch.library.custom_op(
            f"{NAMESPACE}::{self.name}",
            self._run,
            mutates_args=[name for name, kind in self.types.items() if "!" in kind],
            schema=f"({arguments}) -> ({returns})",
        )
        known.register_fake(self._fake)
        if self.differentiable:
            self._register_backward()
            known.register_autograd(self._differentiate, setup_context=self._setup)
        self.known = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def _through_pytorch(self, args: tuple[Any, ...]) -> Any:
        """Run the registered op, through the dispatcher: for autograd, tracing, dispatch modes."""
        if not self.differentiable:
            with torch.no_grad():
                return self.known(*args)
        found = self.known(*args)
        return found[0] if self.outputs == 1 else found[: self.outputs]

    def _run(self, *args: Any) -> Any:
        backend = choose(self, args)
        moved = None if backend.name == "reference" else elsewhere(list(self.types), args)
        if moved is not None:  # a kernel would mistake another device's address for its own
            raise ValueError(f"{self.name}: {moved}; use .to({args[0].device.type!r})")
        record(self.name, backend.name)
        outputs, statistics = backend.forward(*args, True)
        return self._packed(args[0], outputs, statistics, MARKS[backend.name])

    def _fake(self, *args: Any) -> Any:
        outputs, statistics = self.fake(*args)
        return self._packed(args[0], outputs, statistics, 1)

    def _packed(self, x: Tensor, outputs: Any, statistics: Tensor | None, mark: int) -> Any:
        """Outputs, statistics and mark, as in the schema of the registered op."""
        if outputs is None:
            return None
        flat: tuple[Any, ...] = _flat(outputs)
        if self.statistics:
            flat = (*flat, statistics)
        if self.differentiable:
            flat = (*flat, _mark(x, mark))
        return flat if len(flat) > 1 else flat[0]

    # Its derivative

    def _register_backward(self) -> None:
        gradients = [f"Tensor{'?' if i else ''} gradient{i}" for i in range(self.outputs)]
        kept = [
            f"{'Tensor?' if 'Tensor' in kind else kind} {name}" for name, kind in self.types.items()
        ]
        kept += [f"Tensor output{i}" for i in self.kept_outputs]
        kept += ["Tensor statistics"] if self.statistics else []
        arguments = ", ".join([*gradients, *kept, "Tensor mark", "bool[] needs"])
        returns = ", ".join(["Tensor"] * len(self.own))
        name = f"{self.name}_backward"
        known = torch.library.custom_op(
            f"{NAMESPACE}::{name}",
            self._run_backward,
            mutates_args=(),
            schema=f"({arguments}) -> ({returns})",
        )
        known.register_fake(self._fake_backward)
        self.known_backward = getattr(getattr(torch.ops, NAMESPACE), name).default

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = None  # identified by the mark, the last saved tensor
        if self.statistics:
            ctx.mark_non_differentiable(output[self.outputs])
        self.save(ctx, inputs, output[: self.outputs], output[self.outputs :])

    def save(
        self, ctx: Any, args: tuple[Any, ...], outputs: Sequence[Tensor], more: Sequence[Tensor]
    ) -> None:
        """Save what the backward pass needs; `more` is the statistics and mark, if any."""
        kept = self.keep(args, outputs)
        ctx.others = [None if isinstance(a, Tensor) else a for a in kept]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(kept[i] for i in self.tensors), *(outputs[i] for i in self.kept_outputs), *more
        )

    def _differentiate(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return self.differentiate(ctx, ctx.needs_input_grad, gradients[: self.outputs])

    def differentiate(
        self, ctx: Any, wanted: Sequence[bool], given: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the wanted arguments, given those of the outputs."""
        results: list[Tensor | None] = [None] * len(self.types)
        if all(gradient is None for gradient in given):
            return tuple(results)
        count, tensors, kept = len(self.tensors), ctx.saved_tensors, ctx.others.copy()
        for i, tensor in zip(self.tensors, tensors, strict=False):
            kept[i] = tensor
        if given[0] is None:
            assert self.without_first is not None
            found = self.without_first(given, *kept)
        elif torch.is_grad_enabled():
            found = self.gradients_by_reference(given, kept)
        else:
            needs = [any(wanted[i] for i in places) for places in self.takers]
            rest = *given, *kept, *tensors[count:]
            found = [None] * len(needs)
            if any(needs):
                found = self._gradients_of_kernel(ctx.backend, rest, needs)
        for places, gradient in zip(self.takers, found, strict=True):
            for i in places:
                if wanted[i]:
                    results[i] = gradient
        for name, output in self.straight.items():
            if wanted[place := list(self.types).index(name)]:
                results[place] = given[output]
        return tuple(results)

    def _gradients_of_kernel(
        self, backend: Backend | None, rest: Sequence[Any], needs: list[bool]
    ) -> Sequence[Tensor | None]:
        """Run the backward pass of `backend`; None: of the mark at the end of `rest`."""
        if backend is not None:
            batched = (g is not None and _is_batched(g) for g in rest[: self.outputs])
            if untraced(rest) and not any(batched):
                assert backend.backward is not None, f"no backward pass of {self.name}"
                gradients: Sequence[Tensor | None] = backend.backward(*rest, needs)
                return gradients
            rest = *rest, _mark(rest[0], MARKS[backend.name])
        found = self.known_backward(*rest, needs)
        return found if isinstance(found, (tuple, list)) else (found,)

    def gradients_by_reference(
        self, gradients: Sequence[Tensor | None], kept: Sequence[Any]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments in `own`, themselves differentiable."""
        if self.again is not None:
            found: tuple[Tensor | None, ...] = self.again(gradients, *kept)
            return found
        return reference_gradients(self.reference, kept, gradients, self.own)

    def _run_backward(self, *given: Any) -> Any:
        *rest, mark, needs = given
        name = next((name for name, stride in MARKS.items() if stride == mark.stride(0)), None)
        backward = self.backends[name or "reference"].backward
        assert backward is not None, f"{self.name} has no backward pass on {name}"
        found = backward(*rest, needs)
        return self._gradients(found, self.kept_arguments(rest), needs)

    def _fake_backward(self, *given: Any) -> Any:
        *rest, _, needs = given
        kept = self.kept_arguments(rest)
        return self._gradients([None] * len(self.own), kept, needs, room=self.gradient_like)

    def kept_arguments(self, rest: Sequence[Any]) -> Sequence[Any]:
        return rest[self.outputs : self.outputs + len(self.types)]

    def _gradients(
        self,
        found: Sequence[Tensor | None],
        kept: Sequence[Any],
        needs: Sequence[bool],
        room: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """The gradients found, with empty tensors for those that are not needed."""
        results = []
        for i, gradient, need in zip(self.own, found, needs, strict=True):
            if not need or kept[i] is None:
                results.append(kept[self.own[0]].new_empty(0))
            else:
                assert gradient is not None or room is not None, f"no gradient of {self.name}'s {i}"
                results.append(gradient if room is None else room(kept[i]))
        return tuple(results) if len(results) > 1 else results[0]


class _Differentiable(torch.autograd.Function):
    """An eager call that needs a gradient: calls the backend's two functions directly."""

    @staticmethod
    def forward(ctx: Any, op: Op, backend: Backend, *args: Any) -> Any:
        outputs, statistics = backend.forward(*args, True)
        ctx.op, ctx.backend = op, backend
        op.save(ctx, args, _flat(outputs), (statistics,) if op.statistics else ())
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.op.differentiate(ctx, ctx.needs_input_grad[2:], gradients)


@contextmanager
def shapes_only() -> Iterator[None]:
    """For dispatch modes that run meta tensors: they see each op as one, not its reference."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


class _ByReference(torch.autograd.Function):
    """The reference in eager mode: first derivatives by PyTorch, second derivatives by `again`."""

    @staticmethod
    def forward(ctx: Any, op: Op, backend: Backend, *args: Any) -> Any:
        # hooks of a checkpoint around it would recompute for the inner graph too, once per op
        with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, Tensor.detach):
            own = [
                a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
                for a in args
            ]
            y = backend.forward(*own, False)[0]
        output = y.detach()
        ctx.op, ctx.backend, ctx.graph = op, None, (y, own)
        op.save(ctx, args, (output,), ())
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted, (y, own) = ctx.needs_input_grad[2:], ctx.graph
        if gradient is None or torch.is_grad_enabled():
            return None, None, *ctx.op.differentiate(ctx, wanted, (gradient,))
        leaves = [a for a, want in zip(own, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, leaves, gradient, retain_graph=True, allow_unused=True))
        return None, None, *(next(found) if want else None for want in wanted)


def _mark(x: Tensor, stride: int) -> Tensor:
    return torch.empty_strided((0,), (stride,), dtype=torch.uint8, device=x.device)


def reference_gradients(
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    gradients: Sequence[Tensor | None],
    places: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """The gradients of a reference for the inputs at `places`, themselves differentiable.

    Called by a backward pass with create_graph=True (gradients are enabled inside it).
    """
    leaves = [i for i in places if isinstance(inputs[i], Tensor) and inputs[i].requires_grad]
    outputs = _flat(reference(*inputs))
    given = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in given],
        [inputs[i] for i in leaves],
        [g for _, g in given],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    by_place = dict(zip(leaves, found, strict=True))
    return tuple(by_place.get(i) for i in places)


def _reference_backend(op: Op) -> Backend:
    """Wrap the reference as a backend.

    Called directly, it is the reference itself, differentiated by PyTorch. Inside the registered
    op it has the same outputs, statistics and backward function as any other backend.
    """

    def forward(*args: Any) -> tuple[Any, Tensor | None]:
        *given, inside = args
        if not inside:
            return op.reference(*given), None
        outputs, statistics = op.fake(*given)
        with torch.no_grad():
            found = op.reference(*given)
        if outputs is None:
            return None, None
        pairs = zip(_flat(outputs), _flat(found), strict=True)
        filled = tuple(room.copy_(y) for room, y in pairs)
        statistics = None if statistics is None else statistics.zero_()
        return filled if isinstance(outputs, tuple) else filled[0], statistics

    def backward(*args: Any) -> list[Tensor | None]:
        *given, needs = args
        gradients, kept = given[: op.outputs], op.kept_arguments(given)
        leaves = list(kept)
        for i in op.own:  # even if not needed: one gradient may be a sum over another
            if isinstance(kept[i], Tensor) and kept[i].is_floating_point():
                leaves[i] = kept[i].detach().requires_grad_()
        with recording_a_graph():
            found = op.gradients_by_reference(gradients, tuple(leaves))
        results: list[Tensor | None] = []
        for i, gradient, need in zip(op.own, found, needs, strict=True):
            room = op.gradient_like(kept[i]).zero_() if need else None
            results.append(room if room is None or gradient is None else room.copy_(gradient))
        return results

    return Backend(name="reference", forward=forward, backward=backward)


@contextmanager
def recording_a_graph() -> Iterator[None]:
    """Enable autograd inside an op, where PyTorch's dispatcher has already excluded it."""
    autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - autograd
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
