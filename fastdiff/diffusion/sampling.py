"""The sampling loop: a table and a callable in, samples out; and the slots that it runs in.

`Slots` holds samples of one shape, each at its own row of its own sampler's table, and advances all
of them by one row at a time. `sample` fills the slots with one table and steps until it is done; an
engine adds and removes requests between any two steps.

Tables, rows and seeds are on the device before a step begins, and no step reads from the device. On
a GPU the host therefore runs ahead, until the check at the end that everything was finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from fastdiff.diffusion.gradients import Guidance
from fastdiff.diffusion.gradients import guided as guided_by
from fastdiff.diffusion.samplers import COLUMN, SamplerTable
from fastdiff.diffusion.stack import Stack
from fastdiff.kernels import INITIAL_NOISE, int64_bits, philox_normal, sampler_step
from fastdiff.kernels.sampler_step import HISTORY_SLOTS

IDLE = -1
"""Value in `Slots.rows` for a slot without a next row; `sampler_step` does not touch it."""


ALIGNED = 16
"""Bytes at multiples of which the tensors of a planned call begin (`fastdiff.kernels.plans`)."""


class Predict(Protocol):
    """The network with its conditioning, evaluated along one table."""

    def __call__(self, x: Tensor, row: int) -> Tensor:
        """Evaluate the network at the table's `row`.

        x: (N, *shape). Returns (N, ...), or (2N, ...) = [unconditional; conditional] if
        `table.guided[row]`.
        """


@dataclass(frozen=True)
class Step:
    """The argument of callbacks after a step."""

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
    log_prob: Tensor | None = None
    """(n,), log p(x after | x before) of the row, 0 if it adds no noise; None unless asked for."""


OnStep = Callable[[Step], None]
"""Called after each row. Its return value is ignored; an exception it raises ends the sampling."""


@dataclass(eq=False)
class _Place:
    """The position of a slot in its table, kept on the host to avoid reading from the device."""

    table: SamplerTable
    rows: int  # length of the table, cached because asking a tensor for its length is slow
    row: int = 0


class Slots:
    """S samples of one shape, each at its own row of its own table.

    A slot is empty, busy or done; when done it keeps its sample and is idle until it is removed.
    The bits of a sample depend neither on the other slots nor on which slot it is in. Tensors keep
    their addresses, so that one captured graph can run every step; only `tables` moves, when `put`
    has to enlarge it.

    Attributes:
        x: (S, *shape) contiguous, fp32 (or fp64, on the reference backend).
        history: (3, S, *shape); a table only reads values that it has written.
        tables: (capacity, 20), the stacked tables of the slots that are not empty.
        rows: (S,) int64, each slot's row of `tables`, or `IDLE`.
        seeds: (S,) int64.
        finite: (S,) bool, whether everything the network returned for the slot was finite.
        clean: (S,) int64, number of the slot's rows taken before the first value was not finite;
            arbitrary for a slot whose values were all finite.
        counters: (counters,) int64, which every step increments; for whoever runs the steps.
        log_prob: (S,), the log-density of each slot's last row, as in `sampler_step`; None unless
            asked for.
    """

    def __init__(
        self,
        count: int,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        room: int = 0,
        counters: int = 0,
        log_probs: bool = False,
    ) -> None:
        """room: rows of tables that there is room for from the start. log_probs: keep log_prob."""
        self.x = torch.zeros(count, *shape, device=device, dtype=dtype)
        self.history = torch.zeros(HISTORY_SLOTS, count, *shape, device=device, dtype=dtype)
        self._stack = Stack(torch.zeros(room, len(COLUMN), device=device, dtype=dtype))
        self.seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self.log_prob = torch.zeros(count, device=device, dtype=dtype) if log_probs else None
        # whatever advances with a step lies in one tensor, so that one launch advances it
        sizes = count, count, counters
        padded = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        self._numbers = torch.zeros(sum(padded), dtype=torch.int64, device=device)
        self._increments = torch.ones(sum(padded), dtype=torch.bool, device=device)
        self.rows, self.clean, self.counters = _pieces(self._numbers, padded, sizes)
        self._moving, self.finite, _ = _pieces(self._increments, padded, sizes)
        self.rows.fill_(IDLE)
        self._moving.fill_(False)
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
        """The slots with rows left."""
        slots = enumerate(self._slots)
        return [slot for slot, held in slots if held is not None and held.row < held.rows]

    def table(self, slot: int) -> SamplerTable:
        """The table of a slot that is not empty."""
        return self._held(slot).table

    def row(self, slot: int) -> int:
        """The next row of a slot in its own table; the table's length when it is done."""
        return self._held(slot).row

    def timestep(self, slot: int) -> float:
        """The timestep t at which the network is evaluated next for a busy slot."""
        return float(self.table(slot).timesteps[self.row(slot)])

    def put(self, slot: int | slice, table: SamplerTable, x: Tensor, seeds: Tensor | int) -> None:
        """Fill a slot, or a slice of slots that share a table.

        Args:
            x: (*shape), or (k, *shape) for a slice: the start, at the table's first noise level.
            seeds: seed of the noise: an int, or (k,) int64 for a slice.

        Raises:
            ValueError: a slot is not empty.
        """
        chosen = range(len(self))[slot]
        numbers = [chosen] if isinstance(chosen, int) else list(chosen)
        for number in numbers:
            if self._slots[number] is not None:
                raise ValueError(f"slot {number} is not empty; call remove({number}) first")
        start = 0
        for number in numbers:
            self._slots[number] = _Place(table, len(table))
            start = self._stack.add(table, lambda: table.to(self.x.device, self.x.dtype))
        self.x[slot] = x
        self.seeds[slot] = seeds
        self.rows[slot] = start if len(table) else IDLE
        self._moving[slot] = len(table) > 0
        self.finite[slot] = True
        self.clean[slot] = 0

    def remove(self, slot: int) -> None:
        """Empty a slot, whether it is done or not. Its x keeps its values until the next `put`."""
        self._stack.drop(self._held(slot).table)
        self._slots[slot] = None
        self._stop(slot)
        self.finite[slot] = True

    def move(self, slot: int, to: int) -> None:
        """Move a sample to an empty slot, where it continues with the same bits.

        Raises:
            ValueError: `slot` is empty, or `to` is not.
        """
        held = self._held(slot)
        if self._slots[to] is not None:
            raise ValueError(f"slot {to} is not empty; call remove({to}) first")
        for state in (self.x, self.seeds, self.rows, self._moving, self.finite, self.clean):
            state[to] = state[slot]
        self.history[:, to] = self.history[:, slot]
        self._slots[slot], self._slots[to] = None, held
        self._stop(slot)

    def step(
        self,
        prediction: Tensor,
        *,
        cond: Tensor | None = None,
        uncond: Tensor | None = None,
        denoised: Tensor | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        """Advance busy slots by one row.

        Args:
            prediction, cond, uncond, denoised: as in `sampler_step`, with S in place of N.
            only: the slots to advance; None: all busy slots.
        """
        busy = self.busy if only is None else only
        rescale = self.rescales(busy)
        if only is None:
            self.take(prediction, cond, uncond, denoised=denoised, rescale=rescale)
            self.advance()
        else:
            waiting = torch.ones_like(self.finite)
            waiting[list(only)] = False
            rows, clean = (t[waiting].clone() for t in (self.rows, self.clean))
            self.rows[waiting] = IDLE
            self.take(prediction, cond, uncond, denoised=denoised, rescale=rescale)
            self.advance()
            self.rows[waiting], self.clean[waiting] = rows, clean
        self.count(busy)

    def rescales(self, busy: Sequence[int]) -> bool:
        """Whether a row of these slots' tables rescales its guided prediction."""
        return any(self.table(slot).rescales for slot in busy)

    def count(self, busy: Sequence[int]) -> None:
        """The host's part of a step: these slots have taken a row."""
        for slot in busy:
            held = self._held(slot)
            held.row += 1
            if held.row == held.rows:
                self._stop(slot)

    def _stop(self, slot: int) -> None:
        """Make a slot idle."""
        self.rows[slot] = IDLE
        self._moving[slot] = False

    def take(
        self,
        prediction: Tensor,
        cond: Tensor | None,
        uncond: Tensor | None,
        *,
        denoised: Tensor | None,
        rescale: bool,
    ) -> None:
        """Take a row of every slot that is not idle, in place. rescale: see `rescales`."""
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
            log_prob=self.log_prob,
            rescale=rescale,
        )

    def advance(self) -> None:
        """Go to the next row. With `take` this is the device's part of a step, which a graph can
        record; the host's, `count`, makes slots idle whose tables end."""
        self._numbers.add_(self._increments)

    @property
    def state(self) -> list[Tensor]:
        """Tensors that `take` and `advance` modify."""
        kept = [] if self.log_prob is None else [self.log_prob]
        return [self.x, self.history, self._numbers, self._increments, *kept]

    @property
    def inputs(self) -> list[Tensor]:
        """Tensors that they only read."""
        return [self.tables, self.seeds]

    def failures(self) -> dict[int, int]:
        """Slot -> the first row at which the network returned NaN or infinity for it.

        This waits for the device.
        """
        rows = zip(self.finite.tolist(), self.clean.tolist(), strict=True)
        return {slot: clean for slot, (finite, clean) in enumerate(rows) if not finite}

    def _held(self, slot: int) -> _Place:
        held = self._slots[slot]
        if held is None:
            raise ValueError(f"slot {slot} is empty; fill it with put() first")
        return held


