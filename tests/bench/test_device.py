"""What `python -m benchmarks.device` does on a GPU, tested without one; test_device_runner.py tests
how its processes are run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.device import command, measure, prepare, sanitize, table
from benchmarks.device import records as kept
from benchmarks.device.table import ContextLost, Failed, LeftOut, Plan
from benchmarks.networks import gpu_networks
from fastdiff import kernels
from fastdiff.bench import gpu_report, providers, report, shapes
from fastdiff.bench import run as bench_run
from fastdiff.bench.clock import HostTimer
from fastdiff.bench.ops import sampler_step
from fastdiff.bench.providers import LATER, Make, Subject
from fastdiff.bench.record import Record
from fastdiff.bench.run import Case, Outcome
from fastdiff.bench.shapes import Call, Job
from fastdiff.bench.subjects import NETWORK_OPS, SUBJECTS
from fastdiff.bench.watch import watched
from fastdiff.kernels import Work, choose
from tests import cuda_host
from tests.kernels import cases as kernel_cases
from tests.kernels.routes import cuda_kernels

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
JOB = Job(network="unet", preset="digits", size=2, batch=1)
GEGLU = Case(
    subject=SUBJECTS["geglu"], job_name="a job", job=JOB, call=Call("geglu", ((1, 4, 32),))
)


# The cases


def test_a_call_grows_with_the_batch_and_weights_do_not() -> None:
    call = Call("group_norm_silu", ((1, 320, 8, 8), (320,), (320,)), (("scale_shift", (1, 640)),))
    assert call.at_batch(8) == Call(
        "group_norm_silu", ((8, 320, 8, 8), (320,), (320,)), (("scale_shift", (8, 640)),)
    )
    assert str(call) == "(1, 320, 8, 8), scale_shift"
    to_text = Call("attention", ((2, 4096, 8, 40), (2, 77, 8, 40), (2, 77, 8, 40)))
    assert str(to_text) == "(2, 4096, 8, 40) to 77"
    assert str(Call("attention", ((2, 16, 8, 40),) * 3)) == "(2, 16, 8, 40)"
    collected = replace(shapes.GPU_JOBS["SD 1.5 U-Net"], batch=3).collect()
    single = replace(shapes.GPU_JOBS["SD 1.5 U-Net"], batch=1).collect()
    assert {c.at_batch(3): n for c, n in single.items()} == dict(collected)


def test_the_most_important_cases_come_first_and_none_is_missing() -> None:
    jobs = {name: shapes.GPU_JOBS[name] for name in ("SD 1.5 U-Net", "KL-f8 decoder")}
    ops = ("group_norm_silu", "add_group_norm_silu", "attention")
    todo = bench_run.cases([SUBJECTS[op] for op in ops], jobs, (1, 2))
    priorities = [case.priority for case in todo]
    assert priorities == sorted(priorities)
    first = {str(case) for case in todo if case.priority == 0}
    assert "add_group_norm_silu KL-f8 decoder (1, 256, 512, 512), bias" in first
    assert "group_norm_silu backward SD 1.5 U-Net (2, 960, 64, 64)" in first
    assert "attention SD 1.5 U-Net (2, 4096, 8, 40)" in first
    assert "attention backward SD 1.5 U-Net (2, 4096, 8, 40)" in first
    assert "attention SD 1.5 U-Net (2, 1024, 8, 80) to 77" in first
    assert "attention KL-f8 decoder (1, 4096, 1, 512)" in first
    forward = [case for case in todo if case.direction == "forward"]
    distinct = sum(
        call.op in ops for job in jobs.values() for call in replace(job, batch=1).collect()
    )
    assert len({str(case) for case in forward}) == len(forward) == 2 * distinct
    # ops alternate within a priority
    assert {case.subject.op for case in forward[:3]} == set(ops)


def test_work_and_method() -> None:
    one = replace(GEGLU, call=Call("geglu", ((1, 4096, 2560),)))
    assert one.work == Work(bytes=4096 * 2560 * 3)  # 2560 in and 1280 out, two bytes each
    assert one.method == "graph"
    assert replace(one, call=one.call.at_batch(16)).method == "events"
    call = Call("attention", ((2, 4096, 8, 40),) * 3)
    attention = Case(subject=SUBJECTS["attention"], job_name="", job=JOB, call=call)
    numbers = 2 * 4096 * 8 * 40
    assert attention.work == Work(bytes=4 * numbers * 2, flops=4 * numbers * 4096)
    assert attention.method == "events"
    backward = replace(attention, direction="backward")
    assert backward.work == Work(bytes=8 * numbers * 2, flops=10 * numbers * 4096)
    norm = Case(
        subject=SUBJECTS["group_norm_silu"],
        job_name="",
        job=JOB,
        call=Call("group_norm_silu", ((1, 96, 8, 8), (96,), (96,))),
    )
    assert norm.work == Work(bytes=2 * 96 * 64 * 2)
    assert replace(norm, direction="backward").work == Work(bytes=3 * 96 * 64 * 2)
    assert replace(norm, direction="backward").method == "events"


def test_operands_are_in_the_layout_of_the_networks() -> None:
    make = Make(torch.bfloat16, CPU)
    call = Call(
        "add_group_norm_silu", ((2, 32, 4, 4), (32,), (32,)), (("residual", (2, 32, 4, 4)),)
    )
    (x, groups, weight, _), options = SUBJECTS["group_norm_silu"].arguments(call, JOB, make)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert options["residual"].is_contiguous(memory_format=torch.channels_last)
    assert (groups, weight.shape, x.dtype) == (JOB.norm_groups, (32,), torch.bfloat16)
    call = Call("attention", ((2, 16, 4, 8),) * 3)
    (q, k, v), _ = SUBJECTS["attention"].arguments(call, JOB, make)
    assert q.shape == k.shape == v.shape == (2, 16, 4, 8)
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()  # packed
    call = Call("attention", ((2, 16, 4, 8), (2, 7, 4, 8), (2, 7, 4, 8)))
    (q, k, v), _ = SUBJECTS["attention"].arguments(call, JOB, make)
    assert (q.shape, k.shape) == ((2, 16, 4, 8), (2, 7, 4, 8))
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "subject",
    [SUBJECTS["group_norm_silu"], SUBJECTS["attention"]],
    ids=lambda subject: subject.op,
)
def test_eager_code_computes_the_same_as_ours(subject: Subject) -> None:
    """Otherwise the comparison of their times would mean nothing."""
    calls = {
        "group_norm_silu": Call(
            "group_norm_silu", ((2, 32, 4, 4), (32,), (32,)), (("scale_shift", (2, 64)),)
        ),
        "attention": Call("attention", ((2, 16, 4, 8), (2, 7, 4, 8), (2, 7, 4, 8))),
    }
    args, kwargs = subject.arguments(calls[subject.op], JOB, Make(torch.float32, CPU))
    torch.testing.assert_close(
        subject.eager(*args, **kwargs), subject.ours(*args, **kwargs), rtol=1e-4, atol=1e-5
    )


def test_gradients_without_a_target_come_later() -> None:
    jobs = {"SD 1.5 U-Net": shapes.GPU_JOBS["SD 1.5 U-Net"]}
    (case,) = [
        c for c in bench_run.cases([SUBJECTS["geglu"]], jobs, (2,)) if c.direction == "backward"
    ]
    assert (case.priority, case.providers) == (1, LATER)
    assert case.work == Work(bytes=2 * 4096 * 2560 * 5)  # 2560 in and out, 1280 in, 2 bytes each


def test_an_eager_sampler_step_computes_the_same_as_ours() -> None:
    case = sampler_step.gpu_cases(4, (2,))[0]
    args, options = case.subject.arguments(case.call, case.job, Make(torch.float32, CPU))
    ours, theirs = ([a.clone() for a in args] for _ in range(2))
    case.subject.ours(*ours, **options)
    case.subject.eager(*theirs, **options)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[2], theirs[2])


# Running them


def run(todo: list[Case], **options: Any) -> Outcome:
    settings = {"timer": HostTimer(rounds=1), "device": CPU, "inductor": "eager", "matmul": 8}
    deadline = time.monotonic() + 60
    return bench_run.run(todo, **{**settings, "deadline": deadline, **options})


@kernel_cases.needs_interpreter
def test_every_provider_leaves_a_record() -> None:
    outcome = run([GEGLU])
    assert outcome.failures == outcome.left_out == []
    assert [r.provider for r in outcome.records] == [
        "triton",
        "reference",
        "eager",
        "compile",
        "copy",
    ]
    record = outcome.records[0]
    assert (record.benchmark, record.job, record.shape) == ("geglu", "a job", "(1, 4, 32)")
    assert (record.dtype, record.method, record.bytes) == ("bfloat16", "host", 4 * 32 * 3)
    assert all("cuda: it runs on cuda" in line for line in outcome.unavailable)


@kernel_cases.needs_interpreter
def test_all_our_backends_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested with a "cuda" backend that takes CPU tensors."""
    op = kernels.OPS["geglu"]
    stand_in = replace(op.backends["cpu"], name="cuda")
    monkeypatch.setitem(op.backends, "cuda", stand_in)
    monkeypatch.setitem(choose.EMULATED, "cuda", ("cpu",))
    monkeypatch.delitem(choose.UNAVAILABLE, "cuda", raising=False)  # it may not be built here
    outcome = run([GEGLU])
    assert outcome.failures == outcome.unavailable == []
    ours = {r.provider: r.shape_class for r in outcome.records if r.provider in providers.OURS}
    assert ours == {"triton": "launch", "cuda": "launch"}


