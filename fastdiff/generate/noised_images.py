"""The conditions of Stable Diffusion 2.1 unCLIP: a prompt, and the noised embedding of a picture.

    picture -> CLIP's image encoder -> normalise, add noise, restore -> added to the time embedding

Guidance leads away from zeros in place of the embedding and its noise level.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.schedules import noise_schedule
from fastdiff.generate.conditions import Conditions, Kept, Pair
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import InterpolationJob, Job, TextJob, stage_seed
from fastdiff.generate.slerp import slerp
from fastdiff.generate.unclip import KEPT, Noise, PictureEmbeddings
from fastdiff.runtime.conditions import Condition


class NoisedImageConditions:
    """The conditions of a model that reads a prompt and the embedding of a picture."""

    def __init__(
        self,
        model: Model,
        facts: Facts,
        *,
        device: torch.device,
        dtype: torch.dtype,
        noise: Noise,
    ) -> None:
        """Prepare the encoders for inference in place."""
        assert model.image_noise is not None
        assert model.image_encoder is not None
        assert model.image_noise_schedule is not None
        self.texts = Conditions(model, facts, device=device, dtype=dtype)
        self.texts.added = None  # what is added is the picture's, see `_with`
        self.pictures = PictureEmbeddings(model.image_encoder, device, dtype)
        self.image_noise = model.image_noise.to(device, dtype).eval().requires_grad_(False)
        self.schedule, self.noise = noise_schedule(model.image_noise_schedule), noise
        self._kept = Kept(KEPT)

    @torch.no_grad()
    def of(self, job: Job, size: tuple[int, int], *, guided: bool) -> Pair:
        """The conditions of a checked job. size: (height, width) of the image, in pixels.

        Raises:
            ValueError: as for `encode_prompt`, or a picture cannot be read.
        """
        assert isinstance(job, TextJob | InterpolationJob), "the job is checked"
        words = job
        if isinstance(job, InterpolationJob):
            prompt = job.prompt or ""
            end = prompt if job.to_prompt is None else job.to_prompt
            words = replace(job, image=None, to_image=None, prompt=prompt, to_prompt=end)
        text, negative = self.texts.of(words, size, guided=guided)
        image = self._image(job)
        vector = self._noised(image, job)
        condition = self._with(text, vector)
        return condition, negative and self._with(negative, torch.zeros_like(vector))

    def _image(self, job: TextJob | InterpolationJob) -> Tensor:
        """The embedding of a job's picture, or between its two pictures: (1, D)."""
        assert job.image is not None, "the job is checked"
        first = self.pictures.of(job.image)
        if isinstance(job, TextJob) or job.to_image is None or job.at == 0:
            return first
        last = self.pictures.of(job.to_image)
        return last if job.at == 1 else slerp(first, last, job.at)

    def _noised(self, image: Tensor, job: TextJob | InterpolationJob) -> Tensor:
        """The vector of an embedding with the noise of the job's seed, or between its two."""
        t, shape = job.text.image_noise or 0, tuple(image.shape)
        noise = self.noise(stage_seed(job.seed, "image noise"), shape)
        if isinstance(job, InterpolationJob) and job.to_seed is not None and job.at:
            last = self.noise(stage_seed(job.to_seed, "image noise"), shape)
            noise = last if job.at == 1 else slerp(noise, last, job.at)
        alpha, sigma = (float(of(t)) for of in (self.schedule.alpha, self.schedule.sigma))
        vector: Tensor = self.image_noise(image, noise.to(image), alpha, sigma, t)
        return vector

    def _with(self, text: Condition, vector: Tensor) -> Condition:
        """A text's condition with an added vector."""

        def make() -> tuple[Condition, Condition]:  # keeps the text alive, so its id stays valid
            return text, replace(text, added=vector)

        return self._kept.once((id(text), vector.float().cpu().numpy().tobytes()), make)[1]
