"""``fastdiff train``: a preset or a file gives the typed config of a run, and flags change it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from fastdiff.cli.parsing import OptionalName, OptionalPath, UsageError, one_of, option_value, parse
from fastdiff.files import one_line_errors

if TYPE_CHECKING:
    from fastdiff.training import AutoencoderRun, ClassifierRun, ClipRun, DiffusionRun

RunT = TypeVar("RunT", "AutoencoderRun", "ClassifierRun", "ClipRun", "DiffusionRun[Any]")
STAGES = {
    "autoencoder": "the first stage: images to latents and back",
    "diffusion": "the second stage: a denoiser on the latents, or on pixels",
    "classifier": "a classifier of noisy samples, which guides a denoiser",
    "clip": "a noised CLIP, which guides a denoiser that reads text to captions",
}
HELP = """\
Train an autoencoder, a denoiser on its latents, or a classifier or CLIP that guides it.

usage: fastdiff train STAGE [OPTIONS]
       fastdiff train STAGE --help

{stages}

examples:
  fastdiff train autoencoder
  fastdiff train diffusion --autoencoder runs/digits-autoencoder
  fastdiff train classifier --guides digits"""
STAGE_HELP = """\
Train {line}.

Every field of the run's config is an option. The defaults come from a preset ({presets}), from a
config.json, or with --resume from the run in --output.folder. With --data.source folder and no
preset, channels, classes and augmentation are derived from the images. A resumed run may be given
more --optimization.steps. Ctrl-C and SIGTERM save before they stop the run. The folder will contain
config.json, log.jsonl, checkpoints/, samples/, tensorboard/, and model/ for the other commands.

Examples:
{examples}
"""
EXAMPLES = {
    "autoencoder": """\
  fastdiff train autoencoder
  fastdiff train autoencoder --optimization.steps 4000 --output.folder runs/longer --dry-run
  fastdiff train autoencoder --resume""",
    "diffusion": """\
  fastdiff train diffusion --autoencoder runs/digits-autoencoder
  fastdiff train diffusion --init-from digits --output.folder runs/tuned
  fastdiff train diffusion --resume --output.folder runs/digits-diffusion""",
    "classifier": """\
  fastdiff train classifier
  fastdiff train classifier --guides digits --output.folder runs/guide --dry-run
  fastdiff train classifier --resume""",
    "clip": """\
  fastdiff train clip
  fastdiff train clip --preset scenes-clip --output.folder runs/guide --dry-run
  fastdiff train clip --resume""",
}


@dataclass(frozen=True, kw_only=True)
class Train(Generic[RunT]):
    """The config of a run, and what to do with it."""

    run: Annotated[RunT, tyro.conf.arg(name="")]
    preset: OptionalName = None
    """Name of a tested run to take the defaults from."""
    config: OptionalPath = None
    """The config.json of a run to take the defaults from, or its folder."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue from the newest checkpoint in --output.folder, with the same results as without the
    interruption."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the config and the size of the run, and write nothing."""


def run_class(stage: str) -> Any:
    """The config of a stage's runs."""
    from fastdiff.training import AutoencoderRun, ClassifierRun, ClipRun, DiffusionRun

    kinds = {"autoencoder": AutoencoderRun, "diffusion": DiffusionRun, "classifier": ClassifierRun}
    return {**kinds, "clip": ClipRun}[stage]


def main(words: Sequence[str]) -> int:
    stages = "\n".join(f"  {name:11}  {line}" for name, line in STAGES.items())
    if words and words[0] in ("-h", "--help"):
        print(HELP.format(stages=stages))
        return 0
    if not words:
        raise UsageError(
            "missing: autoencoder, diffusion, classifier or clip, and options (see fastdiff train "
            "--help)"
        )
    stage, *rest = words
    one_of(stage, STAGES, "stage")
    from fastdiff.training import TRAINING_PRESETS, DiffusionRun

    kind = run_class(stage)
    presets = {name: run for name, run in TRAINING_PRESETS.items() if isinstance(run, kind)}
    start: Any = _start(kind, presets, rest)
    # Every field of a network's config is an option, so the options depend on the network.
    fields: Any = kind[type(start.model)] if kind is DiffusionRun else kind
    options = parse(
        Train[fields],
        rest,
        prog=f"fastdiff train {stage}",
        default=Train(run=start),
        text=STAGE_HELP.format(
            line=STAGES[stage], presets=", ".join(presets), examples=EXAMPLES[stage]
        ),
    )
    return 0 if options is None else run(options)


