"""The HTML page of a run: one file that needs nothing else, with pictures as SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdiff.bench.record import duration
from fastdiff.bench.result import Entry, Row, Run
from fastdiff.bench.turns import Verdict
from fastdiff.bench.whole import ABLATIONS, OURS
from fastdiff.extras import import_extra
from fastdiff.files import write_text

COLOURS: dict[Verdict | None, str] = {
    "faster": "#0072B2",
    "slower": "#D55E00",
    "equal": "#777777",
    "unsure": "#BBBBBB",
}
"""Okabe and Ito's colors, distinguishable with color blindness."""
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.85rem; width: 100%; }
th, td { text-align: right; padding: 0.15rem 0.6rem; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
tr.row td { border-top: 1px solid #8888; font-weight: 600; text-align: left; padding-top: 0.5rem; }
.faster { color: #0072B2; } .slower, .refused { color: #D55E00; } .unsure, .note { color: #888; }
figure { margin: 1.5rem 0; background: white; border-radius: 6px; padding: 0.5rem; }
figure svg { width: 100%; height: auto; }
figcaption { color: #555; font-size: 0.9rem; }
"""


def write(run: Run, path: Path) -> None:
    """Write the page of a run.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the run has no rows.
    """
    if not run.rows:
        raise ValueError("nothing was measured, so there is no page; use a larger --minutes")
    import_extra("matplotlib", extra="bench")
    figures: list[tuple[Callable[[Run], Any], str]] = [
        (speedups, "How many times as fast as the fastest baseline, with 99.9% intervals. Grey "
         "bands: the noise, by which the same code differed from itself."),
        (rates, "Rates against the limits that were timed in turns with them."),
        (ablations, "What each optimization is worth: the whole network with it switched off."),
        (errors, "Error against fp64, as a multiple of eager PyTorch's, against speed."),
    ]  # fmt: skip
    parts = [f"<h1>fastdiff bench: {_text(run.environment.get('device'))}</h1>"]
    parts += [f"<p>{_text(line)}</p>" for line in answer(run)]
    for draw, caption in figures:
        figure = draw(run)
        if figure is not None:
            parts.append(f"<figure>{_svg(figure)}<figcaption>{caption}</figcaption></figure>")
    parts += ["<h2>All measurements</h2>", _table(run), "<h2>Environment</h2>", _environment(run)]
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fastdiff bench</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    write_text(path, text)


def answer(run: Run) -> list[str]:
    """Is it faster here, and what limits it? In sentences."""
    lines = []
    ops = [row for row in run.rows if row.kind in ("op", "backward") and row.ours]
    if ops:
        lines.append(f"Calls of ops: {_verdicts(ops)}.")
    for row in run.rows:
        if row.kind in ("op", "backward") or not row.ours:
            continue
        mine = next((e for e in row.entries if e.provider == OURS and e.ratio), row.ours[0])
        made = ""
        if row.images and mine.median_s:
            made = f", {row.images / mine.median_s:.3g} images/s"
            made += f", {mine.share:.0%} of {row.limit}" if mine.share is not None else ""
        lines.append(f"{_title(row)}: {sentence(mine, row)}{made}.")
    lines += [line for line in (_limits(ops),) if line]
    noisy = [row for row in run.rows if row.noise > 0.1]
    if noisy:
        lines.append(
            f"In {len(noisy)} of {len(run.rows)} rows the same code differed from itself by more "
            "than 10%: this machine was busy. Measure again when it is not."
        )
    lines += [f"Refused: {line}." for line in run.refused]
    return lines


def sentence(entry: Entry, row: Row) -> str:
    """``faster (1.42 x eager's speed, 1.38 to 1.47)``, or that the difference is within noise."""
    ratio = entry.ratio
    assert ratio is not None
    interval = f"{ratio.value:.2f} x {row.baseline}'s speed, {ratio.low:.2f} to {ratio.high:.2f}"
    if entry.verdict == "unsure":
        return f"no difference beyond the noise ({interval})"
    return {"faster": "faster", "slower": "slower", "equal": "equally fast"}[
        entry.verdict or "equal"
    ] + f" ({interval})"


def _verdicts(rows: Sequence[Row]) -> str:
    said = {
        "faster": "faster than every baseline", "equal": "equal to the best", "slower": "slower",
        "unsure": "within the noise",
    }  # fmt: skip
    parts = []
    for verdict, text in said.items():
        found = [row.ours[0] for row in rows if row.ours[0].verdict == verdict]
        if found:
            values = sorted(entry.ratio.value for entry in found if entry.ratio)
            span = f" ({spanned(values, '.2f')} x)" if verdict != "equal" else ""
            parts.append(f"{len(found)} of {len(rows)} {text}{span}")
    return ", ".join(parts)


def spanned(values: Sequence[float], form: str) -> str:
    """``1.22`` or ``1.22 to 1.37``: the smallest and the largest of sorted values, as one if they
    read alike.

    >>> spanned([0.141, 0.9], ".0%"), spanned([1.221, 1.224], ".2f")
    ('14% to 90%', '1.22')
    """
    first, last = format(values[0], form), format(values[-1], form)
    return first if first == last else f"{first} to {last}"


def _limits(rows: Sequence[Row]) -> str:
    parts = []
    for limit, what in (("copy", "memory"), ("product", "arithmetic")):
        shares = sorted(
            row.ours[0].share for row in rows if row.limit == limit and row.ours[0].share
        )
        if shares:
            calls = "1 call is" if len(shares) == 1 else f"{len(shares)} calls are"
            reach = "reaches" if len(shares) == 1 else "reach"
            parts.append(
                f"{calls} bound by {what} and {reach} {spanned(shares, '.0%')} of a {limit} of the "
                "same work"
            )
    return "; ".join(parts) + "." if parts else ""


# Pictures


def speedups(run: Run) -> Any:
    """Bars of the ratio of our fastest entry in each row."""
    rows = [row for row in run.rows if row.ours]
    if not rows:
        return None
    figure, axes = _figure(10, 1 + 0.34 * len(rows))
    for place, row in enumerate(rows):
        best = row.ours[0]
        assert best.ratio is not None
        ratio = best.ratio
        axes.barh(place, 2 * row.noise, left=1 - row.noise, height=0.9, color="#E8E8E8")
        axes.barh(place, ratio.value - 1, left=1, height=0.55, color=COLOURS[best.verdict])
        ends = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
        axes.errorbar(ratio.value, place, xerr=ends, color="#222222", linewidth=1, capsize=2)
        label = f" {ratio.value:.2f} x {row.baseline}"
        end = max(min(ratio.high, 1.15 * ratio.value), 1 + row.noise)
        axes.text(end, place - 0.3, label, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [_title(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#222222", linewidth=0.8)
    highest = max(row.ours[0].ratio.value for row in rows if row.ours[0].ratio)
    axes.set_xlim(0, 1.5 * max(highest, 1.2))
    axes.set_xlabel("speed, relative to the fastest baseline")
    return figure


def rates(run: Run) -> Any:
    """Bytes per second against bytes, and FLOPs per second against FLOPs, with their limits."""
    panels = [
        ("copy", "bytes", "GB/s", 1e9, "bytes that must move"),
        ("product", "flops", "GFLOP/s", 1e9, "FLOPs"),
    ]
    panels = [p for p in panels if any(row.limit == p[0] for row in run.rows)]
    if not panels:
        return None
    figure, every = _figure(10, 3.8, len(panels))
    for axes, (limit, field, unit, scale, label) in zip(_listed(every), panels, strict=True):
        rows = sorted(
            (r for r in run.rows if r.limit == limit), key=lambda row: getattr(row, field)
        )
        for name, colour in (("limit", "#222222"), ("eager", "#E69F00"), ("ours", "#0072B2")):
            points = [(getattr(r, field), _rate(r, name, field) / scale) for r in rows]
            points = [point for point in points if point[1]]
            style = "-" if name == "limit" else ""
            shown = limit if name == "limit" else name
            axes.plot(*zip(*points, strict=True), f"o{style}", color=colour, label=shown, ms=4)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _rate(row: Row, name: str, field: str) -> float:
    if name == "limit":  # by its share, as its own work may be a multiple of the row's
        entry = next((e for e in row.entries if e.share and e.median_s), None)
        if entry is None or not entry.share or not entry.median_s:
            return 0.0
        return float(getattr(row, field)) / (entry.median_s * entry.share)
    entries = row.ours if name == "ours" else [e for e in row.entries if e.provider == name]
    seconds = entries[0].median_s if entries else None
    return float(getattr(row, field)) / seconds if seconds else 0.0


def ablations(run: Run) -> Any:
    """Speed of whole networks with one optimization switched off, relative to ours."""
    bars: list[tuple[Row, Entry, float]] = []
    for row in run.rows:
        ours = _of(row, OURS).median_s
        shown = [e for e in row.entries if e.provider in (OURS, "eager", *ABLATIONS)]
        if ours and any(entry.provider in ABLATIONS for entry in shown):
            bars += [(row, entry, ours / entry.median_s) for entry in shown if entry.median_s]
    if not bars:
        return None
    figure, axes = _figure(10, 1 + 0.36 * len(bars))
    for place, (_, entry, speed) in enumerate(bars):
        axes.barh(
            place, speed, height=0.6, color="#0072B2" if entry.provider == OURS else "#56B4E9"
        )
        axes.text(speed, place, f" {speed:.2f}", va="center", fontsize=8)
    axes.set_yticks(
        range(len(bars)), [f"{_title(row)}: {e.provider}" for row, e, _ in bars], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("speed, relative to fastdiff with everything on")
    return figure


def errors(run: Run) -> Any:
    """Error and speed of each of our entries, by op."""
    points = [(row, entry) for row in run.rows for entry in row.ours if entry.error and entry.ratio]
    if not points:
        return None
    figure, axes = _figure(10, 4)
    for name in dict.fromkeys(row.name for row, _ in points):
        mine = [(e.ratio.value, e.error) for row, e in points if row.name == name and e.ratio]
        axes.plot(*zip(*mine, strict=True), "o", label=name, ms=5, alpha=0.8)
    axes.axhline(1, color="#222222", linewidth=0.8)
    axes.axvline(1, color="#222222", linewidth=0.8)
    axes.set(xlabel="speed, relative to the fastest baseline", ylabel="error, relative to eager's")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in _listed(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _listed(axes: Any) -> list[Any]:
    return list(axes) if hasattr(axes, "__len__") else [axes]


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)


# Text


def _table(run: Run) -> str:
    head = ("provider", "median", "quartiles", "against the best", "of the limit", "error", "first")
    lines = ["<table>", f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>"]
    for row in run.rows:
        title = f"{_title(row)}, {row.dtype}, noise {row.noise:.1%}"
        lines.append(f'<tr class="row"><td colspan="{len(head)}">{_text(title)}</td></tr>')
        for entry in row.entries:
            cells = _cells(entry, row)
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _cells(entry: Entry, row: Row) -> list[str]:
    name = _text(entry.provider)
    if entry.median_s is None:
        kind = "refused" if entry.note.startswith("refused") else "note"
        return [name, f'<span class="{kind}">{_text(entry.note)}</span>', *[""] * 5]
    assert entry.q1_s is not None
    assert entry.q3_s is not None
    ratio = entry.ratio
    against = "fastest baseline" if entry.provider == row.baseline else ""
    if ratio is not None:
        value = f"{ratio.value:.2f} x ({ratio.low:.2f} to {ratio.high:.2f})"
        against = f'<span class="{entry.verdict}">{value}</span>'
    return [
        name,
        duration(entry.median_s),
        f"{duration(entry.q1_s)} to {duration(entry.q3_s)}",
        against,
        f"{entry.share:.0%}" if entry.share is not None else "",
        f"{entry.error:.2f}" if entry.error is not None else "",
        duration(entry.first_s) if entry.first_s is not None else "",
    ]


def _environment(run: Run) -> str:
    facts = {**run.environment, **({"clocks": run.clocks} if run.clocks else {})}
    if run.left_out:
        facts["no time for"] = "; ".join(run.left_out)
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _title(row: Row) -> str:
    names = {
        "step": "step of",
        "decode": "decoder",
        "image": "images of",
        "job": "job of",
        "backward": "gradients of",
    }
    return " ".join(part for part in (names.get(row.kind, ""), str(row)) if part)


def _of(row: Row, provider: str) -> Entry:
    return next((e for e in row.entries if e.provider == provider), Entry(provider=provider))


def _text(value: Any) -> str:
    return html.escape(str(value))
