"""Slots: samples join and leave, each with its own table, and get the same bits as alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.sampling import IDLE, Slots, sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig

LINEAR = NoiseSchedule(ScheduleConfig())
SHAPE = (3, 4, 4)


def table(name: str, steps: int, scale: float = 1.0, **options: float) -> SamplerTable:
    return build_table(name, LINEAR, steps, guidance_scale=scale, **options)


TABLES = [
    table("ddim", 5),
    table("ddim", 9, 3.0, eta=1.0, guidance_rescale=0.7),
    table("ddpm", 7, 2.0),
    table("heun", 4),
    table("plms", 6, 1.5),
    table("dpmpp-2m-sde", 8, 4.0),
    table("euler-ancestral", 1),
]


def network(x: Tensor, t: float, sign: float) -> Tensor:
    """A network for one sample; sign -1: unconditional."""
    return torch.tanh(x + sign * t / 1000) - 0.1 * sign * x


def alone(request: SamplerTable, noise: Tensor, seed: int) -> Tensor:
    timesteps = request.timesteps.tolist()

    def predict(x: Tensor, row: int) -> Tensor:
        cond = network(x, timesteps[row], 1.0)
        if not request.guided[row]:
            return cond
        return torch.cat([network(x, timesteps[row], -1.0), cond])

    return sample(predict, request, noise[None], [seed])[0]


def step(slots: Slots, denoised: Tensor | None = None) -> int:
    """One step of a loop as an engine has it, the parts of the prediction in any order. Returns the
    parts that were needed."""
    cond, uncond = torch.zeros(len(slots), dtype=torch.int64), torch.full((len(slots),), -1)
    parts: list[Tensor] = []
    for slot in reversed(slots.busy):
        t = slots.timestep(slot)
        cond[slot] = len(parts)
        parts.append(network(slots.x[slot], t, 1.0))
        if slots.table(slot).guided[slots.row(slot)]:
            uncond[slot] = len(parts)
            parts.append(network(slots.x[slot], t, -1.0))
    slots.step(torch.stack(parts), cond=cond, uncond=uncond, denoised=denoised)
    return len(parts)


def test_requests_that_join_leave_and_move_have_the_bits_they_have_alone() -> None:
    """40 requests in 5 slots, at random times; some change their slot on the way."""
    draw = random.Random(0)
    waiting = [(draw.choice(TABLES), draw.getrandbits(63) - 2**62) for _ in range(40)]
    noise = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1))
    slots = Slots(5, SHAPE)
    where: dict[int, int] = {}  # slot -> request
    results: dict[int, Tensor] = {}
    pointers = slots.x.data_ptr(), slots.rows.data_ptr()
    arrived = 0
    while len(results) < len(waiting):
        while slots.empty and arrived < len(waiting) and (not where or draw.random() < 0.5):
            request, seed = waiting[arrived]
            slot = draw.choice(slots.empty)
            slots.put(slot, request, noise[arrived], seed)
            where[slot], arrived = arrived, arrived + 1
        step(slots)
        if slots.empty and slots.busy and draw.random() < 0.3:
            source, to = draw.choice(slots.busy), draw.choice(slots.empty)
            slots.move(source, to)
            where[to] = where.pop(source)
        for slot in set(where) - set(slots.busy):
            assert int(slots.rows[slot]) == IDLE
            results[where.pop(slot)] = slots.x[slot].clone()
            slots.remove(slot)
    assert (slots.x.data_ptr(), slots.rows.data_ptr()) == pointers
    assert len(slots.tables) <= 2 * sum(map(len, TABLES))
    for number, (request, seed) in enumerate(waiting):
        assert torch.equal(results[number], alone(request, noise[number], seed)), number


def test_a_done_slot_keeps_its_sample_while_others_go_on() -> None:
    slots = Slots(3, SHAPE)
    noise = torch.randn(3, *SHAPE)
    for slot, request in enumerate((TABLES[0], TABLES[1], TABLES[0])):
        slots.put(slot, request, noise[slot], slot)
    assert slots.rows.tolist() == [0, 5, 0]  # equal tables lie there once
    rows = [slots.row(slot) for slot in range(3)]
    while slots.busy:
        step(slots)
        rows = [row + 1 if row < len(slots.table(s)) else row for s, row in enumerate(rows)]
        assert [slots.row(slot) for slot in range(3)] == rows
        on = [start + row for start, row in zip((0, 5, 0), rows, strict=True)]
        ends = [5, 14, 5]
        assert slots.rows.tolist() == [
            IDLE if row == end else row for row, end in zip(on, ends, strict=True)
        ]
    for slot, request in enumerate((TABLES[0], TABLES[1], TABLES[0])):
        assert torch.equal(slots.x[slot], alone(request, noise[slot], slot))


def test_previews_are_of_busy_slots() -> None:
    slots = Slots(2, SHAPE)
    noise = torch.randn(SHAPE)
    slots.put(1, TABLES[6], noise, 3)
    denoised = torch.full_like(slots.x, 7.0)
    step(slots, denoised)
    row = TABLES[6].to("cpu")[0]
    expected = row[0] * noise + row[1] * network(noise, float(TABLES[6].timesteps[0]), 1.0)
    torch.testing.assert_close(denoised[1], expected)
    assert (denoised[0] == 7).all()


def test_failures_are_of_a_slot_and_a_row() -> None:
    slots = Slots(3, SHAPE)
    slots.put(slice(0, 2), TABLES[0], torch.randn(2, *SHAPE), torch.tensor([1, 2]))
    for row in range(5):
        prediction = torch.zeros(3, *SHAPE)
        prediction[2] = float("nan")  # of an empty slot
        if row == 3:
            prediction[1, 2, 3, 3] = float("inf")
        slots.step(prediction)
    assert slots.failures() == {1: 3}
    slots.remove(1)
    slots.put(1, TABLES[0], torch.randn(SHAPE), 1)
    assert slots.failures() == {}


def test_tables_come_and_go() -> None:
    slots = Slots(4, SHAPE)
    x = torch.randn(SHAPE)
    slots.put(0, TABLES[0], x, 0)  # rows 0 to 5
    slots.put(1, TABLES[1], x, 0)  # 5 to 14
    room = len(slots.tables)
    slots.put(2, TABLES[1], x, 0)  # it is there
    slots.remove(1)
    slots.remove(0)
    slots.put(3, TABLES[6], x, 0)  # in the place of the first
    assert slots.rows.tolist() == [IDLE, IDLE, 5, 0]
    assert len(slots.tables) == room
    with pytest.raises(ValueError, match="slot 3 is not empty; call remove"):
        slots.put(3, TABLES[6], x, 0)
    with pytest.raises(ValueError, match="slot 0 is empty; fill it with put"):
        slots.remove(0)
    with pytest.raises(ValueError, match="slot 3 is not empty; call remove"):
        slots.move(2, 3)
    with pytest.raises(ValueError, match="slot 1 is empty; fill"):
        slots.move(1, 0)
