"""The diffusion systems of the literature, each trained on digits and judged: docs/trained.md.

    python -m benchmarks.systems --train tiny-dit     train a preset into runs/tiny-dit
    python -m benchmarks.systems ddim fastdpm         measure two systems, whose runs are there
    python -m benchmarks.systems                      measure every system whose run is there
    python -m benchmarks.systems --docs               write the page from the records alone

A record and a contact sheet are written per system, so the page can be completed run by run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import load
from fastdiff.data.digits import CLASSES
from fastdiff.evaluation import digits_bits, evaluate
from fastdiff.evaluation.evaluate import Evaluation, originals, small_images
from fastdiff.evaluation.report import provenance
from fastdiff.files import write_json, write_text
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import SampleSettings
from fastdiff.images import contact_sheet, enlarged, save_png
from fastdiff.training import TRAINING_PRESETS, ClassifierRun
from fastdiff.training.monitor import LOG_FILE, read_log

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks/trained"
PAGE = ROOT / "docs/trained.md"
PICTURES = ROOT / "docs/images"
PER_CLASS = 8
SHARES = ("accuracy", "precision", "recall", "near_copies")
TEXT = ("system", "paper", "preset", "sampler, steps")
COLUMNS = (
    *TEXT[:3],
    "parameters",
    "steps, minutes",
    TEXT[3],
    "guidance",
    "samples",
    "Fréchet",
    *(share.replace("_", "-") for share in SHARES),
    "bits/dim",
)


@dataclass(frozen=True, kw_only=True)
class System:
    """One row: a trained model and how it is sampled."""

    title: str
    paper: str
    model: str
    """A training preset, whose run is in runs/, or a shipped model."""
    settings: dict[str, Any] = field(default_factory=dict)
    bits: bool = False
    """Whether the bound on the likelihood is measured as well."""
    classifier: str = ""
    """A training preset of a classifier, to which the denoiser leaves the class; then its training
    is what the row states."""

    @property
    def trained(self) -> str:
        """The preset whose run the row is about."""
        return self.classifier or self.model


SYSTEMS = {
    "ddpm": System(
        title="DDPM, pixels",
        paper="Ho et al. 2020",
        model="tiny-ddpm",
        settings={"sampler": "ddpm", "steps": 1000, "guidance_scale": 1.0},
        bits=True,
    ),
    "ddim": System(
        title="DDIM, pixels",
        paper="Song et al. 2021",
        model="tiny-ddpm",
        settings={"sampler": "ddim", "steps": 50, "guidance_scale": 1.0},
    ),
    "fastdpm": System(
        title="FastDPM, pixels",
        paper="Kong and Ping 2021",
        model="tiny-ddpm",
        settings={
            "sampler": "fastdpm",
            "steps": 50,
            "spacing": "var-quadratic",
            "guidance_scale": 1.0,
        },
    ),
    "iddpm": System(
        title="IDDPM, pixels, learned variance",
        paper="Nichol and Dhariwal 2021",
        model="tiny-iddpm",
        settings={"sampler": "ddpm", "steps": 100, "guidance_scale": 1.0},
        bits=True,
    ),
    "upsampler": System(
        title="IDDPM's super-resolution, 4 x 4 to 8 x 8 pixels",
        paper="Nichol and Dhariwal 2021",
        model="tiny-upsampler",
        settings={"sampler": "ddpm", "steps": 100, "guidance_scale": 1.0},
    ),
    "flow": System(
        title="Flow matching, pixels",
        paper="Lipman et al. 2023, Esser et al. 2024",
        model="tiny-flow",
        settings={"sampler": "flow-heun", "steps": 25, "guidance_scale": 1.0},
    ),
    "guidance": System(
        title="Classifier-free guidance, pixels",
        paper="Ho and Salimans 2022",
        model="tiny-ddpm",
        settings={"sampler": "ddim", "steps": 50, "guidance_scale": 2.0},
    ),
    "classifier": System(
        title="Classifier guidance, latents, no class in the denoiser",
        paper="Dhariwal and Nichol 2021",
        model="digits",
        classifier="tiny-classifier",
        settings={
            "sampler": "dpmpp-2m",
            "steps": 20,
            "guidance_scale": 1.0,
            "classifier_scale": 6.0,
        },
    ),
    "ldm": System(
        title="Latent diffusion, KL autoencoder",
        paper="Rombach et al. 2022",
        model="digits",
        settings={"sampler": "dpmpp-2m", "steps": 20, "guidance_scale": 1.5},
    ),
    "mnist": System(
        title="DDPM's U-Net on MNIST, pixels",
        paper="Ho et al. 2020",
        model="tiny-mnist",
        settings={"sampler": "dpmpp-2m", "steps": 20, "guidance_scale": 1.5, "clamp": 1.0},
    ),
    "dit": System(
        title="DiT on latents, learned variance",
        paper="Peebles and Xie 2023",
        model="tiny-dit",
        settings={"sampler": "ddpm", "steps": 100, "guidance_scale": 1.5},
    ),
    "uvit": System(
        title="U-ViT on latents",
        paper="Bao et al. 2023",
        model="tiny-uvit",
        settings={"sampler": "dpmpp-2m", "steps": 20, "guidance_scale": 1.5},
    ),
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.systems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", help=f"systems ({', '.join(SYSTEMS)}) or, with --train, presets"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are")
    parser.add_argument("--count", type=int, default=1000, help="samples per system")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--train", action="store_true", help="train presets instead of measuring")
    action.add_argument("--docs", action="store_true", help="only write the page")
    options = parser.parse_args(words)
    known = [name for name in TRAINING_PRESETS if options.train] or list(SYSTEMS)
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"expected some of {', '.join(known)}; got {', '.join(unknown)}")
    if options.train:
        return train(options.names or presets(), options.runs)
    if not options.docs:
        for name in options.names or list(SYSTEMS):
            measure(name, options.runs, options.count)
    write_text(PAGE, page(records()))
    print(PAGE.relative_to(ROOT))
    return 0


def presets() -> list[str]:
    """The training presets that the systems need."""
    needed = dict.fromkeys(system.trained for system in SYSTEMS.values())
    return [name for name in needed if name in TRAINING_PRESETS]


def train(names: list[str], runs: Path) -> int:
    from fastdiff.cli import main as fastdiff_command  # its parser is not needed for the page

    torch.set_num_threads(1)  # the page gives the time of one
    for name in names:
        folder = runs / name
        more = ["--resume"] if (folder / "config.json").exists() else ["--preset", name]
        stage = "classifier" if isinstance(TRAINING_PRESETS[name], ClassifierRun) else "diffusion"
        code = fastdiff_command(["train", stage, *more, "--output.folder", str(folder)])
        if code:
            return code
    return 0


def measure(name: str, runs: Path, count: int) -> None:
    """Sample and judge one system; writes its record and its contact sheet."""
    from fastdiff.cli.machine import progress

    system = SYSTEMS[name]
    folder = runs / system.trained
    trained = system.trained in TRAINING_PRESETS
    if trained and not (folder / "model").exists():
        print(f"{name}: left out, {folder} has no trained model; use --train {system.trained}")
        return
    if system.classifier:
        model = load(system.model, classifier=folder)
    else:
        model = load(str(folder) if trained else system.model)
    assert model.denoiser is not None, "digits have a denoiser"
    settings = SampleSettings(**system.settings)
    since = time.perf_counter()
    with progress(name) as tell:
        evaluation = evaluate(
            model,
            count=count,
            settings=settings,
            progress=tell,
            by_classifier=bool(system.classifier),
        )
    seconds = time.perf_counter() - since
    samples, results = evaluation.results.samples, evaluation.results
    record = {
        **provenance(evaluation, f"python -m benchmarks.systems {name} --count {count}"),
        "parameters": sum(p.numel() for p in (model.classifier or model.denoiser).parameters()),
        "images_per_second": round(count / seconds, 2),
        "frechet_ratio": results.frechet_equal_ratio,
        **{key: getattr(samples, key) for key in SHARES},
        "held_out": {key: getattr(results.held_out, key) for key in SHARES},
        "training": training_cost(folder) if trained else None,
    }
    if Facts.of(model).extra == "upsampler":
        record["psnr"] = enlargement_errors(model, evaluation)
    if system.bits:
        with progress(f"{name}, bits") as tell:
            bits = digits_bits(model, count=90, progress=tell)
        record["bits"] = {"mean": bits.mean, "error": bits.error, "images": 90}
    write_json(RECORDS / f"{name}.json", record)
    places = [torch.nonzero(evaluation.labels == digit).flatten() for digit in range(len(CLASSES))]
    order = torch.cat([place[:PER_CLASS] for place in places])
    sheet = contact_sheet(
        evaluation.images[order], list(CLASSES), columns=PER_CLASS, cell=32, resample="nearest"
    )
    save_png(PICTURES / f"system-{name}.png", sheet)


def enlargement_errors(model: Model, evaluation: Evaluation) -> dict[str, float]:
    """Decibels of peak signal to noise against the originals, higher is nearer: of the samples, and
    of bilinear interpolation."""
    labels = evaluation.labels.tolist()
    whole = originals(evaluation.reference, labels)
    small = torch.stack(
        [t for t in small_images(model, evaluation.reference, labels) if t is not None]
    )
    found = {"samples": evaluation.images, "bilinear": enlarged(small, whole.shape[2:])}
    return {name: round(float(psnr(its, whole)), 2) for name, its in found.items()}


def psnr(images: Tensor, whole: Tensor) -> Tensor:
    """images, whole: (N, C, H, W) in [-1, 1]."""
    return 10 * torch.log10(4 / (images - whole).square().mean())


def training_cost(folder: Path) -> dict[str, float]:
    """Steps, and minutes at the rate of the fastest tenth of the log: the machine may be shared."""
    log = [line for line in read_log(folder) if line.get("steps_per_second")]
    if not log:
        raise ValueError(f"{folder / LOG_FILE} has no rates; train again")
    rates = sorted(line["steps_per_second"] for line in log)
    rate = rates[min(int(len(rates) * 0.9), len(rates) - 1)]
    steps = log[-1]["step"]
    return {"steps": steps, "minutes": round(steps / rate / 60, 1)}


def records() -> dict[str, dict[str, Any]]:
    """The records that exist, in the order of SYSTEMS."""
    paths = {name: RECORDS / f"{name}.json" for name in SYSTEMS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def page(found: dict[str, dict[str, Any]]) -> str:
    """docs/trained.md."""
    rows = "\n".join(f"| {' | '.join(_row(name, record))} |" for name, record in found.items())
    sheets = "\n\n".join(
        f"## {SYSTEMS[name].title}\n\n![One digit per row](images/system-{name}.png)\n\n"
        f"`{record['command']}`, commit {record['commit']}, {record['date']}, weights "
        f"`{record['weights'][:12]}`; the first {PER_CLASS} seeds of every class."
        f"{_enlargement(record)}"
        for name, record in found.items()
    )
    missing = [SYSTEMS[name].title for name in SYSTEMS if name not in found]
    left = f"\nNot trained yet: {'; '.join(missing)}.\n" if missing else ""
    titles = " | ".join(COLUMNS)
    rules = "|".join("---" if column in TEXT else "---:" for column in COLUMNS)
    return f"""# Systems, trained and judged

