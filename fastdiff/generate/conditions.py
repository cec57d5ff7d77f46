"""Convert a job's prompts and classes into conditions for the network, once per content.

label -> a row of the label embedding, or of a class embedding as one context token (LDM)
prompt, negative prompt, sizes -> tokens; also the pooled text, and for XL the sizes
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import ClassJob, InterpolationJob, Job, TextSettings
from fastdiff.models.layers import timestep_embedding
from fastdiff.models.prompts import read_prompt
from fastdiff.models.text import EncodedPrompt, TextEncoder, count_chunks, encode_prompt
from fastdiff.runtime.conditions import Condition

KEPT = 256
"""Number of conditions that are cached; the most recently used ones are kept."""
Pair = tuple[Condition, Condition | None]
"""A condition, and the condition to guide away from."""

Made = TypeVar("Made")


class Kept:
    """Up to `count` values by key; the least recently used are dropped."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: dict[Hashable, object] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The value of a key, made if it is not there."""
        value: Made = self._values.pop(key) if key in self._values else make()  # type: ignore[assignment]
        self._values[key] = value
        if len(self._values) > self._count:
            del self._values[next(iter(self._values))]
        return value


class Conditions:
    """The conditions of one model. Equal contents share an object and what is computed from it."""

    def __init__(
        self, model: Model, facts: Facts, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Prepare the text encoders for inference in place."""
        assert model.denoiser is not None
        self.facts, self.table = facts, model.class_embedding
        self.encoders = [e for e in model.text_encoders if isinstance(e, TextEncoder)]
        others = [e for e in model.text_encoders if not isinstance(e, TextEncoder)]
        self.joint = others[0] if others else None
        self.added = model.denoiser.config.added_condition_dim
        self.noised = model.picture_noise is not None  # the label is the level of its noise
        for encoder in model.text_encoders:
            encoder.model.to(device, dtype)
            encoder.model.eval().requires_grad_(False)
        if self.table is not None:
            self.table.to(device, dtype)
        # XL's base, with two encoders, was trained with zeros in place of a dropped prompt.
        self.zero_negative = bool(
            model.provenance.get("force_zeros_for_empty_prompt", len(self.encoders) == 2)
        )
        self._kept = Kept(KEPT)

    @torch.no_grad()
    def of(self, job: Job, size: tuple[int, int], *, guided: bool) -> Pair:
        """The conditions of a checked job. size: (height, width) of the image, in pixels.

        Raises:
            ValueError: as for `encode_prompt` and `size_vector`.
        """
        if isinstance(job, InterpolationJob):
            return self._between(job, size, guided)
        if not isinstance(job, ClassJob) and job.prompt is not None:
            return self._text(job.prompt, size, job.text, guided)
        label = getattr(job, "label", None)
        assert label is None or isinstance(label, int), "the job is checked"
        return self._class(label), self._class(None) if guided else None

    def _between(self, job: InterpolationJob, size: tuple[int, int], guided: bool) -> Pair:
        """The mixed condition of a frame; at the ends exactly that of the end."""
        if job.prompt is not None:
            other = job.prompt if job.to_prompt is None else job.to_prompt
            first, negative = self._text(job.prompt, size, job.text, guided, together=other)
            last, _ = self._text(other, size, job.text, guided, together=job.prompt)
        else:
            start, end = job.label, job.label if job.to_label is None else job.to_label
            assert not isinstance(start, str), "the job is checked"
            assert not isinstance(end, str)
            first, last = self._class(start), self._class(end)
            negative = self._class(None) if guided else None
        if job.at in (0, 1) or first is last:
            return (last if job.at == 1 else first), negative
        key = ("between", first, last, job.at)
        return self._once(key, lambda: first.mixed(last, job.at)), negative

    def _class(self, label: int | None) -> Condition:
        count, table = self.facts.num_classes, self.table
        if count is None and self.facts.classified is not None:
            label = None  # the class is the classifier's
        row = count if label is None else label
        if table is None:
            return self._once(("class", row), lambda: Condition(label=row))
        assert row is not None
        return self._once(("class", row), lambda: Condition(context=table.weight[row][None, None]))

    def _text(
        self,
        prompt: str,
        size: tuple[int, int],
        text: TextSettings,
        guided: bool,
        *,
        together: str | None = None,
    ) -> Pair:
        """Conditions of a prompt. together: another prompt to pad both to the same length."""
        zeros = text.negative is None and self.zero_negative
        negative = text.negative or ""
        pair = [prompt] if zeros or not guided else [prompt, negative]
        if together is not None:
            pair.append(together)
        chunks = max(self._chunks(words, text) for words in pair)
        condition = self._once(
            ("prompt", prompt, chunks, size, text),
            lambda: self._condition(
                self._encode(prompt, chunks, text), size, text, text.aesthetic_score
            ),
        )
        if not guided:
            return condition, None

        def nothing() -> Condition:
            shape_of = prompt if zeros else negative
            encoded = self._encode(shape_of, chunks, text)
            encoded = encoded.zeros() if zeros else encoded
            return self._condition(encoded, size, text, text.negative_aesthetic_score)

        return condition, self._once(("negative", negative, zeros, chunks, size, text), nothing)

    def _chunks(self, prompt: str, text: TextSettings) -> int:
        if self.joint is not None:
            return 1

        def count() -> int:
            return count_chunks(self.encoders, prompt, emphasis=text.emphasis)

        return self._once(("chunks", prompt, text.emphasis), count)

    def _encode(self, prompt: str, chunks: int, text: TextSettings) -> EncodedPrompt:
        def encode() -> EncodedPrompt:
            if self.joint is not None:
                return self.joint.encode(plain_text(prompt, text))
            return encode_prompt(
                self.encoders,
                prompt,
                chunks=chunks,
                clip_skip=text.clip_skip,
                emphasis=text.emphasis,
            )

        return self._once(("encoded", prompt, chunks, text.clip_skip, text.emphasis), encode)

    def _condition(
        self, encoded: EncodedPrompt, size: tuple[int, int], text: TextSettings, score: float
    ) -> Condition:
        if self.added is None:
            label = text.image_noise if self.noised else None
            return Condition(context=encoded.tokens, label=label)
        if self.joint is not None:
            return Condition(context=encoded.tokens, added=encoded.pooled)
        if encoded.pooled is None:
            raise ValueError(
                "the denoiser needs a pooled text vector, but no text encoder provides one; "
                "give Stable Diffusion XL's second encoder with pooled=True"
            )
        if encoded.pooled.shape[1] == self.added:
            return Condition(context=encoded.tokens, added=encoded.pooled)
        numbers = (*(text.original_size or size), *text.crop)
        vector = size_vector(
            encoded.pooled,
            self.added,
            {6: (*numbers, *(text.target_size or size)), 5: (*numbers, score)},
        )
        return Condition(context=encoded.tokens, added=vector)

    def _once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        return self._kept.once(key, make)


def plain_text(prompt: str, text: TextSettings) -> str:
    """A prompt for an encoder without weights and chunks, its backslashes resolved.

    Raises:
        ValueError: it has weights or BREAK, or layers are to be skipped.
    """
    if text.clip_skip:
        raise ValueError(
            f"clip_skip must be 0 for this text encoder, which is not CLIP, got {text.clip_skip}"
        )
    parts = read_prompt(prompt, emphasis=text.emphasis)
    if len(parts) > 1 or any(fragment.weight != 1 for fragment in parts[0]):
        raise ValueError(
            "this text encoder, which is not CLIP, has no weights and no BREAK; leave them out, or "
            "set emphasis=False (--no-emphasis) to read brackets as text"
        )
    return "".join(fragment.text for fragment in parts[0])


def size_vector(pooled: Tensor, width: int, choices: dict[int, tuple[float, ...]]) -> Tensor:
    """XL's added condition: the pooled text, followed by numbers embedded like timesteps.

    Podell et al. 2023, section 2.2. pooled: (1, P). width: A, the width of the result. choices: the
    numbers for XL's base (6) and for its refiner (5); A - P determines which, for 256 channels per
    number as in the original or any other power of two. Returns (1, A).

    Raises:
        ValueError: neither choice fits.
    """
    room = width - pooled.shape[1]
    for count, numbers in choices.items():
        channels = room // count
        if channels > 0 and channels * count == room and channels & (channels - 1) == 0:
            given = torch.tensor(numbers, device=pooled.device, dtype=torch.float32)
            embedded = timestep_embedding(given, channels, "openai").to(pooled)
            return torch.cat([pooled, embedded.reshape(1, -1)], dim=1)
    raise ValueError(
        f"the denoiser's added condition has {width} channels, got {pooled.shape[1]} of pooled "
        f"text, which leaves {room} for 6 numbers (XL's base) or 5 (its refiner); use the text "
        "encoders that it was trained with"
    )
