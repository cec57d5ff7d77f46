"""Training of a noised CLIP, which guides a denoiser to captions (Nichol et al. 2022, section 2.3).

The loss is the contrastive one of the captions of x_t, at timesteps spread evenly over each batch,
on the same samples, at the same noise levels and the same scale as the denoiser that it will guide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff.checkpoint.guide import with_clip
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import RUN_MODEL, Model
from fastdiff.checkpoint.open import load
from fastdiff.configs import from_dict, to_dict
from fastdiff.data import DataConfig, generator, open_dataset
from fastdiff.data.config import CAPTIONED_SOURCES
from fastdiff.diffusion.schedules import ScheduleConfig, noise_schedule
from fastdiff.files import one_line_errors
from fastdiff.images import contact_sheet
from fastdiff.models.contrastive import Contrastive, ContrastiveConfig, NoisedCLIP
from fastdiff.training.batches import Batches, check_model_fits, drawn
from fastdiff.training.classifier import RANGES, spread_timesteps
from fastdiff.training.config import OptimizationConfig, OutputConfig
from fastdiff.training.latents import Latents
from fastdiff.training.memory import check_training, training_bytes
from fastdiff.training.precision import check_precision, resolve_device
from fastdiff.training.provenance import EXPORT_DTYPES, provenance
from fastdiff.training.ranks import data_parallel, ranks
from fastdiff.training.start import origin
from fastdiff.training.text import Captions, TextConfig, architecture
from fastdiff.training.trainer import PREVIEW_CELL, Batch, train

NAME = "clip"
EXAMPLES = 256
"""Most samples among whose captions a preview looks for the right one."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The towers of a noised CLIP; its channels are those of the samples that it is trained on."""

    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of the image tower's levels; the first works at half the side of x, every further
    one at half of that before it."""
    dim: int = 64
    """Width of the embeddings."""
    text_width: int = 64
    """Width of the text tower."""
    norm_groups: int = 8
    """Groups of every GroupNorm."""


@dataclass(frozen=True, kw_only=True)
class ClipRun:
    """Everything that determines the training of a noised CLIP."""

    model: ClipConfig
    """The towers."""

    text: TextConfig
    """The text tower's depth, and how captions become tokens."""

    optimization: OptimizationConfig
    """Steps, learning rate, precision."""

    output: OutputConfig
    """The run folder, and how often to write to it."""

    guides: str = ""
    """The denoiser that it will guide: anything that `fastdiff.load` opens. The CLIP is trained on
    its samples, latents or pixels, with its scale factor; empty: on pixels."""

    data: DataConfig = field(default_factory=DataConfig)
    """The captioned images."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Noise schedule, that of the denoiser."""

    latent_views: int = 0
    """0: encode each batch when it is needed. k > 0: encode k augmented views of every image before
    the first step and cycle through them, which is faster."""

    preview_rows: int = 4
    """Images per timestep on a preview sheet."""

    seed: int = 0
    """Determines all randomness of the run."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda if available."""

    def __post_init__(self) -> None:
        if self.data.source not in CAPTIONED_SOURCES or not self.text.layers:
            raise ValueError(
                f"a CLIP is trained on captions with at least one text layer, got data source "
                f"{self.data.source!r} and {self.text.layers} layers; use source "
                f"{' or '.join(CAPTIONED_SOURCES)}"
            )
        if self.latent_views < 0 or (self.latent_views and not self.guides):
            raise ValueError(
                "latent_views must be 0 or more, and 0 when training on pixels, got "
                f"{self.latent_views}"
            )
        if self.preview_rows < 1:
            raise ValueError(f"preview_rows must be at least 1, got {self.preview_rows}")
        if self.optimization.batch_size // self.optimization.accumulate < RANGES:
            raise ValueError(
                f"batch_size / accumulate must be at least {RANGES}, since pictures are told apart "
                f"within a part, got {self.optimization.batch_size} and "
                f"{self.optimization.accumulate}"
            )
        if self.optimization.gradient_checkpointing:
            raise ValueError("a CLIP does not support gradient_checkpointing; set it to False")
        self.network(channels=1, vocabulary=self.text.vocabulary)

    @property
    def kind(self) -> str:
        """The family of the network."""
        return NAME

    def network(self, *, channels: int, vocabulary: int) -> ContrastiveConfig:
        """The architecture for samples and a vocabulary of these sizes.

        Raises:
            ValueError: widths and groups, or width and heads, do not fit together.
        """
        text, model = self.text, self.model
        tower = architecture(text, vocabulary, model.text_width, pooled=False)
        return ContrastiveConfig(
            text=tower,
            widths=model.widths,
            dim=model.dim,
            image_channels=channels,
            norm_groups=model.norm_groups,
            noised=True,
        )

    def to_json(self) -> dict[str, Any]:
        """Contents of config.json."""
        return to_dict(self)

    @classmethod
    def from_json(cls, data: Any) -> ClipRun:
        """Inverse of `to_json`. Fields missing in configs of older versions get their defaults.

        Raises:
            ValueError: a field is unknown, missing or wrong.
        """
        return from_dict(cls, data)


