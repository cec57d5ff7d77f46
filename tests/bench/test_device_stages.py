"""The stages of `python -m benchmarks.device` that check and measure, on a CPU."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.device import networks, parity, records, table
from benchmarks.device.dry import dry_jobs
from benchmarks.device.measure import MOST_IMPORTANT, run_cases, tuned_cases
from benchmarks.device.table import ContextLost, Failed, LeftOut, Plan
from fastdiff import kernels
from fastdiff.bench.plain import PLAIN, plain_ops
from fastdiff.bench.record import LAUNCHED, LOOP, LOOP_LAUNCHED, NETWORK
from fastdiff.bench.run import Case, Outcome
from fastdiff.kernels import choose
from tests.kernels.cases import needs_native
from tests.support.tape import Tape

CONTEXT = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(out=tmp_path, seconds=60.0, dry_run=True, commit="abc", part="geglu/cpu")


def saved(plan: Plan) -> dict[tuple[str, str], str]:
    """(benchmark, provider) -> how it was timed, of all records."""
    found = [json.loads(p.read_text())["records"] for p in plan.out.glob("results/*/*.json")]
    return {(r["benchmark"], r["provider"]): r["method"] for of in found for r in of}


# Parity at the shapes of networks


def test_about_80_cases_cover_the_shapes_of_the_networks() -> None:
    found = parity.cases()
    assert 75 <= sum(map(len, found.values())) <= 100
    assert set(found) == set(table.CHECKED)
    labels = {f"{case.job_name} {case.call}" for of in found.values() for case in of}
    for label in (
        "SD 1.5 U-Net (2, 4096, 8, 40)",
        "SD 1.5 U-Net (2, 1024, 8, 80) to 77",
        "SDXL U-Net (2, 4096, 10, 64)",
        "KL-f8 decoder (1, 4096, 1, 512)",
        "KL-f8 decoder (1, 256, 512, 512), bias",
        "SD 1.5 U-Net (2, 320, 64, 64), channel_add",
        "ADM-256 U-Net (8, 256, 256, 256), bias, scale_shift",
    ):
        assert label in labels
    for of in found.values():
        assert {case.dtype for case in of} == {torch.bfloat16}
        assert len({case.call for case in of}) == len(of)


def test_every_op_is_checked_on_every_gpu_backend_attention_first() -> None:
    pairs = {
        f"{op}/{name}"
        for op in table.CHECKED
        for name in kernels.OPS[op].backends
        if name not in ("cpu", "reference")
    }
    assert set(table.PAIRS) == pairs
    assert {pair.partition("/")[0] for pair in table.PAIRS[:3]} == {"attention"}


def geglus() -> list[Case]:
    """The three smallest, cut down."""
    cases = parity.cases()["geglu"][:3]
    shapes = ((2, 8, 64), (2, 8, 128), (2, 8, 256))
    return [
        replace(case, call=replace(case.call, tensors=(shape,)))
        for case, shape in zip(cases, shapes, strict=True)
    ]


def geglu_is(
    monkeypatch: pytest.MonkeyPatch, forward: Callable[[Tensor, Callable[[], Any]], Any]
) -> None:
    """Replace the forward pass of the CPU kernel; it gets x and a function that runs the kernel."""
    op = kernels.OPS["geglu"]
    right = op.backends["cpu"]
    changed = replace(right, forward=lambda x, keep: forward(x, lambda: right.forward(x, keep)))
    monkeypatch.setattr(op, "backends", {**op.backends, "cpu": changed})
    monkeypatch.setattr(op, "candidates", {})


def lines(plan: Plan) -> list[str]:
    return [line["status"] for line in records.parity_lines(plan.out)]


@needs_native
def test_right_kernels_agree_at_their_shapes(plan: Plan) -> None:
    assert parity.checked(geglus(), "cpu", plan) == ["3 of 3 cases agree, 0 not served"]
    assert lines(plan) == ["ok"] * 3


@needs_native
def test_a_wrong_kernel_is_a_failure_and_the_other_cases_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Tensor, right: Callable[[], Any]) -> Any:
        y, kept = right()
        if x.shape[-1] == 128:
            y[0, 0, -1] += 1  # one wrong number among a thousand
        return y, kept

    geglu_is(monkeypatch, wrong)
    with pytest.raises(Failed, match=r"geglu \(2, 8, 128\).*error .* > "):
        parity.checked(geglus(), "cpu", plan)
    assert lines(plan) == ["ok", "failed", "ok"]


@needs_native
def test_bits_that_change_from_run_to_run_are_a_failure(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def wavering(x: Tensor, right: Callable[[], Any]) -> Any:
        y, kept = right()
        ran.append(1)
        if len(ran) % 2:  # the last bit of a number far below the largest
            y.view(torch.int16)[0, 0, 0] ^= 1
        return y, kept

    geglu_is(monkeypatch, wavering)
    with pytest.raises(Failed, match="output 0 differs from run to run"):
        parity.checked(geglus()[:1], "cpu", plan)


def test_a_backend_that_serves_no_case_is_left_out(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was compared, so nothing agrees."""

    def refuse(*_: Any) -> None:
        raise kernels.BackendError("not today", {"cpu": "not today"})

    monkeypatch.setattr(parity, "check", refuse)
    with pytest.raises(LeftOut, match="0 of 3 cases agree, 3 not served"):
        parity.checked(geglus(), "cpu", plan)


