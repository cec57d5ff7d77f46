"""What jobs need to know of a model, and the check of a job against it, which fills in defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.respacing import respacing_steps
from fastdiff.generate.job import (
    CHECKPOINT,
    DEFAULT_SAMPLER,
    ClassJob,
    InpaintJob,
    InterpolationJob,
    Job,
    SampleSettings,
    TextJob,
)

LDM_CLASSES = 1000
"""Rows of a table of classes without one for "no class"."""
STEPS, TEXT_STEPS = 50, 30
GUIDANCE, TEXT_GUIDANCE = 1.5, 7.5
TILE, TEXT_TILE = 96, 128
MOST_AT_ONCE = 64
BATCH_PIXELS = MOST_AT_ONCE * 32 * 32
"""Pixels of x at once by default, in at most 64 images: 64 of 32 x 32, 16 of 64 x 64."""
SMALL = 2**28
"""Bytes below which a job's memory is not estimated before it starts."""
ACTIVATIONS = 64
"""Feature maps of the first level's size that a network holds at most: 25 in Stable Diffusion 1's
U-Net, 6 in its decoder; attention never holds its scores."""
Extra = Literal["none", "inpainting", "upsampler"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """Of one model that samples."""

    model: Model
    channels: int
    """Of x: of latents, or of pixels."""
    image_channels: int
    """Of the images that come out."""
    factor: int
    """Pixels of the image per pixel of x along a side."""
    size_factor: int
    """Heights and widths of images must be multiples of this."""
    only_size: int | None
    """The only height and width of images that the network can make; None: any multiple."""
    image_size: int | None
    """Height and width the model was trained on, in pixels; None where it does not say."""
    extra: Extra
    """What the network reads behind the channels of x."""
    num_classes: int | None
    """Classes; None for a model without."""
    null_class: bool
    """Whether there is a "no class" beside them, which guidance needs."""
    class_names: tuple[str, ...]
    """In the order of the labels; empty where nobody named them."""
    reads_text: bool
    """Whether a prompt is the condition."""
    pixels: bool
    """Whether x is the image itself."""
    published: bool
    """Whether the files come from elsewhere, so that a paper says how to sample."""
    learned_sigma: bool
    """Whether the network returns a variance too."""
    names_sampler: bool
    """Whether the files name a sampler, even one that fastdiff lacks."""

    @classmethod
    def of(cls, model: Model) -> Facts:
        """
        Raises:
            ValueError: the model does not sample, or its parts do not belong together.
        """
        network, first = model.denoiser, model.autoencoder
        if network is None:
            raise ValueError(
                f"{model.path} holds an autoencoder only, expected a denoiser too; "
                "train one with 'fastdiff train diffusion'"
            )
        if model.schedule is None:
            raise ValueError(
                f"{model.path} does not say with which noise its denoiser was trained; load it "
                "with schedule=fastdiff.diffusion.schedules.ScheduleConfig(...), or give the whole "
                "model's folder"
            )
        config = network.config
        channels = config.out_channels // (2 if config.learned_sigma else 1)
        if first is not None and first.config.latent_channels != channels:
            raise ValueError(
                f"the denoiser makes latents of {channels} channels and the autoencoder reads "
                f"{first.config.latent_channels}; give the autoencoder that it was trained with"
            )
        image_channels = channels if first is None else first.config.image_channels
        factor = 1 if first is None else first.downsample_factor
        table = model.class_embedding
        rows = 0 if table is None else table.num_embeddings
        # LDM's first ImageNet model has a row per class, 1000, and every later one a last row for
        # "no class".
        null = bool(config.null_class) if table is None else rows != LDM_CLASSES
        classes = config.num_classes if table is None else rows - null
        _check_context(model, config.context_dim)
        if first is None and "latent size" in model.provenance:
            raise ValueError(
                f"the denoiser of {model.path} makes latents, which need an autoencoder; give the "
                "one that it was trained with as vae="
            )
        named = model.sampler is not None or bool(model.provenance.get("no_sampler"))
        return cls(
            model=model,
            channels=channels,
            image_channels=image_channels,
            factor=factor,
            size_factor=factor * config.size_multiple,
            only_size=None if network.only_side is None else factor * network.only_side,
            image_size=model.image_size,
            extra=_extra(config.in_channels, channels, image_channels, latent=first is not None),
            num_classes=classes,
            null_class=null,
            class_names=tuple(model.class_names),
            reads_text=config.context_dim is not None and table is None,
            pixels=first is None,
            published=model.layout != "bundle",
            learned_sigma=config.learned_sigma,
            names_sampler=named,
        )

    @property
    def name(self) -> str:
        """What messages call the model."""
        return self.model.name

    def x_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of what is diffused for an image of this size."""
        return self.channels, height // self.factor, width // self.factor

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, what is None as the model was trained.

        Raises:
            ValueError: the size does not fit the networks, or the model does not tell one.
        """
        height = self.image_size if height is None else height
        width = self.image_size if width is None else width
        if height is None or width is None:
            raise ValueError(
                "the checkpoint does not say for which size it was trained; give height and width"
            )
        self.check_size(height, width)
        return height, width

    def check_size(self, height: int, width: int, *, fits: bool = False) -> None:
        """Raise ValueError, with the nearest sizes, unless the networks can halve these sides.

        fits: they are a picture's, which `fit` would crop or resize.
        """
        if (only := self.only_size) is not None and (height, width) != (only, only):
            raise ValueError(
                f"the image must be {only} x {only} for this model, which has learned a position "
                f"for each of its patches, got {width} x {height} (width x height)"
            )
        factor = self.size_factor
        if height % factor == 0 and width % factor == 0 and height > 0 and width > 0:
            return
        below, above = (
            [max(rounded(side / factor), 1) * factor for side in (width, height)]
            for rounded in (math.floor, math.ceil)
        )
        way_out = ", and fit (--fit) crop or resize makes it so" if fits else ""
        near = " or ".join(dict.fromkeys(f"{w} x {h}" for w, h in (below, above)))
        raise ValueError(
            f"the sides of the image must be positive multiples of {factor}, got "
            f"{width} x {height} (width x height); the nearest sizes are {near}{way_out}"
        )

    def label(self, wanted: int | str | None) -> int | None:
        """A class by name or number as a number; None for no class.

        Raises:
            ValueError: the model has no such class.
        """
        count, names = self.num_classes, self.class_names
        if isinstance(wanted, str) and wanted in names:
            return names.index(wanted)
        if isinstance(wanted, str) and wanted.isdecimal() and count and int(wanted) < count:
            return int(wanted)
        if wanted is None:
            if count is not None and not self.null_class:
                raise ValueError(
                    f"this model has no null class, got None; give a class from 0 to {count - 1}"
                )
            return None
        if count is None:
            raise ValueError(f"this model has no classes, got class {wanted!r}; leave it out")
        if isinstance(wanted, str):
            known = names or [str(label) for label in range(count)]
            shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise ValueError(f"unknown class {wanted!r}; expected one of {shown}")
        if isinstance(wanted, bool) or not 0 <= wanted < count:
            raise ValueError(f"class must be from 0 to {count - 1}, got {wanted!r}")
        return wanted

    def check_guidance(self, scale: float) -> None:
        """Raise ValueError unless the model can be guided so."""
        if scale <= 1 or self.reads_text or self.null_class:
            return
        lacks = "has no classes" if self.num_classes is None else "was trained without a null class"
        raise ValueError(f"this model {lacks}, so it cannot be guided; set guidance_scale=1")


def check(job: Job, facts: Facts) -> Job:
    """The job as the model does it: the class as a number, the defaults filled in.

    Raises:
        ValueError: it does not fit the model; one line with the way out.
    """
    settings = resolved(job.settings, facts)
    facts.check_guidance(settings.weight)
    negative = None if isinstance(job, ClassJob) else job.text.negative
    if settings.weight == 1 and negative is not None:
        raise ValueError(
            f"guidance_scale {settings.guidance_scale:g} is no guidance and has no negative "
            f"prompt, got {negative!r:.40}; leave one of them out"
        )
    _check_condition(job, facts)
    change: dict[str, Any] = {"settings": settings}
    if not isinstance(job, TextJob) and not facts.reads_text:
        change["label"] = facts.label(job.label)
        if isinstance(job, InterpolationJob) and job.to_label is not None:
            change["to_label"] = facts.label(job.to_label)
    if isinstance(job, ClassJob | TextJob | InterpolationJob):
        change["height"], change["width"] = facts.size(job.height, job.width)
    return replace(job, **change)


def _check_condition(job: Job, facts: Facts) -> None:
    """A prompt, a class, an image to inpaint or enlarge: what the model reads, and no more."""
    prompt = None if isinstance(job, ClassJob) else job.prompt
    if facts.reads_text and prompt is None:
        raise ValueError(
            f"{facts.name} draws what a prompt says; give it one "
            "(model.generate('a cat'), or fastdiff txt2img PROMPT)"
        )
    prompt = getattr(job, "to_prompt", None) if prompt is None else prompt
    if not facts.reads_text and prompt is not None:
        raise ValueError(
            f"the denoiser of {facts.name} reads no text, got prompt {prompt!r:.40}; leave the "
            "prompt out (fastdiff sample draws classes)"
        )
    for name in ("label", "to_label"):
        if facts.reads_text and (label := getattr(job, name, None)) is not None:
            raise ValueError(f"this model has no classes, got class {label!r}; leave it out")
    if facts.extra == "inpainting" and not isinstance(job, InpaintJob):
        reads = facts.channels * 2 + 1
        raise ValueError(
            f"this denoiser reads {reads} channels, {facts.channels} of latents and an image to "
            "inpaint; use inpaint, with a mask of ones to make the whole image new"
        )
    if facts.extra == "upsampler" and (not isinstance(job, ClassJob) or job.image is None):
        raise ValueError(
            f"{facts.name} enlarges a small image and needs one; give image= "
            "(fastdiff sample --image FILE)"
        )
    if facts.extra != "upsampler" and isinstance(job, ClassJob) and job.image is not None:
        raise ValueError(
            f"{facts.name} is not an upsampler and starts from noise; for variations of an image "
            "use an ImageToImageJob (fastdiff img2img)"
        )


def resolved(settings: SampleSettings, facts: Facts) -> SampleSettings:
    """The settings with nothing left open but what the sampler itself decides."""
    text, named = facts.reads_text, facts.names_sampler
    guidance = TEXT_GUIDANCE if text else GUIDANCE if facts.null_class else 1.0
    # The papers' samplers clip the estimate of x0 to the range of pixels.
    clamp = 1.0 if facts.pixels and facts.published and not named else None
    defaults: dict[str, Any] = {
        "sampler": CHECKPOINT if named else DEFAULT_SAMPLER,
        "steps": (settings.spacing and respacing_steps(settings.spacing))
        or (TEXT_STEPS if text else STEPS),
        "guidance_scale": guidance,
        "clamp": clamp,
        "tile": TEXT_TILE if text else TILE,
    }
    return replace(
        settings,
        **{name: value for name, value in defaults.items() if getattr(settings, name) is None},
    )


def default_batch(height: int, width: int, *, text: bool) -> int:
    """Samples of x at once, from the size of one; text: with a context to attend to."""
    return max(1, min(4 if text else MOST_AT_ONCE, BATCH_PIXELS // (height * width)))


def is_small(job: Job, facts: Facts, batch: int, *, on_cpu: bool) -> bool:
    """Whether a checked job surely takes less than SMALL; others deserve an estimate.

    batch: images at once.
    """
    height, width = getattr(job, "height", None), getattr(job, "width", None)
    if height is None or width is None or getattr(job, "upscale", None):
        return False
    channels, *sides = facts.x_shape(height, width)
    assert facts.model.denoiser is not None
    pixels, first = sides[0] * sides[1], facts.model.autoencoder
    evaluated = max(2 * pixels, 1024) if on_cpu else 2 * batch * pixels
    numbers = evaluated * getattr(facts.model.denoiser.config, "model_channels", 1024)
    if first is not None:
        decoded = max(pixels, 512) if on_cpu else batch * pixels
        numbers += decoded * facts.factor**2 * first.config.model_channels
    return 4 * (ACTIVATIONS * numbers + 16 * batch * channels * pixels) < SMALL


def _extra(reads: int, channels: int, image_channels: int, *, latent: bool) -> Extra:
    kinds: dict[int, Extra] = {0: "none", image_channels: "upsampler"}
    if latent:
        kinds[channels + 1] = "inpainting"
    if reads - channels not in kinds:
        raise ValueError(
            f"the denoiser reads {reads} channels and makes {channels}; fastdiff knows what the "
            f"rest is for {' or '.join(str(channels + more) for more in sorted(kinds))} channels"
        )
    return kinds[reads - channels]


def _check_context(model: Model, width: int | None) -> None:
    """The denoiser's tokens must be those that the conditioners make."""
    if width is None or model.class_embedding is not None:
        return
    if model.autoencoder is None:
        raise ValueError(
            f"expected a text-to-image checkpoint, got one without autoencoder ({model.path}); "
            "give the whole model, or the autoencoder as vae="
        )
    if not model.text_encoders:
        raise ValueError(
            f"the checkpoint {model.path} has no text encoder; give the whole model, loaded with "
            "text_encoders=True"
        )
    have = sum(encoder.model.config.hidden_size for encoder in model.text_encoders)  # type: ignore[union-attr,misc]
    if have != width:
        raise ValueError(
            f"the denoiser reads text vectors {width} wide and the text encoders make {have}; "
            "give the text encoders that it was trained with"
        )
