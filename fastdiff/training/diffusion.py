"""Second stage, the denoiser: the complete config of a run (Rombach et al. 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_args

from fastdiff.configs import from_dict, to_dict
from fastdiff.data import DataConfig
from fastdiff.data.config import CAPTIONED_SOURCES
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.schedules import ScheduleConfig, check_flow
from fastdiff.models.network import NetworkConfig, kind_of, network_family
from fastdiff.names import Extra, Prediction
from fastdiff.training.concat import ConcatConfig, check_concat
from fastdiff.training.config import OptimizationConfig, OutputConfig
from fastdiff.training.objective import DenoiserLossConfig
from fastdiff.training.text import TextConfig, check_text

OLDEST_KIND = "unet"
"""The kind of denoiser in a config.json without "network", written when there was only one kind."""
NetworkConfigT = TypeVar("NetworkConfigT", bound=NetworkConfig)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """How to make sample sheets during training."""

    count: int = 40
    """Images per sheet, with seeds 0, 1, 2, ..., cycling through the classes."""

    sampler: str = "ddim"
    """Name of a sampler; `fastdiff samplers` lists them."""

    steps: int = 50
    """Sampling steps."""

    guidance_scale: float = 1.0
    """Classifier-free guidance scale, also the default of the trained model; 1: no guidance."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1:
            raise ValueError(
                f"preview count and steps must be at least 1, got {self.count} and {self.steps}"
            )
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"unknown sampler {self.sampler!r}; expected one of {', '.join(SAMPLERS)}"
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionRun(Generic[NetworkConfigT]):
    """Everything that determines the training of a denoiser."""

    model: NetworkConfigT
    """The denoiser: the config of any family in `fastdiff.models.network.NETWORKS`."""

    optimization: OptimizationConfig
    """Steps, learning rate, precision."""

    output: OutputConfig
    """The run folder, and how often to write to it."""

    autoencoder: str = ""
    """Bundle or run folder of the trained first stage; leave it empty to train on pixels."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Noise schedule."""

    prediction: Prediction = "eps"
    """What the network returns: eps, v, x0, or flow with a schedule of kind flow."""

    loss: DenoiserLossConfig = field(default_factory=DenoiserLossConfig)
    """Noise levels and weights in the loss."""

    low_resolution: int = 0
    """k > 0: train an upsampler, which also sees the image reduced to k x k pixels and enlarged
    again (Nichol and Dhariwal 2021, section 4), with twice the in_channels. On latents k is their
    side, and the small image joins them as it is (Rombach et al. 2022, section 4.4). 0: no
    upsampler."""

    concat: ConcatConfig = field(default_factory=ConcatConfig)
    """A picture that the denoiser reads behind x: an image to inpaint, or a sketch (Rombach et al.
    2022, section 3.3)."""

    class_dropout: float = 0.1
    """Fraction of labels replaced by "no class", and of captions replaced by an empty one, for
    classifier-free guidance."""

    text: TextConfig = field(default_factory=TextConfig)
    """A text transformer that is trained with the denoiser on captions."""

    latent_views: int = 0
    """0: encode each batch when it is needed. k > 0: encode k augmented views of every image before
    the first step and cycle through them, which is faster; the posterior noise is still drawn for
    every step."""

    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Sample sheets."""

    init_from: str = ""
    """A trained model whose denoiser's weights the run starts from: a bundle, a run's folder or any
    other checkpoint of the same architecture; empty: random weights. Moments and averages
    start afresh."""

    seed: int = 0
    """Determines all randomness of the run."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda if available."""

    def __post_init__(self) -> None:
        if not network_family(self.kind).network.denoises:
            raise ValueError(
                f"a network of kind {self.kind!r} does not denoise; train it with "
                f"'fastdiff train {self.kind}'"
            )
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout must be in [0, 1], got {self.class_dropout}")
        if self.model.num_classes is not None and self.class_dropout and not self.model.null_class:
            raise ValueError(
                f"class_dropout {self.class_dropout} needs a model with null_class=True, got "
                "False; set null_class=True or class_dropout=0"
            )
        if self.latent_views < 0 or (self.latent_views and not self.autoencoder):
            raise ValueError(
                "latent_views must be 0 or more, and 0 when training on pixels, got "
                f"{self.latent_views}"
            )
        side = self.data.image_size
        if self.low_resolution and not 0 < self.low_resolution < side:
            raise ValueError(
                f"low_resolution must be from 1 to {side - 1}, below image_size, or 0, got "
                f"{self.low_resolution}"
            )
        check_concat(self.concat, self.data, self.low_resolution)
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction must be eps, v, x0 or flow, got {self.prediction!r}")
        check_flow(self.schedule.kind, self.prediction)
        if self.prediction == "flow" and self.loss.timesteps == "second-moment":
            raise ValueError(
                "loss timesteps 'second-moment' needs a schedule with betas, got 'flow'; use "
                "'logit-normal' (Stable Diffusion 3)"
            )
        if self.prediction == "flow" and self.model.learned_sigma:
            raise ValueError(
                "a model with learned_sigma needs a schedule with betas, got 'flow'; set "
                "learned_sigma=False and as many out_channels as in_channels"
            )
        if self.model.learned_sigma and self.loss.timesteps == "logit-normal":
            raise ValueError(
                "a model with learned_sigma needs integer timesteps, got timesteps "
                "'logit-normal'; use 'uniform' or 'stratified'"
            )
        if self.loss.weighting == "bound" and not self.model.learned_sigma:
            raise ValueError(
                "loss weighting 'bound' trains prediction and variance by the bound and needs a "
                "model with learned_sigma=True; set it and twice the out_channels, or use 'simple'"
            )
        check_text(self.text, self.model, self.data.source, CAPTIONED_SOURCES)
        if self.text.layers and not self.autoencoder:
            raise ValueError(
                "text is trained on latents; set autoencoder to the run of a first stage"
            )
        if self.text.layers and self.init_from:
            raise ValueError(
                "init_from starts from a denoiser, and text needs its text encoder too; leave "
                "init_from out"
            )

    @property
    def kind(self) -> str:
        """The denoiser's family, such as "unet": `network` in config.json."""
        return kind_of(self.model)

    @property
    def extra(self) -> Extra | None:
        """What the denoiser reads behind x; None for nothing, and for upsamplers of pixels, which
        their number of channels tells."""
        if self.low_resolution:
            return "upsampler" if self.autoencoder else None
        return None if self.concat.kind == "none" else self.concat.kind

    def to_json(self) -> dict[str, Any]:
        """Contents of config.json: the fields, and the kind of denoiser under "network"."""
        return {"network": self.kind, **to_dict(self)}

    @classmethod
    def from_json(cls, data: Any) -> DiffusionRun[Any]:
        """Inverse of `to_json`. Fields missing in configs of older versions get their defaults.

        Raises:
            ValueError: the kind is unknown, or a field is unknown, missing or wrong.
        """
        kind = OLDEST_KIND
        if isinstance(data, Mapping):
            data = dict(data)
            kind = data.pop("network", OLDEST_KIND)
        if not isinstance(kind, str):
            raise ValueError(f"DiffusionRun: network: expected str, got {kind!r:.60}")
        return from_dict(cls[network_family(kind).config], data)  # type: ignore[index]
