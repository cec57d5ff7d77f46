"""Second stage: networks, batches, losses and previews of a denoiser (a `trainer.Task`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import RUN_MODEL, Model
from fastdiff.data import ImageDataset, generator, open_dataset
from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.schedules import noise_schedule
from fastdiff.images import contact_sheet, enlarged, reduced
from fastdiff.kernels import INITIAL_NOISE, philox_normal
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.concat import extra_channels
from fastdiff.models.network import Network, network_family
from fastdiff.models.text import TextEncoder
from fastdiff.models.text_transformer import TextTransformer
from fastdiff.runtime.conditions import Condition, class_conditions
from fastdiff.runtime.engine import Request
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import run
from fastdiff.training.batches import Batches, check_model_fits, drawn
from fastdiff.training.concat import Concat
from fastdiff.training.diffusion import DiffusionRun
from fastdiff.training.latents import Latents, first_stage
from fastdiff.training.memory import check_training, training_bytes
from fastdiff.training.objective import Objective
from fastdiff.training.precision import check_precision, resolve_device
from fastdiff.training.provenance import EXPORT_DTYPES, provenance
from fastdiff.training.ranks import data_parallel, ranks
from fastdiff.training.resampler import SecondMomentResampler
from fastdiff.training.start import origin, take_weights, warn_of_another_task
from fastdiff.training.text import Captions, Conditioned
from fastdiff.training.trainer import PREVIEW_CELL, Batch, train

LETTERS = 10
"""Maximum length of a class name above its column of a preview."""
_PIXEL_CLAMP = 1.0


@data_parallel
def train_diffusion(run: DiffusionRun[Any], *, resume: bool = False) -> Path:
    """Train the denoiser of a run; see `fastdiff.training.trainer.train`."""
    check_precision(run.optimization.precision, resolve_device(run.device))
    task = DiffusionTask(run)
    check_training(task.needed_bytes(), run.output.folder, task.device)
    if run.init_from and not resume:
        task.start_from(run.init_from)
    return train(task, run, resume=resume)


class DiffusionTask:
    """A denoiser, its training data and its objective (a `trainer.Task`)."""

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
        schedule = noise_schedule(run.schedule)
        self.objective = Objective(
            config=run.loss,
            schedule=schedule,
            prediction=run.prediction,
            learned_sigma=run.model.learned_sigma,
        )
        self.resampler = (
            SecondMomentResampler(schedule.num_timesteps)
            if run.loss.timesteps == "second-moment"
            else None
        )
        torch.manual_seed(generator(run.seed, "weights").initial_seed())
        self.denoiser = new_denoiser(run).to(self.device)
        check_size(run, self.denoiser, autoencoder)
        if run.optimization.channels_last:
            self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = run.kind  # also the stem of its files in a run
        self.captions, self.network = self._with_text(dataset)
        self.networks: dict[str, nn.Module] = {self.averaged: self.network}
        self.latents = Latents(
            self.batches,
            autoencoder,
            first_stage_hash=self.bundle.weights_hash if self.bundle else "",
            views=run.latent_views,
        )
        self.concat = None if run.concat.kind == "none" else Concat(run.concat, self.latents)
        self.origin: dict[str, str] | None = None

    def _with_text(self, dataset: ImageDataset) -> tuple[Captions | None, nn.Module]:
        """The captions, and the denoiser with its text transformer; without text, the denoiser."""
        if not self.run.text.layers:
            return None, self.denoiser
        captions, width = Captions(dataset.captions, self.run.text), self.run.model.context_dim
        assert width is not None, "checked by the run's config"
        pooled = self.run.model.added_condition_dim is not None
        encoder = TextTransformer(captions.transformer(width, pooled=pooled))
        return captions, Conditioned(self.denoiser, encoder.to(self.device))

    def start_from(self, place: str) -> None:
        """Initialize the weights from a trained model; see `fastdiff.training.start`.

        On latents its scale factor is used too, because the weights were trained at that scale.
        """
        run = self.run
        model = take_weights(self.denoiser, "denoiser", place, self.device)
        warn_of_another_task(model, run.prediction, run.schedule)
        if run.autoencoder and model.autoencoder is not None:
            self.latents.scale_factor = model.scale_factor
        self.origin = origin(model)

    def needed_bytes(self) -> int:
        """Memory that training takes, in bytes; see `fastdiff.training.memory`."""
        run, shape = self.run, self.latents.shape(self.run.data.image_size)
        width, others = run.model.context_dim, 0
        if isinstance(self.network, Conditioned):
            others = sum(p.numel() for p in self.network.encoder.parameters())

        def forward(network: Any, rows: int) -> Tensor:
            x = torch.empty(rows, run.model.in_channels, *shape[1:], device="meta")
            t, y, context = torch.empty(rows, device="meta"), None, None
            if run.model.num_classes is not None:
                y = torch.empty(rows, dtype=torch.int64, device="meta")
            if width is not None:
                context = torch.empty(rows, run.text.tokens, width, device="meta")
            if (added := run.model.added_condition_dim) is not None:
                added = torch.empty(rows, added, device="meta")
            return network(x, t, y=y, context=context, added=added)

        return training_bytes(
            run.model, run.optimization, run.data, forward, others=others, device=self.device
        )

    def batch(self, step: int, rows: Tensor | None = None) -> Batch:
        """The batch of a step, or some of its rows.

        x0 (N, C, h, w), scaled; noise of the same shape; t (N,); y (N,) if the model has classes;
        weight (N,) of the losses if timesteps are not drawn uniformly; extra (N, K, h, w), what an
        upsampler enlarges, or another concatenated picture; ids (N, T) of the captions.
        """
        run, size = self.run, self.run.optimization.batch_size
        mine = slice(None) if rows is None else rows
        x0, labels = self.latents.batch(step, rows)
        source = generator(run.seed, "noise", step, device=self.device)
        batch = {"x0": x0, "noise": drawn(x0.shape, size, source, rows)}
        if run.low_resolution:
            images = x0
            if run.autoencoder:
                images = self.batches.augmented(*self.latents.views_of(step, rows))
            batch["extra"] = self._small(images)
        if self.concat is not None:
            batch["extra"] = self.concat.batch(step, rows)
        if self.resampler is None:
            batch["t"] = self.timesteps(step)[mine]
        else:
            t, weight = self.resampler.draw(size, generator(run.seed, "timesteps", step))
            batch |= {"t": t[mine].to(self.device), "weight": weight[mine].to(self.device)}
        source = generator(run.seed, "class-dropout", step)
        dropped = torch.rand(size, generator=source)[mine] < run.class_dropout
        if run.model.num_classes is not None:
            batch["y"] = torch.where(dropped.to(self.device), run.model.num_classes, labels)
        if self.captions is not None:
            source = generator(run.seed, "captions", step)
            uniform = torch.rand(size, 2, generator=source, dtype=torch.float64)[mine]
            indices, _ = self.batches.places(step, rows)
            batch["ids"] = self.captions.drawn(indices, uniform, dropped).to(self.device)
        return batch

    def timesteps(self, step: int) -> Tensor:
        """The batch's timesteps (N,): int64, or real for logit-normal."""
        source = generator(self.run.seed, "timesteps", step)
        return self.objective.timesteps(self.run.optimization.batch_size, source).to(self.device)

    def losses(self, part: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The denoiser's loss; see `Objective.losses`."""
        x0, noise, t = part["x0"], part["noise"], part["t"]
        x = self.objective.schedule.add_noise(x0, noise, t)
        whole = torch.cat([x, part["extra"]], dim=1) if "extra" in part else x
        if self.run.optimization.channels_last:
            whole = whole.contiguous(memory_format=torch.channels_last)
        words = {"ids": part["ids"]} if "ids" in part else {}
        output = self.network(whole, t, y=part.get("y"), **words)
        losses = self.objective.losses(output, x, x0, noise, t)
        if self.resampler is None:
            return {self.averaged: losses.mean()}, {}
        self.resampler.update(*ranks().gather(t, losses.detach()))
        return {self.averaged: (part["weight"] * losses).mean()}, {}

    def preview(self, network: nn.Module, step: int) -> Image.Image:
        """A labelled sheet of samples, a column per class, from the averaged weights."""
        config, classes = self.run.preview, self.run.model.num_classes
        labels = [None if classes is None else i % classes for i in range(config.count)]
        columns, named = classes or 0, None
        if 0 < columns <= config.count:
            named = [
                name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…" for name in self.classes
            ]
        else:  # no classes, or more of them than images
            columns = math.ceil(math.sqrt(config.count))
        scale = self._guidance
        guidance = f", guidance {scale:g}" if scale != 1 else ""
        captions = None if self.captions is None else self.captions.examples(config.count)
        return contact_sheet(
            self.sample(network, range(config.count), labels).cpu(),
            columns=columns,
            column_labels=named,
            captions=captions,
            title=f"step {step:,}",
            caption=f"{config.sampler}, {config.steps} steps{guidance}, averaged weights",
            cell=PREVIEW_CELL,
        )

    @torch.no_grad()
    def sample(
        self, network: nn.Module, seeds: Sequence[int], labels: Sequence[int | None]
    ) -> Tensor:
        """Sample images with the preview's sampler, as the exported model does for these seeds.

        labels: one class per seed; None for a model without classes. An upsampler enlarges an
        image of the data for each, and a concatenated picture is that of an image of the data; a
        model with text shows captions of the data.

        Returns (N, C, H, W) in [-1, 1].
        """
        shape = self.latents.shape(self.run.data.image_size)
        table = self._preview_table()
        denoiser, conditions, unconditional = self._conditions(
            network, labels, guided=any(table.guided)
        )
        noise = philox_normal(
            torch.tensor(list(seeds), device=self.device), shape, step=0, stream=INITIAL_NOISE
        )
        extra = self._extra_examples(labels)
        requests = [
            Request(
                table=table,
                x=noise[index],
                extra=None if extra is None else extra[index],
                seed=seed,
                condition=conditions[index],
                unconditional=unconditional[index] if unconditional else None,
                tag=index,
            )
            for index, seed in enumerate(seeds)
        ]
        # `prepare` changes a network in place, and this one is still being averaged.
        ready = prepare(copy.deepcopy(denoiser), device=self.device)
        for result in run(ready, requests):
            noise[result.request.tag] = result.x
        return self.latents.decode(noise)

    def _conditions(
        self, network: nn.Module, labels: Sequence[int | None], *, guided: bool
    ) -> tuple[Network, list[Condition], list[Condition] | None]:
        """The denoiser of the averaged network, and the conditions of a preview's images."""
        if self.captions is not None:
            assert isinstance(network, Conditioned)
            texts = self.captions.examples(len(labels))
            made = self.captions.conditions(network.encoder, texts, guided=guided)
            return network.denoiser, *made
        assert isinstance(network, Network)
        return network, *class_conditions(self.run.model, labels, guided=guided)

    @property
    def _guidance(self) -> float:
        """The preview's guidance scale, or 1 for a model that was not trained without condition."""
        captioned = self.captions is not None and self.run.class_dropout > 0
        guided = self.run.model.null_class or captioned
        return self.run.preview.guidance_scale if guided else 1.0

    def _extra_examples(self, labels: Sequence[int | None]) -> Tensor | None:
        """What the denoiser reads behind x, for an image of the data per label: (N, K, h, w); None
        if it reads nothing."""
        if self.concat is None and not self.run.low_resolution:
            return None
        places = self._examples(labels)
        if self.concat is not None:
            return self.concat.examples(places)
        images = self.batches.dataset.batch(places)[0].to(self.device)
        return self._small(images)

    def _small(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) reduced, and enlarged to the size of x: (N, C, h, w)."""
        _, *size = self.latents.shape(self.run.data.image_size)
        return enlarged(reduced(images, self.run.low_resolution), size)

    def _examples(self, labels: Sequence[int | None]) -> Tensor:
        """An image of the data per label, which has it; with text, those of the captions shown."""
        if self.captions is not None:
            return self.captions.places(len(labels))
        own, used, chosen = self.batches.dataset.labels, dict[int | None, int](), []
        for label in labels:
            places = torch.arange(len(own)) if label is None else torch.nonzero(own == label)
            turn = used[label] = used.get(label, -1) + 1
            chosen.append(int(places.flatten()[turn % len(places)]))
        return torch.tensor(chosen)

    def _preview_table(self) -> SamplerTable:
        """The preview's table: guided only if there is a null class, clamped only on pixels."""
        config, model = self.run.preview, self.run.model
        options: dict[str, Any] = {}
        if config.sampler == "ddpm" and model.learned_sigma:
            options["variance"] = "learned"
        if not self.run.autoencoder:
            options["clamp"] = _PIXEL_CLAMP
        return build_table(
            config.sampler,
            self.objective.schedule,
            config.steps,
            prediction=self.run.prediction,
            guidance_scale=self._guidance,
            **options,
        )

    def export(self, network: nn.Module, step: int) -> None:
        """Write model/: the averaged denoiser and the first stage that it was trained on."""
        run, bundle = self.run, self.bundle
        encoders: tuple[TextEncoder, ...] = ()
        denoiser = network
        if isinstance(network, Conditioned):
            assert self.captions is not None
            denoiser, encoders = network.denoiser, (self.captions.encoder(network.encoder),)
        assert isinstance(denoiser, Network)
        model = Model(
            layout="bundle",
            image_size=run.data.image_size,
            image_channels=run.data.channels,
            autoencoder=bundle.autoencoder if bundle else None,
            denoiser=denoiser,
            text_encoders=encoders,
            extra=run.extra,
            schedule=run.schedule,
            prediction=run.prediction,
            scale_factor=self.latents.scale_factor,
            guidance_scale=self._guidance if self._guidance != 1 else None,
            class_names=self.classes if run.model.num_classes is not None else (),
        )
        facts = provenance(run, step, self.origin)
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
        """The scale factor, and the identity of first stage, images and initial weights."""
        began = {"init_from": self.origin} if self.origin else {}
        return {**self.latents.state(), **began}

    def tensors(self) -> dict[str, Tensor]:
        """The history of losses used to draw timesteps; empty if they are drawn uniformly."""
        return {} if self.resampler is None else self.resampler.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        assert self.resampler is not None
        self.resampler.load(tensors)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the scale factor; raise ValueError if the first stage or the images differ."""
        self.latents.load_state(state, first_stage=self.run.autoencoder)
        self.origin = state.get("init_from")


def new_denoiser(run: DiffusionRun[Any]) -> Network:
    """The untrained denoiser of a run, on the CPU.

    Raises:
        ValueError: the family does not support what the run asks for.
    """
    network = network_family(run.kind).network(run.model)
    if run.optimization.gradient_checkpointing:
        if not hasattr(network, "gradient_checkpointing"):
            raise ValueError(
                f"denoisers of kind {run.kind!r} do not support gradient checkpointing; set "
                "optimization gradient_checkpointing to False"
            )
        network.gradient_checkpointing = True  # type: ignore[assignment]
    return network


def check_size(run: DiffusionRun[Any], denoiser: Network, autoencoder: Autoencoder | None) -> None:
    """Raise ValueError unless the images have the size that the denoiser has positions for."""
    factor = 1 if autoencoder is None else autoencoder.downsample_factor
    only = denoiser.only_side
    if only is not None and run.data.image_size != only * factor:
        raise ValueError(
            f"image_size must be {only * factor} for this denoiser, got {run.data.image_size}; set "
            f"model sample_size to {run.data.image_size // factor}, or change the images' size"
        )


def check_parts_fit(
    run: DiffusionRun[Any], classes: tuple[str, ...], autoencoder: Autoencoder | None
) -> None:
    """Raise ValueError unless data, first stage and denoiser fit together."""
    model = run.model
    factor = 1 if autoencoder is None else autoencoder.downsample_factor
    channels = model.in_channels - _concatenated(run, autoencoder)
    if run.low_resolution and autoencoder is None:
        if channels != 2 * run.data.channels:
            raise ValueError(
                f"an upsampler of images with {run.data.channels} channels takes "
                f"{2 * run.data.channels}, got in_channels={channels}; set model in_channels, or "
                "low_resolution to 0"
            )
        channels = run.data.channels
    if autoencoder is None:
        check_model_fits(run.data, channels=channels, what="denoiser")
    else:
        check_model_fits(run.data, channels=autoencoder.config.image_channels, what="autoencoder")
    wanted = model.num_classes
    if wanted is not None and wanted != len(classes):
        raise ValueError(
            f"the denoiser has {wanted} classes, the data has {len(classes)}; "
            f"set model num_classes to {len(classes) or None}"
        )
    if autoencoder is not None and autoencoder.config.latent_channels != channels:
        raise ValueError(
            f"the autoencoder's latents have {autoencoder.config.latent_channels} channels, the "
            f"denoiser takes {channels}; set model in_channels and out_channels to match"
        )
    wanted_out = channels * (2 if model.learned_sigma else 1)
    if model.out_channels != wanted_out:
        raise ValueError(
            f"the denoiser must return {wanted_out} channels, got out_channels={model.out_channels}"
        )
    # A network can run on sizes that do not halve evenly, but training on them is a mistake.
    step = factor * getattr(model, "downsample_factor", model.size_multiple)
    if run.data.image_size % step:
        raise ValueError(
            f"image_size must be a multiple of {step} for these models, got {run.data.image_size}"
        )


def _concatenated(run: DiffusionRun[Any], autoencoder: Autoencoder | None) -> int:
    """Input channels that a concatenated picture takes; 0 for upsamplers of pixels.

    Raises:
        ValueError: the denoiser has another number of input channels, or a small image does not
            have the size of the latents.
    """
    if run.extra is None:
        return 0
    first, factor = run.data.channels, 1
    if autoencoder is not None:
        first, factor = autoencoder.config.latent_channels, autoencoder.downsample_factor
    if run.low_resolution and run.low_resolution * factor != run.data.image_size:
        raise ValueError(
            f"low_resolution must be {run.data.image_size // factor} on these latents, their side, "
            f"got {run.low_resolution}"
        )
    more = extra_channels(
        run.extra, channels=first, image_channels=run.data.channels, factor=factor
    )
    if run.model.in_channels != first + more:
        raise ValueError(
            f"a denoiser for {run.extra} reads {more} channels behind the {first} of x, got "
            f"in_channels={run.model.in_channels}; set model in_channels to {first + more}"
        )
    return more
