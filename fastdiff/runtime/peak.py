"""Estimate the peak memory of a network without weights and without computing anything.

The network is built from its config on the meta device and called there. Every tensor that PyTorch
or a fastdiff op would allocate is counted while it is alive, so the largest sum is the peak of the
same call on a real device: PyTorch and `fastdiff.kernels` reuse freed memory immediately, and no
backend stores a matrix of attention scores. The scratch memory of oneDNN is not counted.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.kernels import backend, selected_backend, shapes_only
from fastdiff.models.layers import Upsample
from fastdiff.runtime.cpu_layers import fold_wins, pack_wins, plan_for

FOLDED_SHARE = 16 / 9
"""Numbers of a folded upsampling's weights per number of the convolution's."""


POINTWISE = frozenset(
    ("add", "sub", "mul", "div", "exp", "sin", "cos", "clamp", "silu", "gelu", "sigmoid", "tanh")
)
"""Ops of floating-point tensors whose result has their broadcast shape and dtype."""


@dataclass(frozen=True)
class Peak:
    """Memory of a call, in bytes."""

    most: int
    """Largest sum of the tensors alive at the same time, without the weights."""
    copies: int
    """Second copies of weights that a CPU keeps (`runtime.cpu_layers`)."""
    result: Any
    """What the call returned, on the meta device."""


def peak_of(
    module: nn.Module,
    call: Callable[[], Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = False,
) -> Peak:
    """Call a function that uses a module on the meta device, and count.

    module: on the meta device; used up by this. call: makes its inputs itself, on the meta device.
    device, dtype: where the module is to run, prepared for inference (`runtime.prepare`).
    training: what backward passes need is kept, and the module is not prepared.
    """
    copies: dict[nn.Module, float] = {}
    if device.type == "cpu" and not training:
        plan = plan_for(dtype, keep_copies=True, half_as_fp32=None)
        for layer in list(module.modules()):
            _prepare(layer, wide=plan.widens(dtype), copies=copies)
    with ExitStack() as modes:
        modes.enter_context(torch.set_grad_enabled(training))
        live = modes.enter_context(_Live(module))
        modes.enter_context(_on_meta())
        result = call()
    return Peak(live.peak, round(sum(copies.values())), result)


@contextmanager
def _on_meta() -> Iterator[None]:
    """Ops of ours as one each; a forced reference keeps its steps, which take memory."""
    with ExitStack() as modes:
        modes.enter_context(_Attention())
        if selected_backend() != "reference":
            modes.enter_context(backend("auto"))
            modes.enter_context(shapes_only())
        yield


class _Live(TorchDispatchMode):
    """Counts the bytes of all live tensors except those of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        own = (*module.parameters(), *module.buffers())
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in own}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Called by PyTorch, which would otherwise import Dynamo to exclude it: two seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = _made(func, args, kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An op's result on the meta device.

    PyTorch can infer every shape, but for many ops it uses decompositions, and the first of them
    imports Dynamo, which takes two seconds. So the ops that networks use are handled here.
    """
    name = func.name().removeprefix("aten::").partition(".")[0]
    if name == "arange":
        start, end, step = (0, *args[:1], 1) if len(args) == 1 else (*args, 1)[:3]
        dtype = kwargs.get("dtype") or torch.int64
        return torch.empty(-(-(end - start) // step), dtype=dtype, device="meta")
    if name in POINTWISE:
        return _like(
            torch.broadcast_shapes(*(x.shape for x in args if isinstance(x, Tensor))), args
        )
    if name == "cat":
        tensors, dim = args[0], args[1] if len(args) > 1 else 0
        shape = list(tensors[0].shape)
        shape[dim] = sum(x.shape[dim] for x in tensors)
        return _like(torch.Size(shape), tensors)
    if name == "argmin":
        x, dim = args[:2]
        shape = [size for at, size in enumerate(x.shape) if at != dim % x.ndim]
        return torch.empty(shape, dtype=torch.int64, device="meta")
    if name == "addmm":
        return _like(torch.Size((args[1].shape[0], args[2].shape[1])), args)
    return func(*args, **kwargs)


def _like(shape: torch.Size, given: Sequence[Any]) -> Tensor:
    """A tensor of the dtype of all given ones, in the memory format of the first of that rank."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    first = next(x for x in tensors if x.ndim == len(shape))
    last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last and not first.is_contiguous() else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


class _Attention(TorchFunctionMode):
    """PyTorch's attention as one op: on the meta device it takes the way with all scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty((*q.shape[:-1], v.shape[-1]))
        return func(*args, **(kwargs or {}))


def _prepare(layer: nn.Module, *, wide: bool, copies: dict[nn.Module, float]) -> None:
    """Let a layer take what it takes on a CPU, and write down its copy of weights."""
    if type(layer) is Upsample:
        layer.forward = functools.partial(_upsample, layer, wide, copies)  # type: ignore[method-assign]
    elif type(layer) is nn.Conv2d:
        layer.forward = functools.partial(_conv, layer, wide, copies)  # type: ignore[method-assign]
    elif type(layer) is nn.Linear and wide:
        layer.forward = functools.partial(_linear, layer, copies)  # type: ignore[method-assign]


def _conv(conv: nn.Conv2d, wide: bool, copies: dict[nn.Module, float], x: Tensor) -> Tensor:
    if wide or pack_wins(conv, x):
        copies[conv] = 4 * conv.weight.numel()
    y = conv._conv_forward(x, conv.weight, conv.bias)
    return _widened(x, y) if wide else y


def _linear(linear: nn.Linear, copies: dict[nn.Module, float], x: Tensor) -> Tensor:
    copies[linear] = 4 * linear.weight.numel()
    return _widened(x, nn.functional.linear(x, linear.weight, linear.bias))


def _upsample(layer: Upsample, wide: bool, copies: dict[nn.Module, float], x: Tensor) -> Tensor:
    if not (fold_wins(layer.conv, x) and (wide or x.dtype is torch.float32)):
        return Upsample.forward(layer, x)
    copies[layer] = 4 * FOLDED_SHARE * layer.conv.weight.numel()
    n, channels, height, width = x.shape
    y = x.new_empty((n, channels, 2 * height, 2 * width))
    return _widened(x, y) if wide else y


def _widened(x: Tensor, y: Tensor) -> Tensor:
    """y, past fp32 tensors of the layer's input and result."""
    shapes: Sequence[torch.Size] = (x.shape, y.shape)
    given, made = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    del given
    return made.to(y.dtype)
