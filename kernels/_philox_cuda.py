"""The CUDA kernel of `philox_normal`; its launcher is in csrc/philox.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.kernels import _cuda

_cuda.declare("philox_normal", "ip" + "ppqqp" + "qq")


def normal(
    seeds: Tensor, shape: Sequence[int], step: Tensor | None, number: int, stream: int
) -> Tensor:
    """The step is the tensor `step`, or `number` where that is None."""
    z = torch.empty(len(seeds), *shape, dtype=torch.float32, device=seeds.device)
    if z.numel():
        seeds = seeds.contiguous()
        _cuda.launch(
            "philox_normal", z, seeds.data_ptr(), _cuda.address(step), number, stream,
            z.data_ptr(), len(seeds), z.numel() // len(seeds),
        )  # fmt: skip
    return z


philox_normal_cuda = torch.library.custom_op(
    "fastdiff::philox_normal_cuda", normal, mutates_args=()
)


def plain_normal(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor = 0, stream: int = 0
) -> Tensor:
    """`philox_normal` past PyTorch's dispatcher."""
    tensor, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    return normal(seeds, shape, tensor, number, int(stream))


def registered_normal(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor = 0, stream: int = 0
) -> Tensor:
    """`philox_normal` as PyTorch knows it."""
    tensor, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    result: Tensor = philox_normal_cuda(seeds, shape, tensor, number, int(stream))
    return result


def objection(
    seeds: Tensor, shape: tuple[int, ...], *, step: int | Tensor, stream: int
) -> str | None:
    if isinstance(step, Tensor) and step.device != seeds.device:
        return f"step must be on the device of the seeds, {seeds.device}, got {step.device}"
    return None
