"""The worker, driven turn by turn: who joins, leaves and fails, and that bits stay the same."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from fastdiff.generate.facts import Facts, check
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.model import Model, with_generate
from fastdiff.memory import NotEnoughMemory
from fastdiff.serve.errors import ApiError
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.worker import Call, Done, Event, Failed, Partial, Worker, cost_of
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return with_generate(tiny_model())


class Caller:
    """A call and the events that it gets."""

    def __init__(self, worker: Worker, *, seconds: float = 60, partials: int = 0, **fields: Any):
        flow, count = fields.pop("flow", object()), fields.pop("count", 1)
        self.settings = {"steps": 4, "sampler": "euler", "guidance_scale": 2.0, **fields}
        self.events = list[Event]()
        settings = SampleSettings(**self.settings)
        facts = worker.session.facts
        jobs = [check(ClassJob(label=1, seed=n, settings=settings), facts) for n in range(count)]
        self.call = Call(
            jobs=jobs,
            on_event=self.events.append,
            flow=flow,
            deadline=time.monotonic() + seconds,
            partials=partials,
        )
        worker.submit(self.call)

    @property
    def error(self) -> ApiError:
        (event,) = self.events
        assert isinstance(event, Failed)
        return event.error

    def is_as_alone(self, model: Model) -> bool:
        done = [event for event in self.events if isinstance(event, Done)]
        assert len(done) == len(self.call.jobs)
        alone = model.generate(classes=1, seeds=range(len(done)), **self.settings)
        return all(torch.equal(d.result.image, alone[d.index].image) for d in done)


def worker_of(model: Any, *, queue: int = 100, slots: int | None = 8) -> Worker:
    made = Worker(model, Metrics(), queue=queue, slots=slots)
    made.prepare()
    return made


def value(worker: Worker, name: str, **labels: str) -> float:
    found = worker.metrics.registry.get_sample_value(f"fastdiff_{name}", labels)
    return 0.0 if found is None else float(found)


def turns(worker: Worker, callers: list[Caller]) -> int:
    """Take turns until all calls have their images; how many it took."""
    count = 0
    while any(caller.call.left for caller in callers):
        assert worker.turn()
        count += 1
        assert count < 500
    return count


def test_calls_that_join_at_any_time_are_as_alone(model: Model) -> None:
    worker = worker_of(model)
    callers = [Caller(worker, steps=9, count=3)]
    for steps, sampler, scale in ((3, "ddim", 1.0), (5, "heun", 3.0), (2, "euler-ancestral", 1.5)):
        worker.turn()
        callers.append(Caller(worker, steps=steps, sampler=sampler, guidance_scale=scale, count=2))
    turns(worker, callers)
    assert all(caller.is_as_alone(model) for caller in callers)
    assert value(worker, "images_total") == 9
    assert (value(worker, "images_running"), value(worker, "images_waiting")) == (0, 0)


def test_a_client_that_leaves_frees_its_slots_before_the_next_step(model: Model) -> None:
    worker = worker_of(model, slots=2)
    gone = Caller(worker, steps=50, count=2)
    worker.turn()
    waits = Caller(worker, steps=2, count=2)
    worker.turn()
    assert (value(worker, "images_running"), value(worker, "images_waiting")) == (2, 2)
    worker.cancel(gone.call)
    worker.turn()  # another has taken a step in a slot of those that left
    assert value(worker, "images_waiting") <= 1
    assert value(worker, "rows_total") <= 2 * 2 + 2
    turns(worker, [waits])
    assert waits.is_as_alone(model)
    assert gone.events == []
    assert value(worker, "dropped_total", reason="cancelled") == 1


def test_a_call_that_waits_can_leave_too(model: Model) -> None:
    worker = worker_of(model, slots=1)
    first, gone = Caller(worker), Caller(worker, count=3)
    worker.turn()
    worker.cancel(gone.call)
    worker.turn()
    assert value(worker, "images_waiting") == 0
    turns(worker, [first])
    assert first.is_as_alone(model)


def test_the_queue_has_a_limit(model: Model) -> None:
    worker = worker_of(model, queue=3, slots=1)
    callers = [Caller(worker, count=3)]
    with pytest.raises(ApiError) as found:
        Caller(worker)
    error = found.value
    assert (error.status, error.headers) == (429, {"retry-after": "1"})
    worker.turn()  # one has left the queue
    callers.append(Caller(worker))
    turns(worker, callers)
    assert all(caller.is_as_alone(model) for caller in callers)


def test_the_wait_that_clients_are_told_grows_with_the_queue(model: Model) -> None:
    worker = worker_of(model, queue=40, slots=1)
    turns(worker, [Caller(worker, steps=3)])
    waits = []
    for steps in (1, 900):
        Caller(worker, steps=steps, sampler="ddpm", count=20)
        with pytest.raises(ApiError) as found:
            Caller(worker, count=41)
        waits.append(found.value.retry_after or 0)
    assert 1 <= waits[0] < waits[1] <= 60


def test_a_deadline_frees_slots_and_tells_the_client(model: Model) -> None:
    worker = worker_of(model, slots=1)
    late, other = Caller(worker, seconds=0.2, steps=900, sampler="ddpm"), Caller(worker)
    worker.turn()
    time.sleep(0.25)
    turns(worker, [late, other])
    assert (late.error.status, late.error.headers) == (504, {"x-should-retry": "false"})
    assert other.is_as_alone(model)
    assert value(worker, "dropped_total", reason="deadline") == 1


def test_a_short_call_is_done_long_before_a_long_one(model: Model) -> None:
    """The slots are full of long images and more wait; a short call gets the next free slot."""
    worker = worker_of(model, slots=4)
    long = [Caller(worker, steps=24, count=2) for _ in range(4)]
    worker.turn()
    short = Caller(worker, steps=2)
    took = turns(worker, [short])
    assert took <= 24 + 2 + 1  # until the first long ones finish, and its own steps
    assert sum(caller.call.left > 0 for caller in long) >= 2
    turns(worker, long)


def test_partial_images_come_before_the_image(model: Model) -> None:
    worker = worker_of(model)
    callers = [Caller(worker, steps=8, partials=3), Caller(worker, steps=2, partials=3)]
    turns(worker, callers)
    kinds = [[type(event) for event in caller.events] for caller in callers]
    assert kinds == [[Partial] * 3 + [Done], [Partial, Done]]  # 2 steps have one estimate between
    assert [event.number for event in callers[0].events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    assert all(caller.is_as_alone(model) for caller in callers)


def test_of_a_step_that_fails_only_its_images_fail(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(model)
    failing = Caller(worker, count=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            "fastdiff.runtime.engine.Engine.step", lambda self: (_ for _ in ()).throw(RuntimeError)
        )
        worker.turn()
    assert (failing.error.status, failing.error.code) == (500, "server_error")
    later = Caller(worker)
    turns(worker, [later])
    assert later.is_as_alone(model)


def test_of_images_that_are_decoded_together_only_the_bad_one_fails(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(model)
    decode = worker.session.latents.decode

    def refusing(z: torch.Tensor, *, tile: int = 0) -> torch.Tensor:
        if (z > 1e3).any():
            raise ValueError("not finite")
        return decode(z, tile=tile)

    good, bad = Caller(worker, steps=2), Caller(worker, steps=2)
    monkeypatch.setattr(worker.session.latents, "decode", refusing)
    run_step = worker._step

    def step() -> None:
        run_step()
        for latents in worker._latents:
            if latents.image.call is bad.call:
                latents.z.fill_(2e3)

    monkeypatch.setattr(worker, "_step", step)
    turns(worker, [good, bad])
    assert bad.error.code == "not_finite"
    assert good.is_as_alone(model)


def test_nan_fails_one_call_and_spares_its_neighbours(model: Model) -> None:
    worker = worker_of(model)
    good, bad = Caller(worker, steps=5), Caller(worker, steps=5, guidance_scale=3e38)
    turns(worker, [good, bad])
    assert (bad.error.status, bad.error.code) == (400, "not_finite")
    assert good.is_as_alone(model)


def test_closing_finishes_what_was_taken(model: Model) -> None:
    worker = worker_of(model, slots=1)
    worker.start()
    callers = [Caller(worker, steps=6) for _ in range(4)]
    worker.close()
    with pytest.raises(ApiError) as found:
        Caller(worker)
    assert found.value.status == 503
    assert worker.join(60)
    assert all(caller.is_as_alone(model) for caller in callers)


def test_a_crash_fails_all_calls_and_is_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(model, slots=1)
    callers = [Caller(worker, steps=6) for _ in range(3)]
    worker.turn()
    monkeypatch.setattr(worker, "_decode", lambda: 1 / 0)
    worker.start()
    assert worker.join(60)
    assert worker.crashed
    assert not worker.alive
    assert [caller.error.status for caller in callers] == [500] * 3
    with pytest.raises(ApiError):
        Caller(worker)


def test_events_of_many_threads_are_not_mixed(model: Model) -> None:
    """Eight threads submit, and some cancel, while the worker runs."""
    worker = worker_of(model, slots=6)
    worker.start()
    kept, lock = list[Caller](), threading.Lock()

    def client(number: int) -> None:
        for turn in range(4):
            caller = Caller(worker, steps=2 + (number + turn) % 4, count=1 + turn % 2)
            if (number + turn) % 3 == 0:
                worker.cancel(caller.call)
            else:
                with lock:
                    kept.append(caller)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.close()
    assert worker.join(120)
    assert len(kept) > 15
    assert all(caller.is_as_alone(model) for caller in kept)


def test_sizes_and_engines_share_the_room(model: Model) -> None:
    """Images of two sizes run in two engines, which step in turns; each is as alone."""
    worker = worker_of(model, slots=4)
    callers = [Caller(worker, steps=4, count=2)]
    settings = SampleSettings(steps=4, sampler="euler", guidance_scale=2.0)
    job = check(ClassJob(label=1, height=32, width=16, settings=settings), worker.session.facts)
    events = list[Event]()
    large = Call(jobs=[job], on_event=events.append, flow=1, deadline=time.monotonic() + 60)
    worker.submit(large)
    assert turns(worker, callers) <= 9
    while large.left:
        worker.turn()
    alone = model.generate(
        classes=1, seeds=[0], height=32, width=16, steps=4, sampler="euler", guidance_scale=2.0
    )
    (done,) = events
    assert isinstance(done, Done)
    assert torch.equal(done.result.image, alone[0].image)
    assert callers[0].is_as_alone(model)


def test_cached_images_cost_what_they_compute() -> None:
    """Of two clients that always wait, the one whose images reuse features gets more of them."""
    facts = Facts.of(tiny_model())
    costs = [
        cost_of(check(ClassJob(label=1, settings=SampleSettings(steps=8, **more)), facts), facts)
        for more in ({}, {"cache": 2}, {"cache": 8})
    ]
    assert costs[0] > 1.3 * costs[1] > costs[1] > 1.2 * costs[2]
    assert costs[2] > costs[0] / 8  # one of eight is full, and the others are not free


def test_the_memory_of_deep_features_is_checked_for_each_branch(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain requests of the same size have been let in before."""
    monkeypatch.setattr("fastdiff.generate.facts.SMALL", 0)
    worker = worker_of(model, slots=8)
    plain = Caller(worker)
    turns(worker, [plain])

    def check_memory(*_: Any, **__: Any) -> None:
        raise NotEnoughMemory("no room")

    monkeypatch.setattr("fastdiff.generate.memory.check_memory", check_memory)
    again, cached = Caller(worker), Caller(worker, cache=2, cache_branch=1)
    turns(worker, [again, cached])
    monkeypatch.undo()
    assert again.is_as_alone(model)
    assert cached.error.status == 400
