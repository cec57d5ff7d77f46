"""Each sample's row of a sampler table: guidance, x0 estimate, clamp, update, noise and history in
one pass.

    F  = F_uncond + W (F_cond - F_uncond)                        Ho & Salimans 2022, eq. 6
    F  = phi F std(F_cond) / std(F) + (1 - phi) F                Lin et al. 2023, eq. 15-16
    D  = clamp(U x + V F, -CLAMP, CLAMP)                         the x0 estimate
    x' = A x + B D + C1 H_1 + C2 H_2 + C3 H_3 + S noise
    H' = P x + Q D                                               into slot SLOT, after x'

phi is RESCALE; x and H on the right hand sides are the old ones. Samples without an unconditional
prediction have F = F_cond. A network that learns the variance gives 2C channels, the second half v
in [-1, 1]; the factor of the noise is then exp(logvar / 2), logvar = f LOGVAR_MAX + (1 - f)
LOGVAR_MIN with f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15), in rows where S is not 0. With
guidance it is the conditional prediction's.

The tables of all requests lie stacked in one buffer and every sample has its own row of it, so
samplers, numbers of steps and guidance may differ within a batch. A sample's bits do not depend on
the other samples, on its place in the batch, or on where its table lies: its noise is keyed by its
seed and by NOISE_STEP.

Bytes that must move, in numbers per element of x: x in and out, the prediction (1; 2 with
guidance; one more for a learned variance, in rows with noise), one per history slot that is read or
written, one for `denoised`; the noise is made on the spot and `finite` costs no further read. Eager
schedulers make 10 to 40 passes. Idle samples move nothing. One launch; where samples may be
rescaled, a launch before it for the deviations of whole images. It reads the prediction (its 2
numbers) once more, which the second launch then finds in the L2 cache, and returns at once for
samples whose row does not rescale.

A coefficient of 0 means that its tensor is not read: a history slot may hold anything before it is
first written.

A row or an index out of range is a ValueError where the host reads it (reference, CPU). On a GPU a
kernel cannot raise, and the host does not wait for it: the sample's x and denoised become NaN, its
`finite` False, and its history stays. x left as it is would be a wrong image that nobody notices.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels import _cuda, _sampler_step_cuda, extension
from fastdiff.kernels._sampler_step import LARGEST, run_step
from fastdiff.kernels._triton import register, why_not
from fastdiff.kernels.dispatch import check_shape, define_op
from fastdiff.kernels.philox import SAMPLER_NOISE, philox_normal_reference

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
    NOISE_STEP = 15
    """The step that keys the noise: the row's number within its own table, below 2^24."""
    RESCALE = 16
    """phi of Lin et al. 2023; 0 leaves the guided prediction alone."""
    RESERVED_17 = 17
    """Zero, as the next two; they make a row a multiple of 16 bytes."""
    RESERVED_18 = 18
    RESERVED_19 = 19


COLUMNS = Column


