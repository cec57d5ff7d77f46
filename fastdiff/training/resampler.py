"""Importance sampling of timesteps by the second moment of their losses (IDDPM section 3.3).

p_t is proportional to sqrt(E[L_t²]), estimated from the last ten losses of each timestep, with a
thousandth of the probability spread uniformly. A sample's loss is weighted by 1 / (T p_t), so that
its expectation stays the mean over all t. Until every timestep has ten losses, p is uniform.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HISTORY = 10
UNIFORM = 1e-3
_HISTORY, _COUNTS = "history", "counts"


class SecondMomentResampler:
    """Draws timesteps according to the losses seen so far.

    Attributes:
        history: (T, 10), fp64, CPU; the last losses of each timestep, oldest first.
        counts: (T,), int64; how many of them are filled.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.history = torch.zeros(num_timesteps, HISTORY, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Probability of drawing each timestep: (T,), fp64."""
        total = len(self.counts)
        even = torch.full((total,), 1 / total, dtype=torch.float64)
        if bool((self.counts < HISTORY).any()):
            return even
        moments = self.history.square().mean(1).sqrt()
        if not bool(moments.sum() > 0):  # every loss is 0: nothing tells timesteps apart
            return even
        return (1 - UNIFORM) * moments / moments.sum() + UNIFORM * even

    def draw(self, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (count,), int64, and the weights of their losses (count,), fp32; on the CPU."""
        p = self.probabilities()
        t = torch.multinomial(p, count, replacement=True, generator=source)
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record unweighted losses. t, losses: (N,), any device; synchronizes with it.

        Losses that are not finite are ignored: with fp16 such a step is skipped.
        """
        for index, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            if loss - loss != 0:
                continue
            filled = int(self.counts[index])
            if filled == HISTORY:
                self.history[index] = torch.cat(
                    [self.history[index, 1:], self.history.new_tensor([loss])]
                )
            else:
                self.history[index, filled] = loss
                self.counts[index] += 1

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        return {_HISTORY: self.history, _COUNTS: self.counts}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned.

        Raises:
            ValueError: the number of timesteps differs.
        """
        if tensors[_HISTORY].shape != self.history.shape:
            raise ValueError(
                f"the checkpoint has losses of {len(tensors[_HISTORY])} timesteps, expected "
                f"{len(self.history)}; resume with the run's own schedule"
            )
        self.history, self.counts = tensors[_HISTORY].clone(), tensors[_COUNTS].clone()
