"""The sampling loop: a table and a callable in, samples out; and the slots that it runs in.

`Slots` holds samples of one shape, each at its own row of its own sampler's table, and takes all of
them a row further at a time. `sample` fills slots with one table and steps until it is done; an
engine puts requests in and takes them out between any two steps.

Tables, rows and seeds are on the device before a step begins, and no step asks the device for a
number: with the ops of a GPU the host runs ahead of it, until the look at the end whether
everything was finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastdiff.diffusion.samplers import COLUMN, SamplerTable
from fastdiff.kernels import INITIAL_NOISE, philox_normal, sampler_step
from fastdiff.kernels.sampler_step import HISTORY_SLOTS

MAX_SEED = 2**63 - 1
IDLE = -1
"""In `Slots.rows`: no row to take; `sampler_step` leaves the slot alone."""


class Predict(Protocol):
    """The network with its conditioning, along one table."""

    def __call__(self, x: Tensor, row: int) -> Tensor:
        """x: (N, *shape) at the table's `row`. Returns (N, ...); in a row of `table.guided`
        (2N, ...), [unconditional; conditional]."""


@dataclass(frozen=True)
class Step:
    """What callbacks are given after a row of the table.

    Attributes:
        row: of the table.
        done, total: network evaluations so far, and in all.
        samples: which of the call's samples these are; there is more than one pass where they do
            not fit into one batch.
        x: (n, *shape), the noisy samples; the next row overwrites them.
        denoised: (n, *shape), the row's estimate D of the clean ones.
    """

    row: int
    done: int
    total: int
    samples: Sequence[int]
    x: Tensor
    denoised: Tensor


OnStep = Callable[[Step], None]
"""Called after each row; what it returns is ignored, what it raises ends the sampling."""
Adjust = Callable[[Step], None]
"""Called after each row, before `OnStep`; may change `step.x` in place."""


@dataclass(eq=False)
class _Stacked:
    """A table in the buffer of `Slots`, which several slots may share."""

    table: SamplerTable
    start: int
    users: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.table)


@dataclass(eq=False)
class _Run:
    """Slots that were filled together: what the host knows without reading from the device."""

    stacked: _Stacked
    row: int = 0

    @property
    def done(self) -> bool:
        return self.row == len(self.stacked.table)


class Slots:
    """S samples of one shape, each at its own row of its own table.

    A slot is empty, busy, or done: it then keeps its sample, and stays idle until it is removed. A
    slot's bits do not depend on the others, or on which slot it is. All tensors stay where they are
    in memory, so that a captured graph of a step serves every step.

    Attributes:
        x: (S, *shape) contiguous, fp32 (or fp64, on the reference backend).
        history: (3, S, *shape); a table reads only what it has written.
        tables: (capacity, 20), the stacked tables.
        rows: (S,) int64, each slot's row of `tables`, or `IDLE`.
        seeds: (S,) int64.
        finite: (S,) bool, whether all that the network returned for the slot was.
        clean: (S,) int64, how many of the slot's rows were taken before it was not.
    """

    def __init__(
        self,
        count: int,
        shape: Sequence[int],
        *,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """capacity: rows of all the different tables that are there at a time."""
        self.x = torch.zeros(count, *shape, device=device, dtype=dtype)
        self.history = torch.zeros(HISTORY_SLOTS, count, *shape, device=device, dtype=dtype)
        self.tables = torch.zeros(capacity, len(COLUMN), device=device, dtype=dtype)
        self.seeds, self.clean, self._ends = torch.zeros(3, count, dtype=torch.int64, device=device)
        self.rows = torch.full_like(self.seeds, IDLE)
        self.finite = torch.ones(count, dtype=torch.bool, device=device)
        self._slots: list[_Run | None] = [None] * count
        self._stack: list[_Stacked] = []  # in the order of their rows

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def empty(self) -> list[int]:
        """The slots that `put` may fill."""
        return [slot for slot, held in enumerate(self._slots) if held is None]

    @property
    def busy(self) -> list[int]:
        """The slots with rows left to take."""
        return [s for s, held in enumerate(self._slots) if held is not None and not held.done]

    def table(self, slot: int) -> SamplerTable:
        """The table of a slot that is not empty."""
        return self._held(slot).stacked.table

    def row(self, slot: int) -> int:
        """The row of its own table that a slot takes next; the table's length when it is done."""
        return self._held(slot).row

    def timestep(self, slot: int) -> float:
        """What the network of a busy slot is given as t."""
        return float(self.table(slot).timesteps[self.row(slot)])

    def guided(self, slot: int) -> bool:
        """Whether the next row of a busy slot needs an unconditional prediction too."""
        return self.table(slot).guided[self.row(slot)]

    def fits(self, table: SamplerTable) -> bool:
        """Whether there is room for a table beside those that are there."""
        return self._find(table) is not None

    def put(self, slot: int | slice, table: SamplerTable, x: Tensor, seeds: Tensor | int) -> None:
        """Fill a slot, or a slice of slots that share a table.

        Args:
            x: (*shape), for a slice (k, *shape): what to start with, at the table's first level.
            seeds: of the noise: a number, for a slice (k,) int64.

        Raises:
            ValueError: a slot that is not empty, or no room for the table.
        """
        chosen = range(len(self))[slot]
        numbers = [chosen] if isinstance(chosen, int) else list(chosen)
        for number in numbers:
            if self._slots[number] is not None:
                raise ValueError(f"slot {number} is taken; remove it before it is filled again")
        stacked = self._find(table)
        if stacked is None:
            raise ValueError(
                f"no room for a table of {len(table)} rows in {len(self.tables)} beside "
                f"{len(self._stack)} others; remove a slot, or give more capacity"
            )
        if not stacked.users:
            self.tables[stacked.start : stacked.end] = table.to(self.x.device, self.x.dtype)
            self._stack = sorted([*self._stack, stacked], key=lambda other: other.start)
        stacked.users += len(numbers)
        run = _Run(stacked)
        for number in numbers:
            self._slots[number] = run
        self.x[slot] = x
        self.seeds[slot] = seeds
        self.rows[slot] = stacked.start if len(table) else IDLE
        self._ends[slot] = stacked.end
        self.finite[slot] = True
        self.clean[slot] = 0

    def remove(self, slot: int) -> None:
        """Empty a slot, whether it is done or not. Its x stays until the slot is filled again."""
        stacked = self._held(slot).stacked
        stacked.users -= 1
        if not stacked.users:
            self._stack.remove(stacked)
        self._slots[slot] = None
        self.rows[slot] = IDLE

    def move(self, slot: int, to: int) -> None:
        """Take a sample to an empty slot; it goes on there with the same bits.

        Raises:
            ValueError: a slot to take it from that is empty, or one to take it to that is not.
        """
        held = self._held(slot)
        if self._slots[to] is not None:
            raise ValueError(f"slot {to} is taken; remove it before it is filled again")
        for state in (self.x, self.seeds, self.rows, self._ends, self.finite, self.clean):
            state[to] = state[slot]
        self.history[:, to] = self.history[:, slot]
        self._slots[slot], self._slots[to] = None, held
        self.rows[slot] = IDLE

    def step(
        self,
        prediction: Tensor,
        *,
        cond: Tensor | None = None,
        uncond: Tensor | None = None,
        denoised: Tensor | None = None,
    ) -> None:
        """Take every busy slot one row further.

        prediction, cond, uncond, denoised: as in `sampler_step`, with S for its N.
        """
        sampler_step(
            self.x,
            prediction,
            self.history,
            self.tables,
            self.rows,
            self.seeds,
            cond=cond,
            uncond=uncond,
            denoised=denoised,
            finite=self.finite,
            rescale=any(stacked.table.rescales for stacked in self._stack),
        )
        self.clean += self.finite
        self.rows += self.rows != IDLE
        self.rows.masked_fill_(self.rows >= self._ends, IDLE)
        for run in {run for run in self._slots if run is not None and not run.done}:
            run.row += 1

    def failures(self) -> dict[int, int]:
        """Slot -> the first row at which the network returned a NaN or infinity for it; waits for
        the device."""
        rows = zip(self.finite.tolist(), self.clean.tolist(), strict=True)
        return {slot: clean for slot, (finite, clean) in enumerate(rows) if not finite}

    def _held(self, slot: int) -> _Run:
        held = self._slots[slot]
        if held is None:
            raise ValueError(f"slot {slot} is empty; put a sample there first")
        return held

    def _find(self, table: SamplerTable) -> _Stacked | None:
        """Where a table is, or the first gap that it fits into; None: there is none."""
        start = 0
        for stacked in self._stack:
            if stacked.table is table:
                return stacked
        for stacked in self._stack:
            if stacked.start - start >= len(table):
                break
            start = stacked.end
        return _Stacked(table, start) if start + len(table) <= len(self.tables) else None


