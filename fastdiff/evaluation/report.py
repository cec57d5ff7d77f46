"""Write docs/results.md and its images from an evaluation."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

import fastdiff
from fastdiff.configs import to_dict
from fastdiff.evaluation.evaluate import (
    MAX_FRECHET_RATIO,
    MIN_ACCURACY,
    NEAR_COPY_QUANTILE,
    Evaluation,
    Scores,
)
from fastdiff.evaluation.inception import InceptionScores
from fastdiff.files import write_json, write_text
from fastdiff.images import contact_sheet, save_png

SAMPLES_PICTURE = "evaluation-samples.png"
NEIGHBOURS_PICTURE = "evaluation-neighbours.png"
SHOWN = 12


def write_report(
    evaluation: Evaluation, folder: str | os.PathLike[str], *, command: str, title: str = "Results"
) -> Path:
    """Write results.md, results.json and images/*.png to a folder.

    Args:
        command: the command line that ran the evaluation, so that it can be repeated.

    Returns:
        The path of results.md.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    source = provenance(evaluation, command)
    _write_samples(evaluation, folder / "images" / SAMPLES_PICTURE)
    _write_neighbours(evaluation, folder / "images" / NEIGHBOURS_PICTURE)
    results = to_dict(evaluation.results)
    failures = list(evaluation.results.failures())
    found = {"provenance": source, "results": results, "failures": failures}
    if evaluation.inception is not None:
        found["inception"] = {name: to_dict(each) for name, each in evaluation.inception.items()}
    write_json(folder / "results.json", found)
    write_text(folder / "results.md", _markdown(evaluation, source, title))
    return folder / "results.md"


def provenance(evaluation: Evaluation, command: str) -> dict[str, object]:
    """Where the numbers of an evaluation come from: code, machine, model, seeds, settings."""
    return {
        **measured_by(command),
        "model": evaluation.model,
        "weights": evaluation.weights_hash,
        "seeds": [evaluation.seeds[0], evaluation.seeds[-1]],
        "settings": to_dict(evaluation.settings),
    }


def measured_by(command: str) -> dict[str, object]:
    """Where numbers come from: command, commit, date, versions and machine."""
    return {
        "command": command,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "fastdiff": fastdiff.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def _markdown(evaluation: Evaluation, provenance: Mapping[str, object], title: str) -> str:
    results, settings = evaluation.results, evaluation.settings
    samples, real = results.samples, results.held_out
    failures = results.failures()
    verdict = (
        "All limits are met."
        if not failures
        else "**Not met:**\n\n" + "\n".join(f"- {failure}" for failure in failures)
    )
    guidance = "no guidance" if settings.weight == 1 else f"guidance {settings.weight:g}"
    if settings.guidance_interval and settings.weight != 1:
        guidance += f" in steps {settings.guidance_interval[0]} to {settings.guidance_interval[1]}"
    rows = [
        ("images", f"{samples.count}", f"{real.count}", ""),
        (
            "class accuracy",
            _share(samples.accuracy),
            _share(real.accuracy),
            f"≥ {MIN_ACCURACY:.0%}",
        ),
        (
            "Fréchet distance, all images",
            f"{samples.frechet:.3f} ({results.frechet_ratio:.2f} x)",
            f"{real.frechet:.3f}",
            f"≤ {MAX_FRECHET_RATIO:g} x",
        ),
        (
            f"Fréchet distance, {real.count} images",
            f"{samples.frechet_equal:.3f} ({results.frechet_equal_ratio:.2f} x)",
            f"{real.frechet_equal:.3f}",
            f"≤ {MAX_FRECHET_RATIO:g} x",
        ),
        ("precision", _share(samples.precision), _share(real.precision), ""),
        ("recall", _share(samples.recall), _share(real.recall), ""),
        ("near-copies", _share(samples.near_copies), _share(real.near_copies), "≤ held-out"),
        (
            "distance to the nearest training image, median",
            f"{samples.nearest_median:.2f}",
            f"{real.nearest_median:.2f}",
            "",
        ),
        (
            "distance to the nearest training image, 5th percentile",
            f"{samples.nearest_5_percent:.2f}",
            f"{real.nearest_5_percent:.2f}",
            "",
        ),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    names = evaluation.reference.class_names
    return f"""# {title}

Written by `{provenance["command"]}` at commit {provenance["commit"]}, {provenance["date"]}
(fastdiff {provenance["fastdiff"]}, torch {provenance["torch"]}, {provenance["machine"]}).

Model `{evaluation.model}`, weights `{evaluation.weights_hash[:16]}`; sampler {settings.sampler},
{settings.steps} steps, {guidance}, seeds {evaluation.seeds[0]} to {evaluation.seeds[-1]}.

{verdict}

| | samples | held-out real images | limit |
|---|---:|---:|---:|
{table}

Accuracy per class, samples: {_classes(samples, names)}.
Held-out: {_classes(real, names)}.

- The judge is scikit-learn's multilayer perceptron, trained only on the {results.training_images}
  real training images; the table shows its accuracy on the {real.count} held-out images. Distances,
  precision and recall are computed on the {results.feature_dim} principal components of its last
  hidden layer.
- The held-out images set the floor: they are real images that neither the model nor the judge has
  seen, scored against the training images.
- The Fréchet distance decreases with the number of images. The row "all images" flatters the larger
  set; the row "{real.count} images" compares equal sizes (mean over random subsets of both sets).
  Precision and recall (Kynkäänniemi et al. 2019, k = 3) are also computed at equal sizes.
- A near-copy is an image whose distance to its nearest training image, divided by the mean distance
  to its 50 nearest (Carlini et al. 2023), is below {results.near_copy_limit:.3f}, the lowest
  {NEAR_COPY_QUANTILE:.0%} of the held-out images; a training image has 0.

{_on_inception(evaluation.inception)}![Samples, one class per row](images/{SAMPLES_PICTURE})

Samples, one class per row, in the order of their seeds; none were hand-picked.

![The samples nearest to a training image](images/{NEIGHBOURS_PICTURE})

The {SHOWN} samples with the smallest ratio, each above its nearest training image.
"""


def _on_inception(scores: Mapping[str, InceptionScores] | None) -> str:
    """The table of an Inception network's metrics; nothing without one."""
    if scores is None:
        return ""
    mine, real = scores["samples"], scores["held_out"]
    rows = "\n".join(
        f"| {title} | {a} | {b} |"
        for (title, a), (_, b) in zip(inception_rows(mine), inception_rows(real), strict=True)
    )
    return f"""On the {mine.feature_dim} features of the given Inception network, {mine.count}
images each, against as many training images:

| | samples | held-out real images |
|---|---:|---:|
{rows}

"""


def inception_rows(scores: InceptionScores) -> list[tuple[str, str]]:
    """Names and values, as text."""
    rows = [
        ("FID", f"{scores.fid:.3f}"),
        ("KID", f"{scores.kid:.5f} ± {scores.kid_deviation:.5f}"),
        ("precision, Inception", _share(scores.precision)),
        ("recall, Inception", _share(scores.recall)),
    ]
    if scores.inception_score is not None:
        rows.append(("Inception score", f"{scores.inception_score:.3f}"))
    return rows


def _share(value: float) -> str:
    return f"{value:.1%}"


def _classes(scores: Scores, names: tuple[str, ...]) -> str:
    return ", ".join(
        f"{name} {_share(value)}"
        for name, value in zip(names, scores.class_accuracy, strict=True)
        if value is not None
    )


def _write_samples(evaluation: Evaluation, path: Path) -> None:
    names = evaluation.reference.class_names
    rows = [
        torch.nonzero(evaluation.labels == label).flatten()[:SHOWN] for label in range(len(names))
    ]
    columns = min(len(row) for row in rows)
    if columns == 0:
        present = sum(len(row) > 0 for row in rows)
        raise ValueError(
            f"expected samples of all {len(names)} classes for the picture, got {present} classes; "
            "evaluate more samples"
        )
    index = torch.cat([row[:columns] for row in rows])
    sheet = contact_sheet(evaluation.images[index], names, cell=64)
    save_png(path, sheet)


def _write_neighbours(evaluation: Evaluation, path: Path) -> None:
    near = evaluation.neighbours
    closest = np.argsort(near.ratio, kind="stable")[:SHOWN]
    pairs = torch.cat(
        [
            evaluation.images[torch.from_numpy(closest)],
            evaluation.reference.train_images[torch.from_numpy(near.index[closest])],
        ]
    )
    labels = [f"{near.ratio[i]:.2f}" for i in closest]
    sheet = contact_sheet(pairs, ["sample", "nearest"], column_labels=labels, cell=64)
    save_png(path, sheet)


def _commit() -> str:
    """Short hash of the checkout that the package runs from, or a note that there is none."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a Git checkout)"
    return done.stdout.strip()
