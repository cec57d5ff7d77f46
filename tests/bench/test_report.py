"""The arithmetic of the benchmarks, and the report generated from their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.networks import bench_accelerate, bench_cpu_networks
from fastdiff import kernels
from fastdiff.bench import cpu_report, predict, record, report, shapes
from fastdiff.bench.record import Peak, Record, Share
from fastdiff.bench.subjects import SUBJECTS
from fastdiff.kernels import Work

EAGER = Record(
    benchmark="geglu",
    job="SD 1.5 U-Net",
    shape="(1, 4096, 2560)",
    provider="eager",
    dtype="float32",
    threads=2,
    rounds=9,
    q1_s=0.019,
    median_s=0.020,
    q3_s=0.024,
    bytes=60_000_000,
    flops=0,
)
REFERENCE = replace(EAGER, provider="reference", median_s=0.030)
COPY = replace(EAGER, provider="copy", median_s=0.005)
SHARE = Share(job="SD 1.5 U-Net", op="geglu", calls=16, seconds=0.5, total_s=2.0)
PEAK = Peak(benchmark="sample", shape="64 digits", threads=2, bytes=300 * 2**20)


def test_rates_and_shares() -> None:
    assert EAGER.bytes_per_second == 3e9
    assert EAGER.share_of(COPY) == 0.25
    sgemm = replace(COPY, provider="sgemm", flops=8_000_000, median_s=0.001)
    # 4 MFLOP in 20 ms are 0.2 of 8 GFLOP/s
    assert replace(EAGER, flops=4_000_000).share_of(sgemm) == pytest.approx(0.025)
    assert SHARE.share == 0.25
    # a quarter of the job becomes twice as fast: 0.75 + 0.125
    assert record.amdahl(0.25, 2.0) == pytest.approx(1 / 0.875)
    assert record.amdahl(0.25, 1.0) == 1.0


def test_declared_work_by_hand() -> None:
    call = shapes.Call("attention", ((1, 10, 2, 4), (1, 7, 2, 4), (1, 7, 2, 4)))
    # q and out: 80 numbers each; k and v: 56 each; 2 heads x 10 x 7 x 4 x 2 products x 2 FLOPs
    assert SUBJECTS["attention"].work(call, shapes.JOBS["SD 1.5 U-Net"], torch.float32) == Work(
        bytes=(160 + 112) * 4, flops=2240
    )


def test_shapes_are_those_of_the_published_networks() -> None:
    unet = shapes.JOBS["SD 1.5 U-Net"]
    assert unet.largest("attention").tensors[0] == (1, 4096, 8, 40)
    assert unet.largest("geglu").tensors == ((1, 4096, 2560),)
    assert unet.norm_groups == 32
    # 16 transformers, each with self- and cross-attention
    assert sum(n for call, n in unet.collect().items() if call.op == "attention") == 32
    decoder = shapes.JOBS["KL-f8 decoder"]
    assert decoder.largest("add_group_norm_silu").tensors[0] == (1, 256, 256, 256)
    assert shapes.jobs_with("geglu") == ["SD 1.5 U-Net"]


def test_collecting_calls_leaves_the_ops_unchanged() -> None:
    before = dict(kernels.OPS["geglu"].backends)
    shapes.JOBS["digits U-Net"].collect()
    assert kernels.OPS["geglu"].backends == before


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """A function that saves records like a run at some commit on some day."""

    def save(commit: str, day: int, *measured: Sequence[Any], clean: bool = True) -> Path:
        facts = {
            **record.environment(),
            "commit": commit,
            "clean": clean,
            "date": f"2026-01-{day:02d}T00:00:00+00:00",
            "device": "Test CPU",
        }
        monkeypatch.setattr(record, "environment", lambda: facts)
        return record.save_records(*measured, results=tmp_path)

    return save


def test_the_report_matches_the_records(at: Callable[..., Path], tmp_path: Path) -> None:
    path = at("c0ffee" * 6, 1, [REFERENCE, EAGER, COPY], [SHARE], [PEAK])
    assert path == tmp_path / "test-cpu" / "c0ffeec0ffee.json"
    (device,) = report.devices(tmp_path)
    (run,) = device.runs
    assert (run.records, run.shares, run.peaks) == ([REFERENCE, EAGER, COPY], [SHARE], [PEAK])
    text = report.section(device)
    # ratio 30/20; 60 MB in 20 ms; a copy takes 5 ms; a quarter of the job is 1.5 times as fast
    assert "| eager | 20.0 ms | 1.50 x | 3.00 | 25% | 1.09 x | c0ffeec |" in text
    assert "| geglu | 16 | 500 ms | 25.0% | 1.33 x | c0ffeec |" in text
    assert "| sample | 64 digits |  |  | 1 |  | 300 MiB | c0ffeec |" in text
    assert "- c0ffeec, 2026-01-01: fastdiff" in text
    assert "2 threads, float32" in text
    assert "| copy |" not in text
    assert report.BEFORE_KERNELS in text


def test_runs_of_one_commit_add_up(at: Callable[..., Path], tmp_path: Path) -> None:
    slower, more = replace(EAGER, median_s=0.040), replace(PEAK, bytes=400 * 2**20)
    other = replace(SHARE, op="attention")
    first = at("c0ffee" * 6, 1, [REFERENCE, EAGER], [SHARE], [PEAK], clean=False)
    assert at("c0ffee" * 6, 2, [slower, COPY], [other], [more]) == first
    (device,) = report.devices(tmp_path)
    (run,) = device.runs
    assert run.records == [REFERENCE, slower, COPY]
    assert run.shares == [SHARE, other]
    assert run.peaks == [more]
    assert run.environment["date"].startswith("2026-01-02")
    assert "- c0ffeec with uncommitted changes, 2026-01-02" in report.section(device)


def test_the_newest_run_of_a_case_wins(at: Callable[..., Path], tmp_path: Path) -> None:
    compiled = replace(EAGER, provider="compile", median_s=0.010)
    unfused = replace(SHARE, op="layer_norm")
    # the order of file names differs from that of dates
    at("bbbbbbb", 1, [REFERENCE, EAGER, compiled], [SHARE, unfused], [PEAK])
    at("aaaaaaa", 2, [replace(REFERENCE, median_s=0.060), EAGER], [SHARE])
    (device,) = report.devices(tmp_path)
    text = report.section(device)
    assert "| eager | 20.0 ms | 3.00 x | 3.00 |  | 1.20 x | aaaaaaa |" in text
    # not measured again, so it stays and is compared with the reference of its own run
    assert "| compile | 10.0 ms | 3.00 x | 6.00 |  | 1.20 x | bbbbbbb |" in text
    assert "| 300 MiB | bbbbbbb |" in text
    assert text.count("| eager |") == text.count("| reference |") == 1
    # the ops of a job stay together, so an op that the newer run lacks is dropped
    assert device.shares() == [(device.runs[1], SHARE)]
    assert text.index("- aaaaaaa, 2026-01-02") < text.index("- bbbbbbb, 2026-01-01")

    at("ccccccc", 3, [replace(REFERENCE, median_s=0.050), EAGER, compiled], [SHARE], [PEAK])
    text = report.section(report.devices(tmp_path)[0])
    assert "| compile | 10.0 ms | 5.00 x |" in text
    assert "- ccccccc" in text
    assert "aaaaaaa" not in text  # replaced completely
    assert "bbbbbbb" not in text


def test_networks_are_compared_with_diffusers_in_the_same_run(
    at: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = replace(EAGER, benchmark=record.END_TO_END, provider="diffusers", median_s=3.0)
    ours = replace(theirs, provider="fastdiff", median_s=2.0)
    compiled = replace(theirs, provider="compile", median_s=2.5)
    at("bbbbbbb", 1, [theirs, ours, compiled])
    at("aaaaaaa", 2, [replace(theirs, median_s=4.0), ours])
    text = report.section(report.devices(tmp_path)[0])
    assert "| fastdiff | 2.00 s | 19.0 ms to 24.0 ms | 2.00 x | aaaaaaa |" in text
    assert report.BEFORE_KERNELS not in text
    assert "| compile | 2.50 s | 19.0 ms to 24.0 ms | 1.20 x | bbbbbbb |" in text
    assert text.count("| fastdiff |") == 1


def test_providers_take_turns_once_their_results_agree() -> None:
    calls: list[str] = []

    def step(name: str, result: float) -> Callable[[], torch.Tensor]:
        return lambda: (calls.append(name), torch.tensor([result, -1.0]))[1]

    steps = {"fastdiff": step("f", 4.02), "diffusers": step("d", 4.0)}
    with pytest.raises(AssertionError, match=r"fastdiff differs from diffusers by 5\.0e-03"):
        bench_cpu_networks.in_turns(steps, 2, 1e-3)
    calls.clear()
    seconds = bench_cpu_networks.in_turns(steps, 2, 1e-2)
    assert "".join(calls) == "fd" * 3
    assert {name: len(times) for name, times in seconds.items()} == {"fastdiff": 2, "diffusers": 2}
    first, second = bench_cpu_networks.records(
        {"diffusers": [1.0, 2.0, 9.0], "fastdiff": [1.0] * 2}, "job", "shape", "float32", 8
    )
    assert (first.q1_s, first.median_s, first.q3_s) == (1.5, 2.0, 5.5)
    assert (second.provider, second.rounds, second.flops_per_second) == ("fastdiff", 2, 8.0)


def test_without_records_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "astray.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="pytest benchmarks --save-records"):
        report.devices(tmp_path)


def test_the_document_matches_the_records() -> None:
    text = report.DOCUMENT.read_text()
    found = report.devices()
    assert text == report.fill(text, report.tables(found))
    pictures = [report.picture(device) for device in found if not device.is_gpu and device.shares()]
    assert pictures
    assert all(picture.is_file() for picture in pictures)
    assert text.count("(images/shares-") == len(pictures)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.345, "12.3 s"), (0.9999, "1.00 s"), (0.02, "20.0 ms"), (4.2e-7, "0.420 µs")],
)
def test_duration(seconds: float, text: str) -> None:
    assert record.duration(seconds) == text


def test_text_written_by_hand_is_kept() -> None:
    document = f"by hand\n{report.MEASURED[0]}\nold\n{report.MEASURED[1]}\nbelow"
    filled = report.fill(document, "new")
    assert filled == f"by hand\n{report.MEASURED[0]}\n\nnew\n\n{report.MEASURED[1]}\nbelow"
    assert report.fill(filled, "new") == filled
    with pytest.raises(ValueError, match="must contain"):
        report.fill("no markers", "new")


def test_predictions_by_hand() -> None:
    found = {str(p.case): p for p in predict.predictions()}
    image = found["attention SD 1.5 U-Net (2, 4096, 8, 40)"]
    # 2 x 8 heads of 4096^2 scores, Q K^T over 48 and P V over 40 columns; 4 instructions of a warp
    # or 16 exponentials per clock on 132 multiprocessors at 1.98 GHz, 232 instructions per 16 x 64
    # scores, one exponential in eight a polynomial; the rival has 64 columns
    assert image.bound == "products"
    scores, clocks = 2 * 8 * 4096**2, 132 * 1.98e9
    assert image.floor_s == pytest.approx(2 * scores * (48 + 40) / 790e12)
    assert image.seconds["issue"] == pytest.approx(scores / (16 * 64) * 232 / (4 * clocks))
    assert image.seconds["exponentials"] == pytest.approx(scores * 7 / 8 / (16 * clocks))
    assert image.rival_s == pytest.approx(4 * 2 * 8 * 4096**2 * 64 / 790e12)
    # of 63 MB, the 60 that were read last are still in the L2 when the second read begins with them
    sdxl = found["group_norm_silu SDXL U-Net (2, 960, 128, 128)"]
    x = 2 * 960 * 128**2 * 2
    assert sdxl.floor_s == pytest.approx((2 * x + x - 60e6) / 4.3e12)
    assert sdxl.rival_s / sdxl.floor_s == pytest.approx(0.977, abs=1e-3)
    # x, the sum of x and the bias, and y; half of the L2 has the sum, the other half x
    decoder = found["add_group_norm_silu KL-f8 decoder (1, 256, 512, 512), bias"]
    x = 256 * 512**2 * 2
    assert decoder.floor_s == pytest.approx((3 * x + x - 30e6) / 4.3e12)
    assert decoder.rival_s / decoder.floor_s == pytest.approx(0.794, abs=1e-3)
    # a sample of 8 MB fits the L2, but no program: one launch for the moments, one for y
    unet = found["group_norm_silu SD 1.5 U-Net (2, 960, 64, 64)"]
    assert unet.floor_s == unet.rival_s
    assert unet.seconds["launches"] == 2 * 2e-6
    (step,) = (p for p in found.values() if p.case.benchmark == "sampler_step")
    assert (step.bound, step.floor_s) == ("launches", 2e-6)
    # each of its two reads waits for 0.8 us per 4.3 MB
    assert sdxl.seconds["loads in flight"] == pytest.approx(
        2 * 2 * 960 * 128**2 * 2 * 0.8e-6 / 4.3e6
    )


def test_the_document_contains_the_predictions() -> None:
    assert report.predicted_tables() in report.DOCUMENT.read_text()


def test_what_was_rebuilt_is_predicted_to_reach_its_aim() -> None:
    """Then and now, by hand: GroupNorm by its loads in flight, attention by its instructions."""
    head, *rows = predict.progress()
    assert head[1:5] == ("before", "bound by", "now", "bound by")
    found = {row[0]: row[1:] for row in rows}
    assert len(found) == len(predict.AIMS)
    assert {row[-1] for row in rows} == {"met"}
    trip = 2 * 960 * 64**2 * 2
    copy, reading = 2 * trip / 4.3e12, trip * 0.8e-6 / 1.1e6
    norm = found["group_norm_silu SD 1.5 U-Net (2, 960, 64, 64)"]
    assert norm[:4] == (f"{copy / reading:.2f}", "loads in flight", "1.00", "x once, y once")
    scores = 2 * 8 * 4096**2
    issue = scores / (16 * 64) * 320 / (4 * 132 * 1.98e9)
    rival = 4 * scores * 64 / 790e12
    attention = found["attention SD 1.5 U-Net (2, 4096, 8, 40)"]
    assert attention[:2] == (f"{rival / issue:.2f}", "issue")


def test_the_targets_of_a_cpu_use_the_worst_case() -> None:
    def case(shape: str, megabytes: float, **medians: float) -> list[Record]:
        common = {"benchmark": record.IN_TURNS, "job": "SD 1.5 U-Net", "shape": shape}
        size = int(megabytes * 1e6)
        return [
            replace(
                EAGER, provider=name.replace("_", ", memory "), median_s=s, bytes=size, **common
            )
            for name, s in medians.items()
        ]

    found = [
        *case("group_norm_silu A", 1, cpu=1.0, eager=2.5),
        *case("group_norm_silu B", 2, cpu=1.0, eager=1.9),
        *case("group_norm_silu C", 70, cpu=1.0, eager=0.9, cpu_kept=0.2, eager_kept=0.5),
        *case("add_group_norm_silu D", 1, cpu=1.0, eager=0.1),  # another op
        *case("attention (1, 64, 8, 40) to 77", 1, cpu=1.0, eager=1.4),
        *case("attention (1, 64, 8, 40)", 1, cpu=1.0, eager=0.2),
    ]
    rows = {(what, where, against): row for what, where, against, *row in cpu_report.aims(found)}
    norm = "group_norm_silu"
    at = "SD 1.5 U-Net group_norm_silu"
    cached = "Stable Diffusion's, x and y in the caches"
    assert rows[norm, cached, "eager"] == ["at least 1.8 x", "1.90 x", f"{at} B"]
    assert rows[norm, "all calls", "eager"] == ["at least 1.0 x", "0.90 x, missed", f"{at} C"]
    assert rows[norm, "from 34 MB up, outputs reused", "eager"][1] == "4.50 x"
    both = rows[norm, "from 34 MB up, outputs reused by both", "eager, memory kept"]
    assert both[1] == "2.50 x, missed"
    assert rows["attention", "to 77 keys", "eager"][1] == "1.40 x, missed"
    assert rows["sampler_step", "written by hand", "eager"][1] == "not measured"
    assert len(cpu_report.op_rows(found)) == 1 + 6


HALF = bench_accelerate.SMALL._replace(dtype=torch.bfloat16, tolerance=0.1)
"""Half precision, as in a GPU's run: no packing, and the sampler has another dtype."""


@pytest.mark.parametrize("place", [bench_accelerate.SMALL, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize("part", bench_accelerate.PARTS)
def test_accelerate_at_small_size(part: str, place: bench_accelerate.Place) -> None:
    """Every provider gives the same result; `compile` is covered only by the benchmark."""
    providers = [p for p in bench_accelerate.PROVIDERS if not p.endswith("compile")]
    seconds = bench_accelerate.compare(part, providers, place, small=True, rounds=1)
    assert list(seconds) == providers
    assert all(len(times) == 1 and times[0] > 0 for times in seconds.values())


def test_startup_time_and_peak_memory_in_a_process_of_its_own() -> None:
    """The memory of the parent process does not count."""
    ballast = torch.ones(2**29)  # 2 GiB
    found = bench_accelerate.alone("unet", "accelerated", True, bench_accelerate.SMALL)
    assert 0 < found["seconds"] < 300
    assert 10**8 < found["peak_bytes"] < ballast.numel() * ballast.element_size()