@needs_native
def test_a_lost_context_ends_the_process_and_keeps_the_cases_before(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(x: Tensor, right: Callable[[], Any]) -> Any:
        if x.shape[-1] == 128:
            raise RuntimeError(CONTEXT)
        return right()

    geglu_is(monkeypatch, losing)
    with pytest.raises(ContextLost, match="illegal memory access"):
        parity.checked(geglus(), "cpu", plan)
    assert lines(plan) == ["ok", "lost context"]


@needs_native
def test_a_context_lost_while_timing_keeps_the_timings_before(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(x: Tensor) -> Tensor:
        raise RuntimeError(CONTEXT)

    case = replace(geglus()[0], providers=("reference", "eager"))
    lost = replace(case, subject=replace(case.subject, eager=losing))
    with pytest.raises(ContextLost, match="illegal memory access"):
        run_cases(plan, [case, lost, case], time.monotonic() + 60)
    assert set(saved(plan)) == {("geglu", "reference"), ("geglu", "eager"), ("geglu", "copy")}


def test_cases_without_time_are_a_failure(plan: Plan) -> None:
    with pytest.raises(Failed, match="no time for 3 of 3 cases"):
        parity.checked(geglus(), "cpu", replace(plan, seconds=-1.0))


# Networks


@pytest.mark.parametrize("op", PLAIN)
def test_plain_ops_compute_the_formula(op: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def addends() -> dict[str, Tensor]:
        return {"channel_add": draw(2, 32), "residual": draw(2, 32, 4, 4)}

    norm = (draw(2, 32, 4, 4), 8, draw(32), draw(32))
    film = {"scale_shift": draw(2, 64), "eps": 1e-6}
    cat = (norm[0], draw(2, 16, 4, 4), 8, draw(48), draw(48))
    product = (draw(3, 16), draw(24, 16), draw(24))
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "group_norm_silu": [(norm, film), (norm, {"activation": "none"})],
        "add_group_norm_silu": [(norm, {**film, **addends()}), (norm, {"residual": norm[0]})],
        "layer_norm": [((draw(3, 16), draw(16), draw(16)), {"eps": 1e-3})],
        "add_layer_norm": [((draw(3, 16), draw(3, 16), draw(16), draw(16)), {})],
        "attention": [((draw(2, 5, 3, 8), draw(2, 7, 3, 8), draw(2, 7, 3, 8)), {"scale": 0.4})],
        "geglu": [((draw(3, 16),), {})],
        "cat_group_norm_silu": [(cat, {}), (cat, addends())],
        "linear_geglu": [((draw(3, 16), draw(24, 16), draw(24)), {})],
        "linear_add": [
            (product, {}),
            (product, {"addend": draw(3, 16), "residual": draw(3, 24)}),
        ],
        "cat_linear": [((draw(3, 10), draw(3, 6), draw(24, 16), draw(24)), {})],
    }
    for args, options in calls[op]:
        with plain_ops():
            found = getattr(kernels, op)(*args, **options)
        bound = choose.bound_arguments(op, args, options)
        formula = kernels.OPS[op].formula
        expected = formula(**dict(zip(inspect.signature(formula).parameters, bound, strict=False)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert set(kernels.OPS[op].backends) > {"reference"}  # they are back


def test_every_op_of_the_timed_networks_has_a_plain_form() -> None:
    """Otherwise the network of plain operators, our rival, would call our kernels."""
    of_others = {"ada_layer_norm", "gate_residual", "philox_normal"}
    outside_networks = {"sampler_step", "gather_rows"}
    assert kernels.OPS.keys() - PLAIN.keys() == of_others | outside_networks


def test_networks_are_timed_both_ways(plan: Plan) -> None:
    notes = networks.unet(plan)
    assert "digits U-Net: ours agrees with plain ops in fp64" in notes
    assert "digits decoder: ours agrees with plain ops in fp64" in notes
    assert any(re.fullmatch(r"doubling 1 x 8 x 4 x 4: .* us, folded .* x", n) for n in notes)
    providers = ("auto", "auto, cudnn.benchmark", "plain")
    assert set(saved(plan)) == {(b, p) for b in (NETWORK, LAUNCHED) for p in providers}


def test_a_wrong_network_is_measured_and_is_a_failure(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def wrong() -> Iterator[None]:
        op = kernels.OPS["group_norm_silu"]
        before = op.backends
        op.use(
            {n: b.wrapped(lambda f: lambda *a: (f(*a)[0] * 1.05, None)) for n, b in before.items()}
        )
        try:
            yield
        finally:
            op.use(before)

    monkeypatch.setattr(networks, "nullcontext", wrong)
    with pytest.raises(Failed) as failure:
        networks.unet(plan)
    assert "digits U-Net: AssertionError: result: error" in str(failure.value.args[0])
    assert (NETWORK, "auto") in saved(plan)


def test_networks_in_inductor_are_timed(plan: Plan) -> None:
    """With the backend "eager" of torch.compile, as in a dry run."""
    networks.inductor(plan)
    assert set(saved(plan)) >= {
        (NETWORK, "compile"),
        (NETWORK, "compile reduce-overhead"),
        (LAUNCHED, "compile"),
    }


def test_the_loop_is_one_recording_and_its_replays_are_checked(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = networks.loop(plan)
    assert [note.partition(":")[0] for note in notes if "1 recording serves" in note] == [
        "auto", "plain",
    ]  # fmt: skip
    timed = saved(plan)
    assert set(timed) == {(b, p) for b in (LOOP, LOOP_LAUNCHED) for p in ("auto", "plain")}

    class Forgetful(Tape):
        """Replays nothing after the first replay."""

        def record(self, function: Callable[[], None]) -> Callable[[], object]:
            replay = super().record(function)
            left = [replay]
            return lambda: left.pop()() if left else None

    monkeypatch.setattr(networks, "_recorder", lambda plan: Forgetful())
    with pytest.raises(Failed, match="AssertionError"):
        networks.loop(plan)


def test_without_time_what_is_left_out_is_named(plan: Plan) -> None:
    late = replace(plan, seconds=-1.0)
    for stage, first in ((networks.unet, "digits U-Net"), (networks.loop, "digits U-Net by auto")):
        notes = stage(late)
        assert notes[:2] == [
            "0 timings",
            f"1 cases left out for lack of time, from {first} on",
        ]


def test_inputs_are_random_and_repeat() -> None:
    """Products of zeros run faster."""
    job = dry_jobs()["digits U-Net"]
    (_, one), (_, same), (_, other) = (
        networks._built(job, torch.device("cpu"), seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one["x"], same["x"])
    assert not torch.equal(one["x"], other["x"])
    assert one["x"].float().std() > 0.5


def test_five_classes_are_tuned() -> None:
    known = {(case.tunable, case.shape_class) for case in tuned_cases()}
    assert len(set(MOST_IMPORTANT)) == 5
    assert set(MOST_IMPORTANT) <= known


def test_timings_that_may_include_the_hosts_time_are_counted(plan: Plan) -> None:
    job = dry_jobs()["digits U-Net"]
    timing = networks.Timing.of("events+host", [1.0])
    record = networks.gpu_networks.record_of("digits U-Net", job, "auto", timing)
    assert record.method == "events+host"
    records.save(plan, [record])
    assert saved(plan) == {(NETWORK, "auto"): "events+host"}
    notes = records.summarized(Outcome(records=[record]))
    assert notes[0] == "1 timings, 1 of them marked: the host's time may be in them"
