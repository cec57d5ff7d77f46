"""The log-probability of a sampler's step, for training with rewards."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.diffusion.samplers import COLUMN, SamplerTable


def step_log_prob(
    x: Tensor,
    prediction: Tensor,
    x_next: Tensor,
    table: SamplerTable,
    row: int,
    *,
    history: Tensor | None = None,
) -> Tensor:
    """log p(x_next | x) of a step with noise, summed over each sample; differentiable.

    x_next is N(m, s²) with the row's mean m = A x + B clamp(U x + V F) + sum of C_k H_k and its
    deviation s, which is S, or exp(logvar / 2) with a learned variance (Ho et al. 2020, eq. 6;
    Nichol and Dhariwal 2021, eq. 15). Policy gradients on diffusion models need it (Black et al.
    2024, eq. 4).

    Args:
        x: (N, C, *spatial), any float dtype, the sample before the step. Half precision is
            widened to fp32: a sum over an image would lose what a ratio of probabilities needs.
        prediction: (N, C or 2C, *spatial), the network's output for x, after guidance.
        x_next: (N, C, *spatial), the sample after the step.
        table, row: the step that was taken.
        history: (3, N, C, *spatial), the history slots before the step; required if the row reads
            one.

    Returns:
        (N,) in the widest dtype of the arguments, at least fp32.

    Raises:
        ValueError: there is no such row, it adds no noise, or the shapes or the history do not
            fit.
    """
    if not 0 <= row < len(table):
        raise ValueError(f"row must be from 0 to {len(table) - 1}, got {row}")
    values = dict(zip(COLUMN, table.columns[row].tolist(), strict=True))
    channels = x.shape[1]
    whole = x.shape[:1], x.shape[2:]
    if not values["S"]:
        raise ValueError(
            f"row {row} of {table.name!r} adds no noise, so its step has no density; choose a row "
            "with S > 0"
        )
    if (
        x_next.shape != x.shape
        or (prediction.shape[:1], prediction.shape[2:]) != whole
        or prediction.shape[1] not in (channels, 2 * channels)
    ):
        raise ValueError(
            f"x_next must have the shape of x, {tuple(x.shape)}, and prediction its channels or "
            f"twice as many, got {tuple(x_next.shape)} and {tuple(prediction.shape)}"
        )
    if history is not None and history.shape != (3, *x.shape):
        raise ValueError(f"history must have the shape {(3, *x.shape)}, got {tuple(history.shape)}")
    x, prediction, x_next = (_widened(part) for part in (x, prediction, x_next))
    estimate = values["U"] * x + values["V"] * prediction[:, :channels]
    if values["CLAMP"] < math.inf:
        estimate = estimate.clamp(-values["CLAMP"], values["CLAMP"])
    mean = values["A"] * x + values["B"] * estimate
    for slot in range(3):
        if factor := values[f"C{slot + 1}"]:
            if history is None:
                raise ValueError(f"row {row} of {table.name!r} reads the history; pass history=")
            mean = mean + factor * _widened(history[slot])
    if prediction.shape[1] == channels:
        log_variance = torch.full_like(mean, 2 * math.log(values["S"]))
    else:
        part = (prediction[:, channels:] + 1) / 2
        log_variance = part * values["LOGVAR_MAX"] + (1 - part) * values["LOGVAR_MIN"]
    square = (x_next - mean) ** 2 * torch.exp(-log_variance)
    return -0.5 * (square + log_variance + math.log(2 * math.pi)).flatten(1).sum(1)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
