"""The CUDA kernel of `philox_normal`; its launcher is in csrc/cuda/philox_normal.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda

cuda.declare("philox_normal", "ip" + "ppqqp" + "qq")


def forward(
    seeds: Tensor,
    shape: Sequence[int],
    step: Tensor | None,
    number: int,
    stream: int,
    keep: bool,
) -> tuple[Tensor, None]:
    """Return the noise; the step is the tensor `step`, or `number` if that is None."""
    z = torch.empty(len(seeds), *shape, dtype=torch.float32, device=seeds.device)
    if z.numel():
        seeds = seeds.contiguous()
        cuda.launch(
            "philox_normal", z, seeds.data_ptr(), cuda.address(step), number, stream,
            z.data_ptr(), len(seeds), z.numel() // len(seeds),
        )  # fmt: skip
    return z, None


BACKEND = cuda.cuda_backend(forward=forward, dtypes=(torch.int64,))
