"""Data-parallel training: one process per device, started by torchrun.

    torchrun --nproc-per-node 8 -m fastdiff train diffusion --preset ...

Every rank has all weights and takes a share of each accumulated part of the batch. Gradients are
summed before the optimizer step, so all ranks take the same step and the run is the one that a
single process would make with the same config, up to the order of sums. Noise, timesteps and
augmentation are functions of the step and of the place in the batch, not of the rank. Rank 0 alone
writes files and prints.

Gradients are reduced after the backward pass, not during it as `DistributedDataParallel` does: the
losses of a task use its networks directly, several of them in one step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 2**25
"""Numbers that are reduced at once: the copy of the gradients that a reduction needs."""
PATIENCE = timedelta(hours=2)
"""How long ranks wait for one another: rank 0 writes checkpoints and previews meanwhile."""

R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone, all methods return at once."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def rows(self, batch_size: int, parts: int) -> Tensor | None:
        """The rows of a batch that this rank takes of each part, part by part; None: all.

        Returns (batch_size / world,) int64.

        Raises:
            ValueError: a part cannot be divided among the ranks.
        """
        if self.world == 1:
            return None
        if batch_size % (parts * self.world):
            raise ValueError(
                f"batch_size must be a multiple of accumulate times the number of ranks, got "
                f"{batch_size}, {parts} and {self.world}; choose a batch_size of "
                f"{parts * self.world} times a whole number"
            )
        places = torch.arange(batch_size).view(parts, self.world, -1)
        return places[:, self.rank].reshape(-1)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over the ranks, in place."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for gradient in (p.grad for p in parameters if p.grad is not None):
            if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
                _sum(bucket)
                bucket = []
            bucket.append(gradient)
        if bucket:
            _sum(bucket)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks. values: fp32 of one shape on all of them, overwritten."""
        if self.world == 1:
            return values
        dist.all_reduce(values)
        return values / self.world

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor of all ranks, concatenated in the order of the ranks along dimension 0."""
        if self.world == 1:
            return list(tensors)
        found = []
        for tensor in tensors:
            parts = [torch.empty_like(tensor) for _ in range(self.world)]
            dist.all_gather(parts, tensor.contiguous())
            found.append(torch.cat(parts))
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; a signal does not reach all in the same step."""
        if self.world == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_on_the_host())
        return bool(found)

    def wait(self) -> None:
        """Return once all ranks have called this."""
        if self.world > 1:
            dist.barrier(group=_on_the_host())


def _sum(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view(gradient.shape))


_control: list[Any] = []


def _on_the_host() -> Any:
    """A group for messages that must not wait for the device."""
    if not _control:
        _control.append(dist.new_group(backend="gloo", timeout=PATIENCE))
    return _control[0]


def ranks() -> Ranks:
    """This process among those that train together."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started; without torchrun, this one is alone.

    device: the run's: the backend is NCCL on GPUs, where the local rank chooses one, else gloo.

    Raises:
        ValueError: there are more ranks on this machine than GPUs.
    """
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ or ranks().world > 1:
        yield ranks()
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"this machine has {count} GPUs, and torchrun has started more processes; set "
                f"--nproc-per-node {count}"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        _on_the_host()  # all ranks must make it at the same time
        yield ranks()
    finally:
        _control.clear()
        dist.destroy_process_group()


def data_parallel(function: Callable[..., R]) -> Callable[..., R]:
    """Run a function of a config, ``train(run, *, resume)``, on all ranks that torchrun started."""

    @functools.wraps(function)
    def on_all_ranks(run: Any, **options: Any) -> R:
        with joined(run.device):
            return function(run, **options)

    return on_all_ranks


class Silent:
    """In the place of a `Monitor` on the ranks that print nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was opened."""

    def tick(self, done: int) -> None:
        """Nothing to show."""

    def record(self, done: int, scalars: dict[str, float]) -> None:
        """Nothing to write."""

    def pause(self) -> None:
        """No rate is shown."""

    def say(self, text: str) -> None:
        """Nothing to print."""
