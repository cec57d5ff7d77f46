"""Training of a noisy classifier, which guides a denoiser (Dhariwal & Nichol 2021, appendix H).

The loss is the cross-entropy of the class of x_t, at timesteps spread evenly over each batch, on
the same samples, at the same noise levels and the same scale as the denoiser that it will guide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastdiff.checkpoint.guide import with_classifier
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import RUN_MODEL, Model
from fastdiff.checkpoint.open import load
from fastdiff.configs import from_dict, to_dict
from fastdiff.data import DataConfig, generator, open_dataset
from fastdiff.data.config import NAMED_SOURCES
from fastdiff.diffusion.schedules import ScheduleConfig, noise_schedule
from fastdiff.files import one_line_errors
from fastdiff.images import contact_sheet
from fastdiff.models.classifier import Classifier, ClassifierConfig
from fastdiff.training.batches import Batches, check_model_fits, drawn
from fastdiff.training.config import OptimizationConfig, OutputConfig
from fastdiff.training.latents import Latents
from fastdiff.training.memory import check_training, training_bytes
from fastdiff.training.objective import DenoiserLossConfig, Objective
from fastdiff.training.precision import check_precision, resolve_device
from fastdiff.training.provenance import EXPORT_DTYPES, provenance
from fastdiff.training.ranks import data_parallel
from fastdiff.training.start import origin, take_weights
from fastdiff.training.trainer import PREVIEW_CELL, Batch, train

RANGES = 4
"""Number of equal ranges of timesteps in which loss and accuracy are logged."""
NAME = "classifier"
EXAMPLES = 512
"""Most images on which a preview measures the accuracy."""


@dataclass(frozen=True, kw_only=True)
class ClassifierRun:
    """Everything that determines the training of a noisy classifier."""

    model: ClassifierConfig
    """The classifier."""

    optimization: OptimizationConfig
    """Steps, learning rate, precision."""

    output: OutputConfig
    """The run folder, and how often to write to it."""

    guides: str = ""
    """The denoiser that it will guide: anything that `fastdiff.load` opens. The classifier is
    trained on its samples, latents or pixels, with its scale factor; empty: on pixels."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Noise schedule, that of the denoiser."""

    latent_views: int = 0
    """0: encode each batch when it is needed. k > 0: encode k augmented views of every image before
    the first step and cycle through them, which is faster."""

    preview_rows: int = 4
    """Images per timestep on a preview sheet."""

    init_from: str = ""
    """A trained classifier whose weights the run starts from; empty: random weights."""

    seed: int = 0
    """Determines all randomness of the run."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda if available."""

    def __post_init__(self) -> None:
        if self.latent_views < 0 or (self.latent_views and not self.guides):
            raise ValueError(
                "latent_views must be 0 or more, and 0 when training on pixels, got "
                f"{self.latent_views}"
            )
        if self.preview_rows < 1:
            raise ValueError(f"preview_rows must be at least 1, got {self.preview_rows}")
        part = self.optimization.batch_size // self.optimization.accumulate
        if part < RANGES:
            raise ValueError(
                f"batch_size / accumulate must be at least {RANGES}, one image per range of "
                f"timesteps in the log, got {part}"
            )

    @property
    def kind(self) -> str:
        """The family of the network."""
        return NAME

    def to_json(self) -> dict[str, Any]:
        """Contents of config.json."""
        return to_dict(self)

    @classmethod
    def from_json(cls, data: Any) -> ClassifierRun:
        """Inverse of `to_json`. Fields missing in configs of older versions get their defaults.

        Raises:
            ValueError: a field is unknown, missing or wrong.
        """
        return from_dict(cls, data)


@one_line_errors()
def for_guided(run: ClassifierRun, place: str) -> ClassifierRun:
    """Adapt a run to the denoiser that the classifier will guide: schedule, samples and classes.

    place: anything that `fastdiff.load` opens.

    Raises:
        FileNotFoundError, ValueError: as for `fastdiff.load`, or it contains no denoiser.
    """
    model = load(place, device="meta", text_encoders=False)
    if model.denoiser is None:
        raise ValueError(f"{place} contains no denoiser to guide; choose a model that has one")
    config, first = model.denoiser.config, model.autoencoder
    data = replace(
        run.data,
        image_size=model.image_size or run.data.image_size,
        channels=model.image_channels or run.data.channels,
    )
    side = data.image_size // (1 if first is None else first.downsample_factor)
    return replace(
        run,
        guides=place,
        data=data,
        schedule=model.schedule or run.schedule,
        latent_views=run.latent_views if first is not None else 0,
        model=replace(
            run.model,
            in_channels=config.out_channels // (1 + config.learned_sigma),
            sample_size=side,
            num_classes=config.num_classes or run.model.num_classes,
        ),
    )


