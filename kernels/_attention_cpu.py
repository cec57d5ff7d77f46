"""The CPU kernels of `attention` (csrc/attention.cpp) as an op that PyTorch knows.

The forward pass keeps two fp32 numbers per query for the backward pass. That computes P for dQ and
again for dK and dV: seven products of 2 * L * S * D instead of five, but no sum whose order depends
on the threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels import extension
from fastdiff.kernels.dispatch import Op

Strided = tuple[int, int, int, int]


WIDE, MANY_KEYS = 256, 160


def _dense(x: Tensor | None) -> Tensor | None:
    """x with neighbours in the head dim; other strides stay as they are."""
    return x if x is None or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _strided(x: Tensor | None) -> Strided:
    """Where x begins, and its strides from sample to sample, row to row, head to head."""
    if x is None:
        return (0, 0, 0, 0)
    sample, row, head, _ = x.stride()
    return x.data_ptr(), sample, row, head


def _expanded(mask: Tensor | None, full: tuple[int, int, int, int]) -> Tensor | None:
    """The mask as bool or fp32 in its full shape; broadcast dimensions have a stride of 0."""
    if mask is None:
        return None
    return (mask if mask.dtype is torch.bool else mask.float()).expand(full)


class _Call:
    """What both passes give the module; it keeps alive the copies that had to be made."""

    def __init__(
        self,
        tensors: tuple[Tensor | None, ...],
        mask: Tensor | None,
        scale: float,
    ) -> None:
        q, k, _, extra_k, _ = tensors
        assert q is not None
        assert k is not None
        n, length, heads, d = q.shape
        self.keys, self.extra_keys = k.shape[1], 0 if extra_k is None else extra_k.shape[1]
        self.full = (n, heads, length, self.keys + self.extra_keys)
        self.empty = q.numel() == 0 or self.full[3] == 0
        self.tensors = tuple(map(_dense, tensors))
        self.mask = _expanded(mask, self.full)
        self.first = extension.DTYPES[q.dtype], [_strided(x) for x in self.tensors], self._masked()
        sizes = [n, length, heads, self.keys, self.extra_keys, d, torch.get_num_threads()]
        self.last = sizes, scale

    def _masked(self) -> tuple[int, ...]:
        if self.mask is None:
            return (0,) * 6
        return (self.mask.data_ptr(), int(self.mask.dtype is torch.bool), *self.mask.stride())


def _run(
    tensors: tuple[Tensor | None, ...], mask: Tensor | None, scale: float, sums: Tensor | None
) -> Tensor:
    q = tensors[0]
    assert q is not None
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    call = _Call(tensors, mask, scale)
    if call.empty:
        return out.zero_()
    addresses = out.data_ptr(), extension.address(sums)
    extension.native.attention(*call.first, *addresses, *call.last)
    return out


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the largest score and the sum of exp of each query, (2, N, H, L)."""
    sums = _room_for_sums(q)
    return _run((q, k, v, extra_k, extra_v), mask, scale, sums), sums


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    sums: Tensor,
    scale: float,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dextra_k, dextra_v, dmask; of size 0 where there is nothing to differentiate."""
    tensors = q, k, v, extra_k, extra_v
    *gradients, dmask = _room_for_gradients(*tensors, mask, mask_gradient)
    call = _Call(tensors, mask, scale)
    if call.empty:
        for gradient in (*gradients, dmask):
            gradient.zero_()
    else:
        dscores = extension.room(*call.full) if mask_gradient else None
        dense_dout = _dense(dout)
        extension.native.attention_backward(
            *call.first,
            out.data_ptr(),
            sums.data_ptr(),
            *call.last,
            _strided(dense_dout),
            [extension.address(gradient) for gradient in gradients],
            extension.address(dscores),
        )
        if mask is not None and dscores is not None:
            dmask = dscores.sum_to_size(mask.shape).to(mask.dtype)
    dq, dk, dv, dextra_k, dextra_v = gradients
    return dq, dk, dv, dextra_k, dextra_v, dmask


def _room_for_sums(q: Tensor) -> Tensor:
    n, length, heads, _ = q.shape
    return torch.empty(2, n, heads, length, dtype=torch.float32, device=q.device)


def _room_for_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    mask_gradient: bool,
) -> tuple[Tensor, ...]:
    """Contiguous, of size 0 where there is no tensor."""

    def like(x: Tensor | None) -> Tensor:
        shape, dtype = ((0,), q.dtype) if x is None else (x.shape, x.dtype)
        return torch.empty(shape, dtype=dtype, device=q.device)

    return tuple(like(x) for x in (q, k, v, extra_k, extra_v, mask if mask_gradient else None))


attention_cpu = torch.library.custom_op(
    "fastdiff::attention_cpu", _attention, mutates_args=(), device_types="cpu"
)
attention_backward_cpu = torch.library.custom_op(
    "fastdiff::attention_backward_cpu", _attention_backward, mutates_args=(), device_types="cpu"
)


@attention_cpu.register_fake
def _attention_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), _room_for_sums(q)


@attention_backward_cpu.register_fake
def _attention_backward_fake(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v, extra_k, extra_v, mask, _, _, _, mask_gradient = rest
    return _room_for_gradients(q, k, v, extra_k, extra_v, mask, mask_gradient)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Without a gradient: nothing is kept."""
    scale = max(1, q.shape[3]) ** -0.5 if scale is None else scale
    return _run((q, k, v, extra_k, extra_v), mask, scale, None)


def _registered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    scale = max(1, q.shape[3]) ** -0.5 if scale is None else scale
    out: Tensor = attention_cpu(q, k, v, extra_k, extra_v, mask, scale)[0]
    return out


def _slower(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    """Where PyTorch's kernel is as fast or faster; docs/decisions/kernels.md has the figures."""
    tensors = q, k, v, extra_k, extra_v, mask
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "where a gradient is wanted the reference is faster"
    keys = k.shape[1] + (0 if extra_k is None else extra_k.shape[1])
    if q.dtype is torch.float32 and q.shape[3] > WIDE and keys > MANY_KEYS:
        return (
            f"in fp32 the reference is faster for head dims above {WIDE} with more than "
            f"{MANY_KEYS} keys, got {q.shape[3]} and {keys}"
        )
    return None


def register_cpu(op: Op) -> None:
    """Enter the kernels into the dispatcher; second derivatives go by way of the op's reference."""
    reference = op.implementations["reference"].function

    def differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, sums = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
                names = zip(("extra_k", "extra_v", "mask"), rest, strict=True)
                result: Tensor = reference(q, k, v, scale=ctx.scale, **dict(names))
                return result

            return (*extension.reference_gradients(again, inputs, (dout,)), None)
        needed = ctx.needs_input_grad[: len(inputs)]
        found = attention_backward_cpu(dout, *inputs, out, sums, ctx.scale, needed[5])
        return (*(x if wanted else None for x, wanted in zip(found, needed, strict=True)), None)

    attention_cpu.register_autograd(differentiate, setup_context=_keep)
    extension.register(op, _plain, _registered, slower=_slower)