def run(options: Train[Any]) -> int:
    from fastdiff.training import (
        AutoencoderRun,
        ClassifierRun,
        ClipRun,
        describe,
        train_autoencoder,
        train_classifier,
        train_clip,
        train_diffusion,
    )

    if options.dry_run:
        print(describe(options.run))
    elif isinstance(options.run, AutoencoderRun):
        train_autoencoder(options.run, resume=options.resume)
    elif isinstance(options.run, ClassifierRun):
        train_classifier(options.run, resume=options.resume)
    elif isinstance(options.run, ClipRun):
        train_clip(options.run, resume=options.resume)
    else:
        train_diffusion(options.run, resume=options.resume)
    return 0


def _start(kind: type[Any], presets: Mapping[str, Any], words: Sequence[str]) -> Any:
    """The config that the options change: from --config, from --preset, or of the run to resume.

    Raises:
        FileNotFoundError, ValueError: the preset or file does not exist, or is of another stage.
    """
    preset, config = option_value(words, "--preset"), option_value(words, "--config")
    if preset is not None and config is not None:
        raise ValueError("--preset and --config cannot be combined; leave one of them out")
    if config is not None:
        return _read(kind, Path(config))
    default = (
        next(iter(presets.values()))
        if preset is None
        else presets[one_of(preset, presets, "preset")]
    )
    if "--resume" in words and preset is None:
        folder = Path(option_value(words, "--output.folder") or default.output.folder)
        if (folder / "config.json").is_file():
            return _read(kind, folder)
    if (guided := option_value(words, "--guides")) is not None:
        from fastdiff.training import ClipRun
        from fastdiff.training.classifier import for_guided
        from fastdiff.training.clip import for_guided_clip

        adapted: Any = for_guided_clip if kind is ClipRun else for_guided
        default = adapted(default, guided)
    if preset is not None:
        return default
    place = option_value(words, "--init-from")
    if place is not None and hasattr(default, "init_from"):
        default = _like_model(default, place)
    return _for_data(default, words)


def _like_model(run: Any, place: str) -> Any:
    """The default run with the architecture of the model whose weights it starts from.

    Raises:
        FileNotFoundError, ValueError: as `fastdiff.load`, or the model lacks the part.
    """
    from fastdiff.checkpoint.open import load
    from fastdiff.training import AutoencoderRun, ClassifierRun

    model = load(place, device="meta", text_encoders=False)
    part = "autoencoder" if isinstance(run, AutoencoderRun) else "denoiser"
    if isinstance(run, ClassifierRun):
        part = "classifier"
    if (network := getattr(model, part)) is None:
        raise ValueError(f"{place} contains no {part} to start from; choose a model that has one")
    change: dict[str, Any] = {"model": network.config, "init_from": place}
    if model.image_size and model.image_channels:
        channels = model.image_channels
        change["data"] = replace(run.data, image_size=model.image_size, channels=channels)
    if part == "denoiser":
        change["prediction"] = model.prediction
        change["schedule"] = model.schedule or run.schedule
        if not network.config.null_class:
            change["class_dropout"] = 0.0
        if model.autoencoder is None:
            change |= {"autoencoder": "", "latent_views": 0}
        elif model.layout == "bundle":
            change["autoencoder"] = place
    elif part == "classifier":
        change["schedule"] = model.schedule or run.schedule
    else:
        seen = {"image_channels": network.config.image_channels}
        change["discriminator"] = replace(run.discriminator, **seen)
    return replace(run, **change)


def _for_data(run: Any, words: Sequence[str]) -> Any:
    """Adapt the default run to the images that the options name."""
    source, path = option_value(words, "--data.source"), option_value(words, "--data.path")
    if not path or source not in ("folder", "shards"):
        return run
    from fastdiff.data import DataConfig
    from fastdiff.training import for_data

    if (autoencoder := option_value(words, "--autoencoder")) is not None:
        run = replace(run, autoencoder=autoencoder, latent_views=0)
    data = DataConfig(source=source, path=path)  # type: ignore[arg-type]
    return for_data(run, data)


@one_line_errors()
def _read(kind: type[RunT], path: Path) -> RunT:
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no config at {path}; give the config.json of a run, or the run's folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    try:
        return kind.from_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is not the config of a run of this stage: {error}") from error
