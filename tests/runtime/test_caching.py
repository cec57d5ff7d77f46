"""Deep features reused between evaluations (DeepCache), in the slot engine."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.caching import CacheConfig
from fastdiff.diffusion.sampling import sample
from fastdiff.models.layers import Addends
from fastdiff.models.unet import UNet
from fastdiff.runtime.engine import Engine, Request
from fastdiff.runtime.graphs import StepGraphs
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import run
from tests.runtime.test_engine import SHAPE, TEXT, alone, random_requests, request, table, wide
from tests.runtime.test_graphs import all_of, plain_engine, same
from tests.runtime.test_graphs import engine as recorded_engine
from tests.support.tape import Tape
from tests.support.tiny import UNET, tiny_unet


@pytest.mark.parametrize(
    ("config", "rows", "full"),
    [
        (CacheConfig(interval=3), 8, [0, 3, 6]),
        (CacheConfig(interval=10), 4, [0]),
        # l = -3, 0, 3 (exclusive end 6^(1/1)), so rows 0, 3 and 6
        (CacheConfig(interval=3, center=3, power=1.0), 9, [0, 3, 6]),
        # (-4)^(1/2) = -2 to (12 - 4)^(1/2) = 2.828 in 6 parts of 0.8047, squared with their signs:
        # -4, -1.43, -0.15, 0.17, 1.49, 4.09 around 4
        (CacheConfig(interval=2, center=4, power=2.0), 12, [0, 2, 3, 4, 5, 8]),
    ],
)
def test_which_rows_are_full(config: CacheConfig, rows: int, full: list[int]) -> None:
    found = config.full([False] * rows)
    assert [row for row, whole in enumerate(found) if whole] == full


def test_a_row_where_guidance_begins_is_full() -> None:
    found = CacheConfig(interval=10).full([False, False, True, True, False, True])
    assert found == [True, False, True, False, False, True]


def deep_cache(network: UNet, made: Request) -> Tensor:
    """Sampling as in the paper, by whole evaluations whose deep features are overwritten; the skip
    connection is an argument of its own."""
    assert made.cache is not None
    stage = network.output_blocks[-1 - made.cache.branch]
    full, kept = made.cache.full(made.table.guided), dict[str, Tensor]()
    state: dict[str, Any] = {}

    def overwrite(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if full[state["row"]]:
            kept.update(zip(state["names"], args[0].total().clone(), strict=True))
            return args
        # whole: with the addends that the stage's first norm would have summed
        return Addends(torch.stack([kept[name] for name in state["names"]])), *args[1:]

    def predict(x: Tensor, row: int) -> Tensor:
        labels, names = [made.condition.label], ["cond"]
        if made.table.guided[row]:
            x, labels, names = torch.cat([x, x]), [4, *labels], ["uncond", "cond"]
        state.update(row=row, names=names)
        t = torch.full((len(x),), float(made.table.timesteps[row]), dtype=torch.float64)
        return network(x, t, y=torch.tensor(labels))

    handle = stage.register_forward_pre_hook(overwrite)
    try:
        return sample(predict, made.table, made.x[None].double(), [made.seed])[0]
    finally:
        handle.remove()


def test_the_engine_agrees_with_overwritten_features() -> None:
    """In fp64, for each branch, with guidance, guidance in an interval, and two rows per step."""
    exact = prepare(tiny_unet(), dtype=torch.float64)
    requests = [
        request(seed, table(6, sampler, scale, **options), seed % 4, cache=cache)
        for seed, (sampler, scale, options, cache) in enumerate(
            [
                ("ddim", 1.0, {}, CacheConfig(interval=3)),
                ("ddim", 3.0, {}, CacheConfig(interval=2, branch=1)),
                ("dpmpp-2m", 2.0, {"guidance_interval": (2, 4)}, CacheConfig(interval=3, branch=2)),
                ("heun", 2.0, {}, CacheConfig(interval=4, branch=3, center=3)),
            ]
        )
    ]
    for result in run(exact, requests, slots=3):
        wanted = deep_cache(exact, result.request)
        torch.testing.assert_close(result.x, wanted, rtol=1e-9, atol=1e-9)
        plain = alone(exact, replace(result.request, cache=None))
        assert (plain - wanted).abs().max() > 1e-4


def mixed(count: int, *, text: bool = False, seed: int = 5) -> list[Request]:
    """Requests of any settings, two thirds of them with a cache."""
    rng = random.Random(seed)
    return [
        replace(
            made,
            cache=None
            if rng.random() < 1 / 3
            else CacheConfig(interval=rng.randint(2, 5), branch=rng.choice((0, 0, 2))),
        )
        for made in random_requests(count, text=text)
    ]


def test_bits_do_not_depend_on_other_requests() -> None:
    """Cached and other requests of any phase share an engine, join at random times, and move."""
    network, rng = wide(UNET), random.Random(7)
    requests = [made for made in mixed(30) if len(made.table) < 12][:8]
    waiting, engine = list(enumerate(requests)), Engine(network, shape=SHAPE, slots=11)
    places, found, moved = dict[int, int](), dict[int, Tensor](), 0
    while waiting or engine.busy:
        for _ in range(min(rng.choice((0, 1, 5)), engine.free, len(waiting))):
            place, wanted = waiting.pop(rng.randrange(len(waiting)))
            places[engine.submit(wanted)] = place
        if engine.busy and engine.free:
            slot = rng.choice([slot for slot in range(11) if slot not in engine.slots.values()])
            engine.move(rng.choice(list(engine.slots)), slot)
            moved += 1
        found |= {places[result.ticket]: result.x for result in engine.step()}
    assert moved > 3
    assert [n for n in found if not torch.equal(alone(network, requests[n]), found[n])] == []
    assert len({requests[n].cache for n in found}) > 3


def test_replayed_steps_have_the_bits_of_steps_that_are_run() -> None:
    network, tape = prepare(tiny_unet(TEXT)), Tape()
    requests = [made for made in mixed(30, text=True) if len(made.table) < 12][:4]
    recorded, plain = recorded_engine(network, StepGraphs(tape)), plain_engine(network)
    assert same(all_of(recorded, requests), all_of(plain, requests))
    assert tape.replays > len(tape.lengths)


def test_shallow_rows_fill_blocks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 requests of 6 rows at 1:3 take 2 whole and 4 shallow blocks, in step with each other; one
    request among others without a cache advances too, in blocks that it fills alone."""
    network, seen = prepare(tiny_unet()), Counter[tuple[str, int]]()
    for name in ("body_keeping", "shallow"):  # `body` calls the first
        method = getattr(network, name)

        def count(x: Tensor, *others: Any, name: str = name, method: Any = method) -> Any:
            seen[name, len(x)] += 1
            return method(x, *others)

        monkeypatch.setattr(network, name, count)
    cached = [
        request(seed, table(6, scale=1.0), cache=CacheConfig(interval=3)) for seed in range(16)
    ]
    assert len(list(run(network, cached))) == 16
    assert (seen["body_keeping", 16], seen["shallow", 16]) == (2, 4)
    seen.clear()
    engine = Engine(network, shape=SHAPE, slots=33)
    for seed in range(32):
        engine.submit(request(seed, table(20, scale=1.0)))
    ticket = engine.submit(cached[0])
    for _ in range(12):
        engine.step()
    assert ticket not in engine.slots
    assert sum(rows * calls for (_, rows), calls in seen.items()) <= 12 * 32 + 6 * 16


def test_what_cannot_be_cached_is_refused() -> None:
    network = prepare(tiny_unet())
    engine = Engine(network, shape=SHAPE, slots=1)
    with pytest.raises(ValueError, match="cache_branch must be from 0 to 3 for this model, got 4"):
        engine.submit(request(0, cache=CacheConfig(interval=3, branch=4)))
    with pytest.raises(ValueError, match="cache must be at least 2, got 1"):
        CacheConfig(interval=1)
