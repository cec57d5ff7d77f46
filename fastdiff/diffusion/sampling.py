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
from fastdiff.diffusion.stack import Stack
from fastdiff.kernels import INITIAL_NOISE, int64_bits, philox_normal, sampler_step
from fastdiff.kernels.sampler_step import HISTORY_SLOTS

IDLE = -1
"""In `Slots.rows`: no row to take; `sampler_step` leaves the slot alone."""


class Predict(Protocol):
    """The network with its conditioning, along one table."""

    def __call__(self, x: Tensor, row: int) -> Tensor:
        """x: (N, *shape) at the table's `row`. Returns (N, ...); in a row of `table.guided`
        (2N, ...), [unconditional; conditional]."""


@dataclass(frozen=True)
class Step:
    """What callbacks are given after a step."""

    done: int
    """Rows of tables taken so far; see the function that calls back."""
    total: int
    """Rows of tables in all."""
    samples: Sequence[int]
    """Which of the call's samples these are."""
    x: Tensor
    """(n, *shape), the noisy samples; the next row may overwrite them."""
    denoised: Tensor
    """(n, *shape), the row's estimate D of the clean samples."""


OnStep = Callable[[Step], None]
"""Called after each row; what it returns is ignored, what it raises ends the sampling."""


@dataclass(eq=False)
class _Place:
    """Where a slot is in its table: what the host knows without reading from the device."""

    table: SamplerTable
    rows: int  # of the table; asking a tensor for its length is slow
    row: int = 0


class Slots:
    """S samples of one shape, each at its own row of its own table.

    A slot is empty, busy, or done: it then keeps its sample, and stays idle until it is removed. A
    slot's bits do not depend on the others, or on which slot it is. Tensors stay where they are in
    memory, so that a captured graph of a step serves every step; only `tables` moves, when `put`
    finds no room in it.

    Attributes:
        x: (S, *shape) contiguous, fp32 (or fp64, on the reference backend).
        history: (3, S, *shape); a table reads only what it has written.
        tables: (capacity, 20), the stacked tables of the slots that are not empty.
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
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        room: int = 0,
    ) -> None:
        """room: rows of tables that there is room for from the start."""
        self.x = torch.zeros(count, *shape, device=device, dtype=dtype)
        self.history = torch.zeros(HISTORY_SLOTS, count, *shape, device=device, dtype=dtype)
        self._stack = Stack(torch.zeros(room, len(COLUMN), device=device, dtype=dtype))
        self.seeds, self.clean, self._ends = torch.zeros(3, count, dtype=torch.int64, device=device)
        self.rows = torch.full_like(self.seeds, IDLE)
        self.finite = torch.ones(count, dtype=torch.bool, device=device)
        self._slots: list[_Place | None] = [None] * count

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def tables(self) -> Tensor:
        return self._stack.rows

    @property
    def empty(self) -> list[int]:
        """The slots that `put` may fill."""
        return [slot for slot, held in enumerate(self._slots) if held is None]

    @property
    def busy(self) -> list[int]:
        """The slots with rows left to take."""
        slots = enumerate(self._slots)
        return [slot for slot, held in slots if held is not None and held.row < held.rows]

    def table(self, slot: int) -> SamplerTable:
        """The table of a slot that is not empty."""
        return self._held(slot).table

    def row(self, slot: int) -> int:
        """The row of its own table that a slot takes next; the table's length when it is done."""
        return self._held(slot).row

    def timestep(self, slot: int) -> float:
        """What the network of a busy slot is given as t."""
        return float(self.table(slot).timesteps[self.row(slot)])

    def guided(self, slot: int) -> bool:
        """Whether the next row of a busy slot needs an unconditional prediction too."""
        return self.table(slot).guided[self.row(slot)]

    def put(self, slot: int | slice, table: SamplerTable, x: Tensor, seeds: Tensor | int) -> None:
        """Fill a slot, or a slice of slots that share a table.

        Args:
            x: (*shape), for a slice (k, *shape): what to start with, at the table's first level.
            seeds: of the noise: a number, for a slice (k,) int64.

        Raises:
            ValueError: a slot that is not empty.
        """
        chosen = range(len(self))[slot]
        numbers = [chosen] if isinstance(chosen, int) else list(chosen)
        for number in numbers:
            if self._slots[number] is not None:
                raise ValueError(f"slot {number} is taken; remove it before it is filled again")
        start = 0
        for number in numbers:
            self._slots[number] = _Place(table, len(table))
            start = self._stack.add(table, lambda: table.to(self.x.device, self.x.dtype))
        self.x[slot] = x
        self.seeds[slot] = seeds
        self.rows[slot] = start if len(table) else IDLE
        self._ends[slot] = start + len(table)
        self.finite[slot] = True
        self.clean[slot] = 0

    def remove(self, slot: int) -> None:
        """Empty a slot, whether it is done or not. Its x stays until the slot is filled again."""
        self._stack.drop(self._held(slot).table)
        self._slots[slot] = None
        self.rows[slot] = IDLE
        self.finite[slot] = True

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
        only: Sequence[int] | None = None,
    ) -> None:
        """Take busy slots one row further.

        prediction, cond, uncond, denoised: as in `sampler_step`, with S for its N.
        only: the slots that take part; None: all that are busy.
        """
        rows, busy = self.rows, self.busy if only is None else only
        if only is not None:
            waiting = torch.ones_like(self.finite)
            waiting[list(only)] = False
            rows = rows.masked_fill(waiting, IDLE)
        rescale = self.rescales(busy)
        self.take(prediction, rows, cond, uncond, denoised, rescale=rescale)
        self.count(busy)

    def rescales(self, busy: Sequence[int]) -> bool:
        """Whether a row of these slots' tables rescales its guided prediction."""
        return any(self.table(slot).rescales for slot in busy)

    def count(self, busy: Sequence[int]) -> None:
        """The host's part of a step: these slots have taken a row."""
        for slot in busy:
            self._held(slot).row += 1

    def take(
        self,
        prediction: Tensor,
        rows: Tensor,
        cond: Tensor | None,
        uncond: Tensor | None,
        denoised: Tensor | None,
        *,
        rescale: bool,
    ) -> None:
        """The device's part of a step, which a graph can record: it changes tensors in place.

        rows: (S,) int64, `self.rows`, or with more slots left alone. rescale: see `rescales`.
        """
        sampler_step(
            self.x,
            prediction,
            self.history,
            self.tables,
            rows,
            self.seeds,
            cond=cond,
            uncond=uncond,
            denoised=denoised,
            finite=self.finite,
            rescale=rescale,
        )
        taken = rows != IDLE
        self.clean += self.finite & taken
        self.rows += taken
        self.rows.masked_fill_(self.rows >= self._ends, IDLE)

    @property
    def state(self) -> list[Tensor]:
        """What `take` changes."""
        return [self.x, self.history, self.rows, self.finite, self.clean]

    @property
    def inputs(self) -> list[Tensor]:
        """What it reads and leaves alone."""
        return [self.tables, self.seeds, self._ends]

    def failures(self) -> dict[int, int]:
        """Slot -> the first row at which the network returned a NaN or infinity for it; waits for
        the device."""
        rows = zip(self.finite.tolist(), self.clean.tolist(), strict=True)
        return {slot: clean for slot, (finite, clean) in enumerate(rows) if not finite}

    def _held(self, slot: int) -> _Place:
        held = self._slots[slot]
        if held is None:
            raise ValueError(f"slot {slot} is empty; put a sample there first")
        return held