def test_the_winner_of_a_class_is_faster_over_all_its_cases() -> None:
    """Ratios decide, not the sum of times, so a slow case counts as much as a fast one."""
    measured = []
    for shape, triton, cuda in (("A", 1.0, 0.9), ("B", 1e-3, 2e-3), ("C", 1e-3, 1e-3)):
        measured += records("geglu", shape, triton=triton, cuda=cuda, eager=1e-6)
    measured = [replace(record, shape_class="cache") for record in measured]
    measured += [replace(r, shape_class="memory") for r in records("geglu", "D", cuda=1.0)]
    large = records("geglu", "E", triton=9.0, cuda=1.0)
    measured += [replace(record, shape_class="launch") for record in large]
    measured += records("geglu backward", "A", triton=1.0, cuda=0.5)  # without a class
    of_library = [*records("attention", "F", triton=2.0, cuda=3.0, library=1.0)]
    of_library += records("attention", "G", triton=1.0)  # the library does not support its mask
    measured += [replace(record, shape_class="self/64") for record in of_library]
    assert bench_run.fastest_backends(measured) == {
        "geglu": {
            "bfloat16/cache": "triton",  # 0.9 x 2 x 1 > 1
            "bfloat16/memory": "cuda",
            "bfloat16/launch": "cuda",
            "bfloat16/any": "cuda",
        },
        "attention": {"bfloat16/self/64": "library", "bfloat16/any": "library"},
    }


