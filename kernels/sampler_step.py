"""One row of a sampler table: guidance, x0 estimate, clamp, update, noise and history in one pass.

    F  = F_uncond + W (F_cond - F_uncond)                        Ho & Salimans 2022, eq. 6
    F  = phi F std(F_cond) / std(F) + (1 - phi) F                Lin et al. 2023, eq. 15-16
    D  = clamp(U x + V F, -CLAMP, CLAMP)                         the x0 estimate
    x' = A x + B D + C1 H_1 + C2 H_2 + C3 H_3 + S noise
    H' = P x + Q D                                               into slot SLOT, after x'

phi is guidance_rescale; x and H on the right hand sides are the old ones. A network that learns the
variance gives 2C channels, the second half v in [-1, 1]; the factor of the noise is then exp(logvar
/ 2), logvar = f LOGVAR_MAX + (1 - f) LOGVAR_MIN with f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq.
15), in rows where S is not 0. With guidance it is the conditional half's.

Bytes that must move, in numbers per element of x: x in and out, the prediction (1; 2 with
guidance; one more for a learned variance, in rows with noise), one per history slot that is read or
written; the noise is made on the spot. Eager schedulers make 10 to 40 passes. One launch;
guidance_rescale needs the deviations of whole images, a launch before it that reads the prediction
(its 2 numbers) once more, and so finds them in the L2 cache.

A coefficient of 0 means that its tensor is not read: a history slot may hold anything before it is
first written.

A step beyond the table is a ValueError where the host reads it (reference, CPU). On a GPU a kernel
cannot raise, and the host does not wait for it: x becomes NaN and history stays. x left as it is
would be a wrong image that nobody notices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from . import compiled
from ._sampler_step import LARGEST, run_step
from ._sampler_step_cuda import run_step as run_on_cuda
from .checks import check_number, check_shape
from .cpu import DTYPES, cpu_backend
from .cuda import cuda_backend
from .op import Op
from .philox_normal import SAMPLER_NOISE, philox_normal_reference
from .triton import triton_backend
from .tuning.measured import regime

HISTORY_SLOTS = 3


class Column(IntEnum):
    """The columns of a sampler table."""

    U = 0
    """x0 estimate: factor of x."""
    V = 1
    """x0 estimate: factor of the prediction."""
    A = 2
    """Update: factor of x."""
    B = 3
    """Update: factor of the x0 estimate."""
    C1 = 4
    """Update: factor of history slot 0."""
    C2 = 5
    """Update: factor of history slot 1."""
    C3 = 6
    """Update: factor of history slot 2."""
    S = 7
    """Update: factor of the noise."""
    P = 8
    """History: factor of x."""
    Q = 9
    """History: factor of the x0 estimate."""
    SLOT = 10
    """History slot to write, 0 to 2, or -1 for none."""
    W = 11
    """Guidance scale."""
    CLAMP = 12
    """Bound of the x0 estimate; inf for none."""
    LOGVAR_MIN = 13
    """Learned variance: log variance at v = -1."""
    LOGVAR_MAX = 14
    """Learned variance: log variance at v = 1."""
    RESERVED = 15
    """Zero."""


COLUMNS = Column


@torch.no_grad()
def sampler_step_reference(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    guidance_rescale: float = 0.0,
) -> None:
    """The op in plain PyTorch; see `sampler_step`. On a GPU it waits to read the row."""
    if x.numel() == 0:
        return
    index = _index(step, table)
    row = dict(zip(Column, table[index].tolist(), strict=True))

    prediction = prediction.to(x.dtype)
    f, v = prediction[:, : x.shape[1]], prediction[-len(x) :, x.shape[1] :]
    if len(prediction) == 2 * len(x):
        uncond, cond = f.chunk(2)
        f = _guide(uncond, cond, row[Column.W], guidance_rescale)
    d = row[Column.U] * x + row[Column.V] * f
    if row[Column.CLAMP] < math.inf:
        d = d.clamp(-row[Column.CLAMP], row[Column.CLAMP])

    new = row[Column.A] * x + row[Column.B] * d
    for slot, column in enumerate((Column.C1, Column.C2, Column.C3)):
        if row[column] != 0:
            new += row[column] * history[slot]
    if row[Column.S] != 0:
        factor: float | Tensor = row[Column.S]
        if v.shape[1]:
            fraction = (v + 1) / 2
            low, high = row[Column.LOGVAR_MIN], row[Column.LOGVAR_MAX]
            factor = torch.exp(0.5 * (fraction * high + (1 - fraction) * low))
        noise = philox_normal_reference(seeds, x.shape[1:], step=index, stream=SAMPLER_NOISE)
        new += factor * noise.to(x.dtype)
    if row[Column.SLOT] >= 0:
        history[int(row[Column.SLOT])] = row[Column.P] * x + row[Column.Q] * d
    x.copy_(new)


def _index(step: Tensor, table: Tensor) -> int:
    """The row, on the host. Raises ValueError when the table does not have it."""
    index = int(step)
    if not 0 <= index < len(table):
        raise ValueError(f"sampler_step: step must be in [0, {len(table)}), got {index}")
    return index


def _guide(uncond: Tensor, cond: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance; rescale > 0 goes back towards the conditional's deviation.

    A constant F has no deviation to rescale and stays as it is, where the formula says 0 / 0.
    """
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    wanted, have = (t.std(dims, correction=0, keepdim=True) for t in (cond, guided))
    ratio = torch.where(have > 0, wanted / have, 1.0)
    return rescale * guided * ratio + (1 - rescale) * guided


