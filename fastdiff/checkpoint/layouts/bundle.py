"""A bundle: the folder in which fastdiff stores a trained model.

    config.json                   the model (`Stored`), sha256 of each weights file, provenance
    autoencoder.safetensors       absent for pixel diffusion
    KIND.safetensors              the denoiser, "unet" for a U-Net; absent for an autoencoder only
    class_embedding.safetensors   classes as context tokens, for denoisers that read them so
    classifier.safetensors        a noisy classifier, which guides a denoiser
    text_encoder.safetensors      a text transformer that was trained with the denoiser
    tokenizer.json                its merges

Everything is checked before it is used: the safetensors header against the size of the file, the
sha256 against config.json, names and shapes against the model that the config describes. Pickles,
which could run code, are never opened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.checkpoint.formats.safetensors import DTYPES, read_safetensors
from fastdiff.checkpoint.model import RUN_MODEL, Model, check_one_stage
from fastdiff.checkpoint.open import (
    CONFIG_FILE,
    Layout,
    Loading,
    Source,
    shipped_bundles,
    shipped_folder,
)
from fastdiff.checkpoint.scheduler import SamplerSettings
from fastdiff.checkpoint.weights import Progress, Sources, empty_model, fill, read_json, some
from fastdiff.configs import from_dict, to_dict
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.files import NO_SPACE, atomic_folder, write_json, write_text
from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.models.classifier import ClassifierConfig
from fastdiff.models.network import kind_of, network_family
from fastdiff.models.text import TextEncoder
from fastdiff.models.text_transformer import TextTransformer, TextTransformerConfig
from fastdiff.models.tokenizer import Tokenizer
from fastdiff.names import Extra, Prediction

NAME = "bundle"
UNET = "unet"  # the kind of denoiser if config.json does not name one
CLASS_EMBEDDING = "class_embedding"
CLASSIFIER = "classifier"
TEXT_ENCODER = "text_encoder"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = "fastdiff bundle 1"
MAX_IMAGE_SIZE = 2**16
WEIGHT_DTYPES = {name: DTYPES[name] for name in ("F16", "BF16", "F32", "F64")}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The value of "model" in config.json; `_schema` adds the denoiser's config under its kind.

    Optional fields are omitted when they have their default, so that the hash of a bundle does not
    depend on the version that wrote it.
    """

    image_size: int | None
    image_channels: int | None
    autoencoder: AutoencoderConfig | None = None
    kind: str = UNET
    """The denoiser's family; a bundle that does not state one is a U-Net."""
    schedule: ScheduleConfig | None = None
    prediction: Prediction = "eps"
    scale_factor: float = 1.0
    guidance_scale: float | None = None
    class_names: tuple[str, ...] = ()
    class_embedding: tuple[int, int] | None = None
    """Classes and width of a table of context tokens, which is stored in a separate file."""
    classifier: ClassifierConfig | None = None
    text_encoder: TextTransformerConfig | None = None
    sampler: SamplerSettings | None = None
    extra: Extra | None = None
    """What the denoiser reads in the channels behind x, where their number does not tell."""

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.kind)

    def __post_init__(self) -> None:
        denoiser, size, channels = self.denoiser, self.image_size, self.image_channels
        given = [number for number in (size, channels) if number is not None]
        if len(given) == 1 or any(number < 1 for number in given):
            raise ValueError(
                f"image_size and image_channels must be positive, got {size} and {channels}; both "
                "are null only where x is not an image"
            )
        if size is not None and size > MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must be at most {MAX_IMAGE_SIZE} pixels, got {size}")
        first = self.autoencoder.image_channels if self.autoencoder is not None else None
        if first is not None and first != channels:
            raise ValueError(
                f"the autoencoder has {first} image channels, got image_channels {channels}"
            )
        if self.autoencoder is None and denoiser is None and self.classifier is None:
            raise ValueError(f"expected an autoencoder, a {self.kind} or a classifier, got neither")
        noisy = self.kind if denoiser is not None else self.classifier and CLASSIFIER
        if noisy and self.schedule is None:
            raise ValueError(f"a {noisy} needs the schedule it was trained with, got None")
        if self.prediction not in get_args(Prediction):
            raise ValueError(
                f"expected prediction 'eps', 'v', 'x0' or 'flow', got {self.prediction!r}"
            )
        if not (math.isfinite(self.scale_factor) and self.scale_factor > 0):
            raise ValueError(f"scale_factor must be positive and finite, got {self.scale_factor}")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}")
        for kind, part in ((self.kind, denoiser), (CLASSIFIER, self.classifier)):
            classes = None if part is None else part.num_classes
            if classes is not None and self.class_names and len(self.class_names) != classes:
                raise ValueError(
                    f"the {kind} has {classes} classes, got {len(self.class_names)} class_names"
                )


