"""`fastdiff.load`: open any supported checkpoint as fastdiff modules."""

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
from fastdiff.checkpoint.guide import check_denoiser, with_classifier, with_clip
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.weights import Progress, Weights, fill, some
from fastdiff.diffusion.schedules import ScheduleConfig, check_flow
from fastdiff.files import REFUSALS, put_in_one_line

PathLike = str | os.PathLike[str]
ASSETS = Path(__file__).parents[1] / "assets"
CONFIG_FILE = "config.json"
FOLDER = "fastdiff.checkpoint.layouts"
"""The package of the layouts: every file or folder in it that has a `LAYOUT`."""
LORA = f"{FOLDER}.lora"
CONTROLNET = f"{FOLDER}.controlnet"
EMBEDDING = "fastdiff.checkpoint.textual_inversion"
Marks = tuple[str, ...]
"""Keys that a file must all contain; * matches any text."""
Source = Path | Weights
"""A folder, or an opened file."""
Save = Callable[[Model, Path, torch.dtype | None, Progress | None], None]
"""save(model, folder, dtype, progress): write a model atomically; dtype None keeps all dtypes."""


@dataclass
class Assumed:
    """The assumptions made so far about what a model's files do not state."""

    values: dict[str, Any] = field(default_factory=dict)
    """Field of `LoadOptions` -> the assumed value."""
    choices: dict[str, str] = field(default_factory=dict)
    """Field -> the other possible values, in words; only if no published model determines it."""

    @property
    def provenance(self) -> dict[str, Any]:
        """The entries for `Model.provenance`."""
        undecided = {"undecided": dict(self.choices)} if self.choices else {}
        return {"assumed": dict(self.values), **undecided}

    def take(self, name: str, value: Any, choices: str | None = None) -> Any:
        """Assume a value. choices: None if a published model of this architecture has the value."""
        self.values[name] = value
        if choices is not None:
            self.choices[name] = choices
        return value


