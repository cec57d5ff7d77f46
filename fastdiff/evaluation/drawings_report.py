"""Measure a text-to-image model of drawings, and write what was found with a sheet of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.configs import to_dict
from fastdiff.data.config import Split
from fastdiff.data.emoji import SHIPPABLE
from fastdiff.evaluation.drawings import (
    DrawingJudge,
    DrawingReference,
    DrawingScorer,
    DrawingScores,
    sample_drawings,
)
from fastdiff.evaluation.report import measured_by
from fastdiff.files import write_json, write_text
from fastdiff.generate.facts import Facts, resolved
from fastdiff.generate.job import SampleSettings
from fastdiff.images import contact_sheet, save_png

SHEET, SHEET_COUNT, SHEET_COLUMNS = "drawings.png", 100, 10
HELD_OUT, UNGUIDED, SEEN, REAL = "held-out", "held-out, unguided", "seen", "real held-out"
Tell = Callable[[int, int], None]
Bar = Callable[[str], Tell]


@dataclass(frozen=True, kw_only=True)
class DrawingEvaluation:
    """What was measured."""

    scores: dict[str, DrawingScores]
    """HELD_OUT: pictures of the captions of held-out drawings; UNGUIDED: the same without guidance;
    SEEN: of captions that were trained on; REAL: the held-out drawings themselves."""
    near_copy_limit: float
    """Ratio of distances below which a picture counts as a near-copy."""
    texts: tuple[str, ...]
    """Captions of the sheet."""
    images: Tensor
    """Pictures of the sheet, (N, 3, H, W) in [-1, 1]."""
    settings: SampleSettings
    """How they were sampled."""
    seeds: tuple[int, int]
    """First and last seed."""
    model: str
    weights_hash: str


def is_of_drawings(model: Model) -> bool:
    """Whether a model was trained on the captioned drawings."""
    facts = model.provenance.get("facts")
    return isinstance(facts, dict) and facts.get("data") == "emoji"


def evaluate_drawings(
    model: Model,
    *,
    count: int = 500,
    settings: SampleSettings | None = None,
    first_seed: int = 0,
    bar: Bar,
) -> DrawingEvaluation:
    """Sample pictures of the captions of held-out and of seen drawings, and score them.

    Args:
        count: pictures of held-out captions, guided and as many unguided, and of seen ones.
        first_seed: the i-th picture has the seed first_seed + i.
        bar: bar(what) returns a function progress(done, total) that shows how far it is.

    Raises:
        ValueError: the model makes no RGB images of known size.
        FileNotFoundError: the drawings have not been fetched.
    """
    if model.image_size is None or model.image_channels != 3:
        raise ValueError("a model of drawings makes RGB images and states their size")
    reference = DrawingReference.open(model.image_size, SHIPPABLE)
    scorer = DrawingScorer(
        DrawingJudge.trained(model.image_size, progress=bar("training the judge")), reference
    )
    used = resolved(settings or SampleSettings(), Facts.of(model))

    def made(
        split: Split, settings: SampleSettings, what: str
    ) -> tuple[list[str], Tensor, DrawingScores]:
        texts, objects, styles = reference.asked(split, count)
        images = sample_drawings(
            model, texts, settings=settings, first_seed=first_seed, progress=bar(what)
        )
        return texts, images, scorer.score(images, objects, styles)

    texts, images, held_out = made("held-out", used, "held-out captions")
    scores = {HELD_OUT: held_out}
    if used.weight != 1:
        plain = replace(used, guidance_scale=1.0)
        scores[UNGUIDED] = made("held-out", plain, "held-out captions, unguided")[2]
    scores[SEEN] = made("train", used, "seen captions")[2]
    scores[REAL] = scorer.ceiling()
    return DrawingEvaluation(
        scores=scores,
        near_copy_limit=scorer.near_copy_limit,
        texts=tuple(texts[:SHEET_COUNT]),
        images=images[:SHEET_COUNT],
        settings=used,
        seeds=(first_seed, first_seed + count - 1),
        model=model.name,
        weights_hash=model.weights_hash,
    )


def write_drawings(
    evaluation: DrawingEvaluation, folder: str | os.PathLike[str], *, command: str
) -> Path:
    """Write text-to-image.md, text-to-image.json and images/drawings.png to a folder.

    command: the command line that measured, so that it can be repeated.

    Returns:
        The path of text-to-image.md.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    sheet = contact_sheet(
        evaluation.images,
        columns=min(SHEET_COLUMNS, len(evaluation.images)),
        captions=evaluation.texts,
        title=evaluation.model,
        caption=_sampled(evaluation),
    )
    save_png(folder / "images" / SHEET, sheet)
    write_json(
        folder / "text-to-image.json",
        {
            "provenance": {
                **measured_by(command),
                "model": evaluation.model,
                "weights": evaluation.weights_hash,
                "seeds": list(evaluation.seeds),
                "settings": to_dict(evaluation.settings),
            },
            "near_copy_limit": evaluation.near_copy_limit,
            "scores": {name: to_dict(scores) for name, scores in evaluation.scores.items()},
            "sheet": list(evaluation.texts),
        },
    )
    write_text(folder / "text-to-image.md", _markdown(evaluation, command))
    return folder / "text-to-image.md"


def score_rows(evaluation: DrawingEvaluation) -> list[tuple[str, ...]]:
    """The table: a header, then a row per set of pictures."""
    rows: list[tuple[str, ...]] = [
        ("pictures", "number", "object, top 1", "top 5", "style", "near-copies")
    ]
    for name, own in evaluation.scores.items():
        shares = (own.top1, own.top5, own.style, own.near_copies)
        rows.append((name, str(own.count), *(f"{share:.1%}" for share in shares)))
    return rows


def _sampled(evaluation: DrawingEvaluation) -> str:
    settings, (first, last) = evaluation.settings, evaluation.seeds
    guidance = f"guidance {settings.weight:g}" if settings.weight != 1 else "no guidance"
    return f"{settings.sampler}, {settings.total} steps, {guidance}, seeds {first} to {last}"


def _markdown(evaluation: DrawingEvaluation, command: str) -> str:
    header, *rows = score_rows(evaluation)
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    return f"""# Text to image, measured

Written by `{command}`. Model `{evaluation.model}`, weights `{evaluation.weights_hash[:16]}`;
{_sampled(evaluation)}.

{table}

- Captions name an object and a style: "a red apple, noto style". **Held-out** ones are of pairs of
  object and style that the model has not seen together; it knows the object from the other style.
- **Object**: whether the judge's nearest caption, or one of the five nearest, is of the object that
  was asked for, among 853; by chance 0.1%. **Style**: whether it is of the style, of two.
- The judge is a contrastive net trained on real drawings, none of them of a held-out pair. Its
  score on the real held-out drawings is the ceiling: more cannot be measured.
- A **near-copy** is a picture whose distance to its nearest training drawing, divided by the mean
  distance to its 50 nearest (Carlini et al. 2023), is below {evaluation.near_copy_limit:.3f}, the
  lowest 5% of the real held-out drawings. There are 1,598 training drawings: a small model that
  has seen each of them many times knows them by heart.

![Pictures of held-out captions](images/{SHEET})

The first {len(evaluation.texts)} pictures of held-out captions, in order; none were hand-picked.
"""