@torch.no_grad()
def sample(
    predict: Predict,
    table: SamplerTable,
    noise_or_shape: Tensor | Sequence[int],
    seeds: Tensor | Sequence[int],
    *,
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
        on_step: called after each row with a Step of all samples, which counts the table's rows.
        check: when to look whether the network returned a NaN or infinity: once after the loop,
            after each row (waits for the device), or never. Flags are kept on the device, so "end"
            waits once.

    Returns (N, *shape) in the noise's dtype.

    Raises:
        ValueError: a seed is not a whole number of 64 bits, seeds and noise do not match, or the
            network's output has the wrong shape or is not finite; the message names the first such
            row.
    """
    x, seeds = _start(table, noise_or_shape, seeds)
    count, guided = len(x), table.guided
    slots = Slots(count, x.shape[1:], device=x.device, dtype=x.dtype)
    slots.put(slice(None), table, x, seeds)
    first = torch.arange(count, device=x.device)
    second = first + count

    for row in range(len(table)):
        prediction = predict(slots.x, row)
        if guided[row] and len(prediction) != 2 * count:
            raise ValueError(
                f"row {row} is guided, so the network must return "
                f"{2 * count} outputs, [unconditional; conditional], got {len(prediction)}; "
                "use guidance_scale=1 without them"
            )
        denoised = torch.empty_like(slots.x) if on_step else None
        cond, uncond = (second, first) if guided[row] else (None, None)
        slots.step(prediction, cond=cond, uncond=uncond, denoised=denoised)
        if check == "step":
            _check_finite(slots, table)
        if on_step and denoised is not None:
            on_step(Step(row + 1, len(table), range(count), slots.x, denoised))
    if check == "end":
        _check_finite(slots, table)
    return slots.x


def _start(
    table: SamplerTable, noise_or_shape: Tensor | Sequence[int], seeds: Tensor | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """x to start with, and the seeds as a tensor; the errors of `sample`."""
    if not isinstance(seeds, Tensor):
        device = noise_or_shape.device if isinstance(noise_or_shape, Tensor) else None
        seeds = torch.tensor(list(map(int64_bits, seeds)), dtype=torch.int64, device=device)
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
        raise ValueError(not_finite(table, min(bad.values())))


def not_finite(table: SamplerTable, row: int) -> str:
    """What to tell the user where the network returned a NaN or infinity."""
    return (
        f"the network returned NaN or infinity at step {int(table.steps[row])} (row {row} of "
        f"{len(table)}, t = {float(table.timesteps[row]):g}), expected finite numbers; "
        "check its weights and input, or run it in fp32"
    )
