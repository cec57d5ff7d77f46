"""What an op is: its schema, its shapes, its derivative and its backends, registered once.

An op is one `torch.library` op, ``fastdiff::<name>``, and one for its backward pass. Each picks the
backend when it runs, so a graph of `torch.compile` follows ``with backend(...)`` too. What the
forward pass saves has one shape for all backends, and every output has the strides of `fake`.

In eager a call goes straight to the backend's function, through an `autograd.Function` of ours
where a gradient is wanted: PyTorch's dispatcher costs more than a small tensor's work. The backward
pass takes the backend of its forward pass, which it finds in its context: it runs in autograd's own
threads, or after the ``with`` block, where no `ContextVar` tells.

Only graphs, dispatch modes and transformations see the op that PyTorch knows. A differentiable one
returns, after its outputs and its statistics, a mark: the backend that ran. The mark is an empty
tensor whose stride is the backend's number: a graph can pass it on, reading it waits for no GPU,
and it keeps no memory (docs/decisions/kernels.md has the alternatives). Where a hook on saved
tensors made another tensor of it, the gradients are those of the reference, which needs none of the
statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .choose import (
    OPS,
    ORDER,
    Backend,
    choose,
    elsewhere,
    record,
    traces_reference,
    unseen,
    untraced,
    wants_gradient,
)
from .tuning import measured

NAMESPACE = "fastdiff"
MARKS = {name: 2 + number for number, name in enumerate(ORDER)}
"""Backend -> its mark's stride. 1 is what an empty tensor has by itself."""

_is_batched = torch._C._functorch.is_legacy_batchedtensor
"""What ``torch.autograd.grad(..., is_grads_batched=True)`` passes to a backward pass."""

_shapes_only: ContextVar[bool] = ContextVar("fastdiff_shapes_only", default=False)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Work:
    """What a call has to do at least, declared and not measured."""

    bytes: int
    """Read from memory and written to it, each number once."""
    flops: int = 0
    """Of matrix products, 2 per multiply-add; the other ops are bound by memory."""


