"""The conditions of unCLIP's decoder: an image embedding and a prompt.

    prompt -> CLIP's text encoder -> prior (a run of the engine) -> image embedding
    picture -> CLIP's image encoder -> image embedding
    image embedding, text -> projection -> the decoder's tokens and added vector

The prior makes several embeddings, of which the one with the largest dot product with the text's is
kept (Ramesh et al. 2022, arXiv 2204.06125, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.schedules import noise_schedule
from fastdiff.generate.conditions import Kept, Pair, plain_text
from fastdiff.generate.job import (
    InterpolationJob,
    Job,
    Picture,
    TextJob,
    TextSettings,
    stage_seed,
)
from fastdiff.generate.pictures import picture_key, read_picture
from fastdiff.generate.slerp import slerp
from fastdiff.models.prior import Prior
from fastdiff.models.text import EncodedPrompt, TextEncoder
from fastdiff.models.unclip import CLIPImageEncoder
from fastdiff.runtime.conditions import Condition
from fastdiff.runtime.engine import Request
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import Engines
from fastdiff.runtime.run import run as run_requests

KEPT = 256
"""Number of prompts, embeddings and conditions that are cached."""
TEXT_DIFFERENCE = 0.5
"""How far a text difference turns an image embedding at most, as a share of its angle to the
difference: the largest that the paper takes."""
Noise = Callable[[int, tuple[int, ...]], Tensor]
"""(seed, shape) -> noise N(0, 1) that depends on the seed only."""


class _End(NamedTuple):
    """An image embedding, and the prompt that the decoder reads beside it."""

    key: Hashable  # what the embedding was made from
    image: Tensor  # (1, D)
    prompt: str


class UnCLIPConditions:
    """The conditions of unCLIP's decoder. Equal contents share an object."""

    def __init__(
        self, model: Model, *, device: torch.device, dtype: torch.dtype, noise: Noise
    ) -> None:
        """Prepare the encoders, the projection and the prior for inference in place."""
        assert model.projection is not None
        (encoder,) = model.text_encoders
        assert not isinstance(encoder, TextEncoder), "unCLIP's layout reads its own encoder"
        self.encoder, self.projection = encoder, model.projection
        self.encoder.model.to(device, dtype)
        self.encoder.model.eval().requires_grad_(False)
        self.projection.to(device, dtype)
        self.projection.eval().requires_grad_(False)
        self.prior = None if model.prior is None else PriorStage(model.prior, device, dtype, noise)
        sight = model.image_encoder
        self.pictures = None if sight is None else PictureEmbeddings(sight, device, dtype)
        self._kept = Kept(KEPT)

    @torch.no_grad()
    def of(self, job: Job, size: tuple[int, int], *, guided: bool) -> Pair:
        """The conditions of a checked job. size: unused, since the decoder does not read it.

        Raises:
            ValueError: a prompt is too long, or has weights or BREAK; a picture cannot be read.
        """
        assert isinstance(job, TextJob | InterpolationJob), "the job is checked"
        empty = self._condition(None, None, job.text.negative or "", job.text) if guided else None
        if isinstance(job, TextJob):
            end = self._end(job.image, job.prompt, job.seed, job.text)
            return self._read(end, job.text), empty
        return self._between(job), empty

    def _between(self, job: InterpolationJob) -> Condition:
        """The condition of a frame; at the ends exactly that of the end's own image.

        The image embedding is on the great circle between those of the ends (section 3.2), what the
        decoder reads of the prompts on a line.
        """
        start, last = self._ends(job)
        if job.at in (0, 1):
            return self._read(last if job.at == 1 else start, job.text)
        key, image = start.key, start.image
        if last.key != start.key:
            key = (start.key, last.key, job.at)
            image = slerp(start.image, last.image, job.at)
        first, second = (self._condition(key, image, end.prompt, job.text) for end in (start, last))
        if first is second:
            return first
        name = ("between", key, start.prompt, last.prompt, job.at, job.text)
        return self._kept.once(name, lambda: first.mixed(second, job.at))

    def _ends(self, job: InterpolationJob) -> tuple[_End, _End]:
        words, text = job.prompt or "", job.text
        if job.image is not None and job.to_image is None and job.to_prompt is not None:
            return self._difference(job.image, words, job.to_prompt, text)
        start = self._end(job.image, words, job.seed, text)
        image = job.image if job.to_image is None else job.to_image
        words = words if job.to_prompt is None else job.to_prompt
        seed = job.seed if job.to_seed is None else job.to_seed
        return start, self._end(image, words, seed, text)

    def _difference(
        self, picture: Picture, prompt: str, to_prompt: str, text: TextSettings
    ) -> tuple[_End, _End]:
        """A picture, and the picture turned towards what one text adds to another (section 3.3).

        z = slerp(z_i, z_d, TEXT_DIFFERENCE), where z_d is the difference of the texts' embeddings
        at the length of z_i. The decoder reads no text.
        """
        start = self._end(picture, "", 0, text)
        pooled = [self._encoded(words, text).pooled for words in (prompt, to_prompt)]
        assert pooled[0] is not None
        assert pooled[1] is not None
        difference = (pooled[1] - pooled[0]).to(start.image)
        if not difference.any():
            raise ValueError(
                f"prompt and to_prompt must differ, got {prompt!r:.40} twice; a text difference "
                "changes the picture by what to_prompt adds"
            )
        difference = difference * (start.image.norm() / difference.norm())
        turned = slerp(start.image, difference, TEXT_DIFFERENCE)
        return start, _End((start.key, prompt, to_prompt), turned, "")

    def _end(self, picture: Picture | None, prompt: str, seed: int, text: TextSettings) -> _End:
        """A picture's embedding or, without one, the one that the prior makes, and the prompt."""
        if picture is None:
            return _End((prompt, seed), self._image(prompt, seed, text), prompt)
        assert self.pictures is not None, "the job is checked"
        image = self.pictures.of(picture)
        # by value: the key of a tensor is valid only while the tensor lives
        return _End(image.float().cpu().numpy().tobytes(), image, prompt)

    def _read(self, end: _End, text: TextSettings) -> Condition:
        return self._condition(end.key, end.image, end.prompt, text)

    def _image(self, prompt: str, seed: int, text: TextSettings) -> Tensor:
        """The image embedding that the prior makes of a prompt: (1, D)."""
        assert self.prior is not None, "the job is checked"
        prior = self.prior
        return self._kept.once(
            ("image", prompt, seed, text),
            lambda: prior(
                self._encoded(prompt, text), self._encoded(text.negative or "", text), seed, text
            ),
        )

    def _condition(
        self, key: object, image: Tensor | None, prompt: str, text: TextSettings
    ) -> Condition:
        """What the decoder reads of an image embedding, or of none, and a prompt.

        key: what the embedding was made from.
        """

        def make() -> Condition:
            encoded = self._encoded(prompt, text)
            given = None if image is None else image.to(encoded.tokens)
            return as_condition(self.projection(given, encoded))

        return self._kept.once(("decoder", key, prompt, text), make)

    def _encoded(self, prompt: str, text: TextSettings) -> EncodedPrompt:
        return self._kept.once(
            ("text", prompt, text.emphasis),
            lambda: self.encoder.encode(plain_text(prompt, text)),
        )


