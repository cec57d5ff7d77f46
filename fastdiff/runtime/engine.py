"""The slot engine: runs requests of one shape together, each at its own step of its own sampler.

A step is one evaluation of the network for all of them and one `sampler_step`. Between any two
steps a request may join, finish, be cancelled, or be asked for a preview. On a CPU its result is
bit-identical to running it alone, whatever the other requests and whichever its slot.

Most callers should use `run`: it takes requests of any shape and yields results as they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastdiff.diffusion.caching import CacheConfig
from fastdiff.diffusion.gradients import (
    At,
    Objective,
    Pull,
    by_gradients,
    combine,
    gradient_of,
    rows_of,
)
from fastdiff.diffusion.samplers import SamplerTable
from fastdiff.diffusion.sampling import Slots, not_finite
from fastdiff.diffusion.stack import Stack
from fastdiff.kernels import int64_bits
from fastdiff.models.network import Network
from fastdiff.runtime.conditions import Condition, Control
from fastdiff.runtime.denoiser import Batch, Controls, Denoiser, Guide, Turn
from fastdiff.runtime.graphs import ROWS, StepGraphs, rounded_rows

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after each step; both count table rows over all requests."""
Watch = Callable[[Sequence[int], Tensor, Tensor], None]
"""Called as watch(tickets, x, denoised) after a step of an engine; tensors are (n, *shape)."""


HINT, SCALES = "hint of ", "scales"
"""Names of the tensors of ControlNets in `Engine._state`; the number of one follows the first."""
Gradients = Literal["none", "x", "x0"]
"""Of objectives of x alone, or also of the network, for objectives of the x0 estimate."""


class ShapeClass(NamedTuple):
    """Requests with the same shape class can share an engine."""

    shape: tuple[int, ...]
    """(C, *spatial) of x."""
    tokens: int
    """Number of tokens in the condition's context; 0 without one."""
    gradients: Gradients = "none"
    """Which gradients their guidance needs. They are classes of their own, because a step with
    gradients is not recorded as a graph, and because on a CPU the bits of a network's output depend
    on whether it records gradients."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One sample to generate. Its tensors may be on any device; they are copied when it joins.

    A table built with `start` begins in the middle; x must then be noised to its `initial_level`.
    """

    table: SamplerTable
    """Its sampler, steps, guidance and clamp."""
    x: Tensor
    """(C, *spatial), the starting point: noise, or noised latents."""
    seed: int
    """The key of the noise that the sampler adds; 64 bits."""
    condition: Condition
    unconditional: Condition | None = None
    """For guidance; required if a row of the table is guided, otherwise unused."""
    extra: Tensor | None = None
    """(C', *spatial), input channels appended to x, such as those of an inpainting model."""
    mask: Tensor | None = None
    """(1 or C, *spatial), to inpaint with a model that was not trained for it; requires `known` and
    `noise`. Where the mask is not above 0, x becomes alpha * known + sigma * noise after each
    row, at the noise level of the next (Lugmayr et al. 2022, eq. 8, without resampling)."""
    known: Tensor | None = None
    """(C, *spatial), the clean latents to keep outside of the mask."""
    noise: Tensor | None = None
    """(C, *spatial), N(0, 1), the same for all rows."""
    pulls: tuple[Pull, ...] = ()
    """Guidance by gradients, such as that of a classifier (`fastdiff.diffusion.gradients`). On a
    GPU, all requests with the same objective are evaluated together; elsewhere in blocks."""
    cache: CacheConfig | None = None
    """Reuse deep features of the network in some rows; None: every row is evaluated in full."""
    controls: tuple[Control | None, ...] = ()
    """For networks with ControlNets: what each of them adds, or None; () for none."""
    tag: Any = None
    """For the caller's own use; ignored by the engine."""

    @property
    def shape_class(self) -> ShapeClass:
        """The shape class of an engine that can run this request."""
        kinds = {pull.on for pull in self.pulls}
        gradients: Gradients = "x0" if "x0" in kinds else "x" if kinds else "none"
        return ShapeClass(tuple(self.x.shape), self.condition.tokens, gradients)