def open_device(device: torch.device | str) -> torch.device:
    """A device that this machine has.

    Raises:
        ValueError: it is not a device of torch's, or this machine does not have it.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be one of torch's, such as 'cpu' or 'cuda', got {device!r}"
        ) from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device '{found}' is not available ({reason}); use 'cpu'") from error
    return found


@dataclass(frozen=True, kw_only=True)
class Loading:
    """One call of `fastdiff.load`."""

    options: LoadOptions = field(default_factory=LoadOptions)
    schedule: ScheduleConfig | None = None
    """The complete noise schedule, if the caller gave one."""
    dtype: torch.dtype | None = torch.float32
    device: torch.device | str = "cpu"
    progress: Progress | None = None
    assumed: Assumed = field(default_factory=Assumed)
    classifies: bool = False
    """Whether this opens the classifier of another model, whose options do not apply to it."""

    def __post_init__(self) -> None:
        dtype = self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        open_device(self.device)

    @property
    def given(self) -> list[str]:
        """Names of the options that were set."""
        return [*(["schedule"] if self.schedule is not None else []), *self.options.given]

    @property
    def says_noise(self) -> bool:
        return self.schedule is not None or self.options.says_noise

    def check_decided(self, path: Path) -> None:
        """Check that nothing was guessed, if `LoadOptions.strict` is set.

        Raises:
            ValueError: something was guessed.
        """
        if not (self.options.strict and self.assumed.choices):
            return
        left = "; ".join(f"{name}: {words}" for name, words in self.assumed.choices.items())
        names = " ".join(f"--{name.replace('_', '-')}" for name in self.assumed.choices)
        way_out = (
            f"{', '.join(f'{name}=' for name in self.assumed.choices)} (on the command line "
            f"{names}), or load without strict"
        )
        if self.classifies:
            way_out = (
                f"{names} to 'fastdiff convert {path} FOLDER --to bundle' and load FOLDER as the "
                "classifier, or load without strict"
            )
        raise ValueError(f"neither {path} nor a published model determines {left}. Give {way_out}")

    def noise(self, found: ScheduleConfig) -> ScheduleConfig:
        """The training's noise schedule: that of the caller, else the one found or assumed."""
        return self.options.noise(self.schedule or found)

    def fill(self, plan: Plan) -> Any:
        """Read the weights of a planned module.

        Raises:
            ValueError: as for `check_decided` (layouts make all assumptions before they read
                weights) and `Plan.check`.
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
    """One way in which checkpoints are stored on disk."""

    name: str
    files: tuple[Marks, ...] = ()
    """A file that contains all keys of one of these has this layout."""
    folder: Callable[[Path], bool] = lambda path: False
    """Whether a folder has this layout."""
    refused: Mapping[str, Marks] = field(default_factory=dict)
    """Description -> marks, for files that this layout recognises but cannot open on their own. The
    description completes the sentence "these are ..."."""
    open: Callable[[Source, Loading], Model]
    save: Save | None = None

    def recognises(self, source: Source) -> bool:
        if isinstance(source, Path):
            return self.folder(source)
        return any(_has(source.places.keys(), marks) for marks in self.files)

    def refusal(self, weights: Weights) -> str | None:
        """Description of a file that cannot be opened on its own; None if it is not recognised."""
        keys = weights.places.keys()
        return next((what for what, marks in self.refused.items() if _has(keys, marks)), None)


@torch.inference_mode(False)  # weights made in that mode could be neither trained nor watched
def load(
    path: PathLike,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    vae: PathLike | None = None,
    classifier: PathLike | None = None,
    clip: PathLike | None = None,
    tokenizer: PathLike | Sequence[PathLike] | None = None,
    lora: PathLike | Sequence[PathLike] | None = None,
    embedding: Mapping[str, PathLike] | None = None,
    controlnet: PathLike | Sequence[PathLike] | None = None,
    schedule: ScheduleConfig | str | None = None,
    options: LoadOptions | None = None,
    **said: Any,
) -> Model:
    """Open a checkpoint: a diffusers folder, a single file, or a fastdiff bundle.

    The layout is recognised from keys and shapes, never from the file's name. No code from a pickle
    is run. Names and shapes of all parts are checked before any weights are read, and each weight
    is read once, directly to its destination.

    Assumptions about what the files do not state are listed in `Model.assumed`, and in words in
    `Model.assumed_lines`; strict=True refuses to guess.

    Args:
        path: a folder with model_index.json, or with the config.json of one model; a .safetensors,
            .ckpt, .pt or .bin file of CompVis' latent diffusion, Stable Diffusion 1, 2 or XL,
            OpenAI's guided-diffusion, improved-diffusion or GLIDE, a port of DDPM, DiT or
            U-ViT; the folder of a bundle or a training run, or the name of a shipped bundle.
        dtype: dtype of the floating-point weights; None: the most common one of each model's file.
        device: device of the weights.
        progress: called as progress(tensor, bytes) after each tensor.
        vae: a file or folder with the autoencoder to use, if the model has none or in place of its
            own.
        classifier: a file or folder with a noisy classifier, which then guides what the model
            generates (`classifier_scale`); it must have been trained for this denoiser's samples,
            schedule and classes.
        clip: a folder with a noised CLIP (`fastdiff train clip`), which then guides what the model
            generates to the prompts (`clip_scale`); it must have been trained for this denoiser's
            samples and schedule.
        tokenizer: the folder of a CLIP tokenizer, or one per text encoder, for single files.
        lora: a LoRA file, or several, to merge into the weights; "PATH:0.8" gives its strength.
        embedding: textual inversion files by the words that stand for them in prompts.
        controlnet: a ControlNet, or several: folders of diffusers, or files of the original layout;
            jobs give the pictures that they read as `control`.
        schedule: the training's noise schedule, or the kind of its betas, if the files do not state
            it.
        options: all options as one object; options given by name override it.
        said: any other field of `LoadOptions`: variant, ema, text_encoders, prediction, num_heads,
            head_dim, qkv_order, timestep_scale, norm_groups, scale_factor, image_size, strict, ...

    Raises:
        FileNotFoundError: there is no such file or folder, or a part of it is missing.
        ValueError: the checkpoint is damaged or unknown, or its parts do not belong together; the
            message is one line.
        ImportError: the model has text encoders and transformers is not installed.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = (tokenizer,)
    if tokenizer is not None:
        said["tokenizer"] = tuple(Path(folder) for folder in tokenizer)
    if isinstance(lora, str | os.PathLike):
        lora = (lora,)
    if lora is not None:
        said["lora"] = tuple(os.fspath(each) for each in lora)
    if embedding is not None:
        said["embedding"] = tuple(f"{name}={os.fspath(p)}" for name, p in embedding.items())
    if isinstance(controlnet, str | os.PathLike):
        controlnet = (controlnet,)
    if controlnet is not None:
        said["controlnet"] = tuple(Path(each) for each in controlnet)
    places = {"vae": vae, "classifier": classifier, "clip": clip}
    said |= {name: Path(place) for name, place in places.items() if place is not None}
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
    if (place := loading.options.classifier) is not None:
        strict = loading.options.strict
        model = with_classifier(model, open_classifier(place, model, loading.device, strict=strict))
    if (place := loading.options.clip) is not None:
        model = with_clip(model, open_clip(place, model, loading.device))
    loading.check_decided(model.path)
    _check_together(model)
    if loading.options.lora:
        # by name, like the layouts, whose names of layers it uses
        merge_all = importlib.import_module(LORA).merge_all
        model = merge_all(model, loading.options.lora)
    if loading.options.embedding:
        add_all = importlib.import_module(EMBEDDING).add_all
        model = add_all(model, loading.options.embedding)
    if loading.options.controlnet:
        add_controlnets = importlib.import_module(CONTROLNET).add_all
        model = add_controlnets(model, loading.options.controlnet, loading)
    return model


