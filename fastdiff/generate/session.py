"""A model prepared for sampling, with the caches that its jobs share: tables and pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.gradients import Pull, Similarity
from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, noise_schedule
from fastdiff.generate.conditions import Conditions, Kept, Made
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import (
    CHECKPOINT,
    DEFAULT_SAMPLER,
    ClassJob,
    Fit,
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    Job,
    Picture,
    SampleSettings,
    TextJob,
)
from fastdiff.generate.latents import Latents
from fastdiff.generate.noised_images import NoisedImageConditions
from fastdiff.generate.pictures import fitted, picture_key, read_picture
from fastdiff.generate.unclip import UnCLIPConditions
from fastdiff.kernels import INITIAL_NOISE, int64_bits, philox_normal
from fastdiff.models.classifier import Classifier
from fastdiff.models.contrastive import NoisedCLIP
from fastdiff.models.controlnet import with_controlnets
from fastdiff.models.network import Network
from fastdiff.models.prompts import read_prompt
from fastdiff.runtime.conditions import Control
from fastdiff.runtime.engine import Request
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import Engines

TABLES, PICTURES, CAPTIONS = 64, 8, 256
"""Number of entries kept in each cache; the least recently used are dropped."""
NOT_OF_A_TABLE = (
    *("batch", "tile", "classifier_scale", "classifier_class", "clip_scale"),
    *("cache", "cache_branch", "cache_center", "cache_power", "upsampler_steps"),
)
"""Settings that tables do not depend on."""
_of_a_table = attrgetter(*sorted({f.name for f in fields(SampleSettings)} - {*NOT_OF_A_TABLE}))


class Session:
    """A model on its device and in its dtype; each part is prepared on first use.

    On the CPU an image depends only on its job and the model, bit for bit, not on other jobs in the
    same call or on the batch size.
    """

    def __init__(self, model: Model) -> None:
        """
        Raises:
            ValueError: as for `Facts.of`.
        """
        self.model, self.facts = model, Facts.of(model)
        assert model.denoiser is not None
        weight = next(model.denoiser.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.sample_dtype = torch.promote_types(self.dtype, torch.float32)
        self._kept: dict[str, Kept] = {}

    @classmethod
    def of(cls, model: Model) -> Session:
        """The session of a model; the same object until one of the model's fields is replaced."""
        state = tuple(id(getattr(model, field.name)) for field in fields(model))
        kept: tuple[object, Session] | None = vars(model).get("_session")
        if kept is None or kept[0] != state:
            kept = vars(model)["_session"] = (state, cls(model))
        return kept[1]

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier, prepared for inference in place, at least in fp32."""
        assert self.model.classifier is not None
        return prepare(self.model.classifier, device=self.device, dtype=self.sample_dtype)

    @cached_property
    def clip(self) -> NoisedCLIP:
        """The noised CLIP, prepared for inference in place, at least in fp32."""
        assert self.model.clip is not None
        prepare(self.model.clip.model, device=self.device, dtype=self.sample_dtype)
        return self.model.clip

    @cached_property
    def network(self) -> Network:
        """The denoiser with its ControlNets, prepared for inference in place."""
        assert self.model.denoiser is not None
        whole = with_controlnets(self.model.denoiser, self.model.controlnets)
        return prepare(whole, device=self.device, dtype=self.dtype)

    @cached_property
    def engines(self) -> Engines:
        """The engines of the denoiser, which cache its CUDA graphs."""
        return Engines(self.network)

    def forget_engines(self) -> None:
        """Release the memory of the engines' slots and graphs; they are made again when needed."""
        vars(self).pop("engines", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def latents(self) -> Latents:
        """The first stage, prepared for inference in place."""
        first, scale = self.model.autoencoder, self.model.scale_factor
        return Latents(first, scale, device=self.device, dtype=self.dtype)

    @cached_property
    def conditions(self) -> Conditions | UnCLIPConditions | NoisedImageConditions:
        """Converts prompts, classes and pictures to conditions."""
        if self.model.image_noise is not None:
            return NoisedImageConditions(
                self.model, self.facts, device=self.device, dtype=self.dtype, noise=self.noise
            )
        if self.model.projection is not None:
            return UnCLIPConditions(
                self.model, device=self.device, dtype=self.dtype, noise=self.noise
            )
        return Conditions(self.model, self.facts, device=self.device, dtype=self.dtype)

    @cached_property
    def upsamplers(self) -> tuple[Session, ...]:
        """The sessions of the networks that enlarge what the denoiser makes."""
        return tuple(map(Session, self.model.upsamplers))

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the denoiser was trained with."""
        assert self.model.schedule is not None
        return noise_schedule(self.model.schedule)

    def table(
        self,
        settings: SampleSettings,
        *,
        start: int = 0,
        stop: int | None = None,
        files: Session | None = None,
    ) -> SamplerTable:
        """The sampler's rows for steps [start, stop); equal arguments return the same object.

        settings: those of a checked job. files: the session whose checkpoint defines the sampler
        CHECKPOINT, if it is not this one.
        """
        key = (_of_a_table(settings), start, stop, id(files))
        return self._once("tables", TABLES, key, lambda: self._table(settings, start, stop, files))

    def _table(
        self, settings: SampleSettings, start: int, stop: int | None, files: Session | None
    ) -> SamplerTable:
        name, options = (files or self).sampling(settings)
        if name == "ddpm" and self.facts.learned_sigma:
            options["variance"] = "learned"
        return build_table(
            name,
            self.schedule,
            settings.total,
            prediction=self.model.prediction,
            start=start,
            stop=stop,
            guidance_scale=settings.weight,
            guidance_rescale=settings.guidance_rescale,
            guidance_interval=settings.guidance_interval,
            **options,
        )

    def sampling(self, settings: SampleSettings) -> tuple[str, dict[str, Any]]:
        """A sampler's name and options for `build_table`; the checkpoint fills in what is unset."""
        name, options = settings.sampler or DEFAULT_SAMPLER, dict[str, Any]()
        named = self.model.sampler
        if name == CHECKPOINT and named is not None:
            name, options = named.sampler, named.arguments(self.schedule, settings.total)
        elif name == CHECKPOINT:
            name = DEFAULT_SAMPLER
            if lacks := self.model.provenance.get("no_sampler"):
                warnings.warn(f"{lacks}; using {name} instead", stacklevel=1)
        if settings.spacing is not None:
            options |= {"spacing": settings.spacing, "steps_offset": 0}
        for option in ("eta", "clamp"):
            if (value := getattr(settings, option)) is not None:
                options[option] = value
        return name, options

    def noise(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        """Noise N(0, 1) that depends on the seed only: (*shape), in `sample_dtype`."""
        seeds = torch.tensor([int64_bits(seed)], dtype=torch.int64, device=self.device)
        noise = philox_normal(seeds, shape, step=0, stream=INITIAL_NOISE)
        return noise[0].to(self.sample_dtype)

    def picture(
        self,
        picture: Picture,
        height: int | None = None,
        width: int | None = None,
        *,
        fit: Fit | None = None,
    ) -> Tensor:
        """Read an image of a job as (C, H, W) in [-1, 1], with sides that the networks support.

        fit: how to change sides that they do not support, see `pictures.fitted`.

        Raises:
            ValueError: as for `read_picture` and `Facts.check_size`.
        """
        image = read_picture(picture, self.facts.image_channels, height, width)
        image = fitted(image, self.facts.size_factor, fit)
        self.facts.check_size(image.shape[1], image.shape[2], fits=True)
        return image

    @torch.no_grad()
    def controls(self, job: Job, height: int, width: int) -> tuple[Control | None, ...]:
        """What the ControlNets add to a checked job's image of this size, in pixels.

        Each picture is embedded once for all jobs that share it. () without ControlNets, as in a
        refiner that goes on with the job of a model that has some.

        Raises:
            ValueError: a picture cannot be read, or has another size than the image.
        """
        pictures: tuple[Picture | None, ...] = getattr(job, "control", ())
        if not pictures or not self.model.controlnets:
            return ()
        assert isinstance(job, TextJob | ImageToImageJob | InpaintJob)
        return tuple(
            None
            if picture is None
            else Control(
                hint=self._hint(index, picture, height, width), scale=scale, start=start, end=end
            )
            for index, (picture, (scale, start, end)) in enumerate(
                zip(pictures, job.controls.each(len(pictures)), strict=True)
            )
        )

    def _hint(self, index: int, picture: Picture, height: int, width: int) -> Tensor:
        """A picture's embedding for a ControlNet: (C', h, w)."""
        net = self.model.controlnets[index]

        def embed() -> tuple[Picture, Tensor]:  # keeps tensors alive, so ids stay valid
            _ = self.network  # prepared with its ControlNets
            image = read_picture(picture, net.config.image_channels, None, None)
            if image.shape[1:] != (height, width):
                raise ValueError(
                    f"a control picture must have the size of the image, {width} x {height}, got "
                    f"{image.shape[2]} x {image.shape[1]} (width x height); resize it, or set "
                    "height and width"
                )
            pixels = ((image + 1) / 2)[None].to(self.device, self.dtype)
            return picture, net.hint(pixels.contiguous(memory_format=torch.channels_last))[0]

        key = (index, picture_key(picture), height, width)
        return self._once("hints", PICTURES, key, embed)[1]

    def encoded(
        self, pictures: Sequence[Picture], image: Tensor, tile: int, fit: Fit | None
    ) -> Tensor:
        """`latents.encode` of an image, cached for jobs that share it: (C, h, w).

        pictures, fit: what the image was made from, as the key. image: (C, H, W).
        """

        def encode() -> tuple[Sequence[Picture], Tensor]:  # keeps tensors alive, so ids stay valid
            return pictures, self.latents.encode(image[None], tile=tile)[0]

        keys = (*map(picture_key, pictures), tuple(image.shape), tile, fit)
        return self._once("pictures", PICTURES, keys, encode)[1]

    def request(
        self,
        job: Job,
        table: SamplerTable,
        x: Tensor,
        size: tuple[int, int],
        *,
        seed: int | None = None,
        **more: Any,
    ) -> Request:
        """The engine's request for a job.

        x: (C, h, w), at the noise level of the table's first row. size: (height, width) of the
        image. seed: seed of the noise, if not that of the job.
        """
        more["pulls"] = (*self.pulls(job, x), *self.clip_pulls(job))
        more["controls"] = self.controls(job, *size)
        guided = any(table.guided)
        condition, unconditional = self.conditions.of(job, size, guided=guided)
        return Request(
            table=table,
            x=x.to(self.device, self.sample_dtype),
            seed=job.seed if seed is None else seed,
            condition=condition,
            unconditional=unconditional,
            cache=job.settings.caching,
            **more,
        )

    def pulls(self, job: Job, x: Tensor) -> tuple[Pull, ...]:
        """What the model's classifier adds to a checked job's guidance.

        x: (C, h, w), the start. Between two classes, each pulls by its share.

        Raises:
            ValueError: the classifier does not support this size.
        """
        settings = job.settings
        if self.model.classifier is None or not settings.classifier_scale:
            return ()
        only = self.classifier.only_side
        if only is not None and x.shape[1:] != (only, only):
            factor = self.facts.factor
            raise ValueError(
                f"the classifier takes images of {only * factor} x {only * factor}, got "
                f"{x.shape[2] * factor} x {x.shape[1] * factor} (width x height); leave out height "
                "and width, or set classifier_scale=0"
            )
        shares = {settings.classifier_class: 1.0}
        if isinstance(job, InterpolationJob) and settings.classifier_class is None:
            end = job.label if job.to_label is None else job.to_label
            shares = {job.label: 1 - job.at}
            shares[end] = shares.get(end, 0.0) + job.at
        pulls = []
        for label, share in shares.items():
            assert isinstance(label, int), "the job is checked"
            scale = share * settings.classifier_scale
            pulls.append(Pull(objective=self.classifier.log_prob, scale=scale, label=label))
        return tuple(pulls)

    def clip_pulls(self, job: Job) -> tuple[Pull, ...]:
        """What the model's noised CLIP adds to a checked job's guidance.

        Between two prompts, each pulls by its share. Weights and breaks of a prompt are left out.
        """
        scale = job.settings.clip_scale
        if self.model.clip is None or not scale or isinstance(job, ClassJob) or job.prompt is None:
            return ()
        shares = {job.prompt: 1.0}
        if isinstance(job, InterpolationJob) and job.to_prompt is not None:
            shares = {job.prompt: 1 - job.at}
            shares[job.to_prompt] = shares.get(job.to_prompt, 0.0) + job.at
        parts = {prompt: read_prompt(prompt, emphasis=job.text.emphasis) for prompt in shares}
        return tuple(
            Pull(
                objective=self._similarity(
                    " ".join("".join(piece.text for piece in part) for part in parts[prompt])
                ),
                scale=share * scale,
            )
            for prompt, share in shares.items()
            if share
        )

    def _similarity(self, caption: str) -> Similarity:
        """The objective of a caption, which jobs with the same caption share."""

        def embed() -> Similarity:
            return Similarity(self.clip.model.embed_images, self.clip.caption(caption))

        return self._once("captions", CAPTIONS, caption, embed)

    def _once(self, kind: str, count: int, key: Hashable, make: Callable[[], Made]) -> Made:
        return self._kept.setdefault(kind, Kept(count)).once(key, make)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pass:
    """One run through a sampler's table for one job, and what follows it."""

    session: Session
    """The session whose network produces x and whose first stage decodes it."""
    request: Request | None = None
    """The request for the engine; None if there are no steps to take, so `x` is the result."""
    x: Tensor | None = None
    """(C, h, w), the result if there is no request."""
    then: Callable[[Tensor], Pass] | None = None
    """Plans the pass that continues from the result."""
    paste: tuple[Tensor, Tensor] | None = None
    """A mask (1, H, W) and an image (C, H, W) whose pixels are restored where the mask is 0."""