@torch.no_grad()
def sampler_step_reference(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    *,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    denoised: Tensor | None = None,
    finite: Tensor | None = None,
    rescale: bool = True,
) -> None:
    """The op in plain PyTorch; see `sampler_step`. On a GPU it waits to read rows and indices."""
    if x.numel() == 0:
        return
    check_places(prediction, table, rows, cond, uncond, rescale)
    busy = (rows != -1).nonzero().flatten()  # (n,), the samples that are not idle
    old, slots, c = x[busy], history[:, busy], x.shape[1]
    row = table[rows[busy]].reshape(len(busy), len(Column), *(1,) * (x.ndim - 2))

    def column(name: Column) -> Tensor:
        """(n, 1, 1, ...)"""
        return row[:, name : name + 1]

    own = prediction[busy if cond is None else cond[busy]].to(x.dtype)
    f, v = own[:, :c], own[:, c:]
    ok = f.isfinite().flatten(1).all(1)
    if uncond is not None:
        guided = uncond[busy] >= 0
        base = prediction[uncond[busy].clamp(min=0), :c].to(x.dtype)
        ok &= base.isfinite().flatten(1).all(1) | ~guided
        f = torch.where(_like(guided, f), base + column(Column.W) * (f - base), f)
        for i in (guided & (column(Column.RESCALE).flatten() != 0)).nonzero().flatten().tolist():
            f[i] = _rescaled(f[i], own[i, :c], row[i, Column.RESCALE])
    bound = column(Column.CLAMP)
    d = (column(Column.U) * old + column(Column.V) * f).clamp(-bound, bound)

    new = column(Column.A) * old + column(Column.B) * d
    for slot, name in enumerate((Column.C1, Column.C2, Column.C3)):
        new += torch.where(column(name) != 0, column(name) * slots[slot], 0.0)
    noisy = (row[:, Column.S].flatten() != 0).nonzero().flatten()
    if len(noisy):
        factor = column(Column.S)[noisy]
        if v.shape[1]:
            low, high = column(Column.LOGVAR_MIN)[noisy], column(Column.LOGVAR_MAX)[noisy]
            fraction = (v[noisy] + 1) / 2
            factor = torch.exp(0.5 * (fraction * high + (1 - fraction) * low))
            ok[noisy] &= v[noisy].isfinite().flatten(1).all(1)
        step = row[:, Column.NOISE_STEP].flatten()[noisy].long()
        noise = philox_normal_reference(
            seeds[busy][noisy], x.shape[1:], step=step, stream=SAMPLER_NOISE
        )
        new[noisy] += factor * noise.to(x.dtype)

    kept = column(Column.P) * old + column(Column.Q) * d
    for slot in range(HISTORY_SLOTS):
        history[slot, busy] = torch.where(column(Column.SLOT) == slot, kept, slots[slot])
    x[busy] = new
    if denoised is not None:
        denoised[busy] = d
    if finite is not None:
        finite[busy] &= ok


