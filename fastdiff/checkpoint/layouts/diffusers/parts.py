"""The parts of a folder in diffusers' layout: configs, weights, schedulers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastdiff.checkpoint.build import Plan, plan_model
from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.layouts.diffusers import dit, prior
from fastdiff.checkpoint.layouts.diffusers import read as diffusers
from fastdiff.checkpoint.layouts.diffusers.read import CONFIG, SCHEDULER_CONFIG, STEMS
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.options import NOISE
from fastdiff.checkpoint.scheduler import SchedulerConfig, read_scheduler
from fastdiff.checkpoint.weights import Weights, read_json
from fastdiff.diffusion.schedules import ScheduleConfig

UNETS = ("UNet2DConditionModel", "UNet2DModel")
TRANSFORMERS = (dit.NAME, dit.OLD_NAME)
AUTOENCODERS = ("AutoencoderKL", "VQModel")

Result = TypeVar("Result")


def part_of(folder: Path, name: str) -> Path:
    """The folder of a part: its own, or that of the index (in the first DDPM repositories)."""
    return folder / name if (folder / name).is_dir() else folder


def find_weights(folder: Path, variant: str | None = None) -> Weights:
    """Open the weights of a model's folder: one file or shards, safetensors first.

    Raises:
        FileNotFoundError: there are none of this variant; the message lists those that exist.
    """
    mark = f".{variant}" if variant else ""
    for kind in ("safetensors", "bin"):
        for stem in STEMS:
            for name in (f"{stem}{mark}.{kind}", f"{stem}.{kind}.index{mark}.json"):
                if (folder / name).is_file():
                    return open_weights(folder / name)
    there = sorted(
        path.name
        for path in folder.glob("*")
        if path.suffix in (".safetensors", ".bin") or ".index." in path.name
    )
    wanted = f"{STEMS[0]}{mark}.safetensors"
    raise FileNotFoundError(
        f"{folder} contains no {wanted} (nor {STEMS[1]}, {STEMS[2]}, .bin, an index), got "
        f"{', '.join(there[:5]) or 'no weights'}; choose another variant, or download the files"
    )


class Files:
    """Finds the weights of a pipeline's parts: the variant, or the plain files of parts without it.

    Published folders often have a variant of only some parts.
    """

    def __init__(self, variant: str | None) -> None:
        self.variant = variant
        self.found = False
        self.plain: list[str] = []
        self.missing: FileNotFoundError | None = None

    def find(self, folder: Path) -> Weights:
        try:
            weights = find_weights(folder, self.variant)
        except FileNotFoundError as error:
            if self.variant is None or not _has_weights(folder):
                raise
            self.missing = self.missing or error
            self.plain.append(folder.name)
            return find_weights(folder)
        self.found = True
        return weights

    def finish(self, folder: Path) -> None:
        """Raise FileNotFoundError if no part has the variant."""
        if self.missing is not None and not self.found:
            raise self.missing


def _has_weights(folder: Path) -> bool:
    names = [f"{stem}.{kind}" for stem in STEMS for kind in ("safetensors", "bin")]
    return any((folder / f"{name}{end}").is_file() for name in names for end in ("", ".index.json"))


def plan_of(folder: Path, data: dict[str, Any], weights: Weights) -> Plan:
    """Plan a denoiser or an autoencoder. data: its config.json.

    Raises:
        ValueError: fastdiff has no such model, or the weights are not those of the config.
    """
    kind = data.get("_class_name")
    if kind == "ControlNetModel":
        raise ValueError(
            f"{folder} contains a ControlNet; load the model that it was trained for with "
            f"controlnet={str(folder)!r} (--controlnet)"
        )
    known = (*UNETS, *TRANSFORMERS[:1], prior.NAME, *AUTOENCODERS)
    if kind not in known + TRANSFORMERS[1:]:
        raise ValueError(
            f"{folder / CONFIG}: _class_name must be one of {', '.join(known)}, got {kind!r:.60}"
        )
    if kind in TRANSFORMERS:
        transformer = reading(folder / CONFIG, lambda: dit.config(data))
        return dit.plan(transformer, weights)
    if kind == prior.NAME:
        return prior.plan(reading(folder / CONFIG, lambda: prior.config(data)), weights)
    read: Callable[[Mapping[str, Any]], Any] = (
        diffusers.unet_config if kind in UNETS else diffusers.autoencoder_config
    )
    config = reading(folder / CONFIG, lambda: read(data))
    current = {diffusers.current_name(key): key for key in weights.places}
    return plan_model(config, diffusers.names, weights.renamed(current))


def reading(path: Path, read: Callable[[], Result]) -> Result:
    """Call `read`, and turn errors caused by values of unexpected types into one line."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} contains a value of the wrong type ({type(error).__name__}: {error})"
        ) from error


def scheduler_of(folder: Path) -> SchedulerConfig:
    """Read a folder's scheduler_config.json.

    Raises:
        ValueError: as for `read_scheduler`.
    """
    path = folder / SCHEDULER_CONFIG
    data = read_json(path)
    return reading(path, lambda: read_scheduler(data))


def noise_of(folder: Path, scheduler: SchedulerConfig, loading: Loading) -> ScheduleConfig:
    """The noise schedule that a scheduler states.

    Raises:
        ValueError: options of loading would contradict it.
    """
    options = loading.options
    said = [name for name in ("schedule", *NOISE) if getattr(options, name) is not None]
    # the shift of flow matching may be changed: it depends on the size of the images
    if loading.schedule or options.prediction is not None or said not in ([], ["shift"]):
        raise ValueError(
            f"{folder}: schedule and prediction are set by its scheduler_config.json; "
            "change them there"
        )
    return loading.noise(scheduler.schedule)
