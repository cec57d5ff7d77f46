"""The slot engine: the bits of a request do not depend on other requests in the same step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.sampling import Step, sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.unet import UNet
from fastdiff.runtime.conditions import Condition, class_conditions
from fastdiff.runtime.engine import Engine, Request, Result
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import run
from tests.support.tiny import UNET, tiny_unet

SHAPE = (3, 4, 4)
SCHEDULE = NoiseSchedule(ScheduleConfig())
SAMPLERS = ("ddim", "heun", "plms", "dpmpp-2m-sde", "euler-ancestral", "dpmpp-sde", "dpm-solver-3")
TEXT = replace(UNET, in_channels=5, context_dim=24, num_classes=None, null_class=False)


def images(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(
    steps: int = 4, sampler: str = "ddim", scale: float = 2.0, **options: Any
) -> SamplerTable:
    return build_table(sampler, SCHEDULE, steps, prediction="eps", guidance_scale=scale, **options)


CLASSES = {label: Condition(label=label) for label in range(5)}  # 4 is the null class


def request(seed: int, rows: SamplerTable | None = None, label: int = 0, **more: Any) -> Request:
    return Request(
        table=table() if rows is None else rows,
        x=images(*SHAPE, seed=seed),
        seed=seed,
        condition=CLASSES[label],
        unconditional=CLASSES[4],
        **more,
    )


def wide(config=UNET) -> UNet:
    """A network so wide that oneDNN's convolutions depend on the batch size."""
    return prepare(tiny_unet(replace(config, model_channels=32, head_dim=32)))


@pytest.fixture(scope="module")
def unet() -> UNet:
    return prepare(tiny_unet())


def finish(engine: Engine) -> dict[int, Result]:
    left: dict[int, Result] = {}
    while engine.busy:
        left |= {result.ticket: result for result in engine.step()}
    return left


def alone(network: UNet, wanted: Request) -> Tensor:
    (result,) = run(network, [wanted])
    return result.x


def random_requests(count: int, *, text: bool) -> Iterator[Request]:
    """Requests with any sampler and 1 to 30 steps, some guided, also in an interval or rescaled,
    and some that start in the middle."""
    rng = random.Random(count)
    prompts = [Condition(context=images(1, 7, 24, seed=seed)) for seed in range(4)]
    for number in range(count):
        steps = rng.randint(1, 30)
        options: dict[str, Any] = {}
        if rng.random() < 0.3:
            options["guidance_interval"] = (0, rng.randint(1, steps))
        if rng.random() < 0.3:
            options["guidance_rescale"] = 0.7
        if steps > 3 and rng.random() < 0.2:
            options["start"] = rng.randint(1, steps - 1)
        scale = rng.choice((1.0, 1.0, 1.5, 4.0))
        made = request(
            number, table(steps, rng.choice(SAMPLERS), scale, **options), rng.randint(0, 4)
        )
        if text:
            made = replace(
                made,
                condition=rng.choice(prompts[1:]),
                unconditional=prompts[0],
                extra=images(2, 4, 4, seed=number + 1000),
            )
        elif rng.random() < 0.2:
            made = replace(
                made,
                mask=(images(1, 4, 4, seed=number) > 0).float(),
                known=images(*SHAPE, seed=number + 1),
                noise=images(*SHAPE, seed=number + 2),
            )
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(("count", "text"), [(140, False), (60, True)], ids=["classes", "text"])
def test_every_request_has_the_same_bits_as_alone(count: int, text: bool) -> None:
    """Requests arrive at random times in random slots, and some move to another slot."""
    network, rng = wide(TEXT if text else UNET), random.Random(7)
    requests = list(random_requests(count, text=text))
    waiting, engine = (
        list(enumerate(requests)),
        Engine(network, shape=SHAPE, slots=11, tokens=7 if text else 0),
    )
    places: dict[int, int] = {}
    found: dict[int, Tensor] = {}
    moved = 0
    while waiting or engine.busy:
        for _ in range(min(rng.choice((0, 0, 1, 2, 5)), engine.free, len(waiting))):
            place, wanted = waiting.pop(rng.randrange(len(waiting)))
            places[engine.submit(wanted)] = place
        if engine.busy and engine.free and rng.random() < 0.2:
            slot = rng.choice([slot for slot in range(11) if slot not in engine.slots.values()])
            engine.move(rng.choice(list(engine.slots)), slot)
            moved += 1
        for result in engine.step():
            found[places[result.ticket]] = result.x
            assert result.error is None
    assert moved > 10
    assert sorted(found) == list(range(count))
    different = [i for i in found if not torch.equal(alone(network, requests[i]), found[i])]
    assert different == []
    assert len({x.numpy().tobytes() for x in found.values()}) == count