@data_parallel
def train_classifier(run: ClassifierRun, *, resume: bool = False) -> Path:
    """Train a noisy classifier; see `fastdiff.training.trainer.train`."""
    check_precision(run.optimization.precision, resolve_device(run.device))
    task = ClassifierTask(run)
    check_training(task.needed_bytes(), run.output.folder, task.device)
    if run.init_from and not resume:
        task.origin = origin(take_weights(task.classifier, NAME, run.init_from, task.device))
    return train(task, run, resume=resume)


def spread_timesteps(
    schedule: ScheduleConfig, optimization: OptimizationConfig, seed: int, step: int
) -> Tensor:
    """Timesteps of a batch (N,), those of each accumulated part spread evenly (Kingma et al. 2021,
    appendix I.1)."""
    spread = Objective(
        config=DenoiserLossConfig(timesteps="stratified"),
        schedule=noise_schedule(replace(schedule, shift=1.0)),
        prediction="eps",
    )
    source, parts = generator(seed, "timesteps", step), optimization.accumulate
    size = optimization.batch_size // parts
    return torch.cat([spread.timesteps(size, source) for _ in range(parts)])


class ClassifierTask:
    """A noisy classifier and its training data (a `trainer.Task`)."""

    def __init__(self, run: ClassifierRun) -> None:
        """
        Raises:
            ValueError: images, denoiser and classifier do not fit together.
        """
        self.run, self.device = run, resolve_device(run.device)
        self.guided = (
            load(run.guides, device=self.device, text_encoders=False) if run.guides else None
        )
        first = None if self.guided is None else self.guided.autoencoder
        dataset = open_dataset(run.data)
        self.classes = dataset.classes
        if len(dataset.classes) != run.model.num_classes:
            raise ValueError(
                f"the classifier has {run.model.num_classes} classes, the data has "
                f"{len(dataset.classes)}; set model num_classes to {len(dataset.classes)}"
            )
        if first is None:
            check_model_fits(run.data, channels=run.model.in_channels, what=NAME)
        else:
            check_model_fits(run.data, channels=first.config.image_channels, what="autoencoder")
        size = run.optimization.batch_size
        self.batches = Batches(dataset, run.data, size, seed=run.seed, device=self.device)
        self.schedule = noise_schedule(run.schedule)
        torch.manual_seed(generator(run.seed, "weights").initial_seed())
        self.classifier = Classifier(run.model).to(self.device)
        self.classifier.gradient_checkpointing = run.optimization.gradient_checkpointing
        if run.optimization.channels_last:
            self.classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = NAME
        self.networks: dict[str, nn.Module] = {NAME: self.classifier}
        self.latents = Latents(
            self.batches,
            first,
            first_stage_hash="" if self.guided is None else self.guided.weights_hash,
            views=run.latent_views if first is not None else 0,
        )
        if self.guided is not None:
            self.latents.scale_factor = self.guided.scale_factor
            with_classifier(self.guided, self._model(self.classifier))
        shape = self.latents.shape(run.data.image_size)
        self.classifier.check_input(torch.empty(1, *shape, device="meta"), None)
        self.origin: dict[str, str] | None = None

    def _model(self, network: Classifier) -> Model:
        return Model(
            layout="bundle",
            image_size=self.run.data.image_size,
            image_channels=self.run.data.channels,
            classifier=network,
            schedule=self.run.schedule,
            scale_factor=self.latents.scale_factor,
            class_names=self.classes,
            path=Path(self.run.output.folder),
        )

    def needed_bytes(self) -> int:
        """Memory that training takes, in bytes; see `fastdiff.training.memory`."""
        run, shape = self.run, self.latents.shape(self.run.data.image_size)

        def forward(network: Any, rows: int) -> Tensor:
            x, t = torch.empty(rows, *shape, device="meta"), torch.empty(rows, device="meta")
            output: Tensor = network(x, t)
            return output

        return training_bytes(run.model, run.optimization, run.data, forward, device=self.device)

    def batch(self, step: int, rows: Tensor | None = None) -> Batch:
        """The batch of a step: x0 (N, C, h, w), scaled; noise like it; t (N,); y (N,)."""
        run = self.run
        x0, labels = self.latents.batch(step, rows)
        size = run.optimization.batch_size
        source = generator(run.seed, "noise", step, device=self.device)
        noise = drawn(x0.shape, size, source, rows)
        t = spread_timesteps(run.schedule, run.optimization, run.seed, step)
        t = t if rows is None else t[rows]
        return {"x0": x0, "noise": noise, "t": t.to(self.device), "y": labels}

    def losses(self, part: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mean cross-entropy; logs it and the accuracy for each range of timesteps."""
        t, y = part["t"], part["y"]
        x = self.schedule.add_noise(part["x0"], part["noise"], t)
        if self.run.optimization.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits = self.classifier(x, t).float()
        losses = F.cross_entropy(logits, y, reduction="none")
        right = (logits.argmax(1) == y).float()
        logged = {"accuracy": right.mean()}
        total = self.schedule.num_timesteps
        place = torch.div(t * RANGES, total, rounding_mode="floor").clamp(max=RANGES - 1)
        for number in range(RANGES):
            low, high = number * total // RANGES, (number + 1) * total // RANGES
            inside = (place == number).float()
            # A range may be empty if its bounds are not whole timesteps; see `batch`.
            share = inside / inside.sum().clamp(min=1)
            logged[f"loss/t{low}-{high - 1}"] = (share * losses.detach()).sum()
            logged[f"accuracy/t{low}-{high - 1}"] = (share * right).sum()
        return {NAME: losses.mean()}, logged

    def examples(self) -> tuple[Tensor, Tensor, bool]:
        """Samples to measure the accuracy on, x0 (N, C, h, w) scaled, their labels (N,), and
        whether they are held out: those of a named source, else images that it is trained on."""
        data, held_out = self.run.data, False
        dataset = self.batches.dataset
        if data.source in NAMED_SOURCES and data.split == "train":
            dataset, held_out = open_dataset(replace(data, split="held-out")), True
        chosen = torch.linspace(0, len(dataset) - 1, min(EXAMPLES, len(dataset))).long()
        images, labels = dataset.batch(chosen)
        images, first = images.to(self.device), self.latents.autoencoder
        x0 = images if first is None else first.encode_latent(images) * self.latents.scale_factor
        return x0, labels.to(self.device), held_out

    @torch.no_grad()
    def accuracies(self, network: nn.Module) -> tuple[dict[int, float], Tensor, bool]:
        """The accuracy in the middle of each range of timesteps, the noisy samples in its order
        (ranges * N, C, h, w), and whether they are held out."""
        x0, labels, held_out = self.examples()
        found, noisy = {}, []
        for number in range(RANGES):
            middle = (2 * number + 1) * self.schedule.num_timesteps // (2 * RANGES)
            source = generator(self.run.seed, "examples", middle, device=self.device)
            noise = torch.randn(x0.shape, generator=source, device=self.device)
            t = torch.full_like(labels, middle)
            x = self.schedule.add_noise(x0, noise, t)
            found[middle] = float((network(x, t).argmax(1) == labels).float().mean())
            noisy.append(x)
        return found, torch.cat(noisy), held_out

    @torch.no_grad()
    def preview(self, network: nn.Module, step: int) -> Image.Image:
        """A sheet of noisy images, a column per timestep, with the accuracy there."""
        found, noisy, held_out = self.accuracies(network)
        rows = min(self.run.preview_rows, len(noisy) // RANGES)
        shown = noisy.unflatten(0, (RANGES, -1))[:, :rows].transpose(0, 1).flatten(0, 1)
        on = "held-out images" if held_out else "training images"
        return contact_sheet(
            self.latents.decode(shown).cpu(),
            columns=RANGES,
            column_labels=[f"t {t}: {share:.1%}" for t, share in found.items()],
            title=f"step {step:,}",
            caption=f"accuracy on {on}, averaged weights",
            cell=PREVIEW_CELL,
        )

    def export(self, network: nn.Module, step: int) -> None:
        """Write model/: the averaged classifier, and its accuracy by timestep."""
        run = self.run
        assert isinstance(network, Classifier)
        found, _, held_out = self.accuracies(network)
        facts = provenance(run, step, self.origin)
        facts["accuracy"] = {"held out": held_out, "by timestep": found}
        if self.guided is not None:
            facts["guides"] = origin(self.guided)
        save_bundle(
            self._model(network),
            Path(run.output.folder) / RUN_MODEL,
            dtype=EXPORT_DTYPES[run.output.export_dtype],
            provenance=facts,
        )

    def state(self) -> dict[str, Any]:
        """The identity of the denoiser, the images and the initial weights."""
        began = {"init_from": self.origin} if self.origin else {}
        return {**self.latents.state(), **began}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the denoiser or the images differ from those in `state`."""
        self.latents.load_state(state, first_stage=self.run.guides)
        self.origin = state.get("init_from")

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: all randomness follows from the step."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Never called, since `tensors` is empty."""
        assert not tensors
