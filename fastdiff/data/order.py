"""The order of the images, a pure function of (seed, step), so that there is no state to save."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """Derive a 63-bit seed by hashing, so that different arguments give unrelated seeds.

    >>> derive_seed(0, "order", 1) != derive_seed(0, "noise", 1)
    True
    """
    text = "/".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(
    seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator seeded with `derive_seed(seed, purpose, *counters)`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *counters))


class DataOrder:
    """Batches of indices. Each epoch is a new permutation, and a batch may span two epochs.

    No image is dropped: image `k` of the whole run is element `k % length` of permutation
    `k // length`, so the step number alone determines which images come next.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int) -> None:
        if length < 1:
            raise ValueError(f"the data set must have at least 1 image, got {length}")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self._permutations: dict[int, Tensor] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Indices and epochs, each (batch_size,) int64, of step `step`, counted from 0."""
        numbers = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = numbers // self.length
        positions = numbers % self.length
        pieces = [
            self._permutation(epoch)[positions[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return torch.cat(pieces), epochs

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            for old in [key for key in self._permutations if key < epoch - 1]:
                del self._permutations[old]
            source = generator(self.seed, "order", epoch)
            self._permutations[epoch] = torch.randperm(self.length, generator=source)
        return self._permutations[epoch]
