"""A diffusion model read from disk, from any source and in any layout."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoint.scheduler import SamplerSettings
from fastdiff.configs import to_dict
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.files import message_line
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.classifier import Classifier
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.network import Network, kind_of
from fastdiff.models.text import AnyEncoder, TextEncoder
from fastdiff.models.unclip import CLIPImageEncoder, ImageNoise, ImageProjection
from fastdiff.names import Extra, Prediction


@dataclass(frozen=True, kw_only=True)
class PictureNoise:
    """The noise of the low-resolution picture that an upsampler reads, whose level is the
    denoiser's class label (Stable Diffusion's x4-upscaler)."""

    schedule: ScheduleConfig
    """The noise levels."""
    most: int
    """The highest level that the denoiser was trained with."""


CONTROLNET = "controlnet_"  # prefix of the parts that are ControlNets
RUN_MODEL = "model"  # the bundle inside a training run's folder
# The fields of a text encoder's config that the shapes of its weights do not determine.
ENCODER_FACTS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")


@dataclass(kw_only=True, eq=False, repr=False)
class Model:
    """The parts of a diffusion model; the modules are in eval mode and without gradients.

    This class only holds data; `fastdiff.generate` samples from it.
    """

    layout: str
    """Layout of the files: "bundle", "compvis", "ddpm", "diffusers", "guided-diffusion", ..."""
    denoiser: Network | None = None
    """The denoising network; None for an autoencoder alone."""
    autoencoder: Autoencoder | None = None
    """The first stage; None for diffusion on pixels."""
    classifier: Classifier | None = None
    """A classifier of noisy x, which can guide a denoiser with the same schedule and classes."""
    controlnets: tuple[ControlNet, ...] = ()
    """ControlNets, each of which reads one of a job's control pictures."""
    text_encoders: tuple[AnyEncoder, ...] = ()
    """The text encoders, in the order in which their tokens are concatenated."""
    class_embedding: nn.Embedding | None = None
    """Class embedding whose rows are context tokens, for denoisers with context but no text (LDM).
    """
    prior: Model | None = None
    """The prior of unCLIP, which makes an image embedding from a text: a model with a denoiser, a
    schedule, a sampler and a guidance scale of its own, and no other parts."""
    projection: ImageProjection | None = None
    """What turns an image embedding and a text into the denoiser's conditions (unCLIP)."""
    image_encoder: CLIPImageEncoder | None = None
    """CLIP's image encoder, for models that are conditioned on the embedding of a picture."""
    image_noise: ImageNoise | None = None
    """What adds noise to the embedding of a picture before the denoiser reads it (Stable Diffusion
    2.1 unCLIP)."""
    image_noise_schedule: ScheduleConfig | None = None
    """The noise levels of `image_noise`."""
    picture_noise: PictureNoise | None = None
    """The noise of the low-resolution picture that the denoiser reads; None: it reads it clean.
    """
    upsamplers: tuple[Model, ...] = ()
    """Models that enlarge what the denoiser makes, in one run of a sampler: the first takes all
    steps, or all but the last if a second one takes that (karlo)."""
    upsampling: int = 1
    """Factor of both sides by which the upsamplers enlarge an image."""
    schedule: ScheduleConfig | None = None
    """Noise schedule of the training; None without a denoiser or classifier, or if the files do not
    state it."""
    prediction: Prediction = "eps"
    """What the denoiser returns."""
    extra: Extra | None = None
    """What the denoiser reads in the channels behind x; None: its number of channels decides, see
    `fastdiff.generate.facts`."""
    sampler: SamplerSettings | None = None
    """The sampler in the files, `sampler.arguments(schedule, steps)` for `build_table`; None if
    they do not name one, or if fastdiff does not support it, as provenance["no_sampler"] then
    explains."""
    guidance_scale: float | None = None
    """The guidance scale that the model is meant to be sampled with; None: that of its kind, see
    `fastdiff.generate.facts.resolved`."""
    scale_factor: float = 1.0
    """Factor of the latents before the denoiser sees them."""
    image_size: int | None = None
    """Height and width of the training images in pixels; None if the files do not state it."""
    image_channels: int | None = None
    """Channels of the images, 1 for grey and 3 for RGB; None if x is not an image."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of the labels; empty if the files do not name them."""
    path: Path = Path()
    """The file or folder that the model was read from."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What else is known: "pipeline" (diffusers' class), "facts" in the files (training step,
    metadata), "assumed" (name -> value: what the files do not state and was taken from the
    documentation of the published models), "undecided" (name -> the choices in words, for
    assumptions that no published model determines), "ignored" (unused parts of the files),
    "no_sampler"."""
    stored_hash: str = ""
    """The weights hash stored in the files themselves; see `weights_hash`."""

    @property
    def name(self) -> str:
        """The name of the model: that of its file or folder, or of its training run."""
        path = self.path.absolute()
        if path.name == RUN_MODEL and self.layout == "bundle":
            return path.parent.name
        return path.stem if path.is_file() else path.name

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of everything that affects the images: models with equal hashes make equal images.

        A bundle stores its own, computed from the hashes of its files. Otherwise it covers the
        weights in their computing dtype, configs, schedule and vocabularies; this reads all weights
        once, which takes about a second per GB.
        """
        return self.stored_hash or _hash(self)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Part -> module, for the parts that exist."""
        parts: dict[str, Any] = {"denoiser": self.denoiser, "autoencoder": self.autoencoder}
        parts["classifier"] = self.classifier
        parts |= {f"{CONTROLNET}{i + 1}": net for i, net in enumerate(self.controlnets)}
        for index, encoder in enumerate(self.text_encoders):
            parts[f"text_encoder{f'_{index + 1}' * bool(index)}"] = encoder.model
        parts["class_embedding"] = self.class_embedding
        parts["prior"] = self.prior and self.prior.denoiser
        parts["projection"] = self.projection
        parts["image_noise"] = self.image_noise
        parts["image_encoder"] = self.image_encoder and self.image_encoder.model
        for index, upsampler in enumerate(self.upsamplers):
            parts[f"upsampler{f'_{index + 1}' * bool(index)}"] = upsampler.denoiser
        return {name: module for name, module in parts.items() if module is not None}

    @property
    def assumed(self) -> dict[str, Any]:
        """Assumptions about what the files do not state. Each name is an argument of `load`, after
        "classifier " for loading the classifier on its own."""
        return dict(self.provenance.get("assumed", {}))

    def summary(self) -> list[tuple[str, str]]:
        """The most important facts as (title, text); at most eleven pairs."""
        pairs = [("layout", f"{self.layout}, {self.path}")]
        for name, module in self.modules.items():
            if name.startswith(CONTROLNET):
                continue
            count = sum(parameter.numel() for parameter in module.parameters())
            pairs.append((name, f"{type(module).__name__}, {count:,} parameters"))
        if (denoiser := self.denoiser) is not None:
            schedule = "no schedule"
            if self.schedule is not None:
                schedule = f"{self.schedule.kind} schedule of {self.schedule.num_timesteps} steps"
            pairs.append(("predicts", f"{self.prediction}, {schedule}"))
            if self.extra is not None:
                pairs.append(("reads", f"channels behind x: {self.extra}"))
            config = denoiser.config
            table = self.class_embedding
            classes = config.num_classes if table is None else table.num_embeddings
            if classes is not None:
                pairs.append(("classes", str(classes)))
        if self.controlnets:
            sizes = [sum(p.numel() for p in net.parameters()) for net in self.controlnets]
            pairs.append(("controlnets", f"{' + '.join(f'{n:,}' for n in sizes)} parameters"))
        if self.classifier is not None:
            pairs.append(("classifies", f"{self.classifier.config.num_classes} classes"))
        if self.image_size is not None:
            pairs.append(("images", f"{self.image_size} x {self.image_size} pixels"))
        return pairs

    def __str__(self) -> str:
        """A summary of at most twelve lines."""
        lines = [f"Model {self.name!r}", *(f"  {name}: {text}" for name, text in self.summary())]
        return "\n".join([*lines, *(f"  {line}" for line in self.assumed_lines())])

    __repr__ = __str__

    def assumed_lines(self, *, flags: bool = False) -> list[str]:
        """Lines about the files that a command should print before sampling.

        One line lists the assumptions, one says that their sampler is not supported, one that some
        parts have no variant. flags: name options as on the command line instead of as in Python.
        """
        lines = []
        if self.assumed:
            guesses = self.provenance.get("undecided", {})
            write = _as_flag if flags else _as_argument
            facts = ", ".join(
                write(name, value, guesses.get(name)) for name, value in self.assumed.items()
            )
            lines.append(f"assumed: {facts} (the files do not say; give what is wrong yourself)")
        if (reason := self.provenance.get("no_sampler")) is not None:
            lines.append(f"sampler: not supported: {message_line(reason, 200)}")
        if plain := self.provenance.get("without variant"):
            lines.append(f"without variant: {', '.join(plain)}")
        return lines


