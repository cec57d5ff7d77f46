"""`fastdiff.load`: whatever a user has on disk, as modules of ours."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoint.build import Plan
from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.weights import Progress, Weights, fill, some
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.files import REFUSALS, put_in_one_line

PathLike = str | os.PathLike[str]
ASSETS = Path(__file__).parents[1] / "assets"
CONFIG_FILE = "config.json"
FOLDER = "fastdiff.checkpoint.layouts"
"""The room of the layouts: every file or folder in it with a `LAYOUT` is one."""
Marks = tuple[str, ...]
"""Keys that a file has together; * stands for any text."""
Source = Path | Weights
"""A folder, or an opened file."""
Save = Callable[[Model, Path, torch.dtype | None, Progress | None], None]
"""save(model, folder, dtype, progress): write all of it or nothing; dtype None keeps each own."""


@dataclass
class Assumed:
    """What a model's files do not say, as far as it has been met."""

    values: dict[str, Any] = field(default_factory=dict)
    """Field of `LoadOptions` -> what was taken."""
    choices: dict[str, str] = field(default_factory=dict)
    """Of those that no published model decides: what else it may be, in words."""

    @property
    def provenance(self) -> dict[str, Any]:
        """For `Model.provenance`."""
        undecided = {"undecided": dict(self.choices)} if self.choices else {}
        return {"assumed": dict(self.values), **undecided}

    def take(self, name: str, value: Any, choices: str | None = None) -> Any:
        """Assume a value. choices: None where a published model of this architecture has it."""
        self.values[name] = value
        if choices is not None:
            self.choices[name] = choices
        return value


