"""The sampling loop: a table and a callable in, samples out.

The table and the indices of its rows are on the device before the loop begins, and no row asks the
device for a number: with the ops of a GPU the host runs ahead of it, until the look at the end
whether everything was finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastdiff.diffusion.samplers import COLUMN, NO_SLOT, SamplerTable
from fastdiff.kernels import INITIAL_NOISE, philox_normal, sampler_step

MAX_SEED = 2**63 - 1


class Predict(Protocol):
    """The network with its conditioning."""

    def __call__(self, x: Tensor, t: float, guided: bool) -> Tensor:
        """x: (N, *shape). Returns (N, ...); if guided (2N, ...), [unconditional; conditional]."""


OnStep = Callable[[int, Tensor, Tensor], None]
"""Called after each row with (row, x, denoised); denoised is the D of that row."""
Adjust = Callable[[int, Tensor], None]
"""Called after each row with (row, x), and may change x in place."""


@torch.no_grad()
def sample(
    predict: Predict,
    table: SamplerTable,
    noise_or_shape: Tensor | Sequence[int],
    seeds: Tensor | Sequence[int],
    *,
    guidance_rescale: float = 0.0,
    adjust: Adjust | None = None,
    on_step: OnStep | None = None,
    check: Literal["end", "step", "never"] = "end",
) -> Tensor:
    """Run a sampler from noise to samples, without recording gradients.

    Args:
        predict: called once per row as predict(x, t, guided); see Predict.
        table: from build_table.
        noise_or_shape: x to start with, (N, *shape), fp32 (fp64 on the reference backend), left as
            it is; or the shape of one sample, and the noise is drawn from the seeds (Philox, stream
            0).
        seeds: (N,), int64, one per sample; the noise of a sample depends on its own seed only.
        guidance_rescale: phi of Lin et al. 2023, eq. 16.
        adjust: called after each row, before on_step; may change x in place.
        on_step: called after each row; denoised costs one more pass over x.
        check: when to look whether the network returned a NaN or infinity: once after the loop,
            after each row (waits for the device), or never. Flags are kept on the device, so "end"
            waits once.

    Returns (N, *shape) in the noise's dtype.

    Raises:
        ValueError: a seed is no whole number below 2^63, seeds and noise do not match, or the
            network's output has the wrong shape or is not finite; the message names the first such
            row.
    """
    x, seeds = _start(table, noise_or_shape, seeds)
    history = x.new_zeros(3, *x.shape)
    columns = table.to(x.device, x.dtype)
    rows = torch.arange(len(table), device=x.device)
    finite = torch.ones(len(table), dtype=torch.bool, device=x.device)
    guided = table.guided
    previews = _preview_columns(table).to(x.device, x.dtype) if on_step else columns

    for row, t in enumerate(table.timesteps.tolist()):
        prediction = predict(x, t, guided[row])
        if guided[row] and len(prediction) != 2 * len(x):
            raise ValueError(
                f"row {row} is guided, so the network must return "
                f"{2 * len(x)} outputs, [unconditional; conditional], got {len(prediction)}; "
                "use guidance_scale=1 without them"
            )
        if check != "never":
            finite[row] = prediction.isfinite().all()
            if check == "step":
                _check_finite(finite, table)
        before = x.clone() if on_step else x
        sampler_step(
            x, prediction, history, columns, rows[row], seeds, guidance_rescale=guidance_rescale
        )
        if adjust:
            adjust(row, x)
        if on_step:
            on_step(row, x, _denoised(before, prediction, previews, rows[row], guidance_rescale))
    if check == "end":
        _check_finite(finite, table)
    return x


def _start(
    table: SamplerTable, noise_or_shape: Tensor | Sequence[int], seeds: Tensor | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """x to start with, and the seeds as a tensor; the errors of `sample`."""
    if not isinstance(seeds, Tensor):
        device = noise_or_shape.device if isinstance(noise_or_shape, Tensor) else None
        for seed in seeds:
            if not isinstance(seed, int) or not -MAX_SEED <= seed <= MAX_SEED:
                raise ValueError(f"a seed must be a whole number below 2^63, got {seed!r:.40}")
        seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
    if isinstance(noise_or_shape, Tensor):
        if len(noise_or_shape) != len(seeds):
            raise ValueError(
                f"got {len(seeds)} seeds for {len(noise_or_shape)} samples; give each sample one"
            )
        x = noise_or_shape.clone(memory_format=torch.contiguous_format)
    else:
        x = philox_normal(seeds, tuple(noise_or_shape), step=0, stream=INITIAL_NOISE)
        x = x * table.initial_sigma
    return x, seeds


def _preview_columns(table: SamplerTable) -> Tensor:
    """The table with A = 0, B = 1 and nothing else: its steps return D itself."""
    only_d = torch.zeros_like(table.columns)
    for name in ("U", "V", "W", "CLAMP"):
        only_d[:, COLUMN[name]] = table.column(name)
    only_d[:, COLUMN["B"]] = 1
    only_d[:, COLUMN["SLOT"]] = NO_SLOT
    return only_d


def _denoised(
    x: Tensor, prediction: Tensor, previews: Tensor, row: Tensor, guidance_rescale: float
) -> Tensor:
    """The estimate D of x0 that a row makes, for previews: the same as inside `sampler_step`.

    x: (N, C, ...) before the row. prediction: (N or 2N, C or 2C, ...). previews: of
        `_preview_columns`. row: (), int64. Returns (N, C, ...), x's dtype.
    """
    history = x.new_zeros(3, *x.shape)
    seeds = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # no noise is added
    sampler_step(x, prediction, history, previews, row, seeds, guidance_rescale=guidance_rescale)
    return x


def _check_finite(finite: Tensor, table: SamplerTable) -> None:
    if bad := finite.logical_not().nonzero().flatten().tolist():
        row = bad[0]
        raise ValueError(
            f"the network returned NaN or infinity at step {int(table.steps[row])} (row {row} of "
            f"{len(table)}, t = {float(table.timesteps[row]):g}), expected finite numbers; "
            "check its weights and input, or run it in fp32"
        )