def _pieces(whole: Tensor, padded: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """Pieces of a vector without the padding at their ends."""
    return [piece[:size] for piece, size in zip(whole.split(padded), sizes, strict=True)]


@torch.no_grad()
def sample(
    predict: Predict,
    table: SamplerTable,
    noise_or_shape: Tensor | Sequence[int],
    seeds: Tensor | Sequence[int],
    *,
    guidance: Sequence[Guidance] = (),
    on_step: OnStep | None = None,
    check: Literal["end", "step", "never"] = "end",
    log_probs: bool = False,
) -> Tensor:
    """Run a sampler from noise to samples, without recording gradients.

    Args:
        predict: called once per row as predict(x, row); see Predict.
        table: the result of build_table.
        noise_or_shape: the initial x, (N, *shape), fp32 (fp64 on the reference backend), which is
            not modified; or the shape of one sample, for noise drawn from the seeds (Philox, stream
            0).
        guidance: guidance by gradients (`fastdiff.diffusion.gradients`), from the innermost to the
            outermost. `predict` stays as it is: rows that are also guided without a classifier take
            both of its outputs.
        seeds: (N,), int64, one per sample; the noise of a sample depends only on its own seed.
        on_step: called after each row with a Step of all samples, which counts the table's rows.
        check: when to check for NaN or infinity in the network's output: once after the loop, after
            each row, or never. The flags are kept on the device, so "end" waits for it once and
            "step" after every row.
        log_probs: put the log-density of each row's noise into its `Step`.

    Returns:
        (N, *shape) in the dtype of the noise.

    Raises:
        ValueError: a seed is not a 64-bit integer, the numbers of seeds and samples differ, or the
            network's output has the wrong shape or is not finite. The message names the first such
            row. Guidance has no gradient.
    """
    x, seeds = _start(table, noise_or_shape, seeds)
    if guidance:
        predict = cast(Predict, guided_by(predict, table, guidance))
        table = table.unguided
    count, guided = len(x), table.guided
    slots = Slots(count, x.shape[1:], device=x.device, dtype=x.dtype, log_probs=log_probs)
    slots.put(slice(None), table, x, seeds)
    first = torch.arange(count, device=x.device)
    second = first + count

    for row in range(len(table)):
        prediction = predict(slots.x, row)
        if guided[row] and len(prediction) != 2 * count:
            raise ValueError(
                f"row {row} is guided, so the network must return "
                f"{2 * count} outputs, [unconditional; conditional], got {len(prediction)}; "
                "set guidance_scale=1 to sample without guidance"
            )
        denoised = torch.empty_like(slots.x) if on_step else None
        cond, uncond = (second, first) if guided[row] else (None, None)
        slots.step(prediction, cond=cond, uncond=uncond, denoised=denoised)
        if check == "step":
            _check_finite(slots, table)
        if on_step and denoised is not None:
            density = None if slots.log_prob is None else slots.log_prob.clone()
            on_step(Step(row + 1, len(table), range(count), slots.x, denoised, density))
    if check == "end":
        _check_finite(slots, table)
    return slots.x


def _start(
    table: SamplerTable, noise_or_shape: Tensor | Sequence[int], seeds: Tensor | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The initial x, and the seeds as a tensor; raises the errors of `sample`."""
    if not isinstance(seeds, Tensor):
        device = noise_or_shape.device if isinstance(noise_or_shape, Tensor) else None
        seeds = torch.tensor(list(map(int64_bits, seeds)), dtype=torch.int64, device=device)
    if isinstance(noise_or_shape, Tensor):
        if len(noise_or_shape) != len(seeds):
            raise ValueError(
                f"expected one seed per sample, got {len(seeds)} for {len(noise_or_shape)} samples"
            )
        return noise_or_shape, seeds
    x = philox_normal(seeds, tuple(noise_or_shape), step=0, stream=INITIAL_NOISE)
    return x * table.initial_sigma, seeds


def _check_finite(slots: Slots, table: SamplerTable) -> None:
    if bad := slots.failures():
        raise ValueError(not_finite(table, min(bad.values())))


def not_finite(table: SamplerTable, row: int) -> str:
    """The error message for a network that returned NaN or infinity."""
    return (
        f"the network returned NaN or infinity at step {int(table.steps[row])} (row {row} of "
        f"{len(table)}, t = {float(table.timesteps[row]):g}), expected finite numbers; "
        "check its weights and input, or run it in fp32"
    )