@dataclass(frozen=True, eq=False)
class Result:
    """A request that has left its engine.

    Attributes:
        ticket: the ticket returned by `Engine.submit`.
        x: (C, *spatial), the sample, on the network's device.
        rows: number of rows of its table that were taken: all, unless it failed.
        error: if the network returned NaN or infinity, a message that says where; x is then
            unusable. None otherwise.
        log_probs: (rows,), log p(x after | x before) of each row, 0 for rows without noise; on the
            network's device. None unless the engine was asked for them.
    """

    request: Request
    ticket: int
    x: Tensor
    rows: int
    error: str | None = None
    log_probs: Tensor | None = None


@dataclass(eq=False)
class _Seat:
    """A request in the engine."""

    request: Request
    ticket: int
    slot: int
    guide: Guide
    levels: int | None  # index into `Engine._levels` at which its levels begin, if it has a mask
    places: int | None  # index into `Engine._places` at which its table begins, if it has pulls
    full: list[bool] | None  # whether each row is evaluated in full; None: all of them
    turn: int = 0  # the number of its last turn, counting all turns so far
    log_probs: list[Tensor] = field(default_factory=list)  # (), of each row so far, if asked for


_Part = tuple[int | None, tuple[int, ...]]


class _Kind(NamedTuple):
    """What the next row of a slot needs of the network."""

    slot: int
    guided: bool
    branch: int | None  # of its deep features, if it keeps or reuses them
    shallow: bool  # whether it reuses them
    controls: tuple[int, ...] = ()  # the ControlNets that it uses

    @property
    def part(self) -> _Part:
        """Rows with equal parts of the network share blocks."""
        return (self.branch if self.shallow else None), self.controls


@dataclass(eq=False)
class _Plan:
    """A step; reused as long as the next one has the same requests, guided in the same way."""

    turns: list[_Kind]
    slots: list[int]
    batch: Batch
    masked: Tensor  # (n,) int64, the slots with a mask
    levels: Tensor  # (n,) int64, their rows in `Engine._levels`
    places: Tensor  # (turns,) int64, rows in `Engine._places`; empty without pulls

    def advance(self) -> None:
        self.batch.advance()
        self.levels += 1
        self.places += 1


