"""A model made ready to sample, and what the jobs of it share: tables, conditions, pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.generate.conditions import Conditions
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import CHECKPOINT, DEFAULT_SAMPLER, Fit, Job, Picture, SampleSettings
from fastdiff.generate.latents import Latents
from fastdiff.generate.pictures import fitted, read_picture
from fastdiff.kernels import INITIAL_NOISE, int64_bits, philox_normal
from fastdiff.models.network import Network
from fastdiff.runtime.engine import Request
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import Engines

TABLES, PICTURES = 64, 8
"""How many are kept, the last ones used."""
Made = TypeVar("Made")


class Session:
    """A model on its device and in its dtype; each part is prepared when it is first used.

    On the CPU an image depends on its job and the model only, bit for bit: not on the jobs around
    it, or on how many are done at once.
    """

    def __init__(self, model: Model) -> None:
        """
        Raises:
            ValueError: as `Facts.of`.
        """
        self.model, self.facts = model, Facts.of(model)
        assert model.denoiser is not None
        weight = next(model.denoiser.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.sample_dtype = torch.promote_types(self.dtype, torch.float32)
        self._kept: dict[str, dict[Hashable, Any]] = {}

    @classmethod
    def of(cls, model: Model) -> Session:
        """The session of a model: one, for as long as the model's fields stay what they are."""
        state = tuple(id(getattr(model, field.name)) for field in fields(model))
        kept: tuple[object, Session] | None = vars(model).get("_session")
        if kept is None or kept[0] != state:
            kept = vars(model)["_session"] = (state, cls(model))
        return kept[1]

    @cached_property
    def network(self) -> Network:
        """The denoiser, prepared for inference in place."""
        assert self.model.denoiser is not None
        return prepare(self.model.denoiser, device=self.device, dtype=self.dtype)

    @cached_property
    def engines(self) -> Engines:
        """The engines of the denoiser, with the graphs that they keep."""
        return Engines(self.network)

    @cached_property
    def latents(self) -> Latents:
        """The first stage, prepared for inference in place."""
        first, scale = self.model.autoencoder, self.model.scale_factor
        return Latents(first, scale, device=self.device, dtype=self.dtype)

    @cached_property
    def conditions(self) -> Conditions:
        """What makes conditions of prompts and classes."""
        return Conditions(self.model, self.facts, device=self.device, dtype=self.dtype)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise of the training."""
        assert self.model.schedule is not None
        return NoiseSchedule(self.model.schedule)

    def table(
        self,
        settings: SampleSettings,
        *,
        start: int = 0,
        stop: int | None = None,
        files: Session | None = None,
    ) -> SamplerTable:
        """The sampler's rows for this model, of the steps [start, stop); one object per content.

        settings: of a checked job. files: the model whose files say what CHECKPOINT means, if it is
        not this one.
        """
        key = (replace(settings, batch=None, tile=None), start, stop, id(files))
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
        """A sampler's name and its options for `build_table`; what is left open, from the files."""
        name, options = settings.sampler or DEFAULT_SAMPLER, dict[str, Any]()
        named = self.model.sampler
        if name == CHECKPOINT and named is not None:
            name, options = named.sampler, named.arguments(self.schedule, settings.total)
        elif name == CHECKPOINT:
            name = DEFAULT_SAMPLER
            if lacks := self.model.provenance.get("no_sampler"):
                warnings.warn(f"{lacks}; {name} is used instead", stacklevel=1)
        if settings.spacing is not None:
            options |= {"spacing": settings.spacing, "steps_offset": 0}
        for option in ("eta", "clamp"):
            if (value := getattr(settings, option)) is not None:
                options[option] = value
        return name, options

    def noise(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        """Noise N(0, 1), a function of the seed alone: (*shape) in the sample's dtype."""
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
        """An image of a job as (C, H, W) in [-1, 1], of sides that the networks can halve.

        fit: how to get there, see `pictures.fitted`.

        Raises:
            ValueError: as `read_picture` and `Facts.check_size`.
        """
        image = read_picture(picture, self.facts.image_channels, height, width)
        image = fitted(image, self.facts.size_factor, fit)
        self.facts.check_size(image.shape[1], image.shape[2], fits=True)
        return image

    def encoded(
        self, pictures: Sequence[Picture], image: Tensor, tile: int, fit: Fit | None
    ) -> Tensor:
        """`latents.encode` of an image, once for all jobs that share it: (C, h, w).

        pictures, fit: what the image was made of, and how. image: (C, H, W).
        """

        def key(picture: Picture) -> Hashable:
            if isinstance(picture, Tensor):
                return id(picture)
            facts = os.stat(picture)
            return os.fspath(picture), facts.st_mtime_ns, facts.st_size

        def encode() -> tuple[Sequence[Picture], Tensor]:  # with what its ids belong to
            return pictures, self.latents.encode(image[None], tile=tile)[0]

        keys = (*(key(picture) for picture in pictures), tuple(image.shape), tile, fit)
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
        """What the engine is asked. x: (C, h, w) at the level of the table's first row. size:
        (height, width) of the image. seed: of the noise, if it is not the job's."""
        guided = any(table.guided)
        condition, unconditional = self.conditions.of(job, size, guided=guided)
        return Request(
            table=table,
            x=x.to(self.device, self.sample_dtype),
            seed=job.seed if seed is None else seed,
            condition=condition,
            unconditional=unconditional,
            **more,
        )

    def _once(self, kind: str, count: int, key: Hashable, make: Callable[[], Made]) -> Made:
        kept = self._kept.setdefault(kind, {})
        value: Made = kept.pop(key) if key in kept else make()
        kept[key] = value
        if len(kept) > count:
            del kept[next(iter(kept))]
        return value


@dataclass(frozen=True, eq=False, kw_only=True)
class Pass:
    """One way along a sampler's table for one job: what the engine does, and what comes after."""

    session: Session
    """Whose network makes x, and whose first stage decodes it."""
    request: Request | None = None
    """For the engine; None where no step is left, and `x` is there already."""
    x: Tensor | None = None
    """(C, h, w), the result without a request."""
    then: Callable[[Tensor], Pass] | None = None
    """The pass that goes on from the result."""
    paste: tuple[Tensor, Tensor] | None = None
    """A mask (1, H, W) and an image (C, H, W), whose pixels come back where the mask is 0."""
