"""Quality of samples against network evaluations, for every sampler: docs/quality.md.

    python -m benchmarks.quality                  every sampler, ten minutes of one core
    python -m benchmarks.quality unipc dpmpp-2m   two of them; the others keep their numbers
    python -m benchmarks.quality --docs           the page and the chart alone, from the record

The shipped model, unguided. The record is benchmarks/trained/quality.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.judging import SmallSets
from fastdiff.checkpoint.open import load
from fastdiff.diffusion.plots import COLOURS, MARKERS
from fastdiff.diffusion.samplers import SAMPLERS, SamplerTable, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.evaluation.report import measured_by
from fastdiff.extras import import_extra
from fastdiff.files import atomic_file, write_json, write_text
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.run import generate

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks/trained/quality.json"
PAGE = ROOT / "docs/quality.md"
CHART = ROOT / "docs/images/quality.png"
EVALUATIONS = (5, 10, 20, 50)
PER_CLASS = 15
FAMILIES = {
    "onestep": "one evaluation per step",
    "singlestep": "several evaluations per step",
    "multistep": "a history of evaluations",
    "noise": "with noise in every step",
    "distilled": "for distilled networks",
}
Points = list[dict[str, float]]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="samplers, as fastdiff samplers lists; none: all")
    parser.add_argument("--docs", action="store_true", help="only write the page and the chart")
    options = parser.parse_args(words)
    if unknown := [name for name in options.names if name not in SAMPLERS]:
        parser.error(f"expected some of {', '.join(SAMPLERS)}; got {', '.join(unknown)}")
    if not options.docs:
        measure(options.names or list(SAMPLERS))
    record = json.loads(RECORD.read_text())
    draw(record, CHART)
    write_text(PAGE, page(record))
    print(PAGE.relative_to(ROOT))
    return 0


def measure(names: list[str]) -> None:
    """Sample, judge, and write the record after every sampler."""
    from fastdiff.cli.machine import progress

    model = load("digits")
    assert model.schedule is not None
    schedule = NoiseSchedule(model.schedule)
    sets = SmallSets(PER_CLASS)
    fixed = {"weights": model.weights_hash, "images": len(sets.labels)}
    found: dict[str, Points] = {}
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
        if {key: record[key] for key in fixed} == fixed:
            found = record["samplers"]
    plans = {
        name: plan(lambda n, name=name: build_table(name, schedule, n, prediction=model.prediction))  # type: ignore[misc]
        for name in names
    }
    known = {_key(points): name for name, points in plans.items()}  # equal tables once
    total = sum(len(table) for name in known.values() for _, table in plans[name])
    done = 0
    with progress("quality") as tell:
        for name in names:
            if (first := known[_key(plans[name])]) != name and first in found:
                continue
            settings = [
                SampleSettings(sampler=name, steps=steps, guidance_scale=1.0)
                for steps, _ in plans[name]
            ]
            jobs = [  # in one call, so that slots stay full
                ClassJob(label=label, seed=seed, settings=its)
                for its in settings
                for seed, label in enumerate(sets.labels)
            ]
            images = torch.stack([result.image for result in generate(model, jobs)])
            points: Points = []
            for (steps, table), chosen in zip(
                plans[name], images.split(len(sets.labels)), strict=True
            ):
                score = sets.score(chosen)
                points.append(
                    {
                        "evaluations": len(table),
                        "steps": steps,
                        "accuracy": score.accuracy,
                        "frechet": score.frechet,
                    }
                )
                done += len(table)
            tell(min(done, total), total)
            for other, its in plans.items():
                if _key(its) == _key(plans[name]):
                    found[other] = points
            ordered = {other: found[other] for other in SAMPLERS if other in found}
            source = measured_by("python -m benchmarks.quality")
            write_json(RECORD, {**source, **fixed, "samplers": ordered})


def plan(table: Callable[[int], SamplerTable]) -> list[tuple[int, SamplerTable]]:
    """For each of EVALUATIONS the most steps that take no more, and their table."""
    plans = []
    for most in EVALUATIONS:
        steps = most
        while len(built := table(steps)) > most:
            steps -= 1
        plans.append((steps, built))
    return plans


def _key(points: list[tuple[int, SamplerTable]]) -> tuple[object, ...]:
    """Equal for samplers whose tables are equal, to rounding."""
    return tuple(
        (
            steps,
            *(
                round(value, 9)
                for value in [*table.columns.flatten().tolist(), *table.timesteps.tolist()]
            ),
        )
        for steps, table in points
    )


def groups(samplers: dict[str, Points]) -> dict[str, dict[str, Points]]:
    """Family -> its samplers, those with equal samples under one name. Families are the files of
    samplers, but those that add noise are apart: they converge to something else."""
    found: dict[str, dict[str, Points]] = {}
    schedule = NoiseSchedule(ScheduleConfig())
    for name, points in samplers.items():
        key = SAMPLERS[name].rows.__module__.rpartition(".")[2]
        if key != "distilled" and build_table(name, schedule, 4).column("S").any():
            key = "noise"
        family = found.setdefault(key, {})
        same = [other for other, its in family.items() if its == points]
        if same:
            family[f"{same[0]} = {name}"] = family.pop(same[0])
        else:
            family[name] = points
    return {family: found[family] for family in FAMILIES if family in found}


def draw(record: dict[str, Any], path: Path) -> None:
    """A column per family: Fréchet distance above, class accuracy below, on shared scales."""
    families = groups(record["samplers"])
    figure = import_extra("matplotlib.figure", extra="train").Figure(
        figsize=(3.4 * len(families), 7), layout="constrained", dpi=130
    )
    panels = figure.subplots(2, len(families), sharex=True, sharey="row", squeeze=False)
    ticker = import_extra("matplotlib.ticker", extra="train")
    for column, (family, samplers) in enumerate(families.items()):
        upper, lower = panels[:, column]
        for index, (name, points) in enumerate(samplers.items()):
            style = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": MARKERS[index % len(MARKERS)],
                "linestyle": "-" if index < len(COLOURS) else "--",
                "linewidth": 1.2,
                "markersize": 4,
            }
            x = [point["evaluations"] for point in points]
            upper.plot(x, [point["frechet"] for point in points], label=name, **style)
            lower.plot(x, [100 * point["accuracy"] for point in points], **style)
        upper.set_title(FAMILIES[family])
        upper.set_xscale("log")
        upper.set_yscale("log")
        upper.xaxis.set_major_locator(ticker.FixedLocator(EVALUATIONS))
        upper.xaxis.set_major_formatter(ticker.ScalarFormatter())
        upper.xaxis.set_minor_locator(ticker.NullLocator())
        for form in (upper.yaxis.set_major_formatter, upper.yaxis.set_minor_formatter):
            form(ticker.FormatStrFormatter("%g"))
        upper.legend(fontsize=7)
        lower.set_xlabel("network evaluations")
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("Fréchet distance, times held-out digits")
    panels[1, 0].set_ylabel("class accuracy, %")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def page(record: dict[str, Any]) -> str:
    """docs/quality.md."""
    lines = []
    for samplers in groups(record["samplers"]).values():
        for name, points in samplers.items():
            cells = [
                f"{point['frechet']:.2f}, {point['accuracy']:.0%} ({point['evaluations']})"
                for point in points
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    rows = "\n".join(lines)
    titles = " | ".join(f"{most}" for most in EVALUATIONS)
    missing = [name for name in SAMPLERS if name not in record["samplers"]]
    left = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
    return f"""# Quality against network evaluations

Generated by `{record["command"]}`, commit {record["commit"]}, {record["date"]}, weights
`{record["weights"][:12]}`. The shipped model with classes, unguided, {record["images"]} images of
the same seeds for every sampler and number; each takes the most steps that need no more evaluations
than its column says. In a cell: the Fréchet distance as a multiple of that of as many held-out
digits, class accuracy under the judge of [Results](results.md), and in brackets the evaluations.
Samplers with equal tables share a line. At this size an accuracy of 97% has a standard error of 1.4
points, and every solver of the ODE comes near 96% and 0.43 at 50 evaluations, because all of them
then make nearly the same images.

![Fréchet distance and accuracy against evaluations](images/{CHART.name})

| sampler | {titles} |
|---|{"---:|" * len(EVALUATIONS)}
{rows}
{left}
`lcm` and `tcd` are for networks distilled for them, which this one is not.
"""


if __name__ == "__main__":
    sys.exit(main())
