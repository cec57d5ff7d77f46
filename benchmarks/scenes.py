"""What pictures of a text-to-image model of scenes show of their captions: docs/scenes.md.

    python -m benchmarks.scenes runs/scenes-text     500 held-out captions, three sampling seeds
    python -m benchmarks.scenes --ceiling            the checker on renders of the same captions
    python -m benchmarks.scenes --docs               the page alone, from the record

Every caption is sampled with and without guidance, and `fastdiff.data.scene_check` reads the
pictures back. The record is benchmarks/trained/scenes.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import load
from fastdiff.configs import to_dict
from fastdiff.data.scene_check import Verdict, check_scene
from fastdiff.data.scenes import Scene, render_scene, scenes
from fastdiff.evaluation.report import measured_by
from fastdiff.files import write_json, write_text
from fastdiff.generate.facts import Facts, resolved
from fastdiff.generate.job import SampleSettings, TextJob
from fastdiff.generate.run import Progress, generate
from fastdiff.images import to_uint8

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks/trained/scenes.json"
PAGE = ROOT / "docs/scenes.md"
COUNT, SEEDS = 500, 3
GUIDED, UNGUIDED, CEILING = "guided", "unguided", "renders"
CLAIMED = ("objects", "relation")
"""What guidance is expected to raise."""


@dataclass(frozen=True, kw_only=True)
class SceneRates:
    """Shares of the pictures that show what their captions say; None where no caption says it."""

    count: int
    """Number of pictures."""
    objects: float
    """Every thing has its figure and colour."""
    number: float
    """There are as many things as the caption says."""
    sizes: float | None
    """Of the captions with sizes: the things have them."""
    place: float | None
    """Of the captions with a place: the thing is there."""
    relation: float | None
    """Of the captions with a relation: both things are there, and it holds."""
    right: float
    """Everything that the caption says is shown, and nothing else."""


def rates(verdicts: Sequence[Verdict]) -> SceneRates:
    """The shares of verdicts, each over the captions that say something of the kind.

    Raises:
        ValueError: there are no verdicts.
    """
    if not verdicts:
        raise ValueError("expected at least one verdict, got none")

    total = len(verdicts)
    return SceneRates(
        count=total,
        objects=sum(v.objects for v in verdicts) / total,
        number=sum(v.count for v in verdicts) / total,
        sizes=_share(v.sizes for v in verdicts),
        place=_share(v.place for v in verdicts),
        relation=_share(v.relation for v in verdicts),
        right=sum(v.right for v in verdicts) / total,
    )


def _share(said: Iterable[bool | None]) -> float | None:
    known = [part for part in said if part is not None]
    return sum(known) / len(known) if known else None


def checked(asked: Sequence[Scene], pictures: Iterable[np.ndarray]) -> SceneRates:
    """Compare pictures, each (3, S, S) uint8, with the captions of as many scenes."""
    return rates([check_scene(s, picture) for s, picture in zip(asked, pictures, strict=True)])


def ceiling(asked: Sequence[Scene], size: int) -> SceneRates:
    """The rates of renders of the scenes themselves."""
    return checked(asked, (render_scene(scene, size) for scene in asked))


def sampled(
    model: Model,
    asked: Sequence[Scene],
    settings: SampleSettings,
    *,
    first_seed: int,
    progress: Progress | None = None,
) -> SceneRates:
    """Sample a picture of each caption, with seeds that count up from first_seed, and check it."""
    jobs = [
        TextJob(prompt=scene.caption, seed=first_seed + i, settings=settings)
        for i, scene in enumerate(asked)
    ]
    results = generate(model, jobs, progress=progress)
    return checked(asked, (to_uint8(made.image).numpy() for made in results))


def raised(guided: Sequence[SceneRates], unguided: Sequence[SceneRates], name: str) -> bool:
    """Whether a rate is higher with guidance, beyond the spread of the sampling seeds: the lowest
    with it is above the highest without.

    Raises:
        ValueError: no caption says anything of the kind.
    """
    high, low = ([getattr(r, name) for r in rows] for rows in (guided, unguided))
    if None in high + low:
        raise ValueError(f"no caption names a {name}, so its rate cannot be compared; use more")
    return bool(min(high) > max(low))


def measure(model: Model, settings: SampleSettings, *, count: int, seeds: int) -> dict[str, Any]:
    """The record of a model.

    Raises:
        ValueError: the model cannot be sampled from captions with guidance.
    """
    from fastdiff.cli.machine import progress

    used = resolved(settings, Facts.of(model))
    if used.weight == 1:
        raise ValueError(
            "guidance is compared with its absence, so guidance_scale must be above 1, got "
            f"{used.guidance_scale:g}"
        )
    if model.image_size is None:
        raise ValueError(f"{model.name} does not state the size of its images")
    asked = list(scenes(count, split="held-out"))
    ways = {GUIDED: used, UNGUIDED: replace(used, guidance_scale=1.0)}
    found: dict[str, list[SceneRates]] = {name: [] for name in ways}
    for seed in range(seeds):
        for name, own in ways.items():
            with progress(f"{name}, sampling seed {seed}") as tell:
                found[name].append(
                    sampled(model, asked, own, first_seed=seed * count, progress=tell)
                )
    return {
        "model": model.name,
        "weights": model.weights_hash,
        "settings": to_dict(used),
        "rates": {name: [to_dict(r) for r in own] for name, own in found.items()},
        CEILING: to_dict(ceiling(asked, model.image_size)),
        "raised": {name: raised(found[GUIDED], found[UNGUIDED], name) for name in CLAIMED},
    }


def page(record: dict[str, Any]) -> str:
    """docs/scenes.md."""
    rows = [(CEILING, record[CEILING])]
    rows += [
        (f"{name}, sampling {number}", own)
        for name in (GUIDED, UNGUIDED)
        for number, own in enumerate(record["rates"][name])
    ]
    names = ("objects", "number", "sizes", "place", "relation", "right")
    table = "\n".join(
        f"| {title} | {' | '.join(_percent(own[name]) for name in names)} |" for title, own in rows
    )
    verdict = "; ".join(f"{name}: {'yes' if record['raised'][name] else 'no'}" for name in CLAIMED)
    settings, count = record["settings"], record[CEILING]["count"]
    return f"""# Scenes from captions, measured

