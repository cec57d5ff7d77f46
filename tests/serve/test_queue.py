"""The queue is fair: closed forms of self-clocked fair queueing."""

from __future__ import annotations

import random
from typing import Any

from fastdiff.serve.queue import FairQueue


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_of_one_flow_the_first_is_first() -> None:
    queue = FairQueue[str]()
    for name, cost in (("a", 9.0), ("b", 1.0), ("c", 5.0)):
        queue.add(name, flow=1, cost=cost)
    assert queue.cost == 15
    assert drained(queue) == ["a", "b", "c"]
    assert (queue.cost, queue.first()) == (0, None)


def test_a_short_one_passes_long_ones_of_others() -> None:
    queue = FairQueue[str]()
    for name in "abc":
        queue.add(name, flow="long", cost=50)
    queue.add("s", flow="short", cost=4)
    assert drained(queue) == ["s", "a", "b", "c"]


def test_weights_share_and_nobody_starves() -> None:
    """While all three wait, high gets 4 images for each normal one, and 16 for each low one."""
    queue = FairQueue[str]()
    for name, weight in (("low", 0.25), ("normal", 1.0), ("high", 4.0)):
        for _ in range(64):
            queue.add(name, flow=name, cost=3, weight=weight)
    first = [queue.pop() for _ in range(3 * (16 + 4 + 1))]
    counts = {name: first.count(name) for name in ("low", "normal", "high")}
    assert counts == {"low": 3, "normal": 12, "high": 48}
    queue = FairQueue[str]()
    queue.add("low", flow=0, cost=5, weight=0.25)
    passed = 0
    while True:  # high ones arrive without end
        queue.add("high", flow=passed, cost=5, weight=4.0)
        if queue.pop() == "low":
            break
        passed += 1
    assert passed <= 16


def test_two_flows_share_by_cost() -> None:
    """Flow 1 has images of cost 1, flow 2 of cost 3: of any 4 units each gets about half."""
    queue = FairQueue[str]()
    for number in range(30):
        queue.add(f"1:{number}", flow=1, cost=1)
    for number in range(10):
        queue.add(f"2:{number}", flow=2, cost=3)
    served = {"1": 0, "2": 0}
    for name in drained(queue):
        served[name[0]] += 1 if name[0] == "1" else 3
        assert abs(served["1"] - served["2"]) <= 3 + 1  # one image of each


def test_none_starves_under_a_stream_of_short_ones() -> None:
    """Each passing moves the virtual time on by the short one's cost, so a long one is passed by at
    most cost / cost of these, and one more for equal tags."""
    queue = FairQueue[str]()
    queue.add("long", flow="long", cost=50)
    passed = 0
    for number in range(1000):
        queue.add(f"s{number}", flow=number, cost=4)
        if queue.pop() == "long":
            break
        passed += 1
    assert passed == 12  # tags 4, 8, ..., 48 are below 50


def test_what_leaves_costs_its_flow_nothing() -> None:
    queue = FairQueue[str]()
    for number in range(20):
        queue.add(f"gone{number}", flow="a", cost=10)
    queue.add("b1", flow="b", cost=10)
    queue.add("b2", flow="b", cost=10)
    gone = queue.remove(lambda name: name.startswith("gone"))
    assert (len(gone), len(queue), queue.cost) == (20, 2, 20)
    queue.add("a1", flow="a", cost=10)
    assert drained(queue) == ["b1", "a1", "b2"]


def test_random_mixes_lose_nothing_and_keep_the_order_of_flows() -> None:
    draw = random.Random(3)
    queue, added, left = FairQueue[tuple[int, int]](), list[tuple[int, int]](), list[Any]()
    counts = [0] * 5
    for _ in range(2000):
        if draw.random() < 0.55:
            flow = draw.randrange(5)
            item = (flow, counts[flow])
            counts[flow] += 1
            queue.add(item, flow=flow, cost=draw.uniform(1, 9))
            added.append(item)
        elif len(queue):
            left.append(queue.pop())
    left += [queue.pop() for _ in range(len(queue))]
    assert sorted(left) == sorted(added)
    for flow in range(5):
        own = [number for other, number in left if other == flow]
        assert own == sorted(own)
