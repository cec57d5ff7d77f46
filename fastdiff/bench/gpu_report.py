"""The GPU section of docs/performance.md: goals, and every op against its rivals."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from fastdiff.bench.ops.sampler_step import FROM_THE_HOST
from fastdiff.bench.providers import LIBRARY, OURS
from fastdiff.bench.record import LAUNCHED, LOOP, LOOP_LAUNCHED, NETWORK, Record, duration

NOTHING = (
    "No GPU has been measured yet: `python -m benchmarks.device` does it, on a machine with one."
)
ABOVE_CACHE = 128 * 2**20
"""Bytes that exceed the L2 cache of every current GPU."""
WHOLE = {
    NETWORK: "one evaluation",
    LAUNCHED: "one evaluation, launched op by op",
    LOOP: "20 guided steps, each a replay",
    LOOP_LAUNCHED: "20 guided steps, launched op by op",
}
"""Benchmarks of whole networks -> what they measure."""
COLUMNS = ("eager", "eager channels_last", "compile", "reference")


@dataclass(frozen=True, kw_only=True)
class Group:
    """All providers of one case."""

    records: dict[str, Record]

    @property
    def ours(self) -> Record | None:
        """The faster of our kernels, which is the one `auto` uses."""
        found = [self.records[name] for name in ("auto", *OURS) if name in self.records]
        return min(found, key=lambda record: record.median_s, default=None)

    @property
    def any(self) -> Record:
        return next(iter(self.records.values()))

    def against(self, provider: str) -> float | None:
        """Our speedup over a provider."""
        other = self.records.get(provider)
        return other.median_s / self.ours.median_s if other and self.ours else None

    @property
    def best(self) -> Record | None:
        """The fastest library kernel."""
        found = [
            record
            for name, record in self.records.items()
            if name in (*LIBRARY, "library", "eager")
        ]
        known = any(record.provider in LIBRARY for record in found)
        return min(found, key=lambda record: record.median_s) if known else None

    def against_best(self) -> float | None:
        return self.best.median_s / self.ours.median_s if self.best and self.ours else None

    def of_limit(self) -> float | None:
        limit = self.records.get("matmul") or self.records.get("copy")
        return self.ours.share_of(limit) if limit and self.ours else None


def groups(records: Sequence[Record]) -> list[Group]:
    """Group the records of each case, keeping their order."""
    found: dict[Hashable, dict[str, Record]] = {}
    for record in records:
        key = record.benchmark, record.job, record.shape, record.dtype
        found.setdefault(key, {})[record.provider] = record
    return [Group(records=by_provider) for by_provider in found.values()]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio set as a goal before anything was measured, bf16 on an H200."""

    op: str
    where: str
    against: str
    goal: float
    applies: Callable[[Group], bool]
    value: Callable[[Group], float | None]
    percent: bool = False

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.2f} x"

    def worst(self, found: Sequence[Group]) -> tuple[float, Group] | None:
        """The smallest value over the cases it applies to: all of them must reach the goal."""
        values = [(self.value(group), group) for group in found if self.applies(group)]
        known = [(value, group) for value, group in values if value is not None]
        return min(known, key=lambda pair: pair[0]) if known else None


NORMS = ("group_norm_silu", "add_group_norm_silu")
"""Both, since most norms of a network add something."""


def _large_norm(group: Group) -> bool:
    return group.any.benchmark in NORMS and group.any.bytes > ABOVE_CACHE


def _self_attention(d: int, length: int | None = None) -> Callable[[Group], bool]:
    def applies(group: Group) -> bool:
        shape = re.fullmatch(r"\(\d+, (\d+), \d+, (\d+)\)", group.any.shape)
        return (
            group.any.benchmark == "attention"
            and shape is not None
            and int(shape[2]) == d
            and (length is None or int(shape[1]) == length)
        )

    return applies


def _cross_attention(group: Group) -> bool:
    return group.any.benchmark == "attention" and group.any.shape.endswith("to 77")


def _against_diffusers(group: Group) -> float | None:
    """Our speedup over the fastest diffusers scheduler."""
    theirs = [r.median_s for name, r in group.records.items() if name.startswith("diffusers")]
    return min(theirs) / group.ours.median_s if theirs and group.ours else None


def _network(job: str, rows: int) -> Callable[[Group], bool]:
    def applies(group: Group) -> bool:
        one = group.any
        return one.benchmark == NETWORK and one.job == job and one.shape.startswith(f"({rows},")

    return applies


def _against_inductor(group: Group) -> float | None:
    """Our speedup over torch.compile, in one graph of ours or in its own, whichever is faster."""
    ratios = [group.against(name) for name in ("compile", "compile reduce-overhead")]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


