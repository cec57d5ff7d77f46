"""Images for a page: two visitors at a time, and one who leaves."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastdiff

pytest.importorskip("prometheus_client", reason="needs fastdiff[serve]")

from fastdiff.checkpoint import weights as checkpoint_weights
from fastdiff.generate import cost
from fastdiff.serve.errors import ApiError
from fastdiff.serve.limits import Limits
from fastdiff.serve.live import live, read_form
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.worker import Done, Partial, Worker

LIMITS = Limits()


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(fastdiff.load("digits"), Metrics(), queue=8)
    made.start()
    yield made
    made.stop()
    assert made.join(30)


async def picture(worker: Worker, label: str, seed: int) -> tuple[torch.Tensor, int]:
    """The image that a visitor gets, and the number of previews before it."""
    values = {"prompt": label, "seed": seed, "num_inference_steps": 8}
    wanted = read_form(values, worker.facts, LIMITS, served="digits")
    events = [event async for event in live(worker, wanted, LIMITS)]
    assert isinstance(events[-1], Done)
    assert all(isinstance(event, Partial) for event in events[:-1])
    return events[-1].result.image, len(events) - 1


def test_two_visitors_do_not_mix(worker: Worker) -> None:
    async def both() -> list[tuple[torch.Tensor, int]]:
        return await asyncio.gather(picture(worker, "3", 1), picture(worker, "8", 2))

    found = asyncio.run(both())
    alone = [asyncio.run(picture(worker, "3", 1)), asyncio.run(picture(worker, "8", 2))]
    assert not torch.equal(alone[0][0], alone[1][0])
    for (image, previews), (expected, _) in zip(found, alone, strict=True):
        assert previews == 3
        assert torch.equal(image, expected)


def test_leaving_frees_the_slot(worker: Worker) -> None:
    async def leave() -> None:
        values = {"prompt": "5", "num_inference_steps": 60}
        events = live(worker, read_form(values, worker.facts, LIMITS, served="digits"), LIMITS)
        await anext(events)
        await events.aclose()

    asyncio.run(leave())
    end = time.monotonic() + 10
    while worker._running and time.monotonic() < end:
        time.sleep(0.01)
    assert not worker._running
    assert worker.metrics.dropped.labels("cancelled")._value.get() == 1


def test_an_error_names_the_field(worker: Worker) -> None:
    with pytest.raises(ApiError, match="sampler"):
        read_form({"prompt": "3", "sampler": "magic"}, worker.facts, LIMITS, served="digits")


def test_an_image_is_changed_where_its_mask_says(worker: Worker) -> None:
    image = torch.full((1, 32, 32), -1.0)
    mask = torch.zeros(1, 32, 32)
    mask[:, 16:] = 1
    values = {"prompt": "3", "seed": 1, "num_inference_steps": 8, "strength": 1.0}
    wanted = read_form(values, worker.facts, LIMITS, served="digits", image=image, mask=mask)

    async def last() -> Partial | Done:
        return [event async for event in live(worker, wanted, LIMITS)][-1]

    done = asyncio.run(last())
    assert isinstance(done, Done)
    [alone] = fastdiff.load("digits").generate(
        classes=3, seeds=1, steps=8, image=image, mask=mask, strength=1.0
    )
    assert torch.equal(done.result.image, alone.image)
    assert worker.served["group_norm_silu"]


def test_counting_what_a_cached_image_costs_does_not_hold_up_the_loop(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def empty_model(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return checkpoint_weights.empty_model(*args)

    cost.shallow_share.cache_clear()
    monkeypatch.setattr(cost, "empty_model", empty_model)
    values = {"prompt": "3", "num_inference_steps": 6, "cache": 2}
    wanted = read_form(values, worker.facts, LIMITS, served="digits")

    async def last() -> Partial | Done:
        return [event async for event in live(worker, wanted, LIMITS)][-1]

    assert isinstance(asyncio.run(last()), Done)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