@dataclass(eq=False, kw_only=True)
class Op:
    """An op; call it with the arguments of its schema to run it on the backend of the moment."""

    name: str
    schema: str
    """Arguments and outputs, as in ``(Tensor x, Tensor? weight, float eps) -> Tensor``. The first
    argument is a tensor; the choice of the backend goes by it."""
    reference: Callable[..., Any]
    """The op in plain PyTorch: readable, differentiable any number of times, traceable."""
    formula: Callable[..., Any] | None = None
    """The op as the paper has it, for fp64: what all backends are tested against."""
    fake: Callable[..., Any]
    """Empty (outputs, statistics) for arguments; statistics is None where the op has none."""
    work: Callable[..., Work]
    """The op's arguments -> what a call has to do; with ``backward=True``, the backward pass."""
    shape_class: Callable[..., str] | None = None
    """What decides on a GPU which backend is the fastest; None: it was never measured."""
    unmeasured: Callable[[torch.device], str | None] | None = None
    """The backend that comes first on a GPU where nothing was measured; None: by `ORDER`."""
    example: Callable[[Callable[..., Tensor]], dict[str, Any]]
    """A function that makes a tensor of a shape -> small arguments of the public function."""
    kernels: Sequence[Backend] = ()
    statistics: bool = False
    """Whether the forward pass leaves a tensor for the backward pass, besides its outputs."""
    differentiable: bool = True
    traceable: bool = True
    """Whether Dynamo can trace the reference; otherwise graphs hold the op, whatever runs."""
    arguments: Callable[..., tuple[Any, ...]] = lambda *args: args
    """The public function's arguments, in its order -> the op's."""

    # What the backward pass needs
    keep: Callable[..., tuple[Any, ...]] = lambda args, outputs: args
    """(arguments, outputs) -> what backward gets in the arguments' places."""
    kept_outputs: tuple[int, ...] = ()
    """Outputs that it gets besides, after the arguments."""
    passed_on: dict[str, str] = field(default_factory=dict)
    """Argument -> the one whose gradient is its gradient too."""
    gradient_like: Callable[[Tensor], Tensor] = lambda x: torch.empty(
        x.shape, dtype=x.dtype, device=x.device
    )
    """Room for the gradient of an argument."""
    again: Callable[..., Any] | None = None
    """(gradients of the outputs, what was kept) -> the gradients of the arguments, differentiable
    once more; None: those of `reference`."""
    without_first: Callable[..., Any] | None = None
    """The same where nothing depends on the first output, whose gradient is None."""

    # Worked out from the above
    public: Callable[..., Any] | None = field(default=None, init=False)
    """The function that checks its arguments and calls the op."""
    types: dict[str, str] = field(init=False)
    """Argument -> its type in the schema."""
    tensors: list[int] = field(init=False)
    """Places of the tensors among the arguments."""
    own: list[int] = field(init=False)
    """Places of those that have a gradient of their own."""
    takers: list[list[int]] = field(init=False)
    """For each of `own`: the places of the arguments that get its gradient."""
    outputs: int = field(init=False)
    known: Any = field(init=False)
    """The op that PyTorch knows."""
    known_backward: Any = field(default=None, init=False)
    backends: dict[str, Backend] = field(init=False)
    candidates: dict[Any, tuple[Backend, ...]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        assert self.name not in OPS, f"op {self.name} is defined twice"
        arguments, _, returns = self.schema.removeprefix("(").partition(") -> ")
        pairs = [part.rpartition(" ") for part in arguments.split(", ")]
        self.types = {name: kind for kind, _, name in pairs}
        self.outputs = returns.count("Tensor")
        names = list(self.types)
        self.tensors = [i for i, name in enumerate(names) if "Tensor" in self.types[name]]
        self.own = [i for i in self.tensors if names[i] not in self.passed_on]
        self.takers = [
            [i for i in self.tensors if names[i] == a or self.passed_on.get(names[i]) == a]
            for a in (names[place] for place in self.own)
        ]
        given = {kernel.name: kernel for kernel in (*self.kernels, _reference_backend(self))}
        self.use({name: given[name] for name in ORDER if name in given})
        OPS[self.name] = self
        self._register(arguments)

    def use(self, backends: dict[str, Backend]) -> None:
        """Put other backends in the place of the op's, in the order of `ORDER`."""
        self.backends = backends
        self.candidates.clear()

    def exposes(self, function: F) -> F:
        """Decorate the public function, the one that checks its arguments and calls the op."""
        self.public = function
        return function

    def __call__(self, *args: Any) -> Any:
        if is_compiling():
            if self.traceable and traces_reference(self, args):
                return self.backends["reference"].forward(*args, False)[0]
            return self._through_pytorch(args)
        backend = choose(self, args)
        if backend.name != "reference" or _shapes_only.get():
            if not unseen(args):
                return self._through_pytorch(args)
            if self.differentiable and wants_gradient(args):
                record(self.name, backend.name)
                return _Differentiable.apply(self, backend, *args)
        record(self.name, backend.name)
        return backend.forward(*args, False)[0]

    def first(self, args: tuple[Any, ...]) -> str | None:
        """What measured fastest on the GPU of these arguments."""
        if self.shape_class is None:
            return None
        x = args[0]
        # graphs may not depend on the batch
        of = measured.ANY if is_compiling() else self.shape_class(*args)
        found = measured.fastest(self.name, x.device, x.dtype, of)
        if found is None and self.unmeasured is not None:
            return self.unmeasured(x.device)
        return found

    # The op that PyTorch knows

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
        """Run the op as PyTorch knows it: with a gradient, a trace, a dispatch mode."""
        if not self.differentiable:
            with torch.no_grad():
                return self.known(*args)
        found = self.known(*args)
        return found[0] if self.outputs == 1 else found[: self.outputs]

    def _run(self, *args: Any) -> Any:
        backend = choose(self, args)
        moved = None if backend.name == "reference" else elsewhere(list(self.types), args)
        if moved is not None:  # a kernel would take another device's address for one of its own
            raise ValueError(f"{self.name}: {moved}; use .to({args[0].device.type!r})")
        record(self.name, backend.name)
        outputs, statistics = backend.forward(*args, True)
        return self._packed(args[0], outputs, statistics, MARKS[backend.name])

    def _fake(self, *args: Any) -> Any:
        outputs, statistics = self.fake(*args)
        return self._packed(args[0], outputs, statistics, 1)

    def _packed(self, x: Tensor, outputs: Any, statistics: Tensor | None, mark: int) -> Any:
        """Outputs, statistics and mark, as the op's schema has them."""
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
        ctx.backend = None  # the mark, the last of what is saved, tells
        if self.statistics:
            ctx.mark_non_differentiable(output[self.outputs])
        self.save(ctx, inputs, output[: self.outputs], output[self.outputs :])

    def save(
        self, ctx: Any, args: tuple[Any, ...], outputs: Sequence[Tensor], more: Sequence[Tensor]
    ) -> None:
        """Save what the backward pass needs; `more` is the statistics and the mark, if any."""
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
        """The gradients of the arguments, where they are wanted, from those of the outputs."""
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
            found = self._gradients_of_kernel(ctx.backend, rest, needs)
        for places, gradient in zip(self.takers, found, strict=True):
            for i in places:
                if wanted[i]:
                    results[i] = gradient
        return tuple(results)

    def _gradients_of_kernel(
        self, backend: Backend | None, rest: Sequence[Any], needs: list[bool]
    ) -> Sequence[Tensor | None]:
        """backend: of the forward pass; None: the last of `rest` is its mark."""
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
        """The gradients of the arguments of `own`, differentiable once more."""
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
        """What was found, with tensors of no elements for what is not needed."""
        results = []
        for i, gradient, need in zip(self.own, found, needs, strict=True):
            if not need or kept[i] is None:
                results.append(kept[self.own[0]].new_empty(0))
            else:
                assert gradient is not None or room is not None, f"no gradient of {self.name}'s {i}"
                results.append(gradient if room is None else room(kept[i]))
        return tuple(results) if len(results) > 1 else results[0]


class _Differentiable(torch.autograd.Function):
    """A call in eager that wants a gradient: the backend's two functions, and nothing between."""

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


def _mark(x: Tensor, stride: int) -> Tensor:
    return torch.empty_strided((0,), (stride,), dtype=torch.uint8, device=x.device)


def reference_gradients(
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    gradients: Sequence[Tensor | None],
    places: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """The gradients of a reference for the inputs at `places`, differentiable once more.

    A backward pass calls it when a graph of it is wanted (gradients are enabled in it).
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
    """The reference as a backend: itself, with a graph of its own, where PyTorch sees what it does;
    inside the op, as a graph holds it, with the outputs and the derivative of all backends."""

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
        for i in op.own:  # whatever is needed: one gradient may be a sum of another
            if isinstance(kept[i], Tensor) and kept[i].is_floating_point():
                leaves[i] = kept[i].detach().requires_grad_()
        with _recording_a_graph():
            found = op.gradients_by_reference(gradients, tuple(leaves))
        results: list[Tensor | None] = []
        for i, gradient, need in zip(op.own, found, needs, strict=True):
            room = op.gradient_like(kept[i]).zero_() if need else None
            results.append(room if room is None or gradient is None else room.copy_(gradient))
        return results

    return Backend(name="reference", forward=forward, backward=backward)


@contextmanager
def _recording_a_graph() -> Iterator[None]:
    """Autograd at work inside an op, where PyTorch's dispatcher has left it behind."""
    autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - autograd
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
