"""ControlNets in the slot engine: any mix in one batch, and steps as graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdiff.models.controlnet import ControlNet, ControlNetConfig, with_controlnets
from fastdiff.models.network import Network
from fastdiff.runtime.conditions import Control
from fastdiff.runtime.engine import Engine, Request
from fastdiff.runtime.graphs import StepGraphs
from fastdiff.runtime.prepare import prepare
from tests.runtime.test_engine import SHAPE, TEXT, alone, finish, images, random_requests
from tests.runtime.test_graphs import all_of, engine, plain_engine, same
from tests.support.tape import Tape
from tests.support.tiny import randomize, tiny_unet


@pytest.fixture(scope="module")
def network() -> Network:
    config = ControlNetConfig(
        encoder=replace(TEXT, in_channels=3),
        hint_channels=(4, 8),
    )
    nets = [ControlNet(config) for _ in range(2)]
    for seed, net in enumerate(nets):
        randomize(net, 10 + seed)
    return prepare(with_controlnets(tiny_unet(TEXT), nets))


def control(rng: random.Random) -> Control | None:
    if rng.random() < 0.4:
        return None
    start, end = sorted(rng.choice((0.0, 0.25, 0.5, 1.0)) for _ in range(2))
    hint = images(TEXT.model_channels, *SHAPE[1:], seed=rng.randint(0, 99))
    return Control(hint=hint, scale=rng.choice((0.5, 1.0, 2.0)), start=start, end=max(end, 0.5))


def requests(count: int) -> Iterator[Request]:
    rng = random.Random(5)
    for made in random_requests(count, text=True):
        controls = (control(rng), control(rng)) if rng.random() < 0.8 else ()
        yield replace(made, controls=controls)


def test_any_mix_has_the_bits_of_requests_alone(network: Network) -> None:
    wanted = list(requests(15))
    made = Engine(network, shape=SHAPE, slots=7, tokens=7)
    found = all_of(made, wanted)
    for number in range(0, len(wanted), 3):
        assert torch.equal(found[number].x, alone(network, wanted[number]))


def test_replayed_steps_have_the_bits_of_steps_that_are_run(network: Network) -> None:
    wanted, tape = list(requests(9)), Tape()
    recorded = engine(network, StepGraphs(tape, limit=64))
    assert same(all_of(recorded, wanted), all_of(plain_engine(network), wanted))
    assert tape.replays > len(tape.lengths)


def test_it_is_used_in_the_rows_between_start_and_end() -> None:
    used = Control(hint=torch.zeros(1), start=0.2, end=0.8)
    assert [used.covers(row, 5) for row in range(5)] == [False, True, True, True, False]
    part = Control(hint=torch.zeros(1), start=0.3, end=0.7)  # no row may begin before or end after
    assert [part.covers(row, 5) for row in range(5)] == [False, False, True, False, False]


def test_a_moved_request_takes_its_pictures_along(network: Network) -> None:
    wanted = next(each for each in requests(12) if any(each.controls))
    made = Engine(network, shape=SHAPE, slots=3, tokens=7)
    ticket = made.submit(wanted)
    made.step()
    made.move(ticket, 2)
    made.submit(next(requests(1)))
    assert torch.equal(finish(made)[ticket].x, alone(network, wanted))


def other(hint: Tensor) -> tuple[Control | None, ...]:
    return Control(hint=hint), None


def test_wrong_controls_are_refused(network: Network) -> None:
    made, wanted = Engine(network, shape=SHAPE, slots=3, tokens=7), next(requests(1))
    hint = images(TEXT.model_channels, *SHAPE[1:], seed=0)
    for controls, message in (
        ((None,), "has 2 ControlNets, got controls for 1"),
        (other(hint[:, :2]), r"hint must have the sides of x, \(4, 4\), got \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            made.submit(replace(wanted, controls=controls))
    plain = Engine(prepare(tiny_unet(TEXT)), shape=SHAPE, slots=3, tokens=7)
    with pytest.raises(ValueError, match="has 0 ControlNets, got controls for 2"):
        plain.submit(replace(wanted, controls=other(hint)))
