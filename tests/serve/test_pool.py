"""Engine processes: nothing is lost when one is killed or hangs, and bits stay the same."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.generate.facts import check
from fastdiff.generate.job import ClassJob, ImageToImageJob, Job, SampleSettings
from fastdiff.serve.app import Service
from fastdiff.serve.engine import Setup
from fastdiff.serve.frames import LENGTHS, Channel
from fastdiff.serve.limits import Limits
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.pool import Pool
from fastdiff.serve.worker import Call, Done, Event, Failed, Made, Partial

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and pass_fds")
STEP = 4.0


@pytest.fixture(scope="module")
def model() -> fastdiff.Model:
    return fastdiff.load("digits")


@pytest.fixture(scope="module")
def pool(model: fastdiff.Model) -> Iterator[Pool]:
    setup = Setup(
        model="digits", load=LoadOptions(), device="cpu", dtype="float32", backend="auto",
        slots=4, graphs=True, threads=1,
    )  # fmt: skip
    made = Pool(model, [setup, setup], Metrics(), queue=64, step=STEP)
    made.start()
    yield made
    made.stop()
    assert made.join(30)


class Caller:
    """A call and the events that it gets."""

    def __init__(self, pool: Pool, *jobs: Job, partials: int = 0) -> None:
        self.events, self.over = list[Event](), threading.Event()
        self.call = Call(
            jobs=[check(job, pool.facts) for job in jobs],
            on_event=self.take,
            flow=object(),
            deadline=time.monotonic() + 120,
            partials=partials,
        )
        pool.submit(self.call)

    def take(self, event: Event) -> None:
        self.events.append(event)
        if not self.call.left:
            self.over.set()

    def results(self) -> list[Made]:
        assert self.over.wait(120)
        done = [event for event in self.events if isinstance(event, Done)]
        return [event.result for event in sorted(done, key=lambda event: event.index)]  # type: ignore[misc]


def job(seed: int, steps: int = 4) -> ClassJob:
    settings = SampleSettings(steps=steps, guidance_scale=1.0)
    return ClassJob(label=seed % 10, seed=seed, settings=settings)


def pids(pool: Pool, *, busy: bool) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [each for each in pool.processes if each["ready"] and (each["images"] or not busy)]
        if found and (busy or len(found) == len(pool.processes)):
            return [each["pid"] for each in found]
        time.sleep(0.01)
    raise AssertionError(f"no process in time: {pool.processes}")


def assert_as_alone(model: fastdiff.Model, made: list[Made], jobs: list[Job]) -> None:
    for got, expected in zip(made, fastdiff.generate(model, jobs), strict=True):
        assert torch.equal(got.image, expected.image)


def test_images_recipes_and_partial_images_of_processes(pool: Pool, model: fastdiff.Model) -> None:
    (first,) = fastdiff.generate(model, [job(0)])
    settings = SampleSettings(steps=4)
    jobs: list[Job] = [job(1), ImageToImageJob(image=first.image, label=3, settings=settings)]
    caller = Caller(pool, *jobs)
    streamed = Caller(pool, job(7, steps=6), partials=2)
    made = caller.results()
    assert_as_alone(model, made, jobs)
    (alone,) = fastdiff.generate(model, [job(1)])
    assert made[0].recipe == alone.recipe
    assert len(streamed.results()) == 1
    numbers = [event.number for event in streamed.events if isinstance(event, Partial)]
    assert numbers == [0, 1]


def test_a_killed_process_loses_nothing(pool: Pool, model: fastdiff.Model) -> None:
    jobs: list[Job] = [job(seed, steps=40) for seed in range(10)]
    callers = [Caller(pool, each, partials=1) for each in jobs]
    killed = pids(pool, busy=True)[0]
    os.kill(killed, signal.SIGKILL)
    made = [result for caller in callers for result in caller.results()]
    assert_as_alone(model, made, jobs)
    for caller in callers:  # no partial image twice
        assert [type(event) for event in caller.events] == [Partial, Done]
    assert killed not in [each["pid"] for each in pool.processes]


def test_a_process_that_hangs_turns_health_red_and_is_replaced(
    pool: Pool, model: fastdiff.Model
) -> None:
    service = Service(name="digits", worker=pool, limits=Limits(step=STEP / 2), metrics=Metrics())
    pids(pool, busy=False)
    jobs: list[Job] = [job(seed, steps=40) for seed in range(4)]
    callers = [Caller(pool, each) for each in jobs]
    hung = pids(pool, busy=True)[0]
    os.kill(hung, signal.SIGSTOP)
    seen = list[dict[str, Any]]()
    while not all(caller.over.is_set() for caller in callers):
        status, body = service.health()
        if status == 503:
            seen.append(body)
        time.sleep(0.05)
    assert {body["status"] for body in seen} == {"hung"}
    assert max(body["step_seconds"] for body in seen) > STEP / 2
    assert_as_alone(model, [made for caller in callers for made in caller.results()], jobs)
    assert hung not in [each["pid"] for each in pool.processes]
    assert service.health()[0] == 200


def test_an_image_that_kills_processes_is_answered(pool: Pool, model: fastdiff.Model) -> None:
    pids(pool, busy=False)
    caller = Caller(pool, job(0, steps=150))
    (first,) = pids(pool, busy=True)
    os.kill(first, signal.SIGKILL)
    while (second := pids(pool, busy=True)) == [first]:
        time.sleep(0.01)
    os.kill(second[0], signal.SIGKILL)
    assert caller.over.wait(60)
    (event,) = caller.events
    assert isinstance(event, Failed)
    assert (event.error.status, event.error.retry_after) == (503, 5)
    assert_as_alone(model, Caller(pool, job(1)).results(), [job(1)])


def test_what_is_no_message_ends_the_connection() -> None:
    for sent in (pickle.dumps([1]), LENGTHS.pack(2**30, 0), LENGTHS.pack(2, 0) + b"{"):
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(sent)
            ours.shutdown(socket.SHUT_WR)
            assert Channel(theirs).receive() is None
            theirs.close()
    ours, theirs = socket.socketpair()
    image = torch.randn(3, 4, 5).mT
    with ours, theirs:
        Channel(ours).send({"id": 3}, {"image": image})
        found = Channel(theirs).receive()
    assert found is not None
    assert found[0] == {"id": 3}
    assert torch.equal(found[1]["image"], image)