def test_the_engine_agrees_with_the_sampling_loop() -> None:
    """Results in fp64 agree with `sample` and UNet.forward, so no condition or noise is missed."""
    exact = prepare(tiny_unet(), dtype=torch.float64)
    requests = [
        request(seed, table(5, sampler, scale, **options), seed % 4)
        for seed, (sampler, scale, options) in enumerate(
            (sampler, scale, options)
            for sampler in SAMPLERS
            for scale, options in (
                (1.0, {}),
                (3.0, {"guidance_rescale": 0.5}),
                (2.0, {"guidance_interval": (1, 3)}),
            )
        )
    ]
    for result in run(exact, requests, slots=4):
        made = result.request
        timesteps = made.table.timesteps.tolist()

        def predict(x: Tensor, row: int, made=made, timesteps=timesteps) -> Tensor:
            labels = [made.condition.label]
            if made.table.guided[row]:
                x, labels = torch.cat([x, x]), [4, made.condition.label]
            t = torch.full((len(x),), timesteps[row])
            return exact(x, t, y=torch.tensor(labels))

        wanted = sample(predict, made.table, made.x[None].double(), [made.seed])[0]
        torch.testing.assert_close(result.x, wanted, rtol=1e-9, atol=1e-9)


def test_held_pixels_equal_the_known_ones(unet: UNet) -> None:
    """Lugmayr et al. 2022, eq. 8: after each row they have the noise level of the next row, and at
    the end they are exact."""
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    known, noise = images(*SHAPE, seed=3), images(*SHAPE, seed=4)
    rows = table(4, "heun")
    held = request(1, rows, mask=mask, known=known, noise=noise)
    steps: list[Tensor] = []
    results = run(unet, [held, request(2)], slots=2, on_step=lambda step: steps.append(step.x[0]))
    first = next(result for result in results if result.request is held)
    list(results)
    assert torch.equal(first.x[:, 2:], known[:, 2:])
    assert not torch.equal(first.x, alone(unet, request(1, rows)))
    for row, x in enumerate(steps[: len(rows) - 1]):
        sigma = float(rows.sigmas[row + 1])
        level = (known.double() + sigma * noise.double()) / math.sqrt(1 + sigma**2)
        torch.testing.assert_close(x[:, 2:].double(), level[:, 2:], rtol=1e-5, atol=1e-6)


def test_cancelling_leaves_the_others_alone(unet: UNet) -> None:
    requests = [request(seed, table(6), label=seed % 4) for seed in range(5)]
    engine = Engine(unet, shape=SHAPE, slots=5)
    tickets = [engine.submit(wanted) for wanted in requests]
    engine.step()
    engine.cancel(tickets[2])
    engine.cancel(tickets[0])
    assert (engine.busy, engine.free) == (3, 2)
    late = engine.submit(request(9))
    left = finish(engine)
    assert sorted(left) == sorted([tickets[1], tickets[3], tickets[4], late])
    for place in (1, 3, 4):
        assert torch.equal(left[tickets[place]].x, alone(unet, requests[place]))
    assert torch.equal(left[late].x, alone(unet, request(9)))
    for ticket in (tickets[0], late):
        for method in (engine.cancel, engine.preview):
            with pytest.raises(ValueError, match=f"request {ticket} is not in the engine"):
                method(ticket)


