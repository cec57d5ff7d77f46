"""First stage: the autoencoder, trained to reconstruct images and to make them look real.

Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G; the adversarial loss is that of
VQGAN, Esser et al. 2021 (arXiv 2012.09841), equations 5 to 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import RUN_MODEL, Model
from fastdiff.configs import from_dict, to_dict
from fastdiff.data import DataConfig, generator, open_dataset
from fastdiff.images import contact_sheet
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig, Posterior, Quantized
from fastdiff.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from fastdiff.models.perceptual import LPIPS, LocalFeatureLoss
from fastdiff.training.batches import Batches, check_model_fits, drawn
from fastdiff.training.config import OptimizationConfig, OutputConfig
from fastdiff.training.memory import check_training, training_bytes
from fastdiff.training.precision import check_precision, resolve_device
from fastdiff.training.provenance import EXPORT_DTYPES, provenance
from fastdiff.training.ranks import data_parallel
from fastdiff.training.start import origin, take_weights
from fastdiff.training.trainer import PREVIEW_CELL, Batch, train

_PREVIEWED, _COLUMNS = 32, 8
_MAX_ADAPTIVE_WEIGHT = 1e4
_HALF_PRECISION_SCALE = 1024.0  # keeps the fp16 gradients that are balanced from underflowing


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """Weights of the first stage's losses, all relative to the L1 distance per pixel."""

    perceptual_weight: float = 1.0
    """Weight of the perceptual distance."""

    lpips: tuple[str, ...] = ()
    """Files with LPIPS weights (VGG16 and the linear layers); without them the perceptual distance
    is `fastdiff.models.perceptual.LocalFeatureLoss`."""

    kl_weight: float = 1e-6
    """Weight of the KL divergence, divided by the number of pixel values (kl models); LDM uses
    1e-6."""

    codebook_weight: float = 1.0
    """Weight of the codebook loss (vq models)."""

    commitment: float = 0.25
    """Weight beta of the commitment term in the codebook loss."""

    adversarial_weight: float = 0.5
    """Weight of the adversarial loss after balancing; 0: no discriminator."""

    adversarial_start: int = 50_000
    """Step at which the discriminator is first used; starting earlier only hurts."""

    def __post_init__(self) -> None:
        for name in (
            "perceptual_weight",
            "kl_weight",
            "codebook_weight",
            "commitment",
            "adversarial_weight",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.adversarial_start < 0:
            raise ValueError(f"adversarial_start must be 0 or more, got {self.adversarial_start}")


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun:
    """Everything that determines the training of an autoencoder."""

    model: AutoencoderConfig
    """The autoencoder."""

    optimization: OptimizationConfig
    """Steps, learning rate, precision; the discriminator uses the same ones."""

    output: OutputConfig
    """The run folder, and how often to write to it."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""

    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The patch discriminator; unused with adversarial_weight 0."""

    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    """The weights of the losses."""

    init_from: str = ""
    """A trained model whose autoencoder's weights the run starts from: a bundle, a run's folder or
    any other checkpoint of the same architecture; empty: random weights. Moments and averages
    start afresh."""

    seed: int = 0
    """Determines all randomness of the run."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda if available."""

    def __post_init__(self) -> None:
        if self.loss.adversarial_weight:
            expected, got = self.model.image_channels, self.discriminator.image_channels
            if expected != got:
                raise ValueError(
                    f"the discriminator must take the autoencoder's {expected} image channels, "
                    f"got {got}; set discriminator image_channels to {expected}"
                )

    def to_json(self) -> dict[str, Any]:
        """Contents of config.json."""
        return to_dict(self)

    @classmethod
    def from_json(cls, data: Any) -> AutoencoderRun:
        """Inverse of `to_json`. Fields missing in configs of older versions get their defaults.

        Raises:
            ValueError: a field is unknown, missing or wrong.
        """
        return from_dict(cls, data)


@data_parallel
def train_autoencoder(run: AutoencoderRun, *, resume: bool = False) -> Path:
    """Train the autoencoder of a run; see `fastdiff.training.trainer.train`."""
    check_precision(run.optimization.precision, resolve_device(run.device))
    task = AutoencoderTask(run)
    check_training(task.needed_bytes(), run.output.folder, task.device)
    if run.init_from and not resume:
        task.start_from(run.init_from)
    return train(task, run, resume=resume)


class AutoencoderTask:
    """The first stage's networks, batches and losses (a `trainer.Task`)."""

    averaged = "autoencoder"

    def __init__(self, run: AutoencoderRun) -> None:
        self.run = run
        self.device = resolve_device(run.device)
        dataset = open_dataset(run.data)
        check_model_fits(run.data, channels=run.model.image_channels, what="autoencoder")
        factor = run.model.downsample_factor
        if run.data.image_size % factor:
            raise ValueError(
                f"image_size must be a multiple of {factor} for this autoencoder, "
                f"got {run.data.image_size}"
            )
        self.classes = dataset.classes
        self.batches = Batches(
            dataset, run.data, run.optimization.batch_size, seed=run.seed, device=self.device
        )
        torch.manual_seed(generator(run.seed, "weights").initial_seed())
        self.autoencoder = Autoencoder(run.model).to(self.device)
        checkpointing = run.optimization.gradient_checkpointing
        self.autoencoder.encoder.gradient_checkpointing = checkpointing
        self.autoencoder.decoder.gradient_checkpointing = checkpointing
        self.networks: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        if run.loss.adversarial_weight:
            self.networks["discriminator"] = PatchDiscriminator(run.discriminator).to(self.device)
        if run.optimization.channels_last:
            for network in self.networks.values():
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.perceptual = perceptual_distance(run.loss).to(self.device)
        self.origin: dict[str, str] | None = None

    def start_from(self, place: str) -> None:
        """Initialize the weights from a trained model; see `fastdiff.training.start`.

        A discriminator still starts from random weights.
        """
        self.origin = origin(take_weights(self.autoencoder, "autoencoder", place, self.device))

    def needed_bytes(self) -> int:
        """Memory that training takes, in bytes; see `fastdiff.training.memory`.

        The feature maps of the losses are not counted, only the discriminator's weights.
        """
        run, others = self.run, self.networks.get("discriminator")
        side = run.data.image_size // run.model.downsample_factor

        def forward(network: Any, rows: int) -> Any:
            shape = (rows, run.model.image_channels, run.data.image_size, run.data.image_size)
            noise = torch.empty(rows, run.model.latent_channels, side, side, device="meta")
            return network(torch.empty(shape, device="meta"), noise)

        return training_bytes(
            run.model,
            run.optimization,
            run.data,
            forward,
            others=0 if others is None else sum(p.numel() for p in others.parameters()),
            device=self.device,
        )

    def batch(self, step: int, rows: Tensor | None = None) -> Batch:
        """Images (N, C, H, W) in [-1, 1], and noise (N, z, h, w) to sample the posterior."""
        images, _ = self.batches.images(step, rows)
        model = self.run.model
        side = self.run.data.image_size // model.downsample_factor
        shape = (len(images), model.latent_channels, side, side)
        source = generator(self.run.seed, "posterior", step, device=self.device)
        noise = drawn(shape, self.run.optimization.batch_size, source, rows)
        return {"images": images, "noise": noise}

    def losses(self, part: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Reconstruction, regularisation and, once it has started, adversarial losses."""
        config, images = self.run.loss, part["images"]
        if self.run.optimization.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        reconstruction, latent = self.autoencoder(images, part["noise"])
        reconstruction = reconstruction.float()
        distance = F.l1_loss(reconstruction, images)
        perceptual = self.perceptual(reconstruction, images).mean()
        restored = distance + config.perceptual_weight * perceptual
        regularization, scalars = regularization_loss(latent, images[0].numel(), config)
        scalars |= {"l1": distance, "perceptual": perceptual}
        losses = {"autoencoder": restored + regularization}
        discriminator = self.networks.get("discriminator")
        if discriminator is not None and step >= config.adversarial_start:
            verdict = -discriminator(reconstruction).float().mean()
            weight = config.adversarial_weight * adaptive_weight(
                restored, verdict, self.autoencoder.last_layer, scale=self._gradient_scale
            )
            losses["autoencoder"] = losses["autoencoder"] + weight * verdict
            real = discriminator(images).float()
            fake = discriminator(reconstruction.detach()).float()
            losses["discriminator"] = hinge_loss(real, fake)
            scalars |= {
                "adversarial_weight": weight,
                "logits/real": real.mean(),
                "logits/fake": fake.mean(),
            }
        return losses, scalars

    @property
    def _gradient_scale(self) -> float:
        return _HALF_PRECISION_SCALE if self.run.optimization.precision == "fp16" else 1.0

    @torch.no_grad()
    def preview(self, network: nn.Module, step: int) -> Image.Image:
        """A labelled sheet of pairs: images in a row, their reconstructions in the row below."""
        images = self.batches.fixed(_PREVIEWED)
        restored = network(images)[0].clamp(-1, 1)
        # an uneven last row would shift its reconstructions
        columns = _COLUMNS if len(images) % _COLUMNS == 0 else len(images)
        pairs = zip(images.split(columns), restored.split(columns), strict=True)
        rows = [row for pair in pairs for row in pair]
        return contact_sheet(
            torch.cat(rows).cpu(),
            ["original", "decoded"] * (len(rows) // 2),
            title=f"step {step:,}",
            caption="autoencoder, averaged weights",
            cell=PREVIEW_CELL,
        )

    def export(self, network: nn.Module, step: int) -> None:
        """Write model/: the averaged autoencoder."""
        run = self.run
        assert isinstance(network, Autoencoder)
        model = Model(
            layout="bundle",
            image_size=run.data.image_size,
            image_channels=run.model.image_channels,
            autoencoder=network,
            class_names=self.classes,
        )
        save_bundle(
            model,
            Path(run.output.folder) / RUN_MODEL,
            dtype=EXPORT_DTYPES[run.output.export_dtype],
            provenance=provenance(run, step, self.origin),
        )

    def state(self) -> dict[str, Any]:
        """Identity of the training images and of the initial weights."""
        began = {"init_from": self.origin} if self.origin else {}
        return {**self.batches.state(), **began}

    def tensors(self) -> dict[str, Tensor]:
        """Empty: the task has no state of its own."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Never called, since `tensors` is empty."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Check that the images are the same."""
        self.batches.check_state(state)
        self.origin = state.get("init_from")


def perceptual_distance(config: AutoencoderLossConfig) -> nn.Module:
    """LPIPS if the config names weights, else the local feature loss."""
    return LPIPS.from_files(*config.lpips) if config.lpips else LocalFeatureLoss()


def regularization_loss(
    latent: Posterior | Quantized, values: int, config: AutoencoderLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on the latents, and the scalars to log.

    LDM sums the distance over the pixel values of an image, while this trainer takes the mean. So
    the KL divergence is divided by their number, which keeps LDM's balance between the two.

    Args:
        latent: the output of the encoder.
        values: C * H * W of the image.
        config: the weights.
    """
    if isinstance(latent, Posterior):
        kl = latent.kl().mean()
        return config.kl_weight * kl / values, {"kl": kl}
    codebook = latent.loss(config.commitment)
    return config.codebook_weight * codebook, {"codebook": codebook, "usage": latent.usage()}


def adaptive_weight(
    restored: Tensor, verdict: Tensor, last_layer: Tensor, *, scale: float = 1.0
) -> Tensor:
    """|grad restored| / (|grad verdict| + 1e-4) at the decoder's last layer, at most 1e4.

    With this weight (Esser et al. 2021, eq. 7) both losses have equally large gradients at the
    layer that they share.

    Args:
        restored: (), the reconstruction loss.
        verdict: (), the adversarial loss.
        last_layer: the weight whose gradients are compared.
        scale: factor of both losses while the gradients are computed (fp16).

    Returns:
        (), detached.
    """
    (by_restored,) = torch.autograd.grad(restored * scale, last_layer, retain_graph=True)
    (by_verdict,) = torch.autograd.grad(verdict * scale, last_layer, retain_graph=True)
    ratio = by_restored.norm() / scale / (by_verdict.norm() / scale + 1e-4)
    return ratio.clamp(0.0, _MAX_ADAPTIVE_WEIGHT).detach()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: mean of max(0, 1 - real) / 2 + max(0, 1 + fake) / 2.

    Lim and Ye 2017. real, fake: logits of any shape. Returns ().
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
