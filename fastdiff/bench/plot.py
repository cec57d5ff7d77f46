"""The figure of docs/performance.md: the share of each op in one evaluation of each network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastdiff.bench.record import Share, duration
from fastdiff.files import atomic_file

# Okabe and Ito's colors, distinguishable with color blindness; related ops have the dark and the
# light shade of one hue.
COLOURS = {
    "group_norm_silu": "#0072B2",
    "add_group_norm_silu": "#56B4E9",
    "attention": "#D55E00",
    "geglu": "#009E73",
    "layer_norm": "#7A3E66",
    "add_layer_norm": "#CC79A7",
}
UNKNOWN, REST = "#000000", "#E4E4E4"
LIGHT = (REST, "#56B4E9", "#CC79A7")  # these get black numbers
READABLE = 0.03
"""Smallest share with room for its number."""


def draw_shares(shares: Sequence[Share], device: str, path: Path) -> None:
    """One bar per job of `shares`: the ops in the order of `COLOURS`, then the rest.

    Args:
        shares: of one device; the ops of a job add up to less than 1.
        path: a .png file, written atomically.
    """
    jobs = list(dict.fromkeys(share.job for share in shares))
    order = [*COLOURS, *sorted({share.op for share in shares} - set(COLOURS))]
    figure = Figure(figsize=(10, 1.7 + 0.62 * len(jobs)), dpi=150, layout="constrained")
    axes = figure.subplots()
    lefts = dict.fromkeys(jobs, 0.0)
    for op in order:
        for share in (share for share in shares if share.op == op):
            colour = COLOURS.get(op, UNKNOWN)
            _segment(axes, share.job, lefts[share.job], share.share, colour)
            lefts[share.job] += share.share
        if any(share.op == op for share in shares):
            axes.barh(jobs[0], 0, color=COLOURS.get(op, UNKNOWN), label=op)
    for job, left in lefts.items():
        _segment(axes, job, left, 1 - left, REST)
    axes.barh(jobs[0], 0, color=REST, label="the rest, mostly convolutions and linear layers")
    totals = {share.job: share.total_s for share in shares}
    axes.set_yticks(range(len(jobs)), [f"{job}\n{duration(totals[job])}" for job in jobs])
    _frame(axes, device)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _segment(axes: Any, job: str, left: float, width: float, colour: str) -> None:
    axes.barh(job, width, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.6)
    if width >= READABLE:
        ink = "black" if colour in LIGHT else "white"
        axes.text(left + width / 2, job, f"{width:.0%}", color=ink, ha="center", va="center")


def _frame(axes: Any, device: str) -> None:
    axes.set_title(
        f"Where the time of one evaluation goes, reference backend, {device}",
        loc="left",
        fontsize=11,
        fontweight="bold",
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