def _as_argument(name: str, value: Any, choices: str | None) -> str:
    """An option of loading as in Python, with its alternatives."""
    return f"{name}={_short(value)}" + (f" (or {choices})" if choices else "")


def _as_flag(name: str, value: Any, choices: str | None) -> str:
    """An option of loading as on the command line, where a boolean is a flag without a value."""
    part, _, word = name.replace("_", "-").rpartition(" ")
    if part:
        return f"{part} {_as_flag(word, value, choices)}"
    if isinstance(value, bool):
        on, off = f"--{word}", f"--no-{word}"
        flag, other = (on, off) if value else (off, on)
        return flag + (f" (or {other})" if choices else "")
    return f"--{word} {_short(value)}" + (f" (or {choices})" if choices else "")


def _short(value: Any) -> str:
    if isinstance(value, ScheduleConfig):
        return f"{value.kind} ({value.beta_start:g} to {value.beta_end:g}, {value.num_timesteps})"
    return str(value)


def image_channels(denoiser: Network | None, autoencoder: Autoencoder | None) -> int | None:
    """Channels of the images that these parts make."""
    if autoencoder is not None:
        return autoencoder.config.image_channels
    if denoiser is None:
        return None
    return denoiser.config.out_channels // (2 if denoiser.config.learned_sigma else 1)