class Engine:
    """S slots for requests of one shape class, which advance together, one row per step.

    Attributes:
        previews: ticket -> (C, *spatial), the estimates of x0 that were requested.
        rows_taken: number of table rows taken so far, over all requests.
        graphs: records and replays the steps; None if they are launched kernel by kernel.
    """

    # In inference mode the engine would hold tensors that autograd cannot save, and that a later
    # step outside of it must not change.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        network: Network,
        *,
        shape: Sequence[int],
        slots: int,
        tokens: int = 0,
        gradients: Gradients = "none",
        graphs: StepGraphs | None = None,
        log_probs: bool = False,
    ) -> None:
        """
        network: prepared for inference; it stays on its device and in its dtype.
        shape, tokens, gradients: the class of the requests; see `ShapeClass`.
        slots: most requests at a time. Bounds memory; does not affect any result on a CPU.
        graphs: records and replays the steps; None: each step is launched kernel by kernel, as
            it must be with gradients.
        log_probs: results contain the log-density of each row's noise.
        """
        assert graphs is None or gradients == "none", "steps with gradients cannot be recorded"
        self._kind, self.graphs = ShapeClass(tuple(shape), tokens, gradients), graphs
        room = 0 if graphs is None else ROWS
        rounded = None if graphs is None else rounded_rows
        self._denoiser = Denoiser(network, shape[1:], rounded=rounded, room=room)
        device = self._denoiser.device
        dtype = torch.promote_types(self._denoiser.dtype, torch.float32)
        counters = 0 if self.graphs is None else 4 * slots + slots  # network rows, levels
        self._slots = Slots(
            slots,
            shape,
            device=device,
            dtype=dtype,
            room=room,
            counters=counters,
            log_probs=log_probs,
        )
        self._estimates: Tensor | None = None  # estimates of x0, as written by graphs
        self._seats: dict[int, _Seat] = {}  # by slot
        self._tickets, self._turn = count(), count(1)
        self._state: dict[str, Tensor] = {}  # extra, mask, known, noise: (S, ...), if needed
        self._levels = Stack()  # (rows, 2), for requests with a mask; see `_levels_after`
        self._places = Stack()  # for requests with pulls; see `gradients.rows_of`
        self._objectives: set[tuple[Objective, str]] = set()  # those with a known gradient
        self._plan: _Plan | None = None
        self._asked: set[int] = set()
        self.previews: dict[int, Tensor] = {}
        self.rows_taken = 0

    @property
    def busy(self) -> int:
        """Number of requests in the engine."""
        return len(self._seats)

    @property
    def free(self) -> int:
        """Number of requests that may join."""
        return len(self._slots) - len(self._seats)

    @property
    def slots(self) -> dict[int, int]:
        """The slot of each request in the engine, by ticket."""
        return {seat.ticket: slot for slot, seat in self._seats.items()}

    def rows_of(self, ticket: int) -> int:
        """Number of rows of its table that a request has taken.

        Raises:
            ValueError: it is not in the engine.
        """
        return self._slots.row(self._seat(ticket).slot)

    @torch.inference_mode(False)
    @torch.no_grad()
    def submit(self, request: Request) -> int:
        """Add a request. Returns its ticket.

        Raises:
            ValueError: no slot is free, or the request does not match the network or the engine.
        """
        self._check(request)
        table, slot, ticket = request.table, self._slots.empty[0], next(self._tickets)
        unconditional = request.unconditional if any(table.guided) else None
        guide = self._denoiser.add(table.timesteps, request.condition, unconditional)
        levels = places = None
        if request.pulls:
            places = self._places.add(
                request.table, lambda: rows_of(request.table).to(self._slots.x)
            )
            table = table.unguided
        full = None
        if request.cache is not None:
            self._denoiser.keep(request.cache.branch, len(self._slots))
            full = request.cache.full(table.guided)
        self._slots.put(slot, table, request.x, int64_bits(request.seed))
        self._keep("extra", slot, request.extra)
        self._keep_controls(slot, request.controls)
        if request.mask is not None:
            levels = self._levels.add(
                request.table, lambda: _levels_after(request.table).to(self._slots.x)
            )
            self._keep("mask", slot, (request.mask > 0).expand(request.x.shape))
            self._keep("known", slot, request.known)
            self._keep("noise", slot, request.noise)
        self._seats[slot] = _Seat(request, ticket, slot, guide, levels, places, full)
        self._plan = None
        return ticket

    def cancel(self, ticket: int) -> None:
        """Remove a request without a result.

        Raises:
            ValueError: it is not in the engine.
        """
        self._leave(self._seat(ticket))

    def clear(self) -> None:
        """Remove all requests, without results."""
        for seat in list(self._seats.values()):
            self._leave(seat)
        self._plan = None
        self.previews.clear()
        self.rows_taken = 0

    def preview(self, ticket: int) -> None:
        """Request an estimate of x0, which the request's next step puts into `previews`.

        Raises:
            ValueError: it is not in the engine.
        """
        self._asked.add(self._seat(ticket).slot)

    def move(self, ticket: int, slot: int) -> None:
        """Move a request to another slot, which does not affect its result.

        Raises:
            ValueError: it is not in the engine, or the slot is occupied.
        """
        seat = self._seat(ticket)
        if slot == seat.slot:
            return
        self._slots.move(seat.slot, slot)
        for kept in self._state.values():
            kept[slot] = kept[seat.slot]
        self._denoiser.move(seat.slot, slot)
        del self._seats[seat.slot]
        if seat.slot in self._asked:
            self._asked.remove(seat.slot)
            self._asked.add(slot)
        seat.slot, self._seats[slot], self._plan = slot, seat, None

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, *, watch: Watch | None = None) -> list[Result]:
        """Advance requests by one row. Returns those that have finished or failed.

        All requests advance, except that on a CPU those whose rows would not fill a block wait, and
        come first in the next step.

        A request fails if the network returns NaN or infinity for it; the others continue. On a CPU
        this is detected immediately, on other devices when a request finishes: until then the host
        does not wait for the device.

        watch: called with x and the estimates of x0 of the requests that advanced, before any of
            them leaves.
        """
        slots, busy = self._slots, self._slots.busy
        if turns := self._turns(busy):
            plan, shown = self._plan_for(turns), bool(watch or self._asked)
            if self.graphs is None:
                denoised = torch.empty_like(slots.x) if shown else None
                self._evaluate(plan, denoised, None if len(turns) == len(busy) else plan.slots)
            else:
                denoised = self._replay(self.graphs, plan, shown=shown)
            self.rows_taken += len(turns)
            if slots.log_prob is not None:
                row = slots.log_prob.clone()  # the next step overwrites it
                for slot in plan.slots:
                    self._seats[slot].log_probs.append(row[slot])
            if denoised is not None:
                self._show(plan.slots, denoised, watch)
        return self._collect()

    def _evaluate(self, plan: _Plan, denoised: Tensor | None, only: list[int] | None) -> None:
        if self._kind.gradients != "none":
            prediction, cond, uncond = *self._pulled(plan), None
        else:
            prediction = self._denoiser(self._slots.x, plan.batch, *self._inputs())
            cond, uncond = plan.batch.cond, plan.batch.uncond
        self._slots.step(prediction, cond=cond, uncond=uncond, denoised=denoised, only=only)
        if len(plan.masked):
            self._hold(plan.masked, plan.levels)
        plan.advance()

    def _pulled(self, plan: _Plan) -> tuple[Tensor, Tensor]:
        """The predictions of a plan's slots with guidance by gradients, and each slot's index."""
        held, batch = self._slots, plan.batch
        chosen = torch.tensor(plan.slots, device=held.x.device)
        cond = batch.cond[chosen]
        uncond = None if batch.uncond is None else batch.uncond[chosen]

        def predict(x: Tensor, at: At) -> Tensor:
            whole = held.x.index_copy(0, chosen, x)
            outputs = self._denoiser(whole, batch, *self._inputs()).to(x.dtype)
            own = outputs[cond]
            if uncond is None:
                return own
            alone = (uncond < 0).reshape(-1, *(1,) * (x.ndim - 1))
            return combine(own, torch.where(alone, own, outputs[uncond.clamp(min=0)]), at, x)

        seats = [self._seats[slot] for slot in plan.slots]
        at = At(self._places.rows[plan.places])
        blocks = self._denoiser.blocks
        guidance = by_gradients(
            [seat.request.pulls for seat in seats], block=None if blocks is None else blocks.single
        )
        order = torch.full_like(batch.cond, -1)
        order[chosen] = torch.arange(len(chosen), device=order.device)
        return guidance(predict)(held.x[chosen], at), order

    def _replay(self, graphs: StepGraphs, plan: _Plan, *, shown: bool) -> Tensor | None:
        """`_evaluate` as a graph. Returns the estimates of x0, if they are needed."""
        slots, inputs = self._slots, self._inputs()
        if shown and self._estimates is None:
            self._estimates = torch.empty_like(slots.x)
        denoised = self._estimates if shown else None
        kept = graphs.static(plan.batch, plan.masked, plan.levels, slots.counters)
        rescale = slots.rescales(plan.slots)

        def work() -> None:
            prediction = self._denoiser(slots.x, kept.batch, *inputs)
            cond, uncond = kept.batch.cond, kept.batch.uncond
            slots.take(prediction, cond, uncond, denoised=denoised, rescale=rescale)
            if len(kept.masked):
                self._hold(kept.masked, kept.levels)
            slots.advance()  # and the indices of the embeddings and levels

        state = [*slots.state, *self._denoiser.deep.values()]
        reads = [*state, *slots.inputs, self._denoiser.embeddings.rows, self._levels.rows]
        reads += self._state.values()
        graphs.run((kept, rescale, shown), work, reads=reads, state=state)
        slots.count(plan.slots)
        return denoised

    def _turns(self, busy: list[int]) -> list[_Kind]:
        """The requests to advance, with those that waited longest first.

        If rows are evaluated in blocks, as many as fill whole blocks: on a CPU a row of padding
        costs as much as any other. Rows that run another part of the network need other blocks;
        the request that waited longest advances even if its block is not full.
        """
        blocks = self._denoiser.blocks
        order = sorted(busy, key=lambda slot: self._seats[slot].turn)
        turns = [self._kind_of(slot) for slot in order]
        if turns and blocks is not None and blocks.guided == blocks.single:
            room: dict[_Part, int] = {}
            for turn in turns:
                room[turn.part] = room.get(turn.part, 0) + 1 + turn.guided
            room = {part: rows - rows % blocks.single for part, rows in room.items()}
            room[turns[0].part] = max(room[turns[0].part], blocks.single)
            chosen = []
            for turn in turns:
                if (rows := 1 + turn.guided) <= room[turn.part]:
                    room[turn.part] -= rows
                    chosen.append(turn)
            turns = chosen
        for turn in turns:
            self._seats[turn.slot].turn = next(self._turn)
        return turns

    def _kind_of(self, slot: int) -> _Kind:
        seat, row = self._seats[slot], self._slots.row(slot)
        guided = seat.request.table.guided[row]
        if seat.full is None or seat.request.cache is None:
            rows, given = len(seat.request.table), enumerate(seat.request.controls)
            used = tuple(net for net, each in given if each is not None and each.covers(row, rows))
            return _Kind(slot, guided, None, False, used)
        return _Kind(slot, guided, seat.request.cache.branch, not seat.full[row])

    def _plan_for(self, turns: list[_Kind]) -> _Plan:
        if self._plan is None or self._plan.turns != turns:
            rows = {turn.slot: self._slots.row(turn.slot) for turn in turns}
            guides = [self._seats[slot].guide for slot in rows]
            parts = [
                Turn(turn.slot, guide, rows[turn.slot], *turn[1:])
                for turn, guide in zip(turns, guides, strict=True)
            ]
            batch = self._denoiser.batch(parts, len(self._slots))
            starts = {slot: self._seats[slot].levels for slot in rows}
            masked = [(s, start + rows[s]) for s, start in starts.items() if start is not None]
            if self.graphs is not None:
                self.graphs.forget_if_moved(self._denoiser.network)
            begun = [(self._seats[slot].places, row) for slot, row in rows.items()]
            places = [start + row for start, row in begun if start is not None]
            kept, at = (
                torch.tensor(numbers, dtype=torch.int64, device=self._denoiser.device)
                for numbers in (masked, places)
            )
            masked_slots, levels = kept.reshape(-1, 2).T.contiguous()
            self._plan = _Plan(turns, list(rows), batch, masked_slots, levels, at)
        return self._plan

    def _hold(self, slots: Tensor, levels: Tensor) -> None:
        """Outside of masks, set x to the known latents, noised to the level of the next row."""
        x = self._slots.x
        mask, known, noise = (self._state[name][slots] for name in ("mask", "known", "noise"))
        alpha, sigma = self._levels.rows[levels].T.reshape(2, -1, *(1,) * (x.ndim - 1))
        x[slots] = torch.where(mask, x[slots], alpha * known + sigma * noise)

    def _show(self, busy: list[int], denoised: Tensor, watch: Watch | None) -> None:
        for slot in self._asked.intersection(busy):
            self.previews[self._seats[slot].ticket] = denoised[slot].clone()
        self._asked.difference_update(busy)
        if watch:
            tickets = [self._seats[slot].ticket for slot in busy]
            watch(tickets, self._slots.x[busy], denoised[busy])

    def _collect(self) -> list[Result]:
        """Remove the requests that have finished or failed, and return their results."""
        slots, seats = self._slots, list(self._seats.values())
        busy = set(slots.busy)
        done = {seat for seat in seats if seat.slot not in busy}
        at_once = self.graphs is None and slots.finite.is_cpu and not bool(slots.finite.all())
        failures = slots.failures() if done or at_once else {}
        results = []
        for seat in seats:
            if seat in done or (at_once and seat.slot in failures):
                bad, table = failures.get(seat.slot), seat.request.table
                error = None if bad is None else not_finite(table, bad)
                x, rows = slots.x[seat.slot].clone(), slots.row(seat.slot)
                kept = torch.stack(seat.log_probs) if seat.log_probs else None
                results.append(Result(seat.request, seat.ticket, x, rows, error, kept))
                self._leave(seat)
        return results

    def _leave(self, seat: _Seat) -> None:
        self._slots.remove(seat.slot)
        self._denoiser.drop(seat.guide)
        if seat.levels is not None:
            self._levels.drop(seat.request.table)
        if seat.places is not None:
            self._places.drop(seat.request.table)
        self._asked.discard(seat.slot)
        del self._seats[seat.slot]

    def _seat(self, ticket: int) -> _Seat:
        for seat in self._seats.values():
            if seat.ticket == ticket:
                return seat
        raise ValueError(f"request {ticket} is not in the engine; it has left, or never joined")

    def _keep(self, name: str, slot: int, value: Tensor | None) -> None:
        """Copy a tensor of a request into the one that holds it for all slots."""
        if value is None:
            return
        if name not in self._state:
            dtype = torch.bool if name == "mask" else self._slots.x.dtype
            shape = len(self._slots), *value.shape
            self._state[name] = torch.zeros(shape, dtype=dtype, device=self._slots.x.device)
        self._state[name][slot] = value

    def _keep_controls(self, slot: int, controls: Sequence[Control | None]) -> None:
        """Copy what a request's ControlNets read."""
        for net, each in enumerate(controls):
            if each is not None:
                self._keep(f"{HINT}{net}", slot, each.hint)
        if controls:
            scales = [0.0 if each is None else each.scale for each in controls]
            self._keep(SCALES, slot, torch.tensor(scales, dtype=self._slots.x.dtype))

    def _inputs(self) -> tuple[Tensor | None, Controls | None]:
        """The extra channels of all slots, and what their ControlNets read."""
        state = self._state
        if (scales := state.get(SCALES)) is None:
            return state.get("extra"), None
        hints = {int(n.removeprefix(HINT)): t for n, t in state.items() if n.startswith(HINT)}
        return state.get("extra"), Controls(hints, scales)

    def _check(self, request: Request) -> None:
        """The errors of `submit`."""
        config, kind = self._denoiser.network.config, request.shape_class
        if not self.free:
            raise ValueError(
                f"all {len(self._slots)} slots are occupied; call step() until a request finishes"
            )
        if kind[:2] != self._kind[:2]:
            raise ValueError(
                f"this engine takes x of shape {self._kind.shape} and {self._kind.tokens} tokens, "
                f"got {kind.shape} and {kind.tokens}; use one engine per shape class, or run()"
            )
        if kind != self._kind:
            raise ValueError(
                f"this engine takes requests with gradients {self._kind.gradients!r}, got "
                f"{kind.gradients!r} (the pulls of a request decide); use one engine per shape "
                "class, or run()"
            )
        if (kind.tokens > 0) != (config.context_dim is not None):
            wanted = "no context" if config.context_dim is None else "a context"
            raise ValueError(
                f"the network takes {wanted}, got a condition with {kind.tokens} tokens; check "
                "that the conditions were made for this model"
            )
        if request.mask is not None and self._slots.log_prob is not None:
            raise ValueError(
                "log_probs describe a step of the sampler, but a mask replaces a part of its "
                "result; omit log_probs or the mask"
            )
        self._check_x(request)
        self._check_pulls(request)
        self._check_controls(request)
        if request.cache is not None:
            check_cache(
                request.cache,
                self._denoiser.network,
                pulled=bool(request.pulls),
                controlled=any(request.controls),
            )
        other = request.unconditional
        if any(request.table.guided) and (other is None or other.tokens != kind.tokens):
            tokens = None if other is None else f"one with {other.tokens} tokens"
            raise ValueError(
                f"the table is guided, so unconditional must be a condition with {kind.tokens} "
                f"tokens, got {tokens}; pass one, or build the table with guidance_scale=1"
            )

    def _check_controls(self, request: Request) -> None:
        """Raise ValueError unless the network has these ControlNets, and hints have x's sides."""
        count = self._denoiser.network.num_controls
        if request.controls and len(request.controls) != count:
            raise ValueError(
                f"the network has {count} ControlNets, got controls for {len(request.controls)}; "
                "give one per ControlNet, None for those that add nothing, or leave controls out"
            )
        sides = tuple(request.x.shape[1:])
        for each in request.controls:
            if each is not None and each.hint.shape[1:] != sides:
                raise ValueError(
                    f"hint must have the sides of x, {sides}, got {tuple(each.hint.shape[1:])}; "
                    "embed a picture of the size of the image"
                )

    def _check_pulls(self, request: Request) -> None:
        """Raise ValueError unless each pull has a gradient, which is tried once per objective."""
        if not request.pulls:
            return
        x, device = request.x[None].to(self._slots.x), self._slots.x.device
        for pull in request.pulls:
            if (pull.objective, pull.on) in self._objectives:
                continue
            t = request.table.timesteps[:1].to(device, x.dtype)
            gradient_of(pull.objective, x, t, torch.tensor([pull.label], device=device))
            self._objectives.add((pull.objective, pull.on))

    def _check_x(self, request: Request) -> None:
        config, shape = self._denoiser.network.config, tuple(request.x.shape)
        extra = request.x[:0] if request.extra is None else request.extra
        if len(request.x) + len(extra) != config.in_channels:
            raise ValueError(
                f"the network takes {config.in_channels} channels, got {len(request.x)} of x and "
                f"{len(extra)} extra ones; check that the latents were made for this model"
            )
        only = self._denoiser.network.only_side
        if only is not None and any(side != only for side in shape[1:]):
            raise ValueError(
                f"the sides of x must be {only}, since this network learned one position "
                f"embedding per patch, got {shape[1:]}; resize the input"
            )
        if any(side % config.size_multiple or not side for side in shape[1:]):
            raise ValueError(
                f"the sides of x must be positive multiples of {config.size_multiple}, got "
                f"{shape[1:]}; resize or pad the input"
            )
        if extra.shape[1:] != request.x.shape[1:]:
            raise ValueError(
                f"extra must have the sides of x, {shape[1:]}, got {tuple(extra.shape[1:])}; "
                "resize it"
            )
        int64_bits(request.seed)
        flat = (1, *shape[1:])
        given = [request.mask, request.known, request.noise]
        got = [None if tensor is None else tuple(tensor.shape) for tensor in given]
        if got != [None] * 3 and (got[0] not in (shape, flat) or got[1:] != [shape, shape]):
            raise ValueError(
                f"mask, known and noise must be given together: expected {flat}, {shape} and "
                f"{shape}, got {got[0]}, {got[1]} and {got[2]}"
            )


