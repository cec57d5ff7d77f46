"""Second stage: the denoiser, on latents of a trained autoencoder or on pixels.

Rombach et al. 2022 (arXiv 2112.10752), section 3.2: the simple loss of DDPM (eq. 14) on latents
that are scaled to unit variance by the first batch's standard deviation (appendix G).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.checkpoint.model import RUN_MODEL, Model
from fastdiff.data import DataConfig, generator, open_dataset
from fastdiff.diffusion.losses import min_snr_weight, simple_loss, variational_bound
from fastdiff.diffusion.predictions import Prediction, target, to_denoised
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder, Posterior
from fastdiff.models.network import Network
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.training.batches import Batches, check_model_fits
from fastdiff.training.config import OptimizationConfig, OutputConfig
from fastdiff.training.precision import check_precision, resolve_device
from fastdiff.training.provenance import EXPORT_DTYPES, provenance
from fastdiff.training.trainer import Batch, fit, open_run, tile

_PIXEL_CLAMP = 1.0
_ENCODED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class DenoiserLossConfig:
    """Which noise levels are trained on, and how each counts."""

    weighting: Literal["simple", "min-snr"] = "simple"
    """simple: DDPM eq. 14; min-snr: Hang et al. 2023 (arXiv 2303.09556)."""

    min_snr_gamma: float = 5.0
    """The signal-to-noise ratio above which min-snr stops growing."""

    timesteps: Literal["uniform", "stratified", "logit-normal"] = "uniform"
    """uniform: DDPM; stratified: also uniform, spread evenly over each batch (Kingma et al. 2021,
    appendix I.1), which makes the gradient less noisy; logit-normal: sigmoid of a normal number
    (Esser et al. 2024, section 3.1), more weight on the middle."""

    logit_mean: float = 0.0
    """Mean of the normal number of logit-normal."""

    logit_std: float = 1.0
    """Standard deviation of the normal number of logit-normal."""

    bound_weight: float = 1e-3
    """Weight of the variational bound for models with learned variance (IDDPM eq. 16)."""

    bin_width: float = 2 / 255
    """Distance of two grey levels in [-1, 1], for that bound; the digits have 17 levels: 0.125."""

    def __post_init__(self) -> None:
        if self.weighting not in ("simple", "min-snr"):
            raise ValueError(f"weighting must be simple or min-snr, got {self.weighting!r}")
        if self.timesteps not in ("uniform", "stratified", "logit-normal"):
            raise ValueError(
                f"timesteps must be uniform, stratified or logit-normal, got {self.timesteps!r}"
            )
        for name in ("min_snr_gamma", "logit_std", "bin_width"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not (math.isfinite(self.bound_weight) and self.bound_weight >= 0):
            raise ValueError(f"bound_weight must be 0 or more, got {self.bound_weight}")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """How the sheets of samples are made while training."""

    count: int = 40
    """Images per sheet; seeds 0, 1, 2 and so on, classes in turn."""

    sampler: str = "ddim"
    """A sampler's name, see `fastdiff samplers`."""

    steps: int = 50
    """Sampling steps."""

    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1:
            raise ValueError(
                f"preview count and steps must be at least 1, got {self.count} and {self.steps}"
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionRun:
    """Everything that decides a denoiser's training."""

    model: UNetConfig
    """The denoiser."""

    optimization: OptimizationConfig
    """Steps, rates, precision."""

    output: OutputConfig
    """The run's folder and how often it is written to."""

    autoencoder: str = ""
    """Bundle folder of the trained first stage, or its run's folder; empty to train on pixels."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The noise."""

    prediction: Prediction = "eps"
    """What the network returns: eps, v or x0."""

    loss: DenoiserLossConfig = field(default_factory=DenoiserLossConfig)
    """Noise levels and weights of the loss."""

    class_dropout: float = 0.1
    """Share of labels replaced by "no class", for classifier-free guidance."""

    latent_views: int = 0
    """0 encodes each batch anew. k > 0 encodes k augmented views of every image once, before the
    first step, and cycles through them: faster, and the posterior noise is still fresh."""

    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """The sheets of samples."""

    seed: int = 0
    """All randomness of the run follows from it."""

    device: str = "auto"
    """cpu, cuda, or auto for cuda where there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout must be 0 to 1, got {self.class_dropout}")
        if self.model.num_classes is not None and self.class_dropout and not self.model.null_class:
            raise ValueError(
                "class_dropout needs a model with null_class=True; set it, or class_dropout=0"
            )
        if self.latent_views < 0 or (self.latent_views and not self.autoencoder):
            raise ValueError(
                f"latent_views must be 0 or more, and 0 on pixels, got {self.latent_views}"
            )
        if self.prediction not in ("eps", "v", "x0"):
            raise ValueError(f"prediction must be eps, v or x0, got {self.prediction!r}")
        if self.model.learned_sigma and self.loss.timesteps == "logit-normal":
            raise ValueError(
                "the bound of a learned variance needs whole timesteps, got timesteps "
                "'logit-normal'; use 'uniform' or 'stratified'"
            )
        if self.model.context_dim is not None or self.model.added_condition_dim is not None:
            raise ValueError(
                "training conditions on classes or on nothing, this model wants context or an "
                "added vector; choose a model without context_dim and added_condition_dim"
            )


def train_diffusion(run: DiffusionRun, *, resume: bool = False) -> Path:
    """Train the denoiser of a run; see `fastdiff.training.trainer.fit`."""
    check_precision(run.optimization.precision, resolve_device(run.device))
    task = DiffusionTask(run)
    open_run(run, resume=resume)
    return fit(task, run, resume=resume)


class DiffusionTask:
    """The denoiser's networks, batches and losses (a `trainer.Task`)."""

    averaged = "unet"

    def __init__(self, run: DiffusionRun) -> None:
        self.run = run
        self.device = resolve_device(run.device)
        self.bundle = _first_stage(run, self.device)
        self.autoencoder: Autoencoder | None = self.bundle.autoencoder if self.bundle else None
        dataset = open_dataset(run.data)
        check_model_fits(
            dataset,
            run.data,
            channels=_image_channels(run, self.autoencoder),
            what="denoiser" if self.autoencoder is None else "autoencoder",
        )
        self.classes = dataset.classes
        _check_conditioning(run, dataset.classes, self.autoencoder)
        self.batches = Batches(
            dataset, run.data, run.optimization.batch_size, seed=run.seed, device=self.device
        )
        self.schedule = NoiseSchedule(run.schedule)
        torch.manual_seed(generator(run.seed, "weights").initial_seed())
        self.unet = UNet(run.model).to(self.device)
        self.unet.gradient_checkpointing = run.optimization.gradient_checkpointing
        if run.optimization.channels_last:
            self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: dict[str, nn.Module] = {"unet": self.unet}
        self._views: Tensor | None = None
        self.scale_factor = 1.0
        if self.autoencoder is not None:
            self._views = self._encode_views() if run.latent_views else None
            self.scale_factor = 1 / float(self.latents(0)[0].double().std())

    def batch(self, step: int) -> Batch:
        """x0 (N, C, h, w), scaled; noise like it; t (N,); y (N,) where the model has classes."""
        run = self.run
        x0, labels = self.latents(step)
        x0 = x0 * self.scale_factor
        source = generator(run.seed, "noise", step, device=self.device)
        noise = torch.randn(x0.shape, generator=source, device=self.device)
        batch = {"x0": x0, "noise": noise, "t": self.timesteps(step)}
        if run.model.num_classes is not None:
            source = generator(run.seed, "class-dropout", step)
            dropped = torch.rand(len(labels), generator=source).to(self.device) < run.class_dropout
            batch["y"] = torch.where(dropped, run.model.num_classes, labels)
        return batch

    def losses(self, part: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted simple loss, plus the variational bound where the variance is learned."""
        run, schedule = self.run, self.schedule
        x0, noise, t = part["x0"], part["noise"], part["t"]
        x = schedule.add_noise(x0, noise, t)
        if run.optimization.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        output = self.unet(x, t, y=part.get("y"))
        variance: Tensor | None = None
        if run.model.learned_sigma:
            output, variance = output.chunk(2, dim=1)
        wanted = target(run.prediction, x0, noise, schedule.alpha(t), schedule.sigma(t))
        weight = None
        if run.loss.weighting == "min-snr":
            snr = schedule.snr(t)
            weight = min_snr_weight(snr, run.prediction, gamma=run.loss.min_snr_gamma)
        loss = simple_loss(output, wanted, weight)
        if variance is not None and run.loss.bound_weight:
            loss = loss + run.loss.bound_weight * self._bound(part, x, output, variance)
        return {"unet": loss}, {}

    def timesteps(self, step: int) -> Tensor:
        """The batch's timesteps (N,): int64, or real for logit-normal."""
        config, total = self.run.loss, self.schedule.num_timesteps
        count = self.run.optimization.batch_size
        source = generator(self.run.seed, "timesteps", step)
        if config.timesteps == "logit-normal":
            normal = torch.randn(count, generator=source, dtype=torch.float64)
            t = torch.sigmoid(config.logit_mean + config.logit_std * normal) * (total - 1)
        elif config.timesteps == "stratified":
            # one offset for all: element i of N gets i/N + u, so every t is equally likely
            offset = torch.rand((), generator=source, dtype=torch.float64)
            strata = torch.randperm(count, generator=source) / count
            t = (((offset + strata.double()) % 1) * total).long().clamp(max=total - 1)
        else:
            t = torch.randint(total, (count,), generator=source)
        return t.to(self.device)

    @torch.no_grad()
    def latents(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch the denoiser works on before scaling (pixels or latents), and its labels."""
        if self.autoencoder is None:
            return self.batches.images(step)
        if self._views is not None:
            moments, labels = self._from_views(step)
        else:
            images, labels = self.batches.images(step)
            moments = self._moments(images)
        if self.autoencoder.config.regularization == "vq":
            return moments, labels
        mean, std = moments.chunk(2, dim=1)
        source = generator(self.run.seed, "posterior", step, device=self.device)
        return mean + std * torch.randn(mean.shape, generator=source, device=self.device), labels

    def preview(self, network: nn.Module) -> Tensor:
        """A sheet of samples, classes in turn, from the averaged weights."""
        config = self.run.preview
        seeds = torch.arange(config.count, device=self.device)
        labels = self._preview_labels(config.count)
        columns = self.run.model.num_classes or 0
        if not 0 < columns <= config.count:  # no classes, or more than images
            columns = math.ceil(math.sqrt(config.count))
        return tile(self.sample(network, seeds, labels), columns=columns)

    @torch.no_grad()
    def sample(self, network: nn.Module, seeds: Tensor, labels: Tensor | None) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] with the preview's sampler; a function of the seeds."""
        run, config = self.run, self.run.preview
        guidance = config.guidance_scale if labels is not None and run.model.null_class else 1.0
        table = build_table(
            config.sampler,
            self.schedule,
            config.steps,
            prediction=run.prediction,
            guidance_scale=guidance,
            clamp=_PIXEL_CLAMP if self.autoencoder is None else None,
        )
        null = None if labels is None else torch.full_like(labels, run.model.num_classes or 0)

        timesteps = table.timesteps.tolist()

        def predict(x: Tensor, row: int) -> Tensor:
            y = labels
            if table.guided[row]:
                assert labels is not None
                assert null is not None
                x, y = torch.cat([x, x]), torch.cat([null, labels])
            t = torch.full((len(x),), timesteps[row], device=x.device)
            return network(x, t, y=y).float()

        z = sample(predict, table, self._latent_shape(), seeds)
        if self.autoencoder is None:
            return z.clamp(-1, 1)
        return self.autoencoder.decode(z / self.scale_factor).clamp(-1, 1)

    def export(self, network: nn.Module, step: int) -> None:
        """Write model/: the averaged denoiser, and the first stage it was trained on."""
        run, bundle = self.run, self.bundle
        assert isinstance(network, Network)
        model = Model(
            layout="bundle",
            image_size=run.data.image_size,
            image_channels=run.data.channels,
            autoencoder=self.autoencoder,
            denoiser=network,
            schedule=run.schedule,
            prediction=run.prediction,
            scale_factor=self.scale_factor,
            class_names=self.classes if run.model.num_classes is not None else (),
        )
        facts = provenance(run, step)
        if bundle is not None:
            facts |= {
                "autoencoder": bundle.provenance["facts"],
                "autoencoder_hash": bundle.weights_hash,
            }
        save_bundle(
            model,
            Path(run.output.folder) / RUN_MODEL,
            dtype=EXPORT_DTYPES[run.output.export_dtype],
            provenance=facts,
        )

    def state(self) -> dict[str, Any]:
        """The scale factor, and which first stage and images it belongs to."""
        first_stage = {"scale_factor": self.scale_factor, "autoencoder": self._first_stage_hash()}
        return first_stage | self.batches.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the scale factor; the first stage and the images must be the same ones."""
        self.batches.check_state(state)
        if state["autoencoder"] != self._first_stage_hash():
            raise ValueError(
                f"the autoencoder in {self.run.autoencoder} has changed since this run was "
                "started; put the old one back, or train the denoiser in a new folder"
            )
        self.scale_factor = state["scale_factor"]

    def _first_stage_hash(self) -> str:
        return self.bundle.weights_hash if self.bundle else ""

    def _moments(self, images: Tensor) -> Tensor:
        """Latents before quantisation (vq), or the posterior's [mean | std] in channels (kl)."""
        assert self.autoencoder is not None
        if self.autoencoder.config.regularization == "vq":
            return self.autoencoder.encode_latent(images)
        posterior = self.autoencoder.encode(images)
        assert isinstance(posterior, Posterior)
        return torch.cat([posterior.mean, torch.exp(0.5 * posterior.logvar)], dim=1)

    def _encode_views(self) -> Tensor:
        """Moments of `latent_views` augmented views of every image: (views, images, C, h, w)."""
        dataset, views = self.batches.dataset, self.run.latent_views
        rows: list[Tensor] = []
        with torch.no_grad():
            for view in range(views):
                for indices in torch.arange(len(dataset)).split(_ENCODED_AT_ONCE):
                    images = self.batches.augmented(indices, torch.full_like(indices, view))
                    rows.append(self._moments(images))
        return torch.cat(rows).unflatten(0, (views, len(dataset)))

    def _from_views(self, step: int) -> tuple[Tensor, Tensor]:
        assert self._views is not None
        indices, epochs = self.batches.order.batch(step)
        moments = self._views[(epochs % len(self._views)).to(self.device), indices.to(self.device)]
        return moments, self.batches.dataset.labels[indices].to(self.device)

    def _bound(self, part: Batch, x: Tensor, output: Tensor, variance: Tensor) -> Tensor:
        """L_vlb over all timesteps; the mean is detached: only the variance learns from it."""
        t, schedule = part["t"], self.schedule
        levels = [
            to_denoised(float(a), float(s), self.run.prediction)
            for a, s in zip(schedule.alpha(t), schedule.sigma(t), strict=True)
        ]
        u, v = torch.tensor(levels, dtype=x.dtype, device=x.device).T[:, :, None, None, None]
        denoised = u * x + v * output.detach().to(x.dtype)
        bits = variational_bound(
            schedule,
            part["x0"],
            x,
            denoised,
            variance.float(),
            t,
            bin_width=self.run.loss.bin_width,
        )
        return schedule.num_timesteps * bits.mean()

    def _preview_labels(self, count: int) -> Tensor | None:
        classes = self.run.model.num_classes
        return None if classes is None else torch.arange(count, device=self.device) % classes

    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.run.data.image_size
        if self.autoencoder is not None:
            side //= self.autoencoder.downsample_factor
        return (self.run.model.in_channels, side, side)


def _first_stage(run: DiffusionRun, device: torch.device) -> Model | None:
    if not run.autoencoder:
        return None
    bundle = load_bundle(run.autoencoder, device=device)
    if bundle.autoencoder is None:
        raise ValueError(
            f"{run.autoencoder} holds no autoencoder; give the folder of an autoencoder's run"
        )
    if bundle.image_size != run.data.image_size:
        raise ValueError(
            f"the autoencoder was trained at {bundle.image_size} pixels, the data has "
            f"{run.data.image_size}; set data image_size to {bundle.image_size}"
        )
    return bundle


def _image_channels(run: DiffusionRun, autoencoder: Autoencoder | None) -> int:
    return run.model.in_channels if autoencoder is None else autoencoder.config.image_channels


def _check_conditioning(
    run: DiffusionRun, classes: tuple[str, ...], autoencoder: Autoencoder | None
) -> None:
    """Raise ValueError where data, first stage and denoiser do not fit together."""
    model, wanted = run.model, run.model.num_classes
    if wanted is not None and wanted != len(classes):
        raise ValueError(
            f"the denoiser has {wanted} classes, the data has {len(classes)}; "
            f"set model num_classes to {len(classes) or None}"
        )
    if autoencoder is not None and autoencoder.config.latent_channels != model.in_channels:
        raise ValueError(
            f"the autoencoder's latents have {autoencoder.config.latent_channels} channels, the "
            f"denoiser takes {model.in_channels}; set model in_channels and out_channels to match"
        )
    wanted_out = model.in_channels * (2 if model.learned_sigma else 1)
    if model.out_channels != wanted_out:
        raise ValueError(
            f"the denoiser must return {wanted_out} channels, got out_channels={model.out_channels}"
        )
    factor = 1 if autoencoder is None else autoencoder.downsample_factor
    step = factor * model.downsample_factor
    if run.data.image_size % step:
        raise ValueError(
            f"image_size must be a multiple of {step} for these models, got {run.data.image_size}"
        )