def sanitizer_says(monkeypatch: pytest.MonkeyPatch, output: str, code: int) -> None:
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    lines = [line for line in output.splitlines() if line.strip()]
    monkeypatch.setattr(sanitize, "_passed_on", lambda words: (lines, code))


def test_sanitizers_that_find_no_kernel_are_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer_says(monkeypatch, "no op has kernels for cuda on this machine", 98)
    with pytest.raises(LeftOut, match="no op has kernels for cuda"):
        sanitize.sanitize(plan(tmp_path, part="racecheck"))
    sanitizer_says(monkeypatch, "geglu: ok\n1 of 1 cases", 0)
    assert sanitize.sanitize(plan(tmp_path, part="memcheck")) == ["geglu: ok", "1 of 1 cases"]
    sanitizer_says(monkeypatch, "race", sanitize.FOUND)
    with pytest.raises(Failed, match="race"):
        sanitize.sanitize(plan(tmp_path, part="racecheck"))
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    with pytest.raises(LeftOut, match="compute-sanitizer is not installed"):
        sanitize.sanitize(replace(plan(tmp_path, part="racecheck"), dry_run=False))


OURS = """
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<(int)512, float>(T1)+0x1a0
=========     by thread (0,0,0) in block (0,0,0)
========= Error: Race reported between Write access at void fastdiff::f<float>(T1)+0x40 in f.cuh:3
=========     Saved host backtrace up to driver entry point at kernel launch time
========= ERROR SUMMARY: 2 errors
"""


