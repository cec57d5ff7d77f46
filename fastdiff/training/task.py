"""Second stage: what the training loop asks of a denoiser (a `trainer.Task`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import RUN_MODEL, Model
from fastdiff.data import generator, open_dataset
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.kernels import INITIAL_NOISE, philox_normal
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.network import Network, network_family
from fastdiff.runtime import engine
from fastdiff.runtime.conditions import class_conditions
from fastdiff.runtime.engine import Request
from fastdiff.training.batches import Batches, check_model_fits
from fastdiff.training.diffusion import DiffusionRun
from fastdiff.training.latents import Latents, first_stage
from fastdiff.training.objective import Objective
from fastdiff.training.precision import check_precision, resolve_device
from fastdiff.training.provenance import EXPORT_DTYPES, provenance
from fastdiff.training.trainer import Batch, fit, open_run, tile

_PIXEL_CLAMP = 1.0


def train_diffusion(run: DiffusionRun[Any], *, resume: bool = False) -> Path:
    """Train the denoiser of a run; see `fastdiff.training.trainer.fit`."""
    check_precision(run.optimization.precision, resolve_device(run.device))
    task = DiffusionTask(run)
    open_run(run, resume=resume)
    return fit(task, run, resume=resume)


class DiffusionTask:
    """A denoiser, what it is trained on, and its objective (a `trainer.Task`)."""

    def __init__(self, run: DiffusionRun[Any]) -> None:
        self.run = run
        self.device = resolve_device(run.device)
        size = run.data.image_size
        self.bundle = (
            first_stage(run.autoencoder, image_size=size, device=self.device)
            if run.autoencoder
            else None
        )
        autoencoder = self.bundle.autoencoder if self.bundle else None
        dataset = open_dataset(run.data)
        self.classes = dataset.classes
        check_parts_fit(run, dataset.classes, autoencoder)
        self.batches = Batches(
            dataset, run.data, run.optimization.batch_size, seed=run.seed, device=self.device
        )
        schedule = NoiseSchedule(run.schedule)
        self.objective = Objective(
            config=run.loss,
            schedule=schedule,
            prediction=run.prediction,
            learned_sigma=run.model.learned_sigma,
        )
        torch.manual_seed(generator(run.seed, "weights").initial_seed())
        self.denoiser = new_denoiser(run).to(self.device)
        if run.optimization.channels_last:
            self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = run.kind  # as the files of a run name it
        self.networks: dict[str, nn.Module] = {self.averaged: self.denoiser}
        self.latents = Latents(
            self.batches,
            autoencoder,
            first_stage_hash=self.bundle.weights_hash if self.bundle else "",
            views=run.latent_views,
        )

    def batch(self, step: int) -> Batch:
        """x0 (N, C, h, w), scaled; noise like it; t (N,); y (N,) where the model has classes."""
        run = self.run
        x0, labels = self.latents.batch(step)
        source = generator(run.seed, "noise", step, device=self.device)
        noise = torch.randn(x0.shape, generator=source, device=self.device)
        batch = {"x0": x0, "noise": noise, "t": self.timesteps(step)}
        if run.model.num_classes is not None:
            source = generator(run.seed, "class-dropout", step)
            dropped = torch.rand(len(labels), generator=source).to(self.device) < run.class_dropout
            batch["y"] = torch.where(dropped, run.model.num_classes, labels)
        return batch

    def timesteps(self, step: int) -> Tensor:
        """The batch's timesteps (N,): int64, or real for logit-normal."""
        source = generator(self.run.seed, "timesteps", step)
        return self.objective.timesteps(self.run.optimization.batch_size, source).to(self.device)

    def losses(self, part: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The denoiser's loss; see `Objective.loss`."""
        x0, noise, t = part["x0"], part["noise"], part["t"]
        x = self.objective.schedule.add_noise(x0, noise, t)
        if self.run.optimization.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        output = self.denoiser(x, t, y=part.get("y"))
        return {self.averaged: self.objective.loss(output, x, x0, noise, t)}, {}

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
            self.objective.schedule,
            config.steps,
            prediction=run.prediction,
            guidance_scale=guidance,
            clamp=None if run.autoencoder else _PIXEL_CLAMP,
        )
        classes = [None] * len(seeds) if labels is None else labels.tolist()
        conditions, others = class_conditions(run.model, classes, guided=any(table.guided))
        shape = self.latents.shape(run.data.image_size)
        z = philox_normal(seeds, shape, step=0, stream=INITIAL_NOISE) * table.initial_sigma
        requests = [
            Request(
                table=table,
                x=z[place].clone(),
                seed=seed,
                condition=conditions[place],
                unconditional=others[place] if others else None,
                tag=place,
            )
            for place, seed in enumerate(seeds.tolist())
        ]
        assert isinstance(network, Network)
        for result in engine.run(network, requests):
            z[result.request.tag] = result.x
        return self.latents.decode(z)

    def _preview_labels(self, count: int) -> Tensor | None:
        classes = self.run.model.num_classes
        return None if classes is None else torch.arange(count, device=self.device) % classes

    def export(self, network: nn.Module, step: int) -> None:
        """Write model/: the averaged denoiser, and the first stage it was trained on."""
        run, bundle = self.run, self.bundle
        assert isinstance(network, Network)
        model = Model(
            layout="bundle",
            image_size=run.data.image_size,
            image_channels=run.data.channels,
            autoencoder=bundle.autoencoder if bundle else None,
            denoiser=network,
            schedule=run.schedule,
            prediction=run.prediction,
            scale_factor=self.latents.scale_factor,
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
        return self.latents.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the scale factor; the first stage and the images must be the same ones."""
        self.latents.load_state(state, first_stage=self.run.autoencoder)


def new_denoiser(run: DiffusionRun[Any]) -> Network:
    """The untrained denoiser of a run, on the CPU.

    Raises:
        ValueError: its family cannot do what the run asks for.
    """
    network = network_family(run.kind).network(run.model)
    if run.optimization.gradient_checkpointing:
        if not hasattr(network, "gradient_checkpointing"):
            raise ValueError(
                f"a denoiser of kind {run.kind!r} has no gradient checkpointing; set "
                "optimization gradient_checkpointing to False"
            )
        network.gradient_checkpointing = True  # type: ignore[assignment]
    return network


def check_parts_fit(
    run: DiffusionRun[Any], classes: tuple[str, ...], autoencoder: Autoencoder | None
) -> None:
    """Raise ValueError where data, first stage and denoiser do not fit together."""
    model = run.model
    if autoencoder is None:
        check_model_fits(run.data, channels=model.in_channels, what="denoiser")
    else:
        check_model_fits(run.data, channels=autoencoder.config.image_channels, what="autoencoder")
    wanted = model.num_classes
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
    # A network may run on sizes that it halves unevenly, but to train on them is a mistake.
    step = factor * getattr(model, "downsample_factor", model.size_multiple)
    if run.data.image_size % step:
        raise ValueError(
            f"image_size must be a multiple of {step} for these models, got {run.data.image_size}"
        )