@dataclass(frozen=True, kw_only=True)
class Loading:
    """One call of `fastdiff.load`."""

    options: LoadOptions = field(default_factory=LoadOptions)
    schedule: ScheduleConfig | None = None
    """The whole of the noise, where the caller said it."""
    dtype: torch.dtype | None = torch.float32
    device: torch.device | str = "cpu"
    progress: Progress | None = None
    assumed: Assumed = field(default_factory=Assumed)

    def __post_init__(self) -> None:
        dtype = self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"device must be one of torch's, such as 'cpu' or 'cuda', got {self.device!r}"
            ) from error

    @property
    def given(self) -> list[str]:
        """Names of the options that were set."""
        return [*(["schedule"] if self.schedule is not None else []), *self.options.given]

    @property
    def says_noise(self) -> bool:
        return self.schedule is not None or self.options.says_noise

    def check_decided(self, path: Path) -> None:
        """
        Raises:
            ValueError: `LoadOptions.strict`, and something is left to choose.
        """
        if not (self.options.strict and self.assumed.choices):
            return
        left = "; ".join(f"{name}: {words}" for name, words in self.assumed.choices.items())
        names = " ".join(f"--{name.replace('_', '-')}" for name in self.assumed.choices)
        raise ValueError(
            f"{path} and the published models leave open {left}. Say which "
            f"({', '.join(f'{name}=' for name in self.assumed.choices)}; of a command {names}), or "
            "load without strict"
        )

    def noise(self, found: ScheduleConfig) -> ScheduleConfig:
        """The training's noise: as the caller says, else as was found or assumed."""
        return self.options.noise(self.schedule or found)

    def fill(self, plan: Plan) -> Any:
        """The planned module with its weights.

        Raises:
            ValueError: as `check_decided`; what a layout assumes is known before it reads weights.
                As `Plan.check`.
        """
        self.check_decided(plan.weights.path)
        plan.check()
        return fill(
            plan.model,
            plan.sources,
            plan.weights,
            dtype=self.dtype,
            device=self.device,
            progress=self.progress,
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which checkpoints lie on disk."""

    name: str
    files: tuple[Marks, ...] = ()
    """A file with all keys of one of these is of this layout."""
    folder: Callable[[Path], bool] = lambda path: False
    """Whether a folder is of this layout."""
    refused: Mapping[str, Marks] = field(default_factory=dict)
    """What a file is -> its marks, where this layout knows the file but cannot open it alone:
    the name ends the sentence "these are ..."."""
    open: Callable[[Source, Loading], Model]
    save: Save | None = None

    def recognises(self, source: Source) -> bool:
        if isinstance(source, Path):
            return self.folder(source)
        return any(_has(source.places.keys(), marks) for marks in self.files)

    def refusal(self, weights: Weights) -> str | None:
        """What a file is that cannot be opened alone; None where it is not known."""
        keys = weights.places.keys()
        return next((what for what, marks in self.refused.items() if _has(keys, marks)), None)


def load(
    path: PathLike,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    vae: PathLike | None = None,
    tokenizer: PathLike | Sequence[PathLike] | None = None,
    schedule: ScheduleConfig | str | None = None,
    options: LoadOptions | None = None,
    **said: Any,
) -> Model:
    """Open a checkpoint: a diffusers folder, a single file, or a fastdiff bundle.

    The layout is recognised from keys and shapes, never from a name. Nothing in a pickle is run.
    Names and shapes of all parts are checked before a number of any is read, and each number is
    read once, to where it stays.

    Args:
        path: a folder with model_index.json, or with the config.json of one model; a .safetensors,
            .ckpt, .pt or .bin file of CompVis' latent diffusion, Stable Diffusion 1, 2 or XL,
            OpenAI's guided-diffusion or improved-diffusion, a port of DDPM, DiT or U-ViT; a
            bundle's or a training run's folder, or a shipped bundle's name.
        dtype: what floating-point weights become; None: what each model mostly has in its file.
        device: where the weights are read to.
        progress: called as progress(tensor, bytes) after each tensor.
        vae: a file or folder whose autoencoder is used, for a model without one or instead of its
            own.
        tokenizer: a CLIP tokenizer's folder, or one per text encoder, for single files.
        schedule: the noise of the training, whole or by the kind of its betas, where the files do
            not say it.
        options: the same and more as one object; what is given by name wins over it.
        said: any other field of `LoadOptions`: variant, ema, text_encoders, prediction, num_heads,
            head_dim, qkv_order, timestep_scale, norm_groups, scale_factor, image_size, strict, ...

    What had to be assumed is in `Model.assumed`, and in words in `Model.assumed_lines`; strict=True
    refuses where the choice is a guess.

    Raises:
        FileNotFoundError: nothing there, or a part of it is missing.
        ValueError: damaged, unknown, or parts that do not belong together; one line.
        ImportError: text encoders are wanted and transformers is not installed.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = (tokenizer,)
    if tokenizer is not None:
        said["tokenizer"] = tuple(Path(folder) for folder in tokenizer)
    if vae is not None:
        said["vae"] = Path(vae)
    if isinstance(schedule, str):
        said["schedule"] = schedule
    elif not isinstance(schedule, ScheduleConfig | None):
        raise ValueError(
            f"schedule must be a ScheduleConfig or the name of one, got {schedule!r:.60}"
        )
    loading = Loading(
        options=replace(options or LoadOptions(), **said),
        schedule=schedule if isinstance(schedule, ScheduleConfig) else None,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    try:
        return _open_whole(Path(path), loading)
    except REFUSALS as error:
        put_in_one_line(error)
        raise


def _open_whole(path: Path, loading: Loading) -> Model:
    model = _open(path, loading)
    if loading.options.vae is not None:
        model = _with_autoencoder(model, loading.options.vae, loading)
    loading.check_decided(model.path)
    _check_together(model)
    return model


def _open(path: Path, loading: Loading) -> Model:
    source: Source
    if path.is_dir():
        source = path
    elif path.exists():
        if loading.options.variant is not None:
            raise ValueError(
                f"variant is for folders, got {loading.options.variant!r} with the file {path}"
            )
        source = open_weights(path)
    elif (shipped := shipped_folder(str(path))) is not None:
        source = shipped
    else:
        raise FileNotFoundError(
            f"{path} is missing; give a file, a folder, or the name of a shipped model "
            f"({', '.join(shipped_bundles())})"
        )
    layout = recognise(source)
    with _naming(source if isinstance(source, Path) else source.path):
        return layout.open(source, loading)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path before what is wrong with its names or shapes."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def shipped_bundles() -> tuple[str, ...]:
    """Names of the bundles that come with the package."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG_FILE}")))


def shipped_folder(name: str) -> Path | None:
    """The folder of a shipped bundle; None if there is none of that name."""
    folder = ASSETS / name
    return folder if len(Path(name).parts) == 1 and (folder / CONFIG_FILE).is_file() else None


def _has(keys: Collection[str], marks: Marks) -> bool:
    return all(
        mark in keys if "*" not in mark else any(fnmatch.fnmatchcase(key, mark) for key in keys)
        for mark in marks
    )


def layouts() -> Iterator[Layout]:
    """Every layout; a module is imported when its turn comes."""
    for name in _modules():
        layout = getattr(importlib.import_module(f"{FOLDER}.{name}"), "LAYOUT", None)
        if layout is not None:
            yield layout


@functools.cache
def _modules() -> tuple[str, ...]:
    path = importlib.import_module(FOLDER).__path__
    return tuple(sorted(found.name for found in pkgutil.iter_modules(path)))


def recognise(source: Source) -> Layout:
    """The layout of a folder or of an opened file, told by what is in it and never by its name.

    Raises:
        FileNotFoundError: a folder that holds no model.
        ValueError: a file of no known layout; says what the file is, or lists its keys.
    """
    for layout in layouts():
        if layout.recognises(source):
            return layout
    if isinstance(source, Path):
        found = sorted(path.name for path in source.glob("*"))
        raise FileNotFoundError(
            f"{source}: expected model_index.json (a diffusers pipeline) or config.json (a model "
            f"or a fastdiff bundle), got {some(found) or 'an empty folder'}"
        )
    raise ValueError(f"{source.path}: {_stranger(source)}")


def _stranger(weights: Weights) -> str:
    """What to say of a file of no known layout."""
    for layout in layouts():
        if (what := layout.refusal(weights)) is not None:
            return f"these are {what}"
    return (
        "expected a checkpoint of CompVis, Stable Diffusion, OpenAI, DDPM, DiT or U-ViT, got "
        f"tensors of no known layout: {some(sorted(weights.places), 8) or 'none'}"
    )


def _with_autoencoder(model: Model, path: Path, loading: Loading) -> Model:
    """The model with the autoencoder of another file or folder.

    Raises:
        ValueError: it holds none, or its latents are scaled in another way than the model's.
    """
    part = Loading(
        options=LoadOptions(text_encoders=False, norm_groups=loading.options.norm_groups),
        dtype=loading.dtype,
        device=loading.device,
        progress=loading.progress,
    )
    other = _open(path, part)
    if other.autoencoder is None:
        raise ValueError(f"{path} holds no autoencoder; give the file or folder of one as vae")
    assumed, latent = model.assumed, model.provenance.get("latent size")
    scale = model.scale_factor
    if loading.options.scale_factor is None:
        stated = "scale_factor" not in other.assumed
        known = model.autoencoder is not None and "scale_factor" not in assumed
        if known and stated and abs(other.scale_factor - scale) > 1e-6:
            raise ValueError(
                f"the latents of {path} are scaled by {other.scale_factor}, those of {model.path} "
                f"by {scale}; use the autoencoder that belongs to it, or give scale_factor={scale} "
                "if they were trained together"
            )
        if not known and stated:
            scale = other.scale_factor
            assumed.pop("scale_factor", None)
    return replace(
        model,
        autoencoder=other.autoencoder,
        scale_factor=scale,
        image_size=model.image_size or (latent and latent * other.autoencoder.downsample_factor),
        image_channels=image_channels(model.denoiser, other.autoencoder),
        provenance={**model.provenance, "vae": str(path), "assumed": assumed},
        stored_hash="",
    )


def _check_together(model: Model) -> None:
    """The parts' widths must meet: latents with the denoiser, tokens with its context."""
    denoiser, autoencoder = model.denoiser, model.autoencoder
    if denoiser is None:
        return
    config = denoiser.config
    if autoencoder is not None:
        latent = autoencoder.config.latent_channels
        out = config.out_channels // (2 if config.learned_sigma else 1)
        if latent != out:
            raise ValueError(
                f"{model.path}: the autoencoder's latents have {latent} channels, the denoiser's "
                f"{out}; use the autoencoder that belongs to it"
            )
    if model.text_encoders:
        configs: list[Any] = [encoder.model.config for encoder in model.text_encoders]
        widths = [text.hidden_size for text in configs]
        if sum(widths) != config.context_dim:
            raise ValueError(
                f"{model.path}: the text encoders' tokens are {' + '.join(map(str, widths))} "
                f"wide, the denoiser reads {config.context_dim}; use those that belong to it"
            )
    classes = model.class_embedding
    if classes is not None and classes.embedding_dim != config.context_dim:
        raise ValueError(
            f"{model.path}: the classes' tokens are {classes.embedding_dim} wide, the denoiser "
            f"reads {config.context_dim}"
        )
