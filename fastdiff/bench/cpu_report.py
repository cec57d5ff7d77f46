"""The CPU section of docs/performance.md: goals against measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastdiff.bench.record import END_TO_END, IN_TURNS, Record, duration

AIMS = {"SD 1.5 U-Net": 1.1, "KL-f8 decoder": 1.2, "residual block, bf16": 10.0}
"""Speedup over stock diffusers; set before anything was measured."""
LARGE = 34_000_000
"""Bytes of x above which calls are memory bound."""
CACHE = 4 * 2**20
"""Bytes of x and y that fit into the L2 caches of two cores together."""
Cases = dict[tuple[str, str], dict[str, Record]]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A speedup set as a goal before anything was measured, fp32 on two cores."""

    op: str
    where: str
    ours: str
    rival: str
    goal: float
    applies: Callable[[Record], bool]

    def worst(self, cases: Cases) -> tuple[float, Record] | None:
        """The smallest ratio over the cases that have both providers, and its record."""
        found = [
            (by[self.rival].median_s / by[self.ours].median_s, by[self.ours])
            for by in cases.values()
            if self.ours in by and self.rival in by and self.applies(by[self.ours])
        ]
        return min(found, key=lambda pair: pair[0], default=None)


def _op(name: str, more: Callable[[Record], bool] = lambda record: True) -> Callable[..., bool]:
    return lambda record: record.shape.startswith(f"{name} ") and more(record)


def _network(job: str) -> Callable[[Record], bool]:
    return lambda record: record.benchmark == END_TO_END and record.job == job


NORM = "group_norm_silu"
OPS = (
    Aim(
        op=NORM, where="Stable Diffusion's, x and y in the caches", ours="cpu", rival="eager",
        goal=1.8,
        applies=_op(NORM, lambda record: record.bytes <= CACHE and "digits" not in record.job),
    ),
    Aim(
        op=NORM, where="from 34 MB up, outputs reused", ours="cpu, memory kept", rival="eager",
        goal=4.0, applies=_op(NORM, lambda record: record.bytes / 2 >= LARGE),
    ),
    Aim(
        op=NORM, where="from 34 MB up, outputs reused by both", ours="cpu, memory kept",
        rival="eager, memory kept", goal=4.0,
        applies=_op(NORM, lambda record: record.bytes / 2 >= LARGE),
    ),
    Aim(op=NORM, where="all calls", ours="cpu", rival="eager", goal=1.0, applies=_op(NORM)),
    Aim(
        op="sampler_step", where="written by hand", ours="cpu", rival="eager", goal=4.0,
        applies=_op("sampler_step"),
    ),
    Aim(
        op="sampler_step", where="diffusers' DDIM", ours="cpu", rival="diffusers DDIM", goal=4.0,
        applies=_op("sampler_step", lambda record: record.shape.endswith("deterministic")),
    ),
    Aim(
        op="attention", where="to 77 keys", ours="cpu", rival="eager", goal=1.5,
        applies=_op("attention", lambda record: record.shape.endswith("to 77")),
    ),
)  # fmt: skip
NETWORKS = tuple(
    Aim(
        op=job, where="whole", ours="fastdiff", rival=rival, goal=goal, applies=_network(job)
    )
    for job, goals in {
        **{job: {"diffusers": goal} for job, goal in AIMS.items()},
        "SD 1.5 U-Net": {"diffusers": AIMS["SD 1.5 U-Net"], "compile": 1.0},
    }.items()
    for rival, goal in goals.items()
)  # fmt: skip


def cases_of(records: Sequence[Record]) -> Cases:
    """(job, shape) -> provider -> record, of everything that was measured in turns."""
    found: Cases = {}
    for record in records:
        if record.benchmark in (END_TO_END, IN_TURNS):
            found.setdefault((record.job, record.shape), {})[record.provider] = record
    return found


def aims(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """One row per goal, after the header. records: of one run."""
    rows: list[tuple[str, ...]] = [("what", "where", "against", "aimed at", "measured", "worst at")]
    cases = cases_of(records)
    for aim in (*OPS, *NETWORKS):
        worst, result = aim.worst(cases), ("not measured", "")
        if worst is not None:
            ratio, record = worst
            missed = "" if ratio >= aim.goal else ", missed"
            result = f"{ratio:.2f} x{missed}", f"{record.job} {record.shape}".strip()
        rows.append((aim.op, aim.where, aim.rival, f"at least {aim.goal:.1f} x", *result))
    return rows


def op_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """One row per call, after the header: ours against eager, then both with outputs reused."""
    rows: list[tuple[str, ...]] = [
        ("job", "call", "ours", "eager", "ratio", "ours, memory kept", "ratio to eager with it")
    ]
    for (job, shape), by in cases_of(records).items():
        if "cpu" not in by or "eager" not in by:
            continue
        ours, kept = by["cpu"].median_s, by.get("cpu, memory kept")
        rows.append(
            (
                job,
                shape,
                duration(ours),
                duration(by["eager"].median_s),
                f"{by['eager'].median_s / ours:.2f} x",
                duration(kept.median_s) if kept else "",
                f"{by['eager, memory kept'].median_s / kept.median_s:.2f} x" if kept else "",
            )
        )
    return rows