# The backends


def _on_triton(*args: Any) -> tuple[None, None]:
    run_step(*args[:-1])
    return None, None


def _on_cpu(*args: Any) -> tuple[None, None]:
    _native(*args[:-1])
    return None, None


def _on_cuda(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    guidance_rescale: float,
    keep: bool,
) -> tuple[None, None]:
    run_on_cuda(x, prediction, history, table, step, seeds, guidance_rescale)
    return None, None


def _objection(x: Tensor, *others: Any) -> str | None:
    if x.numel() and x[0].numel() > LARGEST:
        return f"an image may have 2^31 - 1 elements, got {x[0].numel()}"
    names = ("prediction", "history", "table", "step", "seeds")
    for name, tensor in zip(names, others, strict=False):
        if tensor.device != x.device:
            return f"{name} must be on the device of x, {x.device}, got {tensor.device}"
    return None


ROW_BYTES = len(Column) * torch.float32.itemsize
NOISE = int(SAMPLER_NOISE)


def _native(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    guidance_rescale: float = 0.0,
) -> None:
    if x.numel() == 0:
        return
    index = _index(step, table)
    if not (x.is_contiguous() and history.is_contiguous()):
        dense, slots = x.contiguous(), history.contiguous()
        _native(dense, prediction, slots, table, step, seeds, guidance_rescale)
        x.copy_(dense)
        history.copy_(slots)
        return
    n, c = x.shape[:2]
    space = x.numel() // (n * c)
    if prediction.dtype not in DTYPES:
        prediction = prediction.float()
    channels = prediction.shape[1]
    channels_last = not prediction.is_contiguous()
    if channels_last and not (
        x.ndim == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    ):
        prediction = prediction.movedim(1, -1).contiguous()
    runs, length, stride = (c, space, channels) if channels_last else (1, c * space, 1)
    table, seeds = table.contiguous(), seeds.contiguous()
    compiled.native.sampler_step(
        DTYPES[prediction.dtype],
        len(prediction) == 2 * n,
        channels == 2 * c,
        x.data_ptr(),
        prediction.data_ptr(),
        history.data_ptr(),
        table.data_ptr() + index * ROW_BYTES,
        seeds.data_ptr(),
        n,
        runs,
        length,
        channels * space,
        1,
        stride,
        c if channels_last else c * space,
        index,
        NOISE,
        guidance_rescale,
    )


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    x, table = draw(2, 4, 8, 8), draw(4, len(Column)) * 0
    seeds = torch.arange(2, device=x.device)
    return {
        "x": x, "prediction": draw(2, 4, 8, 8), "history": draw(3, 2, 4, 8, 8), "table": table,
        "step": seeds[0], "seeds": seeds,
    }  # fmt: skip


