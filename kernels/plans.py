"""Plans: what a call of an op does on the host, worked out once and then repeated.

Most of the host's time in an eager call goes into deciding the same things again: which backend
runs, tile sizes and grid, strides of views, how Triton specializes the kernel. All of it follows
from the shapes, strides and dtypes of the tensors and from the other arguments. So the second call
with the same `signature` is recorded, and a `Plan` repeats it from then on: it allocates the same
outputs and temporaries, and starts the same kernels with the same grids and numbers. Only
addresses differ.

A call is recorded while the backend's own `forward` runs it. A dispatch mode notes the tensors that
`forward` allocates, and `launch` passes in what it starts. Every address a kernel receives must lie
in one of the arguments or of these allocations; the plan keeps it as a distance from there. A call
cannot be planned if `forward` runs an operator of PyTorch that computes something (such as the copy
of a tensor whose layout the kernels cannot read).

Only ordinary calls are planned: without autograd, tracing, transformations, dispatch modes or
tensor subclasses, and with all tensors on one device and aligned to 16 bytes, which kernels are
specialized for. All others take the way through `choose` and `forward`. Plans are forgotten
(`choose.forget_candidates`) when launch configs or backends change. The requested backend is part
of the signature.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from .choose import NO_TENSORS, Backend, ordinary

LIMIT = 1024
"""Most signatures that an op remembers; beyond it, it forgets all of them."""

aten = torch.ops.aten
ALLOCATORS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
# absent from PyTorch without CUDA
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_empty = torch.empty_strided

Signature = tuple[Hashable, ...]
Pointers = list[int]
"""The address of each argument of a call (0 if it is not a tensor), then of each allocation."""

_recording: ContextVar[Recording | None] = ContextVar("fastdiff_recording", default=None)
_paused: list[None] = []
"""One entry per block of `paused`."""


@contextmanager
def paused() -> Iterator[None]:
    """Neither make nor use plans inside the ``with`` block, in any thread."""
    _paused.append(None)
    try:
        yield
    finally:
        _paused.pop()


def recording() -> Recording | None:
    """The recording in progress in this thread or task."""
    return _recording.get()


def signature(
    selected: str, args: tuple[Any, ...], differentiable: bool
) -> tuple[Signature, Pointers] | None:
    """What a plan for these arguments depends on, and their addresses; None: a call that cannot be
    planned."""
    if _paused or not ordinary():
        return None
    gradients = differentiable and torch.is_grad_enabled()
    found: list[Any] = [selected]
    pointers: Pointers = []
    device, bits = None, 0
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            if a.is_neg() or (gradients and a.requires_grad):
                return None
            if device is None:
                device = a.device
                found.append(device)
            elif a.device != device:
                return None
            address = a.data_ptr()
            bits |= address
            pointers.append(address)
            found += (a.dtype, a.shape, a.stride())
        elif kind in NO_TENSORS or kind is tuple:
            found.append(a)
            pointers.append(0)
        else:
            return None
    return None if bits & 15 else (tuple(found), pointers)


@dataclass(frozen=True, slots=True)
class Address:
    """An address that differs from call to call."""

    source: int
    """The position in `Pointers` of the tensor it lies in."""
    offset: int
    """Bytes from the start of that tensor."""


Start = Callable[[int | None, list[Any]], None]
"""Starts a kernel, given the stream and the kernel's arguments."""


class Step:
    """One launch of a plan."""

    __slots__ = ("_arguments", "_places", "_start")

    def __init__(self, start: Start, arguments: Sequence[Any]) -> None:
        """arguments: of the kernel, with `Address` in the place of addresses."""
        self._start, self._arguments = start, list(arguments)
        self._places = [
            (place, a.source, a.offset) for place, a in enumerate(arguments) if type(a) is Address
        ]

    def run(self, stream: int | None, pointers: Pointers) -> None:
        arguments = self._arguments.copy()
        for place, source, offset in self._places:
            arguments[place] = pointers[source] + offset
        self._start(stream, arguments)


class Plan:
    """Repeats a call with other tensors of the same signature. Immutable, so that threads may share
    it."""

    __slots__ = (
        "_device",
        "_index",
        "_kept",
        "_owner",
        "_result",
        "_rooms",
        "_settings",
        "_steps",
        "backend",
    )

    def __init__(
        self,
        backend: Backend,
        device: torch.device,
        rooms: Sequence[tuple[torch.Size, tuple[int, ...], torch.dtype]],
        steps: Sequence[Step],
        result: Any,
    ) -> None:
        """
        rooms: shape, strides and dtype of each allocation.
        result: the outputs, with a position in the arguments and allocations for each tensor.
        """
        self.backend, self._owner = backend.name, backend
        self._device, self._rooms = device, tuple(rooms)
        self._index = device.index if device.type == "cuda" else None
        self._settings, self._kept = backend.settings, None
        if backend.settings is not None:
            self._kept = backend.settings()
        self._steps, self._result = tuple(steps), result

    def valid(self, backends: dict[str, Backend]) -> bool:
        """Whether the op still has the backend that was recorded, with the same settings."""
        if backends.get(self.backend) is not self._owner:
            return False
        return self._settings is None or self._settings() == self._kept

    def run(self, args: tuple[Any, ...], pointers: Pointers) -> Any:
        """Do the call. Returns the outputs of `Backend.forward`, without the statistics."""
        index = self._index
        if index is None:
            return self._run(args, pointers, None)
        if _current_device() != index:
            with torch.cuda.device(index):
                return self._run(args, pointers, _current_stream(index))
        return self._run(args, pointers, _current_stream(index))

    def _run(self, args: tuple[Any, ...], pointers: Pointers, stream: int | None) -> Any:
        made = []
        for shape, strides, dtype in self._rooms:
            room = _empty(shape, strides, dtype=dtype, device=self._device)
            made.append(room)
            pointers.append(room.data_ptr())
        for step in self._steps:
            step.run(stream, pointers)
        return _taken(self._result, (*args, *made))


