"""The benchmarks' arithmetic, and that the report says what the records hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention, harness, report, shapes
from benchmarks.harness import Record, Share, Work
from fastdiff import kernels

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


def test_rates_and_shares() -> None:
    assert EAGER.bytes_per_second == 3e9
    assert EAGER.share_of(COPY) == 0.25
    sgemm = replace(COPY, provider="sgemm", flops=8_000_000, median_s=0.001)
    # 4 MFLOP in 20 ms are 0.2 GFLOP/s of 8
    assert replace(EAGER, flops=4_000_000).share_of(sgemm) == pytest.approx(0.025)
    assert SHARE.share == 0.25
    # a quarter of the job, twice as fast: 0.75 + 0.125
    assert harness.amdahl(0.25, 2.0) == pytest.approx(1 / 0.875)
    assert harness.amdahl(0.25, 1.0) == 1.0


def test_declared_work_by_hand() -> None:
    q, k = torch.zeros(1, 10, 2, 4), torch.zeros(1, 7, 2, 4)
    # q and out: 80 numbers each; k and v: 56 each; 2 heads x 10 x 7 x 4 x 2 products x 2 FLOPs
    assert bench_attention.declared(q, k) == Work(bytes=(160 + 112) * 4, flops=2240)


def test_shapes_are_those_of_the_published_networks() -> None:
    unet = shapes.JOBS["SD 1.5 U-Net"]
    assert unet.largest("attention").tensors[0] == (1, 4096, 8, 40)
    assert unet.largest("geglu").tensors == ((1, 4096, 2560),)
    assert unet.norm_groups == 32
    # 16 transformers, each with self- and cross-attention
    assert sum(n for call, n in unet.collect().items() if call.op == "attention") == 32
    decoder = shapes.JOBS["KL-f8 decoder"]
    assert decoder.largest("group_norm_silu").tensors[0] == (1, 256, 256, 256)
    assert shapes.jobs_with("geglu") == ["SD 1.5 U-Net"]


def test_noting_leaves_the_ops_as_they_were() -> None:
    before = dict(kernels.OPS["geglu"].implementations)
    shapes.JOBS["digits U-Net"].collect()
    assert kernels.OPS["geglu"].implementations == before


def test_the_report_says_what_the_records_hold(tmp_path: Path) -> None:
    path = harness.save_records([REFERENCE, EAGER, COPY], [SHARE], tmp_path)
    (run,) = report.newest(tmp_path)
    assert run.records == [REFERENCE, EAGER, COPY]
    assert run.shares == [SHARE]
    text = report.section(run)
    # ratio 30/20; 60 MB in 20 ms; a copy takes 5 ms; a quarter of the job 1.5 times as fast
    row = "| eager | 20.0 ms | 1.50 x | 3.00 | 25% | 1.09 x |"
    assert row in text
    assert "| geglu | 16 | 500 ms | 25.0% | 1.33 x |" in text
    assert run.environment["commit"][:12] in text
    assert path.stem in text
    assert "| copy |" not in text


def test_the_newest_run_of_a_device_counts(tmp_path: Path) -> None:
    path = harness.save_records([REFERENCE], [], tmp_path)
    older = path.read_text().replace('"date": "2', '"date": "1').replace("0.03", "0.04")
    (path.parent / "zzz.json").write_text(older)
    (run,) = report.newest(tmp_path)
    assert run.records == [REFERENCE]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.345, "12.3 s"), (0.9999, "1.00 s"), (0.02, "20.0 ms"), (4.2e-7, "0.420 µs")],
)
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_what_is_written_by_hand_stays() -> None:
    document = f"by hand\n{report.BEGIN}\nold\n{report.END}\nbelow"
    filled = report.fill(document, "new")
    assert filled == f"by hand\n{report.BEGIN}\n\nnew\n\n{report.END}\nbelow"
    assert report.fill(filled, "new") == filled
    with pytest.raises(ValueError, match="must contain"):
        report.fill("no markers", "new")