@pytest.mark.parametrize(
    ("output", "fails"),
    [
        (OURS, True),
        (OURS.replace("fastdiff::", "cub::"), False),
        (OURS.replace("+0x", "+"), True),  # places that cannot be parsed
    ],
)
def test_reports_about_library_kernels_are_not_failures(
    output: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except those of memcheck, because no kernel may access memory out of bounds."""
    sanitizer_says(monkeypatch, output, sanitize.FOUND)
    for tool in sanitize.TOOLS:
        if fails or tool == "memcheck":
            with pytest.raises(Failed, match="ERROR SUMMARY: 2 errors"):
                sanitize.sanitize(plan(tmp_path, part=tool))
        else:
            notes = sanitize.sanitize(plan(tmp_path, part=tool))
            assert notes[0] == "reports in other kernels than ours: 2"


def test_the_drivers_report_on_kernels_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 0, "kernel  threads\nf<float>  256\n", "")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *_, **__: done)
    assert prepare.kernels_of_the_gpu(plan(tmp_path)) == ["1 kinds of launches in cuda-kernels.txt"]
    assert (tmp_path / "cuda-kernels.txt").read_text() == done.stdout
    assert tmp_path / "cuda-kernels.txt" in set(kept.written(tmp_path))
    done.returncode, done.stderr = 2, "torch finds no usable GPU"
    with pytest.raises(Failed, match="torch finds no usable GPU"):
        prepare.kernels_of_the_gpu(plan(tmp_path))


def test_a_module_that_was_built_but_does_not_import_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        imports = "-c" in words
        return subprocess.CompletedProcess(words, int(imports), "", "undefined symbol: x")

    monkeypatch.setattr(prepare.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(table.Failed, match="does not import") as failure:
        prepare.build(replace(plan(tmp_path), dry_run=False))
    assert "undefined symbol: x" in failure.value.args


def test_without_time_a_case_is_left_out_by_name() -> None:
    outcome = run([GEGLU, GEGLU], deadline=0.0)
    assert outcome.records == []
    assert outcome.left_out == [str(GEGLU)] * 2


@kernel_cases.needs_interpreter
def test_a_wrong_kernel_is_a_failure_and_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = kernels.OPS["geglu"]
    right = op.backends["triton"]
    wrong = replace(right, forward=lambda x, keep: (right.forward(x, keep)[0] * 1.2, None))
    monkeypatch.setitem(op.backends, "triton", wrong)
    outcome = run([GEGLU])
    assert outcome.failures == [f"{GEGLU}: triton does not agree with the reference"]
    assert "triton" not in {record.provider for record in outcome.records}
    assert "eager" in {record.provider for record in outcome.records}


@kernel_cases.needs_interpreter
def test_a_broken_case_is_reported_and_the_next_one_runs() -> None:
    def broken(*_: Any) -> Tensor:
        raise KeyError("eager is broken")

    bad = replace(GEGLU, subject=replace(GEGLU.subject, eager=broken))
    outcome = run([bad, GEGLU])
    assert outcome.failures == [f"{GEGLU}: KeyError: 'eager is broken'"]
    assert [r.provider for r in outcome.records].count("compile") == 1


def test_the_libraries_kernels_are_tried_one_by_one() -> None:
    call = Call("attention", ((1, 16, 2, 8),) * 3)
    case = Case(subject=SUBJECTS["attention"], job_name="", job=JOB, call=call)
    case = replace(case, dtype=torch.float32, providers=("sdpa math", "sdpa cudnn"))
    outcome = run([case])
    if not torch.cuda.is_available():  # cuDNN needs a GPU, which is not a failure
        assert [r.provider for r in outcome.records] == ["sdpa math", "matmul"]
        assert "sdpa cudnn: RuntimeError" in outcome.unavailable[0]
    assert outcome.failures == []


def test_a_copy_moves_the_bytes_of_the_work() -> None:
    assert sum(t.nbytes for t in bench_run.copied(Work(bytes=3000), CPU)) == 3000


def test_eager_norms_are_given_both_layouts() -> None:
    seen = []

    def eager(x: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x

    call = Call("group_norm_silu", ((2, 32, 4, 4), (32,), (32,)))
    for provider in ("eager", "eager channels_last"):
        subject = replace(SUBJECTS["group_norm_silu"], eager=eager)
        run([Case(subject=subject, job_name="", job=JOB, call=call, providers=(provider,))])
        assert not set(seen) - {provider == "eager channels_last"}
        assert seen
        seen.clear()


def test_gradients_are_timed_of_every_operand() -> None:
    x, weight = torch.randn(2, 4), torch.randn(4)
    step = bench_run._backward(lambda x, w, *, b: x * w + b, (x, weight), {"b": x}, False, "")
    assert [tuple(g.shape) for g in step()] == [(2, 4), (4,), (2, 4)]
    assert not x.requires_grad


# The stages


def plan(out: Path, part: str = "") -> Plan:
    return Plan(out=out, seconds=30.0, dry_run=True, commit="abc", part=part)


def inside(out: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[[Plan], Any]) -> Any:
    monkeypatch.setattr(measure, "tune", function)
    assert command.inside(table.STAGES["tune"].function, plan(out), out / "outcome.json") == 0
    return json.loads((out / "outcome.json").read_text())


def test_a_stage_records_its_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> Callable[[Plan], Any]:
        def stage(_: Plan) -> Any:
            raise error

        return stage

    for function, status, notes in (
        (lambda _: ["fine"], "ok", ["fine"]),
        (raising(Failed("one", "two")), "failed", ["one", "two"]),
        (raising(LeftOut("no tool")), "left out", ["no tool"]),
        (raising(RuntimeError("CUDA error: gone")), "lost context", ["CUDA error: gone"]),
        (raising(ContextLost("geglu: gone")), "lost context", ["geglu: gone"]),
    ):
        found = inside(tmp_path, monkeypatch, function)
        assert found == {"status": status, "notes": notes}
    with pytest.raises(KeyError):  # a bug of ours keeps its traceback
        inside(tmp_path, monkeypatch, raising(KeyError("x")))


@pytest.fixture
def sanitized_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend whose kernels run on a GPU, in the interpreter or under the emulation."""
    emulated = request.param == "cuda" and not torch.cuda.is_available()
    with cuda_host.emulated() if emulated else nullcontext():
        yield request.param


@pytest.mark.slow
@pytest.mark.parametrize("sanitized_backend", kernel_cases.KERNELS, indirect=True)
def test_the_sanitizers_see_every_op(
    sanitized_backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitize.parity_cases([sanitized_backend], 1000.0)
    lines = capsys.readouterr().out.splitlines()
    ran = {line.split()[0] for line in lines if line.endswith(": ok")}
    assert ran == set(kernels.OPS)
    assert f"{len(lines) - 1} of {len(lines) - 1} cases" in lines
    for op in ("geglu", "sampler_step"):
        right = kernels.OPS[op].backends[sanitized_backend]
        wrong = right.wrapped(lambda _: lambda x, *rest: (x[..., : x.shape[-1] // 2].clone(), None))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(kernels.OPS[op].backends, sanitized_backend, wrong)
            patch.setattr(kernels, "OPS", {op: kernels.OPS[op]})
            with pytest.raises(AssertionError):
                sanitize.parity_cases([sanitized_backend], 100.0)


@pytest.mark.slow
@kernel_cases.needs_cuda
def test_the_sanitizers_see_every_cuda_kernel() -> None:
    """All kernels in csrc/ run, except the one that is never launched."""
    emulated = not torch.cuda.is_available()
    with cuda_host.emulated() if emulated else nullcontext(), watched() as seen:
        sanitize.parity_cases(["cuda"], 1000.0)
    names = cuda_kernels() - {"any_kernel"}
    mangled = {name: f"{len(name)}{name}" for name in names}
    ran = {name for name in names if any(mangled[name] in launch.kernel for launch in seen)}
    assert ran == names
    assert {launch.cluster for launch in seen} >= {1, 4}


@pytest.mark.slow
def test_a_device_needs_no_package_of_the_command_line() -> None:
    """A borrowed machine may have torch, triton and pytest but not tyro."""
    names = ["benchmarks.resources.cuda_device"]
    for folder in (
        "benchmarks",
        "benchmarks/device",
        "benchmarks/networks",
        "fastdiff/bench",
        "fastdiff/bench/ops",
    ):
        paths = (path for path in (ROOT / folder).glob("*.py") if path.stem != "conftest")
        names += [f"{folder.replace('/', '.')}.{path.stem}" for path in paths]
    for path in (ROOT / "tests/kernels").glob("*.py"):
        other = ("sanitized", "one_row_too_far")  # these replace the compiled module on import
        ignored = (*prepare.IGNORED, *(f"tests/kernels/{name}.py" for name in other))
        if f"tests/kernels/{path.name}" not in ignored:
            names.append(f"tests.kernels.{path.stem}")
    program = f"import sys; sys.modules['tyro'] = None; [__import__(n) for n in {names}]"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_the_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.device", "--dry-run", "--out", str(tmp_path)]
    words += ["--minutes", "20", "--only", *table.STAGES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    summary = json.loads((tmp_path / "only.json").read_text())
    stages = {stage["stage"]: stage for stage in summary["stages"]}
    assert set(stages) == set(table.STAGES), done.stdout
    for name in ("build", "compile", "wheels", "more-sanitize"):
        assert stages.pop(name)["status"] == "left out"
    failing = {name: stage for name, stage in stages.items() if stage["status"] != "ok"}
    assert [note for note in stages["sanitize"]["notes"] if note.startswith("memcheck: ")]
    assert "not run" not in stages["parity"]["notes"][0]
    (path,) = tmp_path.glob("results/dry-run/*.json")
    assert list(tmp_path.glob("tuned/dry-run.json"))
    if "triton" in choose.UNAVAILABLE:
        assert set(failing) <= {"ops", "bench", "networks"}, done.stdout  # these need triton
        return
    assert not failing, done.stdout
    assert done.returncode == 0
    records = [Record(**record) for record in json.loads(path.read_text())["records"]]
    ops = {record.benchmark for record in records if record.provider == "triton"}
    assert {*kernels.OPS, "attention backward", "group_norm_silu backward", "network"} <= ops


# The report


def records(benchmark: str, shape: str, bytes: int = 0, **medians: float) -> list[Record]:
    return [
        Record(
            benchmark=benchmark,
            job="a job",
            shape=shape,
            provider=provider.replace("_", " ").replace("channels last", "channels_last"),
            dtype="bfloat16",
            threads=1,
            rounds=5,
            q1_s=median * 0.9,
            median_s=median,
            q3_s=median * 1.1,
            bytes=bytes,
            flops=0,
            method="events",
        )
        for provider, median in medians.items()
    ]


def test_targets_use_the_worst_case_and_list_what_is_missing() -> None:
    large = 2**30
    found = gpu_report.groups(
        [
            *records("group_norm_silu", "A", large, triton=1.0, copy=0.9, compile=1.6),
            *records("group_norm_silu", "B", large, triton=1.0, copy=0.8, compile=1.7),
            *records("group_norm_silu", "small", 2**20, triton=1.0, copy=0.1, compile=0.1),
            *records("attention", "(2, 4096, 8, 40)", triton=1.0, sdpa_flash=1.5, sdpa_cudnn=1.3),
            *records("attention", "(2, 64, 8, 40)", triton=1.0, sdpa_flash=0.1),
            *records("attention", "(2, 64, 8, 40) to 77", triton=1.0, sdpa_flash=2.0, eager=1.9),
        ]
    )
    rows = {(op, where, against): row for op, where, against, *row in gpu_report.targets(found)}
    norm = ("group_norm_silu, NHWC", "more bytes than the L2 cache")
    assert rows[(*norm, "a copy of the same bytes")] == ["at least 85%", "80%, missed", "a job B"]
    assert rows[(*norm, "torch.compile")] == ["at least 1.50 x", "1.60 x", "a job A"]
    assert rows[(*norm, "eager channels_last")] == ["at least 3.00 x", "not measured", ""]
    best = gpu_report.BEST
    assert rows["attention", "to itself, d = 40, 4096 tokens", best][1] == "1.30 x"
    assert rows["attention", "to itself, d = 64", best][1] == "not measured"
    assert rows["attention", "to 77 tokens", best][1] == "1.90 x"


def test_networks_are_compared_with_the_faster_way_to_run_inductor() -> None:
    def measured(shape: str, **medians: float) -> list[Record]:
        found = [replace(one, job="SD 1.5 U-Net") for one in records("network", shape, **medians)]
        names = {"reduced": "compile reduce-overhead"}
        return [replace(one, provider=names.get(one.provider, one.provider)) for one in found]

    def goal(*groups: list[Record]) -> tuple[str, ...]:
        rows = gpu_report.targets(gpu_report.groups([one for group in groups for one in group]))
        (found,) = [row for row in rows if row[0] == "SD 1.5 U-Net"]
        return found

    at_16 = measured("(32, 4, 64, 64)", auto=1.0, compile=1.0)
    assert goal(at_16)[4] == "not measured"
    both = measured("(2, 4, 64, 64)", auto=1.0, compile=1.4, reduced=1.3)
    assert goal(at_16, both)[3:5] == ("at least 1.25 x", "1.30 x")
    one = measured("(2, 4, 64, 64)", auto=1.0, compile=1.2)
    assert goal(one)[4] == "1.20 x, missed"


def test_the_section_of_a_gpu_matches_its_records(tmp_path: Path) -> None:
    facts = {
        "commit": "c0ffee" * 6,
        "clean": True,
        "date": "2026-01-02T00:00:00",
        "device": "Test GPU",
        "python": "3.12",
        "torch": "2.11",
        "triton": "3.6",
        "fastdiff": "0.1.0",
        "cores": 16,
        "gpu": {"driver": "580", "multiprocessors": 132},
    }
    measured = [
        *records(
            "geglu", "(1, 4)", 1000, triton=2e-3, cuda=1e-3, copy=0.8e-3, eager=2e-3, compile=1.5e-3
        ),
        *records("attention", "(1, 4, 2, 8)", triton=1e-3, eager=2e-3, sdpa_flash=1.2e-3),
        *records("network", "(2, 4)", triton=1e-3, reference=2e-3, diffusers=3e-3),
        *records("20 steps", "(2, 4)", auto=2e-2, plain=3e-2),
    ]
    folder = tmp_path / "test-gpu"
    folder.mkdir()
    content = {"environment": facts, "shares": [], "peaks": []}
    content["records"] = [vars(record) for record in measured]
    (folder / "c0ffee.json").write_text(json.dumps(content))
    text = report.tables(report.devices(tmp_path))
    assert gpu_report.NOTHING not in text
    assert "- c0ffeec, 2026-01-02: fastdiff 0.1.0, torch 2.11, triton 3.6" in text
    row = "| geglu | a job | (1, 4) | events | 1.00 ms | cuda | 2.00 x | 900 µs to 1.10 ms | 80% |"
    assert row in text
    assert "1.20 x (sdpa flash) |" in text
    row = "| one evaluation | events | diffusers | 3.00 ms | 2.70 ms to 3.30 ms | 0.33 x |"
    assert f"| a job | (2, 4) {row}" in text
    row = "| 20 guided steps, each a replay | events | plain | 30.0 ms | 27.0 ms to 33.0 ms |"
    assert f"| a job | (2, 4) {row} 0.67 x |" in text
    assert "| 20 steps |" not in text  # it is not an op
    assert "| not measured |" in text


def test_without_a_gpu_the_report_says_so() -> None:
    text = report.tables([])
    assert gpu_report.NOTHING in text
    assert text.count("not measured") == len(gpu_report.TARGETS)


# Checks that a dry run leaves out


@pytest.mark.parametrize("name", shapes.GPU_JOBS)
def test_the_networks_take_half_precision(name: str) -> None:
    module, inputs = replace(shapes.GPU_JOBS[name], batch=1).build("meta", torch.bfloat16)
    with torch.device("meta"), torch.inference_mode():
        y = module(**inputs)
    assert y.dtype == torch.bfloat16
    assert y.shape[0] == 1


@pytest.mark.slow
def test_every_case_of_a_real_run_fits_its_providers() -> None:
    """All shapes, batches and directions run, on tensors without data."""
    ours_apart = ("reference", "eager", "eager channels_last", "sdpa math")
    todo = [replace(case, providers=ours_apart) for case in bench_run.cases(NETWORK_OPS)]
    assert len(todo) > 400
    timer = HostTimer(rounds=1)
    outcome = run(todo, timer=timer, device=torch.device("meta"), deadline=math.inf)
    assert outcome.failures == outcome.unavailable == outcome.left_out == []
    assert {record.benchmark for record in outcome.records} == {
        *(subject.op for subject in NETWORK_OPS),
        *(f"{subject.op} backward" for subject in NETWORK_OPS),
    }


@pytest.mark.parametrize("name", gpu_networks.NETWORKS)
def test_diffusers_networks_accept_their_inputs(name: str) -> None:
    pytest.importorskip("diffusers")
    job = shapes.GPU_JOBS[name]
    for provider, step in gpu_networks.diffusers_steps(job, torch.device("meta")):
        with torch.inference_mode():
            y = step()
        y = getattr(y, "sample", y)
        side = job.size * (8 if job.network == "decoder" else 1)
        assert y.shape[2:] == (side, side), provider