@one_line_errors()
def for_guided_clip(run: ClipRun, place: str) -> ClipRun:
    """Adapt a run to the denoiser that the CLIP will guide: schedule and samples.

    place: anything that `fastdiff.load` opens.

    Raises:
        FileNotFoundError, ValueError: as for `fastdiff.load`, or it contains no denoiser.
    """
    model = load(place, device="meta", text_encoders=False)
    if model.denoiser is None:
        raise ValueError(f"{place} contains no denoiser to guide; choose a model that has one")
    data = replace(
        run.data,
        image_size=model.image_size or run.data.image_size,
        channels=model.image_channels or run.data.channels,
    )
    views = run.latent_views if model.autoencoder is not None else 0
    schedule = model.schedule or run.schedule
    return replace(run, guides=place, data=data, schedule=schedule, latent_views=views)


@data_parallel
def train_clip(run: ClipRun, *, resume: bool = False) -> Path:
    """Train a noised CLIP; see `fastdiff.training.trainer.train`.

    Raises:
        ValueError: several processes were started.
    """
    if (world := ranks().world) > 1:
        raise ValueError(
            f"a CLIP tells the pictures of a whole batch apart, so one process trains it, got "
            f"{world}; start it without torchrun"
        )
    check_precision(run.optimization.precision, resolve_device(run.device))
    task = ClipTask(run)
    check_training(task.needed_bytes(), run.output.folder, task.device)
    return train(task, run, resume=resume)