BEST = "the best SDPA kernel"
TARGETS = (
    Target(
        op="group_norm_silu, NHWC",
        where="more bytes than the L2 cache",
        against="a copy of the same bytes",
        goal=0.85,
        applies=_large_norm,
        value=Group.of_limit,
        percent=True,
    ),
    Target(
        op="group_norm_silu, NHWC",
        where="more bytes than the L2 cache",
        against="torch.compile",
        goal=1.5,
        applies=_large_norm,
        value=lambda group: group.against("compile"),
    ),
    Target(
        op="group_norm_silu, NHWC",
        where="more bytes than the L2 cache",
        against="eager channels_last",
        goal=3.0,
        applies=_large_norm,
        value=lambda group: group.against("eager channels_last"),
    ),
    Target(
        op="group_norm_silu, gradients",
        where="all measured",
        against="eager channels_last",
        goal=1.5,
        applies=lambda group: group.any.benchmark in [f"{norm} backward" for norm in NORMS],
        value=lambda group: group.against("eager channels_last"),
    ),
    *(
        Target(
            op="attention",
            where=where,
            against=BEST,
            goal=goal,
            applies=applies,
            value=Group.against_best,
        )
        for where, goal, applies in (
            ("to itself, d = 40, 4096 tokens", 1.2, _self_attention(40, 4096)),
            ("to itself, d = 64", 0.95, _self_attention(64)),
            ("to itself, d = 80", 1.1, _self_attention(80)),
            ("to itself, d = 160", 1.0, _self_attention(160)),
            ("to 77 tokens", 1.5, _cross_attention),
        )
    ),
    Target(
        op="sampler_step",
        where="from the host, all batches",
        against="the fastest of diffusers' `scheduler.step`",
        goal=5.0,
        applies=lambda group: group.any.benchmark == FROM_THE_HOST,
        value=_against_diffusers,
    ),
    *(
        Target(
            op=job,
            where=where,
            against="torch.compile with graphs",
            goal=goal,
            applies=_network(job, rows),
            value=_against_inductor,
        )
        for job, rows, where, goal in (
            ("SD 1.5 U-Net", 2, "one guided evaluation, as a graph", 1.25),
            ("KL-f8 decoder", 1, "one image, as a graph", 1.0),
        )
    ),
)


def targets(found: Sequence[Group]) -> list[tuple[str, ...]]:
    """One row per target, after the header."""
    rows: list[tuple[str, ...]] = [("op", "where", "against", "aimed at", "measured", "worst at")]
    for target in TARGETS:
        worst = target.worst(found)
        goal = f"at least {target.text(target.goal)}"
        result = ("not measured", "")
        if worst is not None:
            value, group = worst
            missed = "" if value >= target.goal else ", missed"
            result = (f"{target.text(value)}{missed}", f"{group.any.job} {group.any.shape}".strip())
        rows.append((target.op, target.where, target.against, goal, *result))
    return rows


def op_rows(found: Sequence[Group]) -> list[tuple[str, ...]]:
    """One row per case, after the header: ours, its share of the limit, its rivals."""
    rows: list[tuple[str, ...]] = [
        (
            "op",
            "job",
            "shape",
            "timed by",
            "ours",
            "by",
            "against our other",
            "quartiles",
            "of the limit",
            *(f"against {name}" for name in COLUMNS),
            "against the best SDPA kernel",
        )
    ]
    for group in found:
        ours = group.ours
        if ours is None or group.any.benchmark in WHOLE:
            continue
        best, ratio = group.best, group.against_best()
        limit = group.of_limit()
        rows.append(
            (
                ours.benchmark,
                ours.job,
                ours.shape,
                ours.method,
                duration(ours.median_s),
                ours.provider,
                _against_the_other(group),
                f"{duration(ours.q1_s)} to {duration(ours.q3_s)}",
                "" if limit is None else f"{limit:.0%}",
                *("" if (x := group.against(name)) is None else f"{x:.2f} x" for name in COLUMNS),
                "" if best is None or ratio is None else f"{ratio:.2f} x ({best.provider})",
            )
        )
    return rows


def _against_the_other(group: Group) -> str:
    """The speedup of the faster of Triton and CUDA over the other."""
    others = [name for name in OURS if group.ours and name != group.ours.provider]
    ratios = [ratio for name in others if (ratio := group.against(name)) is not None]
    return f"{min(ratios):.2f} x" if ratios else ""


def network_rows(found: Sequence[Group]) -> list[tuple[str, ...]]:
    """One row per provider of whole evaluations, after the header."""
    rows: list[tuple[str, ...]] = [
        ("job", "shape", "what", "timed by", "by", "median", "quartiles", "as fast as ours")
    ]
    for group in found:
        if group.any.benchmark not in WHOLE:
            continue
        for name, record in group.records.items():
            ratio = group.ours.median_s / record.median_s if group.ours else None
            rows.append(
                (
                    record.job,
                    record.shape,
                    WHOLE[record.benchmark],
                    record.method,
                    name,
                    duration(record.median_s),
                    f"{duration(record.q1_s)} to {duration(record.q3_s)}",
                    "" if ratio is None else f"{ratio:.2f} x",
                )
            )
    return rows
