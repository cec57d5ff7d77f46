"""One sampler step per sample: guidance, x0 estimate, clamp, update, noise and history in one pass,
with the coefficients of the sample's row of a sampler table.

    F  = F_uncond + W (F_cond - F_uncond)                        Ho & Salimans 2022, eq. 6
    F  = phi F std(F_cond) / std(F) + (1 - phi) F                Lin et al. 2023, eq. 15-16
    D  = clamp(U x + V F, -CLAMP, CLAMP)                         the x0 estimate
    x' = A x + B D + C1 H_1 + C2 H_2 + C3 H_3 + S noise
    H' = P x + Q D                                               into slot SLOT, after x'

phi is RESCALE; x and H on the right hand sides are the old values. Samples without an unconditional
prediction have F = F_cond. A network that learns the variance returns 2C channels, of which the
second half is v in [-1, 1]. In rows where S is not 0, the factor of the noise is then
exp(logvar / 2), logvar = f LOGVAR_MAX + (1 - f) LOGVAR_MIN with f = (v + 1) / 2 (Nichol & Dhariwal
2021, eq. 15). With guidance, v is taken from the conditional prediction.

`log_prob` is the log-density of x' given x, which is that of the noise that was drawn: with m = x'
without its noise and the factor s of the noise,

    log N(x'; m, s^2) = -sum over the sample of (noise^2 / 2 + log |s| + log(2 pi) / 2)

as policy gradients need it (Black et al. 2024, eq. 4). A row without noise has no density; its
entry is 0, so that entries can be added up along a trajectory. The sum is taken in a fixed order,
tile by tile, so that its bits depend neither on the batch nor on chance; on a GPU a second launch
adds up the tiles.

The tables of all requests are stacked in one buffer and every sample has its own row of it, so
samplers, numbers of steps and guidance may differ within a batch. A sample's result is
bit-identical whatever the other samples, its position in the batch and the position of its table:
its noise is keyed by its seed and by NOISE_STEP.

Bytes that must move, in numbers per element of x: x in and out, the prediction (1; 2 with
guidance; one more for a learned variance, in rows with noise), one per history slot that is read or
written, one for `denoised`; the noise is generated in the kernel, and `finite` and `log_prob` cost
no extra read.
Eager schedulers make 10 to 40 passes. Idle samples move nothing. One launch suffices, unless
samples may be rescaled: then another launch before it computes the deviations of whole images. It
reads the prediction (its 2 numbers) once more, which the second launch then finds in the L2 cache,
and returns at once for samples whose row does not rescale.

If a coefficient is 0, its tensor is not read: a history slot may hold anything before it is first
written.

A row or an index out of range is a ValueError if the host reads it (reference, CPU). A GPU kernel
cannot raise and the host does not wait for it, so the sample's x, denoised and log_prob become NaN,
its `finite` becomes False, and its history is left alone. Leaving x unchanged instead would give a
wrong image without any sign of an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_shape
from ..op import Op, Work
from ..philox_normal import philox_normal_reference
from ..philox_normal.streams import SAMPLER_NOISE
from ..tuning.measured import regime
from . import cpu, cuda, triton
from .table import HISTORY_SLOTS, Column, check_places

COLUMNS = Column


@torch.no_grad()
def sampler_step_reference(
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
    log_prob: Tensor | None = None,
    rescale: bool = True,
) -> None:
    """The op in plain PyTorch; see `sampler_step`. It synchronizes to read rows and indices."""
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
    density = x.new_zeros(len(busy))
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
        noise = noise.to(x.dtype)
        new[noisy] += factor * noise
        if log_prob is not None:
            terms = noise**2 / 2 + factor.abs().log() + math.log(2 * math.pi) / 2
            density[noisy] = -terms.flatten(1).sum(1)

    kept = column(Column.P) * old + column(Column.Q) * d
    for slot in range(HISTORY_SLOTS):
        history[slot, busy] = torch.where(column(Column.SLOT) == slot, kept, slots[slot])
    x[busy] = new
    if denoised is not None:
        denoised[busy] = d
    if finite is not None:
        finite[busy] &= ok
    if log_prob is not None:
        log_prob[busy] = density


def _like(x: Tensor, other: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, ...)"""
    return x.reshape(-1, *(1,) * (other.ndim - 1))


def _rescaled(guided: Tensor, cond: Tensor, phi: Tensor) -> Tensor:
    """One sample's guided prediction, rescaled towards the deviation of the conditional one.

    A constant F has no deviation to rescale and is left alone, where the formula would be 0 / 0.
    """
    wanted, have = (t.contiguous().std(correction=0) for t in (cond, guided))
    ratio = torch.where(have > 0, wanted / have, 1.0)
    return phi * guided * ratio + (1 - phi) * guided