def check_one_stage(model: Model) -> None:
    """Raise ValueError if a model has stages besides its denoiser, which no layout can write."""
    names = ("prior", "projection", "image_noise", "image_encoder", "upsamplers")
    if there := [name for name in names if getattr(model, name)]:
        raise ValueError(
            f"{model.name} has further networks ({', '.join(there)}), which fastdiff cannot write; "
            "copy the folder that it was read from"
        )
    if model.picture_noise is not None:
        raise ValueError(
            f"{model.name} reads a noised picture, whose noise levels fastdiff cannot write; copy "
            "the folder that it was read from"
        )


def _encoder_facts(encoder: AnyEncoder) -> list[Any]:
    if not isinstance(encoder, TextEncoder):
        return encoder.facts
    facts = [getattr(encoder.model.config, name) for name in ENCODER_FACTS]
    return [*facts, encoder.skip, encoder.final_norm]


def _stage_facts(stage: Model) -> list[Any]:
    """What decides the results of a prior or an upsampler besides its weights. The sampler is among
    it, because no recipe names it."""
    assert stage.denoiser is not None
    parts = stage.denoiser.config, stage.schedule, stage.sampler
    return [*(None if part is None else to_dict(part) for part in parts), stage.prediction]


def _hash(model: Model) -> str:
    denoiser, autoencoder = model.denoiser, model.autoencoder
    configs = [to_dict(part.config) for part in (denoiser, autoencoder) if part is not None]
    facts: dict[str, Any] = {
        "configs": configs,
        "schedule": None if model.schedule is None else to_dict(model.schedule),
        "prediction": model.prediction,
        "scale_factor": model.scale_factor,
        "encoders": [
            [*_encoder_facts(encoder), encoder.tokenizer.get_vocab() if encoder.tokenizer else None]
            for encoder in model.text_encoders
        ],
    }
    if model.extra is not None:
        facts["extra"] = model.extra
    if model.classifier is not None:
        facts["classifier"] = to_dict(model.classifier.config)
    if model.controlnets:
        facts["controlnets"] = [to_dict(net.config) for net in model.controlnets]
    if model.image_encoder is not None:
        facts["image encoder"] = model.image_encoder.facts
    if model.image_noise_schedule is not None:
        facts["image noise"] = to_dict(model.image_noise_schedule)
    if model.picture_noise is not None:
        facts["picture noise"] = to_dict(model.picture_noise)
    if stages := [stage for stage in (model.prior, *model.upsamplers) if stage is not None]:
        facts["stages"] = [_stage_facts(stage) for stage in stages]
    if denoiser is not None and (kind := kind_of(denoiser.config)) != "unet":
        facts["kind"] = kind
    # With a denoiser in fp16 the autoencoder computes in fp32.
    wide = denoiser is not None and next(denoiser.parameters()).dtype == torch.float16
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for module in model.modules.values():
        for name, value in sorted(module.state_dict().items()):
            widened = module is autoencoder and wide and value.is_floating_point()
            tensor = value.float() if widened else value
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            numbers = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(numbers.view(torch.uint8).numpy())
    return digest.hexdigest()