def _taken(places: Any, tensors: Sequence[Any]) -> Any:
    """Outputs, given their positions among tensors as in `Recording.result`."""
    if type(places) is int:
        return tensors[places]
    if places is None:
        return None
    return tuple([None if place is None else tensors[place] for place in places])


class CannotPlan(Exception):
    """A call cannot be planned; the message says why."""


class Recording(TorchDispatchMode):
    """Notes what a call allocates and launches. See `record`."""

    def __init__(self, args: Sequence[Any]) -> None:
        super().__init__()
        self.reason: str | None = None
        """Why there will be no plan."""
        self.sources: list[Tensor | None] = [a if isinstance(a, Tensor) else None for a in args]
        """The arguments, then the allocations, which are kept so that no address occurs twice."""
        self.steps: list[Step] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # without it, PyTorch imports Dynamo
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in ALLOCATORS:
            self.sources.append(made)
        elif not func.is_view:
            self.reason = self.reason or f"it calls {func}"
        return made

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Note nothing inside the ``with`` block: Triton's interpreter calls PyTorch itself."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def launched(self, start: Start, arguments: Sequence[Any], pointers: str = "") -> None:
        """Note a launch; among the arguments, tensors stand for their addresses.

        pointers: a letter for each argument; a number under a "p" is an address too.
        """
        letters = pointers or " " * len(arguments)
        try:
            found = [self._argument(*pair) for pair in zip(arguments, letters, strict=True)]
        except CannotPlan as error:
            self.reason = self.reason or str(error)
        else:
            self.steps.append(Step(start, found))

    def _argument(self, a: Any, letter: str) -> Any:
        if isinstance(a, Tensor):
            return self.address(a.data_ptr())
        if letter == "p" and isinstance(a, int):
            return self.address(a)
        if isinstance(a, tuple) and any(isinstance(part, Tensor) for part in a):
            raise CannotPlan("a kernel takes a tuple of tensors")
        return a

    def address(self, value: int) -> Address | None:
        """What an address is relative to; None for 0. Raises CannotPlan."""
        if value == 0:
            return None
        starts = [i for i, t in enumerate(self.sources) if t is not None and t.data_ptr() == value]
        if len(starts) == 1:
            return Address(starts[0], 0)
        inside = [
            (i, value - t.data_ptr())
            for i, t in enumerate(self.sources)
            if t is not None and 0 <= value - t.data_ptr() < span(t)
        ]
        if starts or len(inside) != 1:
            raise CannotPlan("an address lies in several tensors, or in none")
        return Address(*inside[0])

    def result(self, outputs: Any) -> Any:
        """Outputs with positions in the place of tensors. Raises CannotPlan."""
        if outputs is None:
            return None
        if isinstance(outputs, tuple):
            return tuple(None if y is None else self._position(y) for y in outputs)
        return self._position(outputs)

    def _position(self, y: Tensor) -> int:
        for i, t in enumerate(self.sources):
            if t is y or (
                t is not None
                and (t.data_ptr(), t.shape, t.stride()) == (y.data_ptr(), y.shape, y.stride())
                and t.dtype == y.dtype
            ):
                return i
        raise CannotPlan("an output is a view")


def span(x: Tensor) -> int:
    """Bytes from the start of a tensor that is not empty to the end of its last element."""
    steps = zip(x.shape, x.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in steps)) * x.element_size()


def record(
    backend: Backend,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    writable: Sequence[int],
) -> tuple[Any, Plan | None]:
    """Run a call and record it. Returns the outputs, and the plan unless it cannot be planned.

    call: runs the backend's `forward`, and returns the outputs without the statistics.
    args: its arguments, of which `signature` was taken.
    writable: the positions of those that the op changes.
    """
    if any(isinstance(a, Tensor) and a.numel() == 0 for a in args):
        return call(*args), None
    settings = backend.settings and backend.settings()
    own = _apart(args, writable)
    with Recording(own) as notes:
        token = _recording.set(notes)
        try:
            outputs = call(*own)
        finally:
            _recording.reset(token)
    try:
        result = notes.result(outputs)
    except CannotPlan as error:
        notes.reason = notes.reason or str(error)
    if notes.reason is not None or (backend.settings and backend.settings() != settings):
        return outputs, None
    if own is not args:
        outputs = _taken(result, (*args, *notes.sources[len(args) :]))
    rooms = [(t.shape, t.stride(), t.dtype) for t in notes.sources[len(args) :] if t is not None]
    return outputs, Plan(backend, args[0].device, rooms, notes.steps, result)


def _apart(args: tuple[Any, ...], writable: Sequence[int]) -> tuple[Any, ...]:
    """The arguments with copies of those that begin at the same address as an earlier one: the
    recording must tell them apart. Copies have the same strides."""
    own, seen, copied = list(args), dict[int, int](), False
    for i, a in enumerate(args):
        if isinstance(a, Tensor):
            other = seen.setdefault(a.data_ptr(), i)
            if other != i and i not in writable and other not in writable:
                copy = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
                own[i], copied = copy.copy_(a), True
    return tuple(own) if copied else args


def as_tensor(address: int, size: int, dtype: torch.dtype) -> Tensor:
    """`size` bytes of CPU memory at an address."""
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