@torch.no_grad()
def sample(
    predict: Predict,
    table: SamplerTable,
    noise_or_shape: Tensor | Sequence[int],
    seeds: Tensor | Sequence[int],
    *,
    adjust: Adjust | None = None,
    on_step: OnStep | None = None,
    check: Literal["end", "step", "never"] = "end",
) -> Tensor:
    """Run a sampler from noise to samples, without recording gradients.

    Args:
        predict: called once per row as predict(x, row); see Predict.
        table: from build_table.
        noise_or_shape: x to start with, (N, *shape), fp32 (fp64 on the reference backend), left as
            it is; or the shape of one sample, and the noise is drawn from the seeds (Philox, stream
            0).
        seeds: (N,), int64, one per sample; the noise of a sample depends on its own seed only.
        adjust: called after each row with a Step, before on_step; may change its x in place.
        on_step: called after each row with a Step.
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
    count, guided = len(x), table.guided
    slots = Slots(count, x.shape[1:], capacity=len(table), device=x.device, dtype=x.dtype)
    slots.put(slice(None), table, x, seeds)
    first = torch.arange(count, device=x.device)
    halves = {"cond": first + count, "uncond": first}

    for row in range(len(table)):
        prediction = predict(slots.x, row)
        if guided[row] and len(prediction) != 2 * count:
            raise ValueError(
                f"row {row} is guided, so the network must return "
                f"{2 * count} outputs, [unconditional; conditional], got {len(prediction)}; "
                "use guidance_scale=1 without them"
            )
        denoised = torch.empty_like(slots.x) if adjust or on_step else None
        slots.step(prediction, denoised=denoised, **(halves if guided[row] else {}))
        if check == "step":
            _check_finite(slots, table)
        if denoised is not None:
            step = Step(row, row + 1, len(table), range(count), slots.x, denoised)
            for callback in (adjust, on_step):
                if callback:
                    callback(step)
    if check == "end":
        _check_finite(slots, table)
    return slots.x


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
        return noise_or_shape, seeds
    x = philox_normal(seeds, tuple(noise_or_shape), step=0, stream=INITIAL_NOISE)
    return x * table.initial_sigma, seeds


def _check_finite(slots: Slots, table: SamplerTable) -> None:
    if bad := slots.failures():
        row = min(bad.values())
        raise ValueError(
            f"the network returned NaN or infinity at step {int(table.steps[row])} (row {row} of "
            f"{len(table)}, t = {float(table.timesteps[row]):g}), expected finite numbers; "
            "check its weights and input, or run it in fp32"
        )
