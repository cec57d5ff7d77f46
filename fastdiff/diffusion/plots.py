"""Plots of sampler tables and of the variational bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.bound import Bound
from fastdiff.diffusion.samplers import SamplerTable
from fastdiff.extras import import_extra
from fastdiff.files import atomic_file

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's palette, which colour-blind people can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
MARKERS = "osD^vPX*"


def plot_tables(tables: Sequence[SamplerTable], path: str | Path) -> None:
    """Plot several samplers together: noise levels, step lengths and weights.

    The four panels show, for each network evaluation: the noise level sigma / alpha; the length of
    the step in log(sigma / alpha); the weight b of the new estimate D and, as hollow markers, the
    sum of the history's weights; the fresh noise s, if any. Samplers with equal rows share a line.

    Args:
        tables: the tables to plot, at least one.
        path: a .png, .svg or .pdf file, written atomically.

    Raises:
        ValueError: there is no table, or the file has another suffix.
        ImportError: matplotlib is missing.
    """
    path = Path(path)
    _check_plot(tables, path, "table")
    figure = import_extra("matplotlib.figure", extra="train").Figure(
        figsize=(11, 7.2), layout="constrained", dpi=150
    )
    panels = figure.subplots(2, 2, sharex=True)
    distinct = _distinct(tables)
    for index, (names, table) in enumerate(distinct):
        # Lines of samplers that agree coincide: earlier ones are wider, so that they stay visible
        width = 1.3 + 3.2 * (len(distinct) - 1 - index) / max(len(distinct) - 1, 1)
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 2.5 + width,
            "linewidth": width,
            "label": " = ".join(names),
        }
        _draw(panels, table, style)
    _caption(panels)
    if not any(_adds_noise(table) for table in tables):
        panels[0, 1].set_xlabel(panels[1, 1].get_xlabel())
        panels[0, 1].tick_params(labelbottom=True)
        panels[1, 1].remove()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:])


def plot_bound(curves: Sequence[tuple[str, Bound]], path: str | Path) -> None:
    """Draw the terms of variational bounds over the timesteps, as IDDPM's figure 2 does.

    The upper panel shows each term in bits per dimension on logarithmic axes (t + 1, so that L_0 is
    visible), the lower one their cumulative sum from t = T down, including the prior term.

    Args:
        curves: (label, bound) for each curve, at least one; "" is left out of the legend.
        path: a .png, .svg or .pdf file, written atomically.

    Raises:
        ValueError: there is no curve, or the file has another suffix.
        ImportError: matplotlib is missing.
    """
    path = Path(path)
    _check_plot(curves, path, "bound")
    figure = import_extra("matplotlib.figure", extra="train").Figure(
        figsize=(8, 7), layout="constrained", dpi=150
    )
    above, below = figure.subplots(2, 1, sharex=True)
    for index, (label, bound) in enumerate(curves):
        t = torch.tensor(bound.timesteps) + 1
        terms = bound.terms.mean(0)
        style = {"color": COLOURS[index % len(COLOURS)], "label": label, "linewidth": 1.5}
        above.plot(t, terms.clamp(min=1e-12), **style)
        rest = terms.flip(0).cumsum(0).flip(0) + bound.prior.mean()
        below.plot(t, rest, **style)
    titles = "Term of the bound", "Sum of the terms from T down to t, including the prior term"
    for panel, title in zip((above, below), titles, strict=True):
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        panel.set_ylabel("bits per dimension")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    above.set_xscale("log")
    above.set_yscale("log")
    below.set_xlabel("t + 1")
    if any(label for label, _ in curves):
        above.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:])


def _check_plot(shown: Sequence[object], path: Path, what: str) -> None:
    if not shown:
        raise ValueError(f"expected at least one {what} to plot, got none")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"the plot's file name must end in one of {', '.join(FORMATS)}, got {str(path)!r}"
        )


def _draw(panels: Any, table: SamplerTable, style: dict[str, Any]) -> None:
    evaluation = range(1, len(table) + 1)
    panels[0, 0].plot(evaluation, table.sigmas, **style)
    first, length = step_lengths(table)
    panels[0, 1].plot(first, length, **style)
    panels[1, 0].plot(evaluation, table.column("B"), **style)
    history = torch.stack([table.column(name) for name in ("C1", "C2", "C3")]).sum(0)
    used = history != 0
    hollow = {**style, "linestyle": "none", "markerfacecolor": "none", "markersize": 5}
    panels[1, 0].plot(torch.arange(1, len(table) + 1)[used], history[used], **hollow)
    if _adds_noise(table):
        panels[1, 1].plot(evaluation, table.column("S"), **style)


def _adds_noise(table: SamplerTable) -> bool:
    return bool((table.column("S") != 0).any())


def step_lengths(table: SamplerTable) -> tuple[Tensor, Tensor]:
    """The length of each step in log(sigma / alpha), and where it begins.

    Steps from pure noise or to a clean image are infinitely long and are omitted. Returns two
    vectors: the number of each step's first network evaluation, counted from 1, and its length.
    """
    first = torch.tensor([row for row in range(len(table)) if row in _first_rows(table)])
    levels = torch.cat([table.sigmas[first], torch.tensor([table.final_sigma]).double()]).log()
    length = -levels.diff()
    return first[length.isfinite()] + 1, length[length.isfinite()]


def _first_rows(table: SamplerTable) -> set[int]:
    steps = table.steps.tolist()
    return {steps.index(step) for step in set(steps)}


def _distinct(tables: Sequence[SamplerTable]) -> list[tuple[list[str], SamplerTable]]:
    """Group the tables by their rows: (names, table) for each distinct one."""
    found: list[tuple[list[str], SamplerTable]] = []
    for table in tables:
        for names, other in found:
            same = table.columns.shape == other.columns.shape
            if same and torch.allclose(table.columns, other.columns, rtol=1e-9, atol=1e-12):
                names.append(table.name)
                break
        else:
            found.append(([table.name], table))
    return found


def _caption(panels: Any) -> None:
    texts = (
        ("Noise level where the network is evaluated", "sigma / alpha"),
        ("Length of each step (to a clean image: infinite)", "decrease of log(sigma / alpha)"),
        ("Weight b of the new x0 estimate (hollow: history)", "b, c"),
        ("Fresh noise (samplers that add noise)", "s"),
    )
    for panel, (title, label) in zip(panels.flat, texts, strict=True):
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0, 0].set_yscale("log")
    panels[0, 1].set_ylim(bottom=0, top=1.05 * panels[0, 1].get_ylim()[1])
    for panel in panels[1]:
        panel.set_xlabel("network evaluation")
