"""A sampler table: its columns, and checks of the rows and indices that a call uses."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

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
    """The step that keys the noise: the row's index within its own table, below 2^24."""
    RESCALE = 16
    """phi of Lin et al. 2023; 0 leaves the guided prediction alone."""
    RESERVED_17 = 17
    """Zero, like the next two; they pad a row to a multiple of 16 bytes."""
    RESERVED_18 = 18
    RESERVED_19 = 19


def check_places(
    prediction: Tensor,
    table: Tensor,
    rows: Tensor,
    cond: Tensor | None,
    uncond: Tensor | None,
    rescale: bool,
) -> None:
    """Raise ValueError if a sample that is not idle has a row or an index out of range, or a row
    with RESCALE despite ``rescale=False``. Reads them on the host."""
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
                f"{op}: a row has RESCALE {float(phi[phi != 0][0]):g}, but rescale=False promises "
                "that there is none; omit rescale=False"
            )