_op = Op(
    name="sampler_step",
    schema="(Tensor(a!) x, Tensor prediction, Tensor(b!) history, Tensor table, Tensor step, "
    "Tensor seeds, float guidance_rescale) -> ()",
    reference=sampler_step_reference,
    fake=lambda *_: (None, None),
    shape_class=regime,
    example=_example,
    kernels=(
        cuda_backend(forward=_on_cuda, why_not=_objection, dtypes=(torch.float32,)),
        triton_backend(forward=_on_triton, why_not=_objection),
        cpu_backend(forward=_on_cpu, dtypes=(torch.float32,)),
    ),
    differentiable=False,
    traceable=False,  # the host reads the row
)


def _check(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    guidance_rescale: float,
) -> None:
    op = "sampler_step"
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: x must be (N, C, *spatial) fp32, got {x.dtype} of shape {tuple(x.shape)}; "
            "keep x in fp32 whatever the network's dtype"
        )
    shape, have = x.shape, prediction.shape
    n, c = shape[0], shape[1]
    if (
        len(have) < 2
        or have[2:] != shape[2:]
        or have[0] not in (n, 2 * n)
        or have[1] not in (c, 2 * c)
    ):
        shapes = [(m * n, k * c, *shape[2:]) for m in (1, 2) for k in (1, 2)]
        check_shape(op, "prediction", prediction, *shapes)
    check_shape(op, "history", history, (HISTORY_SLOTS, *shape))
    check_shape(op, "seeds", seeds, (n,))
    check_shape(op, "step", step, ())
    if step.dtype is not torch.int64 or seeds.dtype is not torch.int64:
        name, tensor = ("step", step) if step.dtype is not torch.int64 else ("seeds", seeds)
        raise ValueError(f"{op}: {name} must be int64, got {tensor.dtype}")
    if history.dtype is not x.dtype or table.dtype is not x.dtype:
        name, tensor = ("history", history) if history.dtype is not x.dtype else ("table", table)
        raise ValueError(f"{op}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    if table.ndim != 2 or table.shape[1] != len(Column):
        raise ValueError(f"{op}: table must be (rows, {len(Column)}), got {tuple(table.shape)}")
    check_number(op, "guidance_rescale", guidance_rescale)
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"{op}: guidance_rescale must be in [0, 1], got {guidance_rescale}")


@_op.exposes
def sampler_step(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    *,
    guidance_rescale: float = 0.0,
) -> None:
    """Apply row `step` of a sampler table to x and history, in place.

    Args:
        x: (N, C, *spatial) fp32, the noisy sample; overwritten by the next one.
        prediction: what the network returned, any float dtype: (N or 2N, C or 2C, *spatial). 2N is
            [uncond; cond] and is combined by column W; the second C channels are the learned
            variance.
        history: (3, N, C, *spatial) in the dtype of x; one slot may be overwritten.
        table: (rows, 16) in the dtype of x, on its device; the columns are `COLUMNS`.
        step: () int64, the row, on the device of x; it also keys the noise.
        seeds: (N,) int64, the seed of each image's noise.
        guidance_rescale: phi of Lin et al. 2023; 0 leaves the guided prediction alone.

    x and the table may be fp64 (for tests); the noise is fp32 numbers always. Not differentiable.

    Raises:
        ValueError: a shape, dtype or option that does not fit; on a CPU, and with the reference,
            also a step beyond the table. In the Triton and CUDA kernels x becomes NaN then.

    Ho & Salimans 2022, eq. 6; Nichol & Dhariwal 2021, eq. 15; Lin et al. 2023, eq. 15-16.
    """
    _check(x, prediction, history, table, step, seeds, guidance_rescale)
    _op(x, prediction, history, table, step, seeds, guidance_rescale)