def _open(path: Path, loading: Loading) -> Model:
    source: Source
    if path.is_dir():
        source = path
    elif path.exists():
        if loading.options.variant is not None:
            raise ValueError(
                f"variant is only for diffusers folders, got {loading.options.variant!r} with the "
                f"file {path}; leave it out"
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
    """Prefix errors about names or shapes with the path."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def shipped_bundles() -> tuple[str, ...]:
    """Names of the bundles that are part of the package."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG_FILE}")))


def shipped_folder(name: str) -> Path | None:
    """The folder of a shipped bundle, or None if there is none of this name."""
    folder = ASSETS / name
    return folder if len(Path(name).parts) == 1 and (folder / CONFIG_FILE).is_file() else None


def _has(keys: Collection[str], marks: Marks) -> bool:
    return all(
        mark in keys if "*" not in mark else any(fnmatch.fnmatchcase(key, mark) for key in keys)
        for mark in marks
    )


def layouts() -> Iterator[Layout]:
    """Yield all layouts; each module is imported when it is reached."""
    for name in _modules():
        layout = getattr(importlib.import_module(f"{FOLDER}.{name}"), "LAYOUT", None)
        if layout is not None:
            yield layout


@functools.cache
def _modules() -> tuple[str, ...]:
    path = importlib.import_module(FOLDER).__path__
    return tuple(sorted(found.name for found in pkgutil.iter_modules(path)))


