"""Samplers as tables: one row per network evaluation, linear in what the network returns.

    F   = F_uncond + W * (F_cond - F_uncond)                      guidance, then RESCALE
    D   = clamp(U * x + V * F, -CLAMP, CLAMP)                     estimate of x0
    x'  = A * x + B * D + C1 * H_1 + C2 * H_2 + C3 * H_3 + S * noise
    H'  = P * x + Q * D                                           into slot SLOT, if it is not -1

`fastdiff.kernels.sampler_step` executes a row. All samplers work in the variance-preserving space
x = alpha * x0 + sigma * n, including those from variance-exploding papers (whose x is ours divided
by alpha). So the network's input needs no scaling, and Euler and DDIM give the same table. Networks
of flow matching see x / (alpha + sigma): their tables contain this factor (`table`), and x in the
loop is what the network sees, again without scaling.

A sampler is a function from noise levels to rows, in one of the files of this folder: `onestep`
(order 1), `singlestep` (several evaluations per step), `multistep` (a history of earlier ones) and
`distilled` (for networks distilled to few steps). `levels` contains one `Level` per step, the
noisiest first, and finally the level to end at. In comments, a prime marks the level that a step
ends at.
"""

from __future__ import annotations

# isort: off
# Importing a family registers its samplers, in the order in which they are listed.
from fastdiff.diffusion.samplers import onestep, singlestep, multistep, distilled

# isort: on
from fastdiff.diffusion.samplers.rows import COLUMN, NO_SLOT, Row, Sampler, Variance
from fastdiff.diffusion.samplers.table import (
    SAMPLERS,
    SamplerTable,
    build_table,
    table_of_levels,
)

__all__ = [
    "COLUMN", "NO_SLOT", "SAMPLERS", "Row", "Sampler", "SamplerTable", "Variance", "build_table",
    "distilled", "multistep", "onestep", "singlestep", "table_of_levels",
]  # fmt: skip
