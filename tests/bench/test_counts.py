"""The host's cost of op calls, in units of one add and with stubbed launches."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastdiff import kernels
from fastdiff.bench import counts, host
from fastdiff.bench.counts import HostCost
from fastdiff.bench.record import ROOT

compiled = pytest.mark.skipif(
    find_spec("fastdiff.kernels._native") is None, reason="the compiled module is not built here"
)
SLOWER_S = 300e-6
SLOW = f"""
import time as _time

_fast = geglu


def geglu(x):
    end = _time.perf_counter() + {SLOWER_S}
    while _time.perf_counter() < end:
        pass
    return _fast(x)
"""
"""Appended to ``kernels/__init__.py``."""


@pytest.fixture(scope="module")
def slow_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a geglu that waits."""
    folder = tmp_path_factory.mktemp("checkout")
    skipped = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("fastdiff", "kernels"):  # the link fastdiff/kernels then points to the copy
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=skipped)
    with (folder / "kernels" / "__init__.py").open("a") as file:
        file.write(SLOW)
    return folder


def costs(**options: object) -> dict[tuple[str, str], HostCost]:
    found = counts.host_costs(**{"rounds": 40, **options})  # type: ignore[arg-type]
    return {(cost.backend, cost.mode): cost for cost in found}


@compiled
def test_a_stubbed_launch_runs_once_and_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    native = import_module("fastdiff.kernels._native")
    real, ran = native.geglu, []

    def seen(*args: object) -> object:
        ran.append(args)
        return real(*args)

    monkeypatch.setattr(native, "geglu", seen)
    x, stub = torch.randn(4, 32), host.Stub()
    with torch.inference_mode():
        expected = kernels.geglu(x)
        with host.stubbed("cpu", stub):
            for _ in range(3):
                kernels.geglu(x)
        assert (stub.launches, len(ran)) == (3, 2)  # one before the block
        assert torch.equal(kernels.geglu(x), expected)
    assert (stub.launches, len(ran)) == (3, 3)


@pytest.mark.slow
@compiled
def test_launches_and_costs_of_every_backend() -> None:
    """One launch forward, one backward. An op costs more than an add, and more with a gradient."""
    found = costs(ops=["geglu"])
    assert {case: cost.launches for case, cost in found.items()} == {
        (backend, mode): launches
        for backend in ("cpu", "triton", "cuda")
        for mode, launches in (("inference", 1), ("gradient", 2))
    }
    for backend in host.BACKENDS:
        inference, gradient = found[backend, "inference"].cost, found[backend, "gradient"].cost
        assert inference is not None
        assert gradient is not None
        assert 1 < inference < gradient < 1000


FUNCTIONS = 80
"""Most functions, in Python and in C, that a planned call of any op may call. Below 72 on Python
3.11; before plans, 200 to 500. Some ten of these take as long as two tiny adds."""
UNITS = {"triton": 19, "cuda": 15}
"""Most tiny adds that a planned call may cost."""


def test_planned_calls_are_short() -> None:
    """Counted, not timed, so the same on a busy machine; timed with the limits doubled."""
    found = list(counts.host_costs(backends=list(UNITS), modes=["inference"], rounds=8))
    assert {(cost.op, cost.backend) for cost in found} == {
        (op, backend) for op in kernels.OPS for backend in UNITS
    }
    for cost in found:
        if not kernels.OPS[cost.op].backends[cost.backend].planned:
            continue  # PyTorch's products, which a plan cannot repeat
        assert cost.cost is not None, cost
        assert 0 < cost.functions <= FUNCTIONS, cost
        assert cost.cost < 2 * UNITS[cost.backend], cost


def test_the_host_s_part_of_a_whole_evaluation() -> None:
    """Stable Diffusion 1.5's U-Net: the issue allows 3,000 tiny adds for all our ops together,
    which is 19 per call. 64 functions a call cost about 12. It has 61 GroupNorms, of which Triton
    concatenates before 12, 48 LayerNorms and 32 attentions, besides products."""
    least = {"triton": 49 + 48 + 32, "cuda": 61 + 48 + 32}
    for cost in counts.evaluation_costs("SD 1.5 U-Net", rounds=4):
        calls = int(cost.op.split(", ")[1].split()[0])
        assert calls >= least[cost.backend]
        assert cost.launches >= calls
        assert 0 < cost.functions < 70 * calls
        assert cost.cost is not None
        assert cost.cost < 2 * 3000


@pytest.mark.slow
def test_slower_code_costs_more(slow_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"ops": ["geglu"], "backends": ["triton"], "modes": ["inference"]}
    cost = costs(**options, against=slow_checkout)["triton", "inference"]
    assert cost.cost is not None
    assert cost.other_cost is not None
    assert cost.ratio is not None
    assert cost.ratio < 0.5
    # 300 µs are more than 100 adds unless an add takes 3 µs
    assert cost.other_cost - cost.cost > 100
    words = ["host", "--op", "geglu", "--backend", "triton", "--mode", "inference", "--json"]
    words += ["--rounds", "8", "--against", str(slow_checkout), "--at-most", "0.001"]
    assert counts.main(words) == 1
    printed = capsys.readouterr()
    (found,) = json.loads(printed.out)
    assert (found["op"], found["backend"], found["launches"]) == ("geglu", "triton", 1)
    assert "counts: geglu triton inference costs 0." in printed.err


@pytest.mark.slow
def test_the_reason_is_given_for_calls_that_cannot_be_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["host", "--op", "philox_normal", "--backend", "cuda", "--mode", "gradient"]
    assert counts.main(words) == 2
    printed = capsys.readouterr()
    assert "philox_normal cuda gradient: it has no gradient" in printed.out
    assert counts.main(["host", "--op", "gelu"]) == 2
    assert "unknown op gelu; expected some of ada_layer_norm, add_" in capsys.readouterr().err


def test_options_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["host", "--at-most", "1"], "so it needs --against CHECKOUT"),
        (["host", "--against", str(tmp_path)], "does not contain the package fastdiff"),
    ):
        with pytest.raises(SystemExit):
            counts.main(words)
        assert message in capsys.readouterr().err


def test_the_table() -> None:
    done = HostCost(
        op="geglu", backend="cpu", mode="inference", launches=1, functions=31, cost=5.84
    )
    compared = HostCost(
        op="attention", backend="cuda", mode="gradient", launches=3, functions=250, cost=91.2,
        other_cost=95.1, ratio=0.9591,
    )  # fmt: skip
    absent = HostCost(op="geglu", backend="cuda", mode="inference", missing="no library")
    assert counts.table([done, compared, absent]).splitlines()[1:] == [
        "geglu      cpu      inference         1         31   5.8",
        "attention  cuda     gradient          3        250  91.2         95.1  0.959",
    ]