Generated by `{record["command"]}`, commit {record["commit"]}, {record["date"]}, weights
`{record["weights"][:12]}`; {settings["sampler"]}, {settings["steps"]} steps, guidance
{settings["guidance_scale"]:g}. Pictures of {count} captions that were held out of training, with
other seeds in each sampling, read back by a checker that compares each thing with drawings of all
figures.

| pictures | objects and colours | number | sizes | place | relation | all |
|---|---:|---:|---:|---:|---:|---:|
{table}

The line of renders is the ceiling: drawings of the scenes themselves, read by the same checker.
Sizes, place and relation are shares of the captions that name one; without its two things a
relation does not hold. Of {count} pictures, a share near 70% has a standard error of
{100 * (0.21 / count) ** 0.5:.1f} points.

Raised by guidance, the lowest sampling with it above the highest without: {verdict}.
"""


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="a model of scenes: a folder or a name")
    parser.add_argument("--ceiling", action="store_true", help="only check renders")
    parser.add_argument("--docs", action="store_true", help="only write the page")
    parser.add_argument("--count", type=int, default=COUNT, help="captions")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="samplings of every caption")
    parser.add_argument("--size", type=int, default=32, help="of renders, with --ceiling")
    parser.add_argument("--guidance", type=float, help="scale; by default the model's own")
    parser.add_argument("--steps", type=int, help="of the sampler")
    options = parser.parse_args(words)
    if (options.model is not None) + options.ceiling + options.docs != 1:
        parser.error("expected one of a model, --ceiling and --docs")
    if min(options.count, options.seeds) < 1:
        parser.error(f"--count and --seeds must be 1 or more, got {options.count, options.seeds}")
    if options.ceiling:
        asked = list(scenes(options.count, split="held-out"))
        print(json.dumps(to_dict(ceiling(asked, options.size)), indent=1))
        return 0
    if not options.docs:
        settings = SampleSettings(guidance_scale=options.guidance, steps=options.steps)
        found = measure(load(options.model), settings, count=options.count, seeds=options.seeds)
        command = f"python -m benchmarks.scenes {' '.join(words or sys.argv[1:])}"
        write_json(RECORD, {**measured_by(command), **found})
    elif not RECORD.exists():
        parser.error(f"{RECORD} does not exist; measure a model first")
    write_text(PAGE, page(json.loads(RECORD.read_text())))
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
