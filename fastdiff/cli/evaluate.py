"""``fastdiff evaluate``: measure samples against real images."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastdiff.cli.console import about_files, print_numbers, print_pairs
from fastdiff.cli.machine import Compute, at_work, device_and_dtype, progress
from fastdiff.cli.options import FLAT, NO_NONE, LoadOptions
from fastdiff.cli.parsing import OptionalFloat, OptionalName, parse
from fastdiff.generate.job import SampleSettings, check_seeds

if TYPE_CHECKING:
    from fastdiff.checkpoint.model import Model
    from fastdiff.cli.machine import Work
    from fastdiff.evaluation import Results

GOAL_MISSED = 1


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Sample from a model of digits or drawings and measure the samples against real ones.

    Digits are scikit-learn's, or MNIST's for a model that was trained on mnist-5k. Pictures of a
    text-to-image model of drawings are named by a judge, which is trained at the first call:
    writes text-to-image.md and .json and a sheet.

    Of digits, measures class accuracy under a classifier trained on real digits only; Fréchet
    distance, precision and recall in its feature space; and near-copies of training images. For
    each number it also shows the score of held-out real digits, the floor. Writes results.md,
    results.json and pictures. The exit code is 1 if a limit is missed. With --bits, measures
    instead, for models on pixels, the negative log likelihood of the held-out digits: writes
    bits.json, and the terms of the bound over the timesteps to bits.png.

    Examples:
      fastdiff evaluate --count 500 --steps 20 --guidance-scale 1
      fastdiff evaluate --model runs/tiny-iddpm --bits --spacing 50
      fastdiff evaluate --inception inception.pt
    """

    model: str = "digits"
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    count: int = 1000
    """Number of samples, cycling through the classes; at least as many as there are held-out
    images: 360, of MNIST 1,000."""
    seed: int = 0
    """Seed of the first sample; the following seeds count up from it."""
    bits: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure the bits per dimension of held-out digits (at most --count), with one evaluation per
    timestep: all timesteps, or those of --steps or --spacing."""
    inception: OptionalName = None
    """Also measure FID, KID, precision and recall, and the Inception score, on the features of this
    network: a TorchScript file, or module:function for a function that returns it. It gets images
    (N, 3, H, W) in uint8 and returns features (N, D), or features and logits."""
    bin_width: OptionalFloat = None
    """With --bits: distance between grey levels from -1 to 1; by default that of the digits."""
    settings: Annotated[SampleSettings, FLAT] = field(default_factory=SampleSettings)
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    out: Path = Path("out/evaluation")
    """Folder for the report and its pictures, created if it is missing."""
    compute: Annotated[Compute, FLAT, NO_NONE] = field(default_factory=Compute)

    def __post_init__(self) -> None:
        check_seeds(self.seed, self.count)
        if self.bin_width is not None and not (self.bits and self.bin_width > 0):
            raise ValueError(
                f"--bin-width must be positive and go with --bits, got {self.bin_width:g}"
            )
        if self.inception is not None and self.bits:
            raise ValueError("--inception does not go with --bits, which makes no images")


def main(words: Sequence[str]) -> int:
    options = parse(Evaluate, words, prog="fastdiff evaluate")
    return 0 if options is None else run(options, words)


def run(options: Evaluate, words: Sequence[str]) -> int:
    if options.bits:
        return _run_bits(options)
    from fastdiff.checkpoint.open import load
    from fastdiff.evaluation import evaluate, load_inception, write_report
    from fastdiff.evaluation.drawings_report import is_of_drawings
    from fastdiff.evaluation.report import inception_rows

    network = None if options.inception is None else load_inception(options.inception)
    device, dtype = device_and_dtype(options.compute)
    with at_work(options.out, options.compute) as work:
        with work.clock("load"):
            model = load(options.model, device=device, dtype=dtype, options=options.load)
        if is_of_drawings(model):
            return _run_drawings(options, words, model, work)
        with work.clock("sample and measure"), progress("sampling") as tell:
            evaluation = evaluate(
                model,
                count=options.count,
                settings=options.settings,
                first_seed=options.seed,
                progress=tell,
                inception=network,
            )
        with work.clock("write"):
            command = shlex.join(["fastdiff", "evaluate", *words])
            report = write_report(evaluation, options.out, command=command)
    _print_scores(evaluation.results)
    failures = evaluation.results.failures()
    print_pairs(
        [
            ("verdict", "all limits are met" if not failures else f"missed: {'; '.join(failures)}"),
            *(inception_rows(evaluation.inception["samples"]) if evaluation.inception else []),
            ("report", str(report)),
            *about_files(model),
            *work.report(),
        ]
    )
    return GOAL_MISSED if failures else 0


def _run_drawings(options: Evaluate, words: Sequence[str], model: Model, work: Work) -> int:
    """Measure a text-to-image model of the captioned drawings."""
    from fastdiff.evaluation.drawings_report import evaluate_drawings, score_rows, write_drawings

    if options.inception is not None:
        raise ValueError("--inception measures models of digits, and this one is of drawings")
    with work.clock("sample and measure"), contextlib.ExitStack() as bars:

        def bar(what: str) -> Callable[[int, int], None]:
            bars.close()
            return bars.enter_context(progress(what))

        evaluation = evaluate_drawings(
            model,
            count=options.count,
            settings=options.settings,
            first_seed=options.seed,
            bar=bar,
        )
    with work.clock("write"):
        command = shlex.join(["fastdiff", "evaluate", *words])
        report = write_drawings(evaluation, options.out, command=command)
    print_numbers(score_rows(evaluation), left=True)
    print()
    print_pairs([("report", str(report)), *about_files(model), *work.report()])
    return 0


def _run_bits(options: Evaluate) -> int:
    from fastdiff.checkpoint.open import load
    from fastdiff.evaluation import digits_bits, write_bits

    device, dtype = device_and_dtype(options.compute)
    with at_work(options.out, options.compute) as work:
        with work.clock("load"):
            model = load(options.model, device=device, dtype=dtype, options=options.load)
        with work.clock("measure"), progress("bits") as tell:
            result = digits_bits(
                model,
                count=options.count,
                settings=options.settings,
                bin_width=options.bin_width,
                first_seed=options.seed,
                device=device,
                progress=tell,
            )
        with work.clock("write"):
            report = write_bits(result, options.out)
    print_pairs(
        [
            ("bits per dimension", f"{result.mean:.3f}, standard error {result.error:.3f}"),
            *((name, f"{bits:.4f}") for name, bits in result.parts.items()),
            ("images", f"{len(result.bound.prior)}, bins of {result.bin_width:g}"),
            ("timesteps", f"{len(result.bound.timesteps)}, variance {result.variance}"),
            ("report", str(report)),
            *about_files(model),
            *work.report(),
        ]
    )
    return 0


def _print_scores(results: Results) -> None:
    from fastdiff.evaluation.evaluate import MAX_FRECHET_RATIO, MIN_ACCURACY

    mine, real = results.samples, results.held_out
    rows = [
        ("", "samples", "real, held out", "limit"),
        (
            "class accuracy",
            f"{mine.accuracy:.1%}",
            f"{real.accuracy:.1%}",
            f">= {MIN_ACCURACY:.0%}",
        ),
        ("Fréchet distance", f"{mine.frechet:.3f}", f"{real.frechet:.3f}", ""),
        (
            "  times the floor",
            f"{max(results.frechet_ratio, results.frechet_equal_ratio):.2f}",
            "1",
            f"<= {MAX_FRECHET_RATIO:g}",
        ),
        ("precision", f"{mine.precision:.1%}", f"{real.precision:.1%}", ""),
        ("recall", f"{mine.recall:.1%}", f"{real.recall:.1%}", ""),
        (
            "near-copies",
            f"{mine.near_copies:.1%}",
            f"{real.near_copies:.1%}",
            f"<= {real.near_copies:.1%}",
        ),
        ("images", str(mine.count), str(real.count), ""),
    ]
    print_numbers(rows, left=True)
    print()