def _work(
    x: Tensor,
    prediction: Tensor,
    history: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor,
    cond: Tensor | None,
    uncond: Tensor | None,
    denoised: Tensor | None,
    *_: Any,
) -> Work:
    """The work of a row that reads and writes one history slot each, without learned variance."""
    numbers = x.numel() * (4 if denoised is None else 5)
    predicted = x.numel() * (1 if uncond is None else 2)
    return Work(bytes=numbers * x.element_size() + predicted * prediction.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    """Two samples of a DDIM-like sampler."""
    x, prediction, history = draw(2, 4, 8, 8), draw(2, 4, 8, 8), draw(3, 2, 4, 8, 8)
    table = torch.zeros(4, len(Column), dtype=x.dtype, device=x.device)
    table[:, Column.U], table[:, Column.V] = 1.3, -0.7
    table[:, Column.A], table[:, Column.B] = 0.9, 0.4
    table[:, Column.SLOT], table[:, Column.CLAMP] = -1, torch.inf
    rows = torch.tensor([1, 3], device=x.device)
    return {
        "x": x, "prediction": prediction, "history": history, "table": table, "rows": rows,
        "seeds": rows,
    }  # fmt: skip


def _check(
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
    log_prob: Tensor | None,
    rescale: bool,
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
    if table.ndim != 2 or table.shape[1] != len(Column):
        raise ValueError(f"{op}: table must be (rows, {len(Column)}), got {tuple(table.shape)}")
    _check_vector("rows", rows, n, torch.int64)
    _check_vector("seeds", seeds, n, torch.int64)
    if cond is not None:
        _check_vector("cond", cond, n, torch.int64)
    elif have[0] != n:
        raise ValueError(
            f"{op}: without cond, prediction must have one entry for each of the {n} samples, got "
            f"{have[0]}; pass cond and uncond to map samples to entries"
        )
    if uncond is not None:
        _check_vector("uncond", uncond, n, torch.int64)
    if finite is not None:
        _check_vector("finite", finite, n, torch.bool)
    if log_prob is not None:
        _check_vector("log_prob", log_prob, n, dtype)
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


_op = Op(
    name="sampler_step",
    schema="(Tensor(a!) x, Tensor prediction, Tensor(b!) history, Tensor table, Tensor rows, "
    "Tensor seeds, Tensor? cond, Tensor? uncond, Tensor(c!)? denoised, Tensor(d!)? finite, "
    "Tensor(e!)? log_prob, bool rescale) -> ()",
    check=_check,
    reference=sampler_step_reference,
    fake=lambda *_: (None, None),
    work=_work,
    shape_class=regime,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
    differentiable=False,
    traceable=False,  # the host reads rows and indices
)


@_op.exposes
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
    log_prob: Tensor | None = None,
    rescale: bool = True,
) -> None:
    """Advance each sample by its row of the stacked sampler tables; updates x and history in place.

    Args:
        x: (N, C, *spatial) fp32, the noisy samples; overwritten by the next ones.
        prediction: the network's output, any float dtype: (M, C or 2C, *spatial), any M. The
            second C channels are the learned variance.
        history: (3, N, C, *spatial) in the dtype of x; one slot per sample may be overwritten.
        table: (R, 20) in the dtype of x and on its device: the tables of all samples, stacked. The
            columns are `COLUMNS`.
        rows: (N,) int64, each sample's row of the stacked table. -1 is an idle slot: its part of
            every tensor is left alone, and its prediction is not read.
        seeds: (N,) int64, the seed of each sample's noise; all 64 bits count.
        cond: (N,) int64, each sample's index into the prediction; None: M = N, in order.
        uncond: (N,) int64, the index of its unconditional prediction, combined by column W; -1 or
            None: no guidance. If the network returns [uncond; cond], cond = N + i and uncond = i.
        denoised: (N, C, *spatial) in the dtype of x; overwritten by the x0 estimates D.
        finite: (N,) bool; set to False for a sample whose part of the prediction (cond, uncond,
            variance if it is used) contains a NaN or infinity. Never set to True.
        log_prob: (N,) in the dtype of x; overwritten by the log-density of each sample's step, or 0
            if its row adds no noise. `fastdiff.diffusion.log_prob.step_log_prob` gives the same
            number with gradients, for a step that was taken.
        rescale: False promises that no guided sample's row has RESCALE, which saves a GPU launch.

    x and the table may be fp64 (for tests); the noise is always fp32. Not differentiable.

    Raises:
        ValueError: unsupported shape or dtype; on a CPU and with the reference, also a row or an
            index out of range, or a row with RESCALE despite ``rescale=False``. In those cases the
            Triton and CUDA kernels set the sample's x, denoised and log_prob to NaN and its finite
            to False.

    Ho & Salimans 2022, eq. 6; Nichol & Dhariwal 2021, eq. 15; Lin et al. 2023, eq. 15-16; Black et
    al. 2024, eq. 4.
    """
    outputs = denoised, finite, log_prob
    _op(x, prediction, history, table, rows, seeds, cond, uncond, *outputs, rescale)