def recognise(source: Source) -> Layout:
    """The layout of a folder or an opened file, recognised from its contents, never from its name.

    Raises:
        FileNotFoundError: the folder contains no model.
        ValueError: the file has no known layout; the message says what it is, or lists its keys.
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
    """Describe a file of no known layout, for an error message."""
    for layout in layouts():
        if (what := layout.refusal(weights)) is not None:
            return f"these are {what}"
    return (
        "expected a checkpoint of CompVis, Stable Diffusion, OpenAI, DDPM, DiT or U-ViT, got "
        f"tensors of no known layout: {some(sorted(weights.places), 8) or 'none'}"
    )


def _with_autoencoder(model: Model, path: Path, loading: Loading) -> Model:
    """Replace the model's autoencoder by that of another file or folder.

    Raises:
        ValueError: it contains no autoencoder, or its latents have another scale than the model's.
    """
    part = Loading(
        options=LoadOptions(text_encoders=False, norm_groups=loading.options.norm_groups),
        dtype=loading.dtype,
        device=loading.device,
        progress=loading.progress,
    )
    other = _open(path, part)
    if other.autoencoder is None:
        raise ValueError(f"{path} contains no autoencoder; give one that does as vae")
    assumed, latent = model.assumed, model.provenance.get("latent size")
    scale = model.scale_factor
    if loading.options.scale_factor is None:
        stated = "scale_factor" not in other.assumed
        known = model.autoencoder is not None and "scale_factor" not in assumed
        if known and stated and abs(other.scale_factor - scale) > 1e-6:
            raise ValueError(
                f"the latents of {path} are scaled by {other.scale_factor}, those of {model.path} "
                f"by {scale}; use the autoencoder that belongs to the model, or set "
                f"scale_factor={scale} if they were trained together"
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


def open_classifier(
    path: PathLike, model: Model, device: torch.device | str, *, strict: bool = False
) -> Model:
    """Open the noisy classifier that is to guide a model, in fp32 unless the model is in fp64.

    Gradients of half precision would underflow.

    Raises:
        ValueError: the model contains no denoiser, or the file is not one that can be opened.
    """
    options, dtype = LoadOptions(strict=strict), _wide(check_denoiser(model))
    return _open(Path(path), Loading(options=options, dtype=dtype, device=device, classifies=True))


def open_clip(path: PathLike, model: Model, device: torch.device | str) -> Model:
    """Open the noised CLIP that is to guide a model, in fp32 unless the model is in fp64.

    Raises:
        ValueError: the model contains no denoiser, or the file is not one that can be opened.
    """
    dtype = _wide(check_denoiser(model, "clip"))
    options = LoadOptions(text_encoders=False)
    return _open(Path(path), Loading(options=options, dtype=dtype, device=device))


def _wide(network: torch.nn.Module) -> torch.dtype:
    """The dtype of gradients for a network, in which half precision would underflow."""
    return torch.promote_types(next(network.parameters()).dtype, torch.float32)


def _check_together(model: Model) -> None:
    """Check the widths of the parts (latents and denoiser, text tokens and context), and that the
    schedule is one for the prediction."""
    denoiser, autoencoder = model.denoiser, model.autoencoder
    if denoiser is None:
        return
    if model.schedule is not None:
        check_flow(model.schedule.kind, model.prediction)
    config = denoiser.config
    if autoencoder is not None:
        latent = autoencoder.config.latent_channels
        out = config.out_channels // (2 if config.learned_sigma else 1)
        if latent != out:
            raise ValueError(
                f"{model.path}: the autoencoder's latents have {latent} channels, the denoiser's "
                f"{out}; use the autoencoder that belongs to it"
            )
    if model.text_encoders and model.projection is None:
        configs: list[Any] = [encoder.model.config for encoder in model.text_encoders]
        widths = [text.hidden_size for text in configs]
        if sum(widths) != config.context_dim:
            raise ValueError(
                f"{model.path}: the text encoders' tokens have {' + '.join(map(str, widths))} "
                f"channels, the denoiser expects {config.context_dim}; use the text encoders that "
                "belong to it"
            )
    classes = model.class_embedding
    if classes is not None and classes.embedding_dim != config.context_dim:
        raise ValueError(
            f"{model.path}: the class embedding has {classes.embedding_dim} channels, the denoiser "
            f"expects {config.context_dim}; use the file that they were both saved in"
        )