class PictureEmbeddings:
    """CLIP's embeddings of pictures, once per picture."""

    def __init__(self, encoder: CLIPImageEncoder, device: torch.device, dtype: torch.dtype) -> None:
        """Prepare the image encoder for inference in place."""
        self.encoder = encoder
        encoder.model.to(device, dtype)
        encoder.model.eval().requires_grad_(False)
        self._kept = Kept(KEPT)

    def of(self, picture: Picture) -> Tensor:
        """The embedding of a picture: (1, D), in CLIP's own units.

        Raises:
            ValueError: as for `read_picture`.
        """

        def encode() -> tuple[Picture, Tensor]:  # keeps tensors alive, so ids stay valid
            return picture, self.encoder.encode(read_picture(picture, 3, None, None))

        return self._kept.once(picture_key(picture), encode)[1]


class PriorStage:
    """Makes image embeddings from texts with a prior: each a run through a sampler's table."""

    def __init__(
        self, model: Model, device: torch.device, dtype: torch.dtype, noise: Noise
    ) -> None:
        """Prepare the prior for inference in place."""
        assert isinstance(model.denoiser, Prior)
        assert model.schedule is not None
        self.model, self.noise = model, noise
        self.network = prepare(model.denoiser, device=device, dtype=dtype)
        self.schedule = noise_schedule(model.schedule)
        self._tables = Kept(KEPT)

    @cached_property
    def engines(self) -> Engines:
        """The engines of the prior, which cache its CUDA graphs."""
        return Engines(self.network)

    def __call__(
        self, prompt: EncodedPrompt, negative: EncodedPrompt, seed: int, text: TextSettings
    ) -> Tensor:
        """The best of several image embeddings: (1, D), in CLIP's own units.

        seed: of the job. text: of a checked job.
        """
        samples = text.prior_samples
        assert samples is not None, "the job is checked"
        table, shape = self._table(text), (self.network.config.in_channels,)
        condition, unconditional = as_condition(prompt), as_condition(negative)
        requests = [
            Request(
                table=table,
                x=self.noise(own, shape) * table.initial_sigma,
                seed=own,
                condition=condition,
                unconditional=unconditional,
                tag=number,
            )
            for number in range(samples)
            for own in (prior_seed(seed, number),)
        ]
        found = {
            result.request.tag: result.x
            for result in run_requests(self.network, requests, engines=self.engines)
        }
        made = torch.stack([found[number] for number in range(samples)])
        images = self.network.denormalized(made)  # (samples, D)
        return nearest(images, prompt)

    def _table(self, text: TextSettings) -> SamplerTable:
        steps, scale = text.prior_steps, text.prior_guidance_scale
        assert steps is not None, "the job is checked"
        assert scale is not None

        def build() -> SamplerTable:
            named = self.model.sampler
            assert named is not None, "unCLIP's layout has checked it"
            return build_table(
                named.sampler,
                self.schedule,
                steps,
                prediction=self.model.prediction,
                guidance_scale=max(scale, 1.0),
                **named.arguments(self.schedule, steps),
            )

        return self._tables.once((steps, scale), build)


def prior_seed(seed: int, number: int) -> int:
    """The seed of one of the prior's samples for a job's image."""
    return stage_seed(seed, f"prior {number}")


def nearest(images: Tensor, prompt: EncodedPrompt) -> Tensor:
    """The embedding with the largest dot product with the text's.

    images: (N, D). Returns (1, D).
    """
    assert prompt.pooled is not None
    if len(images) == 1:
        return images
    best = (images @ prompt.pooled[0].to(images)).argmax()
    return images[best][None]


def as_condition(encoded: EncodedPrompt) -> Condition:
    """The condition of a network that reads these tokens and this vector."""
    return Condition(context=encoded.tokens, mask=encoded.mask, added=encoded.pooled)