def check_cache(
    cache: CacheConfig, network: Network, *, pulled: bool, controlled: bool = False
) -> None:
    """Raise ValueError unless a network's deep features can be reused in this way.

    pulled: whether gradients guide the sample. controlled: whether it uses ControlNets.
    """
    if not network.branches:
        raise ValueError(
            f"cache reuses deep features of a U-Net, and this model has a "
            f"{type(network).__name__}; leave cache out"
        )
    if cache.branch >= network.branches:
        raise ValueError(
            f"cache_branch must be from 0 to {network.branches - 1} for this model, got "
            f"{cache.branch}"
        )
    if pulled:
        raise ValueError(
            "cache cannot be combined with guidance by gradients (pulls, or classifier_scale), "
            "which need every evaluation in full; leave one of them out"
        )
    if controlled:
        raise ValueError(
            "cache cannot be combined with control: a ControlNet runs in every evaluation; leave "
            "one of them out"
        )


def _levels_after(table: SamplerTable) -> Tensor:
    """(rows, 2): alpha and sigma of the level that each row of a table leads to.

    After the last row the known image is kept without noise, whatever noise the table leaves in
    the rest, as in diffusers.
    """
    sigmas = torch.cat([table.sigmas[1:], table.sigmas.new_zeros(1)])
    scales = torch.cat([table.scales[1:-1], table.scales.new_ones(1)])
    alpha = (1 + sigmas**2) ** -0.5
    return torch.stack([alpha, alpha * sigmas], dim=1)[: len(table)] * scales[:, None]