def _like(x: Tensor, other: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, ...)"""
    return x.reshape(-1, *(1,) * (other.ndim - 1))


def check_places(
    prediction: Tensor,
    table: Tensor,
    rows: Tensor,
    cond: Tensor | None,
    uncond: Tensor | None,
    rescale: bool,
) -> None:
    """Raise ValueError for a row or an index out of range in a sample that is not idle, or for a
    row that rescales against `rescale`. Reads them on the host."""
    op, busy = "sampler_step", (rows != -1).nonzero().flatten()
    indices = (
        ("rows", rows, 0, len(table), "; -1 is an idle slot"),
        ("cond", cond, 0, len(prediction), ""),
        ("uncond", uncond, -1, len(prediction), "; -1 is a sample without guidance"),
    )
    for name, tensor, least, end, meaning in indices:
        if tensor is None:
            continue
        bad = (tensor[busy] < least) | (tensor[busy] >= end)
        if bad.any():
            sample = int(busy[bad][0])
            raise ValueError(
                f"{op}: {name} must be in [{least}, {end}), got {int(tensor[sample])} for sample "
                f"{sample}{meaning}"
            )
    if uncond is not None and not rescale:
        phi = torch.where(uncond[busy] >= 0, table[rows[busy], Column.RESCALE], 0.0)
        if (phi != 0).any():
            raise ValueError(
                f"{op}: a row has RESCALE {float(phi[phi != 0][0]):g}, but rescale=False says "
                "that none has; leave rescale out"
            )


def _rescaled(guided: Tensor, cond: Tensor, phi: Tensor) -> Tensor:
    """One sample's guided prediction, its deviation brought back towards the conditional one's.

    A constant F has no deviation to rescale and stays as it is, where the formula says 0 / 0.
    """
    wanted, have = (t.contiguous().std(correction=0) for t in (cond, guided))
    ratio = torch.where(have > 0, wanted / have, 1.0)
    return phi * guided * ratio + (1 - phi) * guided


# The Triton kernels, which are in _sampler_step.py

MUTATED = ("x", "history", "denoised", "finite")

sampler_step_triton = torch.library.custom_op(
    "fastdiff::sampler_step_triton", run_step, mutates_args=MUTATED
)


@sampler_step_triton.register_fake
def _sampler_step_fake(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    denoised: Tensor | None = None,
    finite: Tensor | None = None,
    rescale: bool = True,
) -> None:
    return None


@torch.no_grad()
def _run(*tensors: Tensor, **options: Any) -> None:
    sampler_step_triton(*tensors, **options)


def _objection(
    x: Tensor, *tensors: Tensor, rescale: bool = True, **others: Tensor | None
) -> str | None:
    if x.numel() and x[0].numel() > LARGEST:
        return f"an image may have 2^31 - 1 elements, got {x[0].numel()}"
    named = zip(("prediction", "history", "table", "rows", "seeds"), tensors, strict=True)
    for name, tensor in (*named, *others.items()):
        if tensor is not None and tensor.device != x.device:
            return f"{name} must be on the device of x, {x.device}, got {tensor.device}"
    return why_not(x, *tensors)


_op = define_op("sampler_step", sampler_step_reference)
register(_op, _run, _objection)


# CPU

NOISE = int(SAMPLER_NOISE)
WIDTH = len(Column)


def _native(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    *,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    denoised: Tensor | None = None,
    finite: Tensor | None = None,
    rescale: bool = True,
) -> None:
    if x.numel() == 0:
        return
    if not (
        x.is_contiguous()
        and history.is_contiguous()
        and (denoised is None or denoised.is_contiguous())
        and (finite is None or finite.is_contiguous())
    ):
        outputs = x, history, denoised, finite
        dense = [None if t is None else t.contiguous() for t in outputs]
        written = dict(zip(("x", "history", "denoised", "finite"), dense, strict=True))
        given = {"prediction": prediction, "table": table, "rows": rows, "seeds": seeds}
        _native(**written, **given, cond=cond, uncond=uncond, rescale=rescale)  # type: ignore[arg-type]
        for output, filled in zip(outputs, dense, strict=True):
            if output is not None and filled is not None:
                output.copy_(filled)
        return
    n, c = x.shape[:2]
    space = x.numel() // (n * c)
    if prediction.dtype not in extension.DTYPES:
        prediction = prediction.float()
    images, channels = prediction.shape[:2]
    channels_last = not prediction.is_contiguous()
    if channels_last and not (
        x.ndim == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    ):
        prediction = prediction.movedim(1, -1).contiguous()
    runs, length, stride = (c, space, channels) if channels_last else (1, c * space, 1)
    table, rows, seeds = table.contiguous(), rows.contiguous(), seeds.contiguous()
    cond = None if cond is None else cond.contiguous()
    uncond = None if uncond is None else uncond.contiguous()
    bad = extension.native.sampler_step(
        extension.DTYPES[prediction.dtype],
        channels == 2 * c,
        rescale,
        x.data_ptr(),
        prediction.data_ptr(),
        history.data_ptr(),
        table.data_ptr(),
        rows.data_ptr(),
        seeds.data_ptr(),
        0 if cond is None else cond.data_ptr(),
        0 if uncond is None else uncond.data_ptr(),
        0 if denoised is None else denoised.data_ptr(),
        0 if finite is None else finite.data_ptr(),
        n,
        len(table),
        images,
        runs,
        length,
        channels * space,
        1,
        stride,
        c if channels_last else c * space,
        NOISE,
    )
    if bad >= 0:
        check_places(prediction, table, rows, cond, uncond, rescale)


@torch.library.custom_op("fastdiff::sampler_step_cpu", mutates_args=MUTATED, device_types="cpu")
def sampler_step_cpu(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    cond: Tensor | None,
    uncond: Tensor | None,
    denoised: Tensor | None,
    finite: Tensor | None,
    rescale: bool,
) -> None:
    options = {"cond": cond, "uncond": uncond, "denoised": denoised, "finite": finite}
    _native(x, prediction, history, table, rows, seeds, **options, rescale=rescale)


@torch.no_grad()
def _registered(*tensors: Tensor, **options: Any) -> None:
    sampler_step_cpu(*tensors, **options)


extension.register(_op, _native, _registered, dtypes=(torch.float32,))


# The CUDA kernels, which are in _sampler_step_cuda.py

_sampler_step_cuda.sampler_step_cuda.register_fake(_sampler_step_fake)
_cuda.register(
    _op,
    _sampler_step_cuda.run_step,
    _sampler_step_cuda.registered_step,
    _objection,
    dtypes=(torch.float32,),
)


def _check(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    options: dict[str, Any],
) -> None:
    op = "sampler_step"
    shape, have, dtype = x.shape, prediction.shape, x.dtype
    if len(shape) < 2 or (dtype is not torch.float32 and dtype is not torch.float64):
        raise ValueError(
            f"{op}: x must be (N, C, *spatial) fp32, got {dtype} of shape {tuple(shape)}; "
            "keep x in fp32 whatever the network's dtype"
        )
    n, c = shape[0], shape[1]
    if len(have) < 2 or have[2:] != shape[2:] or have[1] not in (c, 2 * c):
        shapes = [(f"{k * c}", *map(str, shape[2:])) for k in (1, 2)]
        expected = " or ".join(f"(M, {', '.join(sizes)})" for sizes in shapes)
        raise ValueError(f"{op}: prediction must have shape {expected}, got {tuple(have)}")
    if history.shape != (HISTORY_SLOTS, *shape):
        check_shape(op, "history", history, (HISTORY_SLOTS, *shape))
    if history.dtype is not dtype or table.dtype is not dtype:
        name, tensor = ("history", history) if history.dtype is not dtype else ("table", table)
        raise ValueError(f"{op}: {name} must have the dtype of x, {dtype}, got {tensor.dtype}")
    if table.ndim != 2 or table.shape[1] != WIDTH:
        raise ValueError(f"{op}: table must be (rows, {WIDTH}), got {tuple(table.shape)}")
    _check_vector("rows", rows, n, torch.int64)
    _check_vector("seeds", seeds, n, torch.int64)
    cond, uncond = options["cond"], options["uncond"]
    if cond is not None:
        _check_vector("cond", cond, n, torch.int64)
    elif have[0] != n:
        raise ValueError(
            f"{op}: without cond, prediction must have one part for each of the {n} samples, got "
            f"{have[0]}; cond and uncond say which are whose"
        )
    if uncond is not None:
        _check_vector("uncond", uncond, n, torch.int64)
    if options["finite"] is not None:
        _check_vector("finite", options["finite"], n, torch.bool)
    denoised = options["denoised"]
    if denoised is not None:
        check_shape(op, "denoised", denoised, tuple(shape))
        if denoised.dtype is not dtype:
            raise ValueError(
                f"{op}: denoised must have the dtype of x, {dtype}, got {denoised.dtype}"
            )


def _check_vector(name: str, x: Tensor, n: int, dtype: torch.dtype) -> None:
    if x.dtype is not dtype:
        known = str(dtype).removeprefix("torch.")
        raise ValueError(f"sampler_step: {name} must be {known}, got {x.dtype}")
    if x.ndim != 1 or x.shape[0] != n:
        check_shape("sampler_step", name, x, (n,))


def sampler_step(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    *,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    denoised: Tensor | None = None,
    finite: Tensor | None = None,
    rescale: bool = True,
) -> None:
    """Take each sample along its row of the stacked sampler tables; x and history in place.

    Args:
        x: (N, C, *spatial) fp32, the noisy samples; overwritten by the next ones.
        prediction: what the network returned, any float dtype: (M, C or 2C, *spatial), any M. The
            second C channels are the learned variance.
        history: (3, N, C, *spatial) in the dtype of x; one slot of a sample may be overwritten.
        table: (R, 20) in the dtype of x, on its device; the columns are `COLUMNS`. The tables of
            all samples, one after the other.
        rows: (N,) int64, each sample's row of the stacked table. -1 is an idle slot: its part of
            every tensor is left alone, and its prediction not read.
        seeds: (N,) int64, the seed of each sample's noise; all 64 bits count.
        cond: (N,) int64, each sample's place in the prediction; None: M = N, in order.
        uncond: (N,) int64, the place of its unconditional prediction, combined by column W; -1 or
            None: no guidance. A network's [uncond; cond] has cond = N + i and uncond = i.
        denoised: (N, C, *spatial) in the dtype of x; overwritten by the x0 estimates D.
        finite: (N,) bool; becomes False for a sample whose part of the prediction (cond, uncond,
            variance where it is used) holds a NaN or infinity. Never set to True.
        rescale: False says that no guided sample's row has RESCALE, which saves a launch on a GPU.

    x and the table may be fp64 (for tests); the noise is fp32 numbers always. Not differentiable.

    Raises:
        ValueError: a shape or dtype that does not fit; on a CPU, and with the reference, also a row
            or an index out of range, or a RESCALE against `rescale`. In the Triton and CUDA
            kernels that sample's x and denoised become NaN then, and its finite False.

    Ho & Salimans 2022, eq. 6; Nichol & Dhariwal 2021, eq. 15; Lin et al. 2023, eq. 15-16.
    """
    options = {
        "cond": cond,
        "uncond": uncond,
        "denoised": denoised,
        "finite": finite,
        "rescale": rescale,
    }
    _check(x, prediction, history, table, rows, seeds, options)
    _op.run((x, prediction, history, table, rows, seeds), options)
