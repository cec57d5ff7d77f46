"""Kernels that do less than the op must, or do it elsewhere, are refused with the reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench import contest, integrity
from fastdiff.bench.clock import HostTimer
from fastdiff.bench.contest import Conditions, UserKernel, filled, op_row
from fastdiff.bench.integrity import Checked, RefusedError
from fastdiff.bench.plan import PRESETS, called
from fastdiff.bench.result import Entry, Row
from fastdiff.bench.run import Case
from fastdiff.bench.subjects import SUBJECTS

CPU = torch.device("cpu")


def case(op: str, *shape: int) -> Case:
    return Case(
        subject=SUBJECTS[op],
        job_name="",
        job=PRESETS["sd15"],
        call=called(op, shape),
        dtype=torch.float32,
    )


GEGLU = case("geglu", 2, 256, 640)


def right(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def empty(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def caching(key: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    kept: dict[Any, Tensor] = {}

    def kernel(x: Tensor) -> Tensor:
        if key(x) not in kept:
            kept[key(x)] = right(x)
        return kept[key(x)].clone()

    return kernel


def deferring(x: Tensor) -> Tensor:
    y = torch.zeros_like(empty(x))

    def work() -> None:
        time.sleep(0.002)
        y.copy_(right(x))

    threading.Thread(target=work).start()
    return y


def in_place(x: Tensor) -> Tensor:
    y = right(x)
    x[..., :1] += 1
    return y


def reusing() -> Callable[[Tensor], Tensor]:
    buffer = torch.zeros(2, 256, 320)
    return lambda x: buffer.copy_(right(x))


def slower_on_new_operands() -> Callable[[Tensor], Tensor]:
    """A cache by content, which returns a copy."""
    kept: dict[float, Tensor] = {}

    def kernel(x: Tensor) -> Tensor:
        key = x[0, 0, 0].item()
        if key not in kept:
            kept.clear()
            time.sleep(0.005)
            kept[key] = right(x)
        return kept[key].clone()

    return kernel


class Lazy(Tensor):
    """A tensor that could compute itself when it is read."""


def constant(x: Tensor) -> Tensor:
    return torch.full_like(empty(x), 0.3)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda x: torch.zeros_like(empty(x)), "returns zeros"),
        (constant, "returns a constant"),
        (lambda x: right(x) * 1.001, "output is wrong"),
        (lambda x: right(x) / 0, "not finite"),
        (caching(lambda x: x.data_ptr()), "caches its output"),
        (caching(lambda x: "always"), "output is wrong"),
        (slower_on_new_operands(), "caches its output"),
        (deferring, "another thread or stream"),
        (in_place, "changes its operands"),
        (reusing(), "the same memory in every call"),
        (lambda x: right(x)[:1], r"shape \(1, 256, 320\), expected \(2, 256, 320\)"),
        (lambda x: right(x).double(), "dtype float64, expected float32"),
        (lambda x: (right(x), right(x)), "returns 2 tensors, expected 1"),
        (lambda x: right(x).as_subclass(Lazy), "returns a Lazy"),
        (lambda x: None, "returns a NoneType"),
    ],
)
def test_refused(kernel: Callable[[Tensor], Any], reason: str) -> None:
    check = Checked(kernel, eager=right, draw=lambda seed: contest.drawn(GEGLU, CPU, seed))
    with pytest.raises(RefusedError, match=reason):
        check.check()


@pytest.mark.parametrize("op", ["geglu", "group_norm_silu", "add_group_norm_silu", "layer_norm"])
def test_right_kernels_pass(op: str) -> None:
    one = case(op, 2, 64, 8, 8) if "group" in op else case(op, 2, 16, 64)
    subject = one.subject
    for kernel in (subject.eager, subject.ours):
        check = Checked(kernel, eager=subject.eager, draw=lambda s: contest.drawn(one, CPU, s))
        parity = check.check()
        assert parity.holds


def test_a_norm_that_forgets_the_mean_is_wrong() -> None:
    """Operands with a mean of zero would let it pass."""
    one = case("layer_norm", 2, 16, 512)

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-5) * weight + bias

    check = Checked(
        kernel, eager=one.subject.eager, draw=lambda seed: contest.drawn(one, CPU, seed)
    )
    with pytest.raises(RefusedError, match="output is wrong"):
        check.check()


def conditions() -> Conditions:
    return Conditions(timer=HostTimer(), device=CPU, budget_s=0.0)


def test_a_kernel_that_turns_bad_while_it_is_timed_is_refused_afterwards() -> None:
    calls, good = [0], [10**6]

    def kernel(x: Tensor) -> Tensor:
        calls[0] += 1
        return right(x) if calls[0] < good[0] else torch.zeros_like(empty(x))

    Checked(kernel, eager=right, draw=lambda seed: contest.drawn(GEGLU, CPU, seed)).check()
    good[0], calls[0] = calls[0] + 5, 0  # bad from the fourth call after as many checks
    mine = UserKernel(name="mine:kernel", op="geglu", function=kernel)
    row = op_row(GEGLU, conditions(), ours=(), others=("eager",), kernel=mine)
    assert row["mine:kernel"].median_s is None
    assert row["mine:kernel"].note.startswith("refused: after it was timed, it returns zeros")


def test_a_cache_gains_nothing_while_it_is_timed() -> None:
    """Operands change between rounds, so a cache by content computes every time."""
    computed, called_ = [0], [0]
    kept: dict[float, Tensor] = {}

    def kernel(x: Tensor) -> Tensor:
        called_[0] += 1
        key = x.sum().item()
        if key not in kept:
            computed[0] += 1
            kept[key] = right(x)
        return kept[key].clone()

    one = contest._Contest(
        GEGLU, conditions(), UserKernel(name="mine:kernel", op="geglu", function=kernel)
    )
    one.functions = {"eager": lambda: None, "mine:kernel": one._function("mine:kernel")}
    one.entries = {name: Entry(provider=name) for name in one.functions}
    one.row(Row(kind="op", name="geglu", job="", shape="", dtype="float32", method="host"))
    assert computed[0] >= called_[0] - 1  # the warm-up and the first round may share operands


def test_what_is_faster_than_the_hardware_is_refused() -> None:
    row = Row(
        kind="op", name="geglu", job="", shape="", dtype="float32", method="host", limit="copy"
    )
    names = ("eager", "cpu", "mine:kernel", "copy")
    seconds = {"eager": 2.0, "cpu": 1.0, "mine:kernel": 0.9, "copy": 1.0}
    entries = {name: Entry(provider=name) for name in names}
    times = {name: [seconds[name]] * 20 for name in names}
    found = filled(row, entries, times, 1.0, {"cpu", "mine:kernel"})
    assert found["mine:kernel"].median_s is None
    assert "faster than the memory allows, 1.11 times" in found["mine:kernel"].note
    assert found["cpu"].ratio is not None
    assert found["cpu"].ratio.value == pytest.approx(2.0)
    assert found["cpu"].share == pytest.approx(1.0)
    # a limit with four times the work allows a quarter of its time
    found = filled(row, entries, times, 4.0, {"cpu", "mine:kernel"})
    assert found["mine:kernel"].share == pytest.approx(0.25 / 0.9)


def test_one_kernel_that_fails_leaves_the_others() -> None:
    def kernel(x: Tensor) -> Tensor:
        raise RuntimeError("no such shape")

    mine = UserKernel(name="mine:kernel", op="geglu", function=kernel)
    row = op_row(GEGLU, conditions(), ours=("cpu",), others=("eager",), kernel=mine)
    assert row["mine:kernel"].note == "failed: RuntimeError: no such shape"
    assert row["cpu"].ratio is not None
    assert row.baseline == "eager"


def test_a_constant_memory_address_is_not_a_cache() -> None:
    """The allocator returns freed memory, so only results that are kept alive may not overlap."""
    assert integrity.same(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]))
    assert not integrity.same(torch.tensor([float("nan")]), torch.tensor([1.0]))