class ClipTask:
    """A noised CLIP and its training data (a `trainer.Task`)."""

    def __init__(self, run: ClipRun) -> None:
        """
        Raises:
            ValueError: images, denoiser and CLIP do not fit together.
        """
        self.run, self.device = run, resolve_device(run.device)
        self.guided = (
            load(run.guides, device=self.device, text_encoders=False) if run.guides else None
        )
        first = None if self.guided is None else self.guided.autoencoder
        if first is not None:
            check_model_fits(run.data, channels=first.config.image_channels, what="autoencoder")
        dataset, size = open_dataset(run.data), run.optimization.batch_size
        self.batches = Batches(dataset, run.data, size, seed=run.seed, device=self.device)
        self.captions = Captions(dataset.captions, run.text)
        self.schedule = noise_schedule(run.schedule)
        self.latents = Latents(
            self.batches,
            first,
            first_stage_hash="" if self.guided is None else self.guided.weights_hash,
            views=run.latent_views if first is not None else 0,
        )
        self.shape = self.latents.shape(run.data.image_size)
        self.config = run.network(channels=self.shape[0], vocabulary=len(self.captions.tokenizer))
        torch.manual_seed(generator(run.seed, "weights").initial_seed())
        self.clip = Contrastive(self.config).to(self.device)
        if run.optimization.channels_last:
            self.clip.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = NAME
        self.networks: dict[str, nn.Module] = {NAME: self.clip}
        if self.guided is not None:
            self.latents.scale_factor = self.guided.scale_factor
            with_clip(self.guided, self._model(self.clip))

    def _model(self, network: Contrastive) -> Model:
        return Model(
            layout="bundle",
            image_size=self.run.data.image_size,
            image_channels=self.run.data.channels,
            clip=NoisedCLIP(model=network, tokenizer=self.captions.tokenizer),
            schedule=self.run.schedule,
            scale_factor=self.latents.scale_factor,
            path=Path(self.run.output.folder),
        )

    def needed_bytes(self) -> int:
        """Memory that training takes, in bytes; see `fastdiff.training.memory`."""
        run = self.run

        def forward(network: Any, rows: int) -> Tensor:
            x, t = torch.empty(rows, *self.shape, device="meta"), torch.empty(rows, device="meta")
            ids = torch.empty(rows, run.text.tokens, dtype=torch.int64, device="meta")
            loss: Tensor = network(x, ids, t)
            return loss

        return training_bytes(self.config, run.optimization, run.data, forward, device=self.device)

    def batch(self, step: int, rows: Tensor | None = None) -> Batch:
        """The batch of a step: x0 (N, C, h, w), scaled; noise like it; t (N,); ids (N, T)."""
        run, size = self.run, self.run.optimization.batch_size
        x0, _ = self.latents.batch(step, rows)
        noise = drawn(x0.shape, size, generator(run.seed, "noise", step, device=self.device), rows)
        t = spread_timesteps(run.schedule, run.optimization, run.seed, step)
        source = generator(run.seed, "captions", step)
        uniform = torch.rand(size, 2, generator=source, dtype=torch.float64)
        if rows is not None:
            t, uniform = t[rows], uniform[rows]
        indices, _ = self.batches.places(step, rows)
        ids = self.captions.drawn(indices, uniform, torch.zeros(len(indices), dtype=torch.bool))
        return {"x0": x0, "noise": noise, "t": t.to(self.device), "ids": ids.to(self.device)}

    def losses(self, part: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The contrastive loss of the part; logs the inverse temperature."""
        x = self.schedule.add_noise(part["x0"], part["noise"], part["t"])
        if self.run.optimization.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        loss = self.clip(x, part["ids"], part["t"])
        return {NAME: loss}, {"scale": self.clip.scale.detach()}

    @torch.no_grad()
    def accuracies(self, network: nn.Module) -> tuple[dict[int, float], Tensor, bool]:
        """The share of samples whose own caption is the nearest of all examples', in the middle of
        each range of timesteps; the noisy samples in its order (ranges * N, C, h, w); and whether
        they are held out."""
        assert isinstance(network, Contrastive)
        data, held_out = self.run.data, self.run.data.split == "train"
        dataset = (
            open_dataset(replace(data, split="held-out")) if held_out else self.batches.dataset
        )
        chosen = torch.linspace(0, len(dataset) - 1, min(EXAMPLES, len(dataset))).long()
        images, first = dataset.batch(chosen)[0].to(self.device), self.latents.autoencoder
        x0 = images if first is None else first.encode_latent(images) * self.latents.scale_factor
        own = [dataset.captions[place][0] for place in chosen.tolist()]
        texts = list(dict.fromkeys(own))
        wanted = torch.tensor([texts.index(text) for text in own], device=self.device)
        embedded = network.embed_text(self.captions.ids(texts).to(self.device))
        found, noisy = {}, []
        for number in range(RANGES):
            middle = (2 * number + 1) * self.schedule.num_timesteps // (2 * RANGES)
            source = generator(self.run.seed, "examples", middle, device=self.device)
            noise = torch.randn(x0.shape, generator=source, device=self.device)
            t = torch.full((len(x0),), middle, device=self.device)
            x = self.schedule.add_noise(x0, noise, t)
            nearest = (network.embed_images(x, t) @ embedded.T).argmax(1)
            found[middle] = float((nearest == wanted).float().mean())
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
            caption=f"captions found on {on}, averaged weights",
            cell=PREVIEW_CELL,
        )

    def export(self, network: nn.Module, step: int) -> None:
        """Write model/: the averaged CLIP, and its accuracy by timestep."""
        run = self.run
        assert isinstance(network, Contrastive)
        found, _, held_out = self.accuracies(network)
        facts = provenance(run, step, None)
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
        """The identity of the denoiser and the images."""
        return self.latents.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the denoiser or the images differ from those in `state`."""
        self.latents.load_state(state, first_stage=self.run.guides)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: all randomness follows from the step."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Never called, since `tensors` is empty."""
        assert not tensors
