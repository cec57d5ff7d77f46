"""Predicted times on an H200 for the shapes that have goals, made before any GPU was measured.

A kernel takes at least as long as the slowest of these: moving its bytes at the speed of a copy,
its matrix products at the speed of a large product, its exponentials at the rate of the special
function units, issuing its instructions, and its launches. The host's time is not included: a CUDA
graph hides it, and `counts host` measures it.

    python -m fastdiff.bench.predict     print the table
    python -m fastdiff.bench.report      write it into docs/performance.md, next to measurements
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff import kernels
from fastdiff.bench.ops import sampler_step
from fastdiff.bench.providers import Make
from fastdiff.bench.record import duration
from fastdiff.bench.run import Case, cases
from fastdiff.bench.subjects import SUBJECTS
from fastdiff.kernels.choose import bound_arguments
from fastdiff.kernels.triton import recording_launches


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of a GPU, per second."""

    name: str
    architecture: str
    copy: float
    """Bytes, counting both reads and writes."""
    l2: int
    """Bytes of the L2 cache (not a rate)."""
    matmul: float
    """bf16 FLOPs of a large product."""
    clock: float
    """Under load."""
    multiprocessors: int
    launch: float
    """Seconds (not a rate)."""

    @property
    def exp2(self) -> float:
        """Exponentials, reciprocals: 16 per clock and multiprocessor."""
        return 16 * self.multiprocessors * self.clock

    @property
    def issue(self) -> float:
        """Instructions of a warp: 4 per clock and multiprocessor."""
        return 4 * self.multiprocessors * self.clock


H200 = Device(
    name="H200",
    architecture="sm_90",
    copy=4.3e12,
    l2=60 * 10**6,
    matmul=790e12,
    clock=1.98e9,
    multiprocessors=132,
    launch=2e-6,
)
INSTRUCTIONS: dict[str, float] = {
    "GroupNorm+SiLU on chip": 15.4,
    "GroupNorm+SiLU in parts": 15.1,
    "attention, d = 40": 232,
    "attention, d = 64": 200,
    "attention, d = 80": 201,
    "attention, d = 160": 260,
}
"""Per number, or per 64 keys and 16 queries, of the backend with the fewest: see docs/counts.md."""
BEFORE: dict[str, float] = {
    "GroupNorm+SiLU on chip": 30.5,
    "GroupNorm+SiLU in parts": 29.4,
    "attention, d = 40": 320,
}
"""The same on 29 Nov 2026, before the kernels were rebuilt."""
FLIGHT, FLIGHT_BEFORE = 4.3e6, 1.1e6
"""Most bytes on their way at a time in a GroupNorm, now and then."""
LATENCY = 0.8e-6
"""Seconds from a load to its data."""
POLYNOMIALS = {40: 1 / 8}
"""Head dim -> share of the exponentials that attention_hopper.cuh computes with multiply-adds."""
LIBRARY_DIMS = (32, 64, 96, 128, 192, 256)
"""Head dims that library kernels are compiled for; others are padded to the next larger one."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Lower bounds for one case: of our kernel, and of a rival."""

    case: Case
    seconds: dict[str, float]
    """Possible bottleneck -> its time."""
    rival: str
    rival_s: float

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def floor_s(self) -> float:
        return self.seconds[self.bound]


def predictions(device: Device = H200) -> Iterator[Prediction]:
    """Predictions for the cases that have goals, at the batch sizes of their networks."""
    subjects = [SUBJECTS[op] for op in ("group_norm_silu", "add_group_norm_silu", "attention")]
    for case in cases(subjects, batches=()):
        more = {name: shape for name, shape in case.call.options if len(shape) > 1}
        if case.priority == 0 and case.direction == "forward" and not more:
            yield of_norm(case, device) if case.subject.norm else of_attention(case, device)
    yield of_step(sampler_step.gpu_cases()[0], device)


def of_norm(case: Case, device: Device) -> Prediction:
    """x, or the sum, is read once if a sample fits on the chip or in the L2. Else it is read again
    from its end on, so that the second read misses only what the L2 could not hold of it, next to
    what else the first pass read or wrote. The rival is a copy."""
    started = launches(case, device)
    kinds = {launch.kernel.__name__ for launch in started}
    numbers = math.prod(case.call.tensors[0])
    trip = numbers * case.dtype.itemsize
    once = "_small_kernel" in kinds or case.work.bytes / case.call.tensors[0][0] <= device.l2
    held = device.l2 * trip / (case.work.bytes - trip)
    missed = 0.0 if once else max(0.0, trip - held)
    results = "y" if case.work.bytes == 2 * trip else "sum and y"
    what = f"x {'once' if once else f'{1 + missed / trip:.2f} times'}, {results} once"
    instructions = INSTRUCTIONS[f"GroupNorm+SiLU {'on chip' if once else 'in parts'}"]
    return Prediction(
        case=case,
        seconds={
            what: (case.work.bytes + missed) / device.copy,
            "loads in flight": (1 if once else 2) * trip * LATENCY / FLIGHT,
            "issue": numbers / 32 * instructions / device.issue,
            "exponentials": 2 * numbers / device.exp2,  # and reciprocals
            "launches": len(started) * device.launch,
        },
        rival="a copy",
        rival_s=max(case.work.bytes / device.copy, device.launch),
    )