def test_previews_and_callbacks_get_the_estimate_of_x0(unet: UNet) -> None:
    """x0 = (x - sigma eps) / alpha, for the requests whose preview was requested."""
    engine = Engine(unet, shape=SHAPE, slots=3)
    requests = [request(seed, table(6, scale=1.0), label=seed) for seed in range(3)]
    tickets = [engine.submit(wanted) for wanted in requests]
    engine.step()
    assert engine.previews == {}
    engine.preview(tickets[1])
    seen: list[tuple[list[int], Tensor, Tensor]] = []
    engine.step()
    engine.step(watch=lambda *what: seen.append(what))
    assert list(engine.previews) == [tickets[1]]
    x = requests[1].x[None]
    with torch.no_grad():
        for row, t in enumerate(requests[1].table.timesteps[:3].tolist()):
            eps = unet(x, torch.tensor([t]), y=torch.tensor([1]))
            alpha = float(SCHEDULE.alpha(torch.tensor([t])))
            sigma = math.sqrt(1 - alpha**2)
            denoised = (x - sigma * eps) / alpha
            if row == 1:
                torch.testing.assert_close(
                    engine.previews[tickets[1]], denoised[0], rtol=1e-3, atol=1e-3
                )
            following = float(SCHEDULE.alpha(requests[1].table.timesteps[row + 1 : row + 2]))
            x = following * denoised + math.sqrt(1 - following**2) * eps
    ((who, now, estimates),) = seen
    assert list(who) == tickets
    torch.testing.assert_close(estimates[1], denoised[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(now[1], x[0], rtol=1e-3, atol=1e-3)
    plain = {result.ticket: result.x for result in finish(engine).values()}
    assert all(
        torch.equal(plain[t], alone(unet, r)) for t, r in zip(tickets, requests, strict=True)
    )


def counted(network: UNet, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that collects the number of rows of each evaluation."""
    seen: list[int] = []
    body = network.body

    def count(x: Tensor, *others: Any) -> Tensor:
        seen.append(len(x))
        return body(x, *others)

    monkeypatch.setattr(network, "body", count)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["all", "some"])
def test_few_rows_are_padding(unet: UNet, guidance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, tables = random.Random(3), {}
    for steps in (10, 50):
        for scale in (1.0, 2.0):
            tables[steps, scale] = table(steps, scale=scale)
    requests = [
        request(seed, tables[rng.choice((10, 50)), rng.choice((1.0, 2.0, 2.0, 2.0))])
        if guidance == "some"
        else request(seed, tables[rng.choice((10, 50)), 2.0])
        for seed in range(96)
    ]
    own = sum(len(r.table) + sum(r.table.guided) for r in requests)
    seen = counted(unet, monkeypatch)
    assert len(list(run(unet, requests))) == 96
    assert set(seen) == {16}
    assert own <= sum(seen) <= 1.1 * own


def test_nine_requests_cost_little_more_than_their_rows(
    unet: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 rows per step would need two blocks of 16; by taking turns, they fill one at a time."""
    seen = counted(unet, monkeypatch)
    requests = [request(seed, table(16)) for seed in range(9)]
    results = list(run(unet, requests))
    assert len(seen) <= 16 * 9 * 2 / 16 + 2
    for place in (0, 8):
        found = next(result.x for result in results if result.request is requests[place])
        assert torch.equal(found, alone(unet, requests[place]))


def test_tables_do_not_accumulate(unet: UNet) -> None:
    engine, rng = Engine(unet, shape=SHAPE, slots=4), random.Random(5)
    longest = 0
    for seed in range(60):
        rows = table(rng.randint(1, 12), scale=1.0)
        longest = max(longest, len(rows))
        held = {"mask": torch.ones(1, 4, 4), "known": torch.ones(SHAPE), "noise": torch.ones(SHAPE)}
        engine.submit(request(seed, rows, seed % 4, **held))
        while not engine.free:
            engine.step()
    finish(engine)
    for stack in (engine._slots._stack, engine._levels, engine._denoiser.embeddings):
        assert len(stack.rows) <= 4 * 4 * longest
        assert not stack._parts
    assert not engine._denoiser._contexts


def test_a_poisoned_request_fails_alone() -> None:
    """NaN in one prompt is reported at its first step, and no bit of other requests changes."""
    network = prepare(tiny_unet(TEXT))
    prompts = [Condition(context=images(1, 7, 24, seed=seed)) for seed in range(4)]
    prompts[2] = Condition(context=torch.full((1, 7, 24), float("nan")))
    requests = [
        replace(
            request(seed, table(5, SAMPLERS[seed])),
            condition=prompts[1 + seed % 3],
            unconditional=prompts[0],
            extra=images(2, 4, 4, seed=seed),
        )
        for seed in range(5)
    ]
    results = {requests.index(r.request): r for r in run(network, requests, check=False)}
    message = "the network returned NaN or infinity at step 0 .row 0 of"
    for place, result in results.items():
        if requests[place].condition is prompts[2]:
            assert result.error is not None
            assert result.error.startswith("the network returned NaN or infinity at step 0 (row 0")
            assert result.rows == 1
        else:
            assert result.error is None
            assert torch.equal(result.x, alone(network, requests[place]))
    with pytest.raises(ValueError, match=rf"{message}.*\(request 1, counted from 0\)"):
        list(run(network, requests))


def test_a_request_may_fail_late(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    body, calls = unet.body, 0

    def breaks(x: Tensor, *others: Any) -> Tensor:
        nonlocal calls
        calls += 1
        out = body(x, *others)
        if calls == 3:
            out[2] = float("inf")  # the row of the third request
        return out

    monkeypatch.setattr(unet, "body", breaks)
    seen: list[tuple[int, int]] = []
    requests = [request(seed, table(5, scale=1.0)) for seed in range(4)]
    results = list(run(unet, requests, check=False, progress=lambda *now: seen.append(now)))
    (bad,) = (result for result in results if result.error)
    assert bad.request is requests[2]
    t = float(bad.request.table.timesteps[2])
    assert f"at step 2 (row 2 of 5, t = {t:g})" in str(bad.error)
    assert bad.rows == 3
    assert seen == [(4, 20), (8, 20), (14, 20), (17, 20), (20, 20)]


def test_shapes_and_token_counts_take_turns() -> None:
    """Three shape classes in one stream: requests of other classes wait, but not forever."""
    network = prepare(tiny_unet(TEXT))
    prompts = {n: Condition(context=images(1, n, 24, seed=n)) for n in (7, 14)}
    requests = []
    for seed in range(12):
        side, tokens = ((4, 7), (4, 14), (8, 7))[seed % 3]
        requests.append(
            Request(
                table=table(3),
                x=images(3, side, side, seed=seed),
                seed=seed,
                condition=prompts[tokens],
                unconditional=prompts[tokens],
                extra=images(2, side, side, seed=seed),
            )
        )
    taken = 0

    def stream() -> Iterator[Request]:
        nonlocal taken
        for wanted in requests:
            taken += 1
            yield wanted

    order: list[int] = []
    seen: list[tuple[int, int]] = []
    for result in run(network, stream(), slots=2, progress=lambda *now: seen.append(now)):
        place = requests.index(result.request)
        order.append(place)
        assert torch.equal(result.x, alone(network, requests[place]))
        assert taken <= len(order) + 4  # two in slots and two waiting
    assert sorted(order) == list(range(12))
    assert order.index(1) < 8
    assert seen[-1] == (36, 36)


def test_steps_list_their_requests(unet: UNet) -> None:
    steps: list[Step] = []
    requests = [request(seed, table(3, scale=1.0)) for seed in range(5)]
    results = list(run(unet, requests, slots=2, on_step=steps.append))
    assert [step.done for step in steps] == [2, 4, 6, 8, 10, 12, 13, 14, 15]
    assert {step.total for step in steps} == {15}
    assert [list(step.samples) for step in steps] == [[0, 1]] * 3 + [[2, 3]] * 3 + [[4]] * 3
    assert torch.equal(steps[2].x[1], results[1].x)
    assert all(step.x.shape == step.denoised.shape for step in steps)
    torch.testing.assert_close(steps[-1].denoised[0], results[-1].x)  # ddim ends at x0


def test_a_request_without_rows_is_returned_unchanged(unet: UNet) -> None:
    nothing = request(0, table(4, start=4))
    assert len(nothing.table) == 0
    assert torch.equal(alone(unet, nothing), nothing.x)


def without(name: str) -> Callable[[Request], Request]:
    return lambda wanted: replace(wanted, **{name: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, x=r.x[:2]), r"takes x of shape \(3, 4, 4\) and 0 tokens, got \(2,"),
        (lambda r: replace(r, extra=r.x[:1]), "takes 3 channels, got 3 of x and 1 extra"),
        (without("unconditional"), "the table is guided, so unconditional must be a condition"),
        (lambda r: replace(r, mask=r.x[:1]), "mask, known and noise must be given together"),
        (lambda r: replace(r, seed=2**64), "a whole number of at most 64 bits"),
        (
            lambda r: replace(r, condition=Condition(context=torch.zeros(1, 7, 24))),
            "0 tokens, got .* and 7",
        ),
        (lambda r: replace(r, condition=Condition()), "y must be int64 class labels"),
    ],
)
def test_requests_that_do_not_fit(unet: UNet, change: Callable, message: str) -> None:
    engine = Engine(unet, shape=SHAPE, slots=1)
    with pytest.raises(ValueError, match=message):
        engine.submit(change(request(0)))
    ticket = engine.submit(request(0))  # the failed one takes no slot
    with pytest.raises(ValueError, match="all 1 slots are occupied"):
        engine.submit(request(1))
    assert torch.equal(finish(engine)[ticket].x, alone(unet, request(0)))


def test_sides_and_contexts_that_do_not_fit() -> None:
    folded = prepare(tiny_unet(replace(UNET, downsample_padding="asymmetric")))
    with pytest.raises(ValueError, match=r"positive multiples of 2, got \(5, 4\)"):
        alone(folded, replace(request(0), x=torch.zeros(3, 5, 4)))
    with pytest.raises(ValueError, match="takes a context, got a condition with 0 tokens"):
        alone(prepare(tiny_unet(TEXT)), request(0))


def test_class_conditions_are_shared() -> None:
    conditions, unconditional = class_conditions(UNET, [1, 2, 1], guided=True)
    assert conditions[0] is conditions[2]
    assert unconditional is not None
    assert unconditional[0] is unconditional[1]