Generated by `python -m benchmarks.systems` from the records in `benchmarks/trained`. Models that
are not shipped were trained with `python -m benchmarks.systems --train PRESET`, on scikit-learn's
digits or on 5,000 of MNIST, as the system says. Samples are judged as in [Results](results.md);
after each slash is what held-out real digits of the same size score.

Minutes of training are those of one thread, at the rate of the fastest tenth of the log, because
the machine was shared. The Fréchet distance is a multiple of that of held-out digits, at equal
size. Bits per dimension are the variational bound on held-out scans of 17 grey levels.

| {titles} |
|{rules}|
{rows}
{left}
{sheets}
"""


def _enlargement(record: dict[str, Any]) -> str:
    """What an upsampler's record says besides, of its samples against the originals."""
    if "psnr" not in record:
        return ""
    samples, bilinear = record["psnr"]["samples"], record["psnr"]["bilinear"]
    return (
        f" Held-out digits were reduced and enlarged: {samples:.1f} dB of peak signal to noise "
        f"against the originals, bilinear interpolation {bilinear:.1f} dB."
    )


def _row(name: str, record: dict[str, Any]) -> list[str]:
    system, cost, bits = SYSTEMS[name], record["training"], record.get("bits")
    return [
        system.title,
        system.paper,
        f"`{system.trained}`",
        f"{record['parameters']:,}",
        f"{cost['steps']}, {cost['minutes']:.0f}" if cost else "shipped",
        f"{record['settings']['sampler']}, {record['settings']['steps']}",
        f"{system.settings.get('classifier_scale', system.settings['guidance_scale']):g}"
        + " (classifier)" * bool(system.classifier),
        f"{record['seeds'][1] - record['seeds'][0] + 1}",
        f"{record['frechet_ratio']:.2f}",
        *(f"{record[key]:.1%} / {record['held_out'][key]:.1%}" for key in SHARES),
        f"{bits['mean']:.2f}" if bits else "",
    ]


if __name__ == "__main__":
    sys.exit(main())