def of_attention(case: Case, device: Device) -> Prediction:
    """The rival pads the head dim and has the same bottlenecks; its instructions are not known."""
    (n, length, heads, d), of_k, _ = case.call.tensors
    scores = n * heads * length * of_k[1]
    exponentials = scores / device.exp2

    def seconds(q_dim: float, v_dim: float, keys: float) -> dict[str, float]:
        return {
            "bytes": case.work.bytes / device.copy,
            "products": 2 * scores * (q_dim + v_dim) * keys / of_k[1] / device.matmul,
            "exponentials": exponentials * keys / of_k[1],
            "launches": device.launch,
        }

    # Q K^T sums over the head dim in steps of 16, and V has pieces of 8 columns (wgmma)
    ours = seconds(math.ceil(d / 16) * 16, math.ceil(d / 8) * 8, math.ceil(of_k[1] / 16) * 16)
    # to the keys of a text, another kernel runs, which is not counted
    if of_k[1] == length and (instructions := INSTRUCTIONS.get(f"attention, d = {d}")):
        ours["issue"] = scores / 64 / 16 * instructions / device.issue
        ours["exponentials"] *= 1 - POLYNOMIALS.get(d, 0.0)
    padded = next((dim for dim in LIBRARY_DIMS if dim >= d), d)
    theirs = seconds(padded, padded, math.ceil(of_k[1] / 128) * 128)
    return Prediction(
        case=case,
        seconds=ours,
        rival=f"padded to {padded}, keys to a multiple of 128",
        rival_s=max(theirs.values()),
    )


def of_step(case: Case, device: Device) -> Prediction:
    """Launch bound: the rival launches ten kernels."""
    return Prediction(
        case=case,
        seconds={"launches": device.launch, "bytes": case.work.bytes / device.copy},
        rival="10 launches",
        rival_s=10 * device.launch,
    )


def launches(case: Case, device: Device) -> list[Any]:
    """The launches that the Triton backend would make."""
    args, kwargs = case.subject.arguments(
        case.call, case.job, Make(case.dtype, torch.device("meta"))
    )
    forward = kernels.OPS[case.subject.op].backends["triton"].forward
    with recording_launches(device.architecture) as found, torch.no_grad():
        forward(*bound_arguments(case.subject.op, args, kwargs), False)
    return found


def rows(device: Device = H200) -> list[tuple[str, ...]]:
    """One row per case, after the header."""
    table: list[tuple[str, ...]] = [
        ("op", "job", "shape", "bound by", "floor", "rival", "its floor", "at best")
    ]
    for p in predictions(device):
        call = p.case.call
        table.append(
            (
                p.case.benchmark,
                p.case.job_name,
                str(call),
                p.bound,
                duration(p.floor_s),
                p.rival,
                duration(p.rival_s),
                f"{p.rival_s / p.floor_s:.2f} x",
            )
        )
    return table


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A kernel that was rebuilt, and the share of its rival's speed that was aimed at."""

    case: str
    """`str` of a prediction's case."""
    least: float
    twice: bool = False
    """Whether the kernel of before read x twice."""


AIMS = (
    Aim(case="group_norm_silu SD 1.5 U-Net (2, 960, 64, 64)", least=0.8),
    Aim(case="group_norm_silu SDXL U-Net (2, 960, 128, 128)", least=0.62, twice=True),
    Aim(case="add_group_norm_silu KL-f8 decoder (1, 256, 512, 512), bias", least=0.62, twice=True),
    Aim(case="group_norm_silu ADM-256 U-Net (8, 512, 256, 256)", least=0.62, twice=True),
    Aim(case="attention SD 1.5 U-Net (2, 4096, 8, 40)", least=1.3),
)


def before(now: Prediction, aim: Aim, device: Device = H200) -> Prediction:
    """The prediction for the kernel that was rebuilt."""
    call, seconds = now.case.call, dict(now.seconds)
    trip = math.prod(call.tensors[0]) * now.case.dtype.itemsize
    if now.case.subject.norm:
        read = next(name for name in seconds if name.startswith("x "))
        del seconds[read]
        reads = 2 if aim.twice else 1
        moved = now.case.work.bytes + (reads - 1) * trip
        seconds[f"x {'twice' if aim.twice else 'once'}"] = moved / device.copy
        seconds["loads in flight"] = reads * trip * LATENCY / FLIGHT_BEFORE
        instructions = BEFORE[f"GroupNorm+SiLU {'in parts' if aim.twice else 'on chip'}"]
        seconds["issue"] = trip / now.case.dtype.itemsize / 32 * instructions / device.issue
    else:
        n, length, heads, d = call.tensors[0]
        scores = n * heads * length * call.tensors[1][1]
        instructions = BEFORE[f"attention, d = {d}"]
        seconds["issue"] = scores / 64 / 16 * instructions / device.issue
        seconds["exponentials"] = scores / device.exp2
    return Prediction(case=now.case, seconds=seconds, rival=now.rival, rival_s=now.rival_s)


def progress(device: Device = H200) -> list[tuple[str, ...]]:
    """One row per rebuilt kernel, after the header: predicted before and now, and the aim."""
    found = {str(p.case): p for p in predictions(device)}
    head = ("kernel", "before", "bound by", "now", "bound by", "against", "aim", "predicted")
    table: list[tuple[str, ...]] = [head]
    for aim in AIMS:
        now = found[aim.case]
        then = before(now, aim, device)
        ratio = now.rival_s / now.floor_s
        cells = (f"{then.rival_s / then.floor_s:.2f}", then.bound, f"{ratio:.2f}", now.bound)
        met = "met" if ratio >= aim.least else "missed"
        table.append((aim.case, *cells, now.rival, f"{aim.least:.2f}", met))
    return table


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m fastdiff.bench.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    table = rows()
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


if __name__ == "__main__":
    main()