@functools.cache
def _schema(kind: str) -> type[Stored]:
    """`Stored` with the denoiser's config as a field of its kind's name.

    Raises:
        ValueError: the kind is unknown, or not that of a denoiser.
    """
    config, network = network_family(kind)
    if not network.denoises:
        raise ValueError(f"kind must be that of a denoiser, got {kind!r}, which does not denoise")
    return make_dataclass(
        "Model", [(kind, config | None, None)], bases=(Stored,), frozen=True, kw_only=True
    )


def save_bundle(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> str:
    """Write a bundle atomically. An existing folder is replaced as a whole.

    dtype: dtype of the stored floating-point weights; None: the dtype of each tensor.
    provenance: JSON-compatible facts such as command, commit, date, data and steps; None: those of
    the bundle that the model was loaded from, or the file that it was converted from.
    progress: called as progress(tensor, bytes) after each tensor.

    Returns the weights hash that the bundle will have.

    Raises:
        ValueError: the model has parts that a bundle cannot contain (text encoders of other
            libraries), lacks facts that a bundle must state, or has weights that are not finite.
        OSError: the folder cannot be written.
    """
    check_one_stage(model)
    data = _stored(model)
    weights: dict[str, dict[str, Any]] = {}
    with atomic_folder(folder) as temporary:
        for name, (module, config) in _parts(model).items():
            tensors = {k: _storable(k, v, dtype) for k, v in module.state_dict().items()}
            path = temporary / f"{name}.safetensors"
            shapes = {key: tuple(value.shape) for key, value in tensors.items()}
            _check_names_and_shapes(path.name, shapes, config)
            save_tensors(tensors, path)
            weights[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
            if progress is not None:
                progress(name, weights[path.name]["bytes"])
        if (encoder := _own_encoder(model)) is not None:
            path = temporary / TOKENIZER_FILE
            assert isinstance(encoder.tokenizer, Tokenizer)
            write_text(path, json.dumps({"merges": encoder.tokenizer.merges}) + "\n")
            weights[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        write_json(
            temporary / CONFIG_FILE,
            {
                "format": FORMAT,
                "model": data,
                "weights": weights,
                "provenance": dict(_origin(model) if provenance is None else provenance),
            },
        )
    return _weights_hash(data, weights)


def _parts(model: Model) -> dict[str, tuple[nn.Module, Any]]:
    """File stem -> (module, config) for each part that the model has."""
    parts: dict[str, tuple[nn.Module, Any]] = {}
    if model.autoencoder is not None:
        parts["autoencoder"] = (model.autoencoder, model.autoencoder.config)
    if model.denoiser is not None:
        parts[kind_of(model.denoiser.config)] = (model.denoiser, model.denoiser.config)
    if model.classifier is not None:
        parts[CLASSIFIER] = (model.classifier, model.classifier.config)
    if (table := model.class_embedding) is not None:
        parts[CLASS_EMBEDDING] = (table, (table.num_embeddings, table.embedding_dim))
    if (encoder := _own_encoder(model)) is not None:
        parts[TEXT_ENCODER] = (encoder.model, encoder.model.config)
    return parts


def _text_config(model: Model) -> TextTransformerConfig | None:
    """The config of the text transformer that was trained with the denoiser, or None."""
    encoder = _own_encoder(model)
    if encoder is None:
        return None
    assert isinstance(encoder.model, TextTransformer)
    return encoder.model.config


def _own_encoder(model: Model) -> TextEncoder | None:
    """The text transformer that was trained with the denoiser, or None.

    Raises:
        ValueError: the model has text encoders of another kind.
    """
    if not model.text_encoders:
        return None
    first, *more = model.text_encoders
    if more or not (isinstance(first, TextEncoder) and isinstance(first.model, TextTransformer)):
        raise ValueError(
            "a bundle cannot contain text encoders of other libraries; write a diffusers folder, "
            "or load the model with text_encoders=False"
        )
    return first


def _stored(model: Model) -> dict[str, Any]:
    """The value of "model" in config.json.

    Raises:
        ValueError: as for `save_bundle`.
    """
    if model.image_size is None and model.image_channels is not None:
        raise ValueError(
            "a bundle must state the size of its images, which these files do not; load them with "
            "image_size="
        )
    if model.controlnets:
        raise ValueError(
            "a bundle cannot contain ControlNets; save the model without controlnet, and give it "
            "when the bundle is loaded"
        )
    denoiser, first, table = model.denoiser, model.autoencoder, model.class_embedding
    kind = UNET if denoiser is None else kind_of(denoiser.config)
    stored = _schema(kind)(
        image_size=model.image_size,
        image_channels=model.image_channels,
        autoencoder=None if first is None else first.config,
        kind=kind,
        schedule=model.schedule,
        prediction=model.prediction,
        extra=model.extra,
        scale_factor=model.scale_factor,
        guidance_scale=model.guidance_scale,
        class_names=model.class_names,
        class_embedding=None if table is None else (table.num_embeddings, table.embedding_dim),
        sampler=model.sampler,
        classifier=None if model.classifier is None else model.classifier.config,
        text_encoder=_text_config(model),
        **{kind: None if denoiser is None else denoiser.config},
    )
    data = to_dict(stored)
    optional = {"kind": UNET, CLASS_EMBEDDING: None, "sampler": None, CLASSIFIER: None}
    optional |= {TEXT_ENCODER: None, "guidance_scale": None, "extra": None}
    for name, absent in optional.items():
        if data[name] == absent:
            del data[name]
    return data


def _origin(model: Model) -> dict[str, Any]:
    """Provenance of a model that is being converted: its own, or the file that it came from."""
    if model.layout == "bundle":
        return dict(model.provenance.get("facts", {}))
    return {"converted from": model.layout, "file": model.path.name}


def load_bundle(
    folder_or_name: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    text_encoders: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Load a bundle from its folder, or a shipped one by its name (``"digits"``).

    dtype: dtype of the loaded floating-point weights; None: the most common dtype of each file.
    text_encoders: False leaves the text encoder out.
    progress: called as progress(tensor, bytes) after each tensor.

    Raises:
        FileNotFoundError: the folder or name does not exist, or a file is missing.
        ValueError: a file is damaged, was changed or does not fit the config.
    """
    folder = _find(folder_or_name)
    data = _read_config(folder / CONFIG_FILE)
    try:
        kind = data["model"].get("kind", UNET)
        stored = from_dict(_schema(kind if isinstance(kind, str) else repr(kind)), data["model"])
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}; download the bundle again") from error
    modules: dict[str, Any] = {}
    encoders: tuple[TextEncoder, ...] = ()
    configs = {
        "autoencoder": stored.autoencoder,
        stored.kind: stored.denoiser,
        CLASS_EMBEDDING: stored.class_embedding,
        CLASSIFIER: stored.classifier,
        TEXT_ENCODER: stored.text_encoder if text_encoders else None,
    }
    for name, config in configs.items():
        if config is None:
            continue
        path = folder / f"{name}.safetensors"
        sha256 = _stated_sha256(data, path)
        modules[name] = _load_module(path, config, sha256, dtype, device, progress)
    if (transformer := modules.get(TEXT_ENCODER)) is not None:
        path = folder / TOKENIZER_FILE
        tokenizer = _read_tokenizer(path, _stated_sha256(data, path), transformer.config)
        pooled = transformer.config.pooled
        encoders = (TextEncoder(model=transformer, tokenizer=tokenizer, pooled=pooled),)
    return Model(
        layout=NAME,
        denoiser=modules.get(stored.kind),
        autoencoder=modules.get("autoencoder"),
        class_embedding=modules.get(CLASS_EMBEDDING),
        classifier=modules.get(CLASSIFIER),
        text_encoders=encoders,
        schedule=stored.schedule,
        prediction=stored.prediction,
        sampler=stored.sampler,
        extra=stored.extra,
        scale_factor=stored.scale_factor,
        guidance_scale=stored.guidance_scale,
        image_size=stored.image_size,
        image_channels=stored.image_channels,
        class_names=stored.class_names,
        path=folder,
        provenance={"facts": data["provenance"]},
        stored_hash=_weights_hash(data["model"], data["weights"]),
    )


def _stated_sha256(data: Mapping[str, Any], path: Path) -> str:
    record = data["weights"].get(path.name)
    if record is None:
        raise ValueError(
            f"{path.parent / CONFIG_FILE} has no sha256 of {path.name}; download the bundle again"
        )
    return str(record["sha256"])


def _read_tokenizer(path: Path, sha256: str, config: TextTransformerConfig) -> Tokenizer:
    """The tokenizer of a bundle.

    Raises:
        FileNotFoundError, ValueError: the file is missing, was changed, or does not belong to the
            text transformer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download the bundle again")
    _check_sha256(path, sha256)
    try:
        tokenizer = Tokenizer(json.loads(path.read_bytes())["merges"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no tokenizer ({error}); download the bundle again") from error
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"{path} has {len(tokenizer)} ids, the text encoder {config.vocab_size}; use the "
            "tokenizer that it was trained with"
        )
    return tokenizer


def _check_sha256(path: Path, sha256: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise ValueError(
            f"{path}: sha256 is {found[:16]}…, {CONFIG_FILE} says {sha256[:16]}…; "
            "the file was changed or damaged; download the bundle again"
        )


def _find(folder_or_name: str | os.PathLike[str]) -> Path:
    folder = Path(folder_or_name)
    if folder.is_dir():
        inside = folder / RUN_MODEL
        return inside if (inside / CONFIG_FILE).is_file() else folder
    if folder.is_file():
        raise ValueError(
            f"{folder}: expected the folder of a bundle (with {CONFIG_FILE}), got a file; "
            f"use the folder, {folder.parent}"
        )
    if (shipped := shipped_folder(str(folder))) is not None:
        return shipped
    known = ", ".join(shipped_bundles()) or "none in this installation"
    raise FileNotFoundError(
        f"no bundle at {folder}; use a folder with {CONFIG_FILE}, or a shipped name: {known}"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing, so this folder is not a bundle; use one written by "
            "'fastdiff train', or a shipped name"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); download the bundle again"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"{path}: expected format {FORMAT!r}, got {found!r}; use the folder of a bundle "
            "(a training run keeps its bundle in model/)"
        )
    for key in ("model", "weights", "provenance"):
        if not isinstance(data.get(key), dict):
            raise ValueError(f"{path}: expected an object under {key!r}, got {data.get(key)!r:.60}")
    for name, record in data["weights"].items():
        if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
            raise ValueError(f"{path} has no sha256 of {name:.60}; download the bundle again")
    return data


def _load_module(
    path: Path,
    config: Any,
    sha256: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: Progress | None,
) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download the bundle again")
    weights = read_safetensors(path, WEIGHT_DTYPES)
    module = _check_names_and_shapes(str(path), weights.shapes, config)
    if torch.device(device).type != "meta":
        _check_sha256(path, sha256)
    sources: Sources = {key: (key,) for key in weights.places}
    return fill(module, sources, weights, dtype=dtype, device=device, progress=progress)


def _check_names_and_shapes(
    file: str, shapes: Mapping[str, tuple[int, ...]], config: Any
) -> nn.Module:
    """Compare with the module that the config describes, built on the meta device; return it."""
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
    # Cloned, because safetensors rejects tensors that share storage, as EMA copies may.
    return stored.contiguous().clone()


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors' `save_file`, but with the errors and the permissions of an ordinary file."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk is reported as text: "... (os error 28)"
        for number in NO_SPACE:
            if f"os error {number})" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise
    path.chmod(0o666 & ~_umask())  # safetensors makes it readable by its owner only


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


def _is_bundle(folder: Path) -> bool:
    if (folder / "model_index.json").is_file():
        return False
    config = folder / CONFIG_FILE
    if (folder / RUN_MODEL / CONFIG_FILE).is_file():
        return True  # a training run
    return config.is_file() and "format" in read_json(config)


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Path)
    allowed = (
        "vae",
        "classifier",
        "tokenizer",
        "lora",
        "embedding",
        "controlnet",
        "ema",
        "text_encoders",
        "strict",
    )
    if given := [name for name in loading.given if name not in allowed]:
        raise ValueError(f"{source}: a bundle states this itself; leave {', '.join(given)} out")
    return load_bundle(
        source,
        device=loading.device,
        dtype=loading.dtype,
        text_encoders=loading.options.text_encoders,
        progress=loading.progress,
    )


def _save(model: Model, folder: Path, dtype: torch.dtype | None, progress: Progress | None) -> None:
    save_bundle(model, folder, dtype=dtype, progress=progress)


LAYOUT = Layout(
    name=NAME,
    folder=_is_bundle,
    refused={
        "the weights of a fastdiff bundle, whose config is in the same folder; use the folder": (
            "input_blocks.0.0.weight",
            "output_blocks.0.0.norm1.weight",
        ),
    },
    open=_open,
    save=_save,
)
