"""A bundle: the folder a trained model is kept in.

    config.json               the model (ModelConfig), sha256 of each weights file, provenance
    autoencoder.safetensors   absent for pixel diffusion
    unet.safetensors          absent for an autoencoder alone

Everything is checked before a number is used: the safetensors header against the file's size, the
sha256 against config.json, names and shapes against the model that the config describes. Nothing
that could run code (pickle) is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.checkpoint.build import empty_model, fill
from fastdiff.checkpoint.formats.safetensors import DTYPES, read_safetensors
from fastdiff.checkpoint.weights import some
from fastdiff.configs import from_dict, to_dict
from fastdiff.diffusion.predictions import Prediction
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.files import NO_SPACE, atomic_folder, write_json
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.unet import UNet, UNetConfig

ASSETS = Path(__file__).parents[2] / "assets"
CONFIG_FILE = "config.json"
RUN_MODEL = "model"  # the bundle inside a training run's folder
FORMAT = "fastdiff bundle 1"
MAX_IMAGE_SIZE = 2**16
WEIGHT_DTYPES = {name: DTYPES[name] for name in ("F16", "BF16", "F32", "F64")}
MODULES: dict[str, type[nn.Module]] = {"autoencoder": Autoencoder, "unet": UNet}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a bundle holds: enough to build the modules and to sample from them."""

    image_size: int
    """Height and width of the images, in pixels."""
    image_channels: int
    """Channels of the images: 1 for grey, 3 for RGB."""
    autoencoder: AutoencoderConfig | None = None
    """The first stage; None for diffusion on pixels."""
    unet: UNetConfig | None = None
    """The denoiser; None for an autoencoder alone."""
    schedule: ScheduleConfig | None = None
    """The noise the denoiser was trained with; needed with a unet."""
    prediction: Prediction = "eps"
    """What the denoiser returns."""
    scale_factor: float = 1.0
    """1 / std of the latents: they are multiplied by it before the denoiser sees them."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of the labels; empty without classes."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.image_channels < 1:
            raise ValueError(
                "image_size and image_channels must be positive, got "
                f"{self.image_size} and {self.image_channels}"
            )
        if self.image_size > MAX_IMAGE_SIZE:
            raise ValueError(
                f"image_size must be at most {MAX_IMAGE_SIZE} pixels, got {self.image_size}"
            )
        first = self.autoencoder.image_channels if self.autoencoder is not None else None
        if first is not None and first != self.image_channels:
            raise ValueError(
                f"the autoencoder has {first} image channels, got image_channels "
                f"{self.image_channels}"
            )
        if self.autoencoder is None and self.unet is None:
            raise ValueError("expected an autoencoder, a unet or both, got neither")
        if self.unet is not None and self.schedule is None:
            raise ValueError("a unet needs the schedule it was trained with, got None")
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"expected prediction 'eps', 'v' or 'x0', got {self.prediction!r}")
        if not (math.isfinite(self.scale_factor) and self.scale_factor > 0):
            raise ValueError(f"scale_factor must be positive and finite, got {self.scale_factor}")
        classes = self.unet.num_classes if self.unet is not None else None
        if classes is not None and self.class_names and len(self.class_names) != classes:
            raise ValueError(
                f"the unet has {classes} classes, got {len(self.class_names)} class_names"
            )


@dataclass(kw_only=True)
class Bundle:
    """A model read from its folder, in eval mode, without gradients."""

    config: ModelConfig
    autoencoder: Autoencoder | None = None
    unet: UNet | None = None
    weights_hash: str = ""
    """sha256 over the model's config and the sha256 of each weights file: names these numbers."""
    folder: Path = Path()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call the model: its folder's name, or the run's if it is the model/ of a run."""
        folder = self.folder.absolute()
        return folder.parent.name if folder.name == RUN_MODEL else folder.name


def save_bundle(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    autoencoder: nn.Module | Mapping[str, Tensor] | None = None,
    unet: nn.Module | Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Write a bundle: all of it or nothing. An existing folder is replaced as a whole.

    autoencoder, unet: a module, or its state dict (EMA weights, say).
    dtype: what floating-point weights are stored as; None keeps each tensor's own.
    provenance: JSON-able facts for people: command, commit, date, data, steps.

    Returns the weights hash that :func:`load_bundle` will give.

    Raises:
        ValueError: the weights do not fit the config, or are not finite.
        OSError: the folder cannot be written.
    """
    given = {"autoencoder": autoencoder, "unet": unet}
    weights: dict[str, dict[str, Any]] = {}
    with atomic_folder(folder) as temporary:
        for name in MODULES:
            part_config, source = getattr(config, name), given[name]
            if (part_config is None) != (source is None):
                raise ValueError(
                    f"{folder}: {name} needs both its config and its weights, got "
                    f"{'no config' if part_config is None else 'a config'} and "
                    f"{'no weights' if source is None else 'weights'}"
                )
            if source is None:
                continue
            state = source.state_dict() if isinstance(source, nn.Module) else source
            tensors = {key: _storable(key, value, dtype) for key, value in state.items()}
            path = temporary / f"{name}.safetensors"
            _check_names_and_shapes(
                path.name, {k: tuple(v.shape) for k, v in tensors.items()}, part_config
            )
            save_tensors(tensors, path)
            weights[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        data = to_dict(config)
        write_json(
            temporary / CONFIG_FILE,
            {
                "format": FORMAT,
                "model": data,
                "weights": weights,
                "provenance": dict(provenance or {}),
            },
        )
    return _weights_hash(data, weights)


def load_bundle(
    folder_or_name: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Bundle:
    """Read a bundle from its folder, or a shipped one by its name (``"digits"``).

    dtype: what floating-point weights become, whatever they are stored as.

    Raises:
        FileNotFoundError: there is no such folder or name, or a file of it is missing.
        ValueError: a file is damaged, was changed, or does not fit the config; one line with the
            file, what was found, what was expected and what to do.
    """
    folder = _find(folder_or_name)
    data = _read_config(folder / CONFIG_FILE)
    try:
        config = from_dict(ModelConfig, data["model"])
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}; fetch the bundle again") from error
    modules: dict[str, Any] = {}
    for name in MODULES:
        part_config = getattr(config, name)
        if part_config is None:
            continue
        path = folder / f"{name}.safetensors"
        record = data["weights"].get(path.name)
        if record is None:
            raise ValueError(
                f"{folder / CONFIG_FILE}: no sha256 of {path.name} in it; fetch the bundle again"
            )
        modules[name] = _load_module(path, part_config, record["sha256"], dtype, device)
    return Bundle(
        config=config,
        weights_hash=_weights_hash(data["model"], data["weights"]),
        folder=folder,
        provenance=data["provenance"],
        **modules,
    )


def shipped_bundles() -> tuple[str, ...]:
    """Names of the bundles that come with the package."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG_FILE}")))


def _find(folder_or_name: str | os.PathLike[str]) -> Path:
    folder = Path(folder_or_name)
    if folder.is_dir():
        inside = folder / RUN_MODEL
        return inside if (inside / CONFIG_FILE).is_file() else folder
    if folder.is_file():
        raise ValueError(
            f"{folder}: expected a bundle's folder (holding {CONFIG_FILE}), got a file; "
            f"give the folder, {folder.parent}"
        )
    shipped = ASSETS / folder
    if len(folder.parts) == 1 and (shipped / CONFIG_FILE).is_file():
        return shipped
    known = ", ".join(shipped_bundles()) or "none in this installation"
    raise FileNotFoundError(
        f"no bundle at {folder}; give a folder that holds {CONFIG_FILE}, or a shipped name: {known}"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: this folder is not a bundle; give one written by "
            "'fastdiff train', or a shipped name"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the bundle again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"{path}: expected format {FORMAT!r}, got {found!r}; give a bundle's folder "
            "(a training run keeps its bundle in model/)"
        )
    for key in ("model", "weights", "provenance"):
        if not isinstance(data.get(key), dict):
            raise ValueError(f"{path}: expected an object under {key!r}, got {data.get(key)!r:.60}")
    for name, record in data["weights"].items():
        if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
            raise ValueError(f"{path}: no sha256 of {name:.60} in it; fetch the bundle again")
    return data


def _load_module(
    path: Path,
    config: Any,
    sha256: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch the bundle again")
    weights = read_safetensors(path, WEIGHT_DTYPES)
    module = _check_names_and_shapes(str(path), weights.shapes, config)
    found = _sha256(path)
    if found != sha256:
        raise ValueError(
            f"{path}: sha256 is {found[:16]}…, {CONFIG_FILE} says {sha256[:16]}…; "
            "the file was changed or damaged: fetch the bundle again"
        )
    return fill(
        module, {key: (key,) for key in weights.places}, weights, dtype=dtype, device=device
    )


def _check_names_and_shapes(
    file: str, shapes: Mapping[str, tuple[int, ...]], config: Any
) -> UNet | Autoencoder:
    """Compare with the module the config describes, built without memory; return the module."""
    module = empty_model(config, file, len(shapes))
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    missing, unknown = sorted(expected.keys() - shapes), sorted(shapes.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"{file}: {len(missing)} tensors missing ({some(missing, 3) or 'none'}), "
            f"{len(unknown)} unknown ({some(unknown, 3) or 'none'}); "
            "use the weights that belong to this config"
        )
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise ValueError(
                f"{file}: {key} has shape {shapes[key]}, the config says {shape}; "
                "use the weights that belong to this config"
            )
    return module


def _storable(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    stored = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
    if not stored.isfinite().all():
        raise ValueError(
            f"{key} is not finite as {stored.dtype}; train with a lower learning rate, "
            "or store it in a wider dtype"
        )
    # A clone: safetensors refuses tensors that share storage, and EMA copies may.
    return stored.contiguous().clone()


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors' own writer, with the errors and the permissions of an ordinary file."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk arrives as text: "... (os error 28)"
        for number in NO_SPACE:
            if f"os error {number})" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise
    path.chmod(0o666 & ~_umask())  # safetensors leaves it readable by its owner only


def _umask() -> int:
    """The process's umask, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _weights_hash(model: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
    hashes = {name: record["sha256"] for name, record in weights.items()}
    text = json.dumps({"model": model, "weights": hashes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
