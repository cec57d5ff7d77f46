"""What jobs need to know about a model; checks a job against it and fills in defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.respacing import respacing_steps
from fastdiff.generate.job import (
    CHECKPOINT,
    DEFAULT_SAMPLER,
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    Job,
    SampleSettings,
    TextJob,
    stage_options,
)
from fastdiff.generate.pictures import picture_size
from fastdiff.generate.stages import UPSAMPLER_STEPS, check_stages, resolved_text
from fastdiff.models.concat import extra_channels
from fastdiff.models.network import NetworkConfig
from fastdiff.names import Extra
from fastdiff.runtime.engine import check_cache

LDM_CLASSES = 1000
"""Rows of a class embedding that has none for "no class"."""
STEPS, TEXT_STEPS = 50, 30
GUIDANCE, TEXT_GUIDANCE = 1.5, 7.5
TILE, TEXT_TILE = 96, 128
MOST_AT_ONCE = 64
BATCH_PIXELS = MOST_AT_ONCE * 32 * 32
"""Default limit of the pixels of x in a batch of at most 64: 64 of 32 x 32, 16 of 64 x 64."""
SMALL = 2**28
"""Jobs that certainly take fewer bytes than this are started without a memory estimate."""
ACTIVATIONS = 64
"""Upper bound on the feature maps of the first level's size that a network holds at once: 25 in
Stable Diffusion 1's U-Net, 6 in its decoder. Attention scores are never stored."""
Checked = TypeVar("Checked", SampleSettings, Job)


@dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """What jobs need to know about a model that can sample."""

    model: Model
    channels: int
    """Channels of x, which is latents or pixels."""
    image_channels: int
    """Channels of the images that are generated."""
    factor: int
    """Ratio of the sides of the image to those of x."""
    size_factor: int
    """Heights and widths of images must be multiples of this."""
    only_size: int | None
    """The only height and width that the network supports; None: any multiple of `size_factor`."""
    image_size: int | None
    """Height and width that the model was trained on, in pixels; None if it is unknown."""
    extra: Extra
    """What the network reads in the channels after those of x."""
    num_classes: int | None
    """Number of classes; None for a model without classes."""
    null_class: bool
    """Whether there is an additional "no class", which guidance needs."""
    class_names: tuple[str, ...]
    """Names in the order of the labels; empty if the classes have none."""
    reads_text: bool
    """Whether the model is conditioned on a prompt."""
    pixels: bool
    """Whether x is the image itself."""
    learned_sigma: bool
    """Whether the network also predicts a variance."""
    classified: int | None
    """Number of classes of the classifier that guides the denoiser; None without one."""
    names_sampler: bool
    """Whether the checkpoint names a sampler, even one that fastdiff does not support."""

    @classmethod
    def of(cls, model: Model) -> Facts:
        """
        Raises:
            ValueError: the model cannot sample, or its parts do not belong together.
        """
        network, first = model.denoiser, model.autoencoder
        if network is None:
            if model.classifier is not None:
                raise ValueError(
                    f"{model.path} contains a classifier, which guides a denoiser; load the "
                    f"denoiser with classifier={str(model.path)!r}"
                )
            if model.clip is not None:
                raise ValueError(
                    f"{model.path} contains a noised CLIP, which guides a denoiser; load the "
                    f"denoiser with clip={str(model.path)!r}"
                )
            raise ValueError(
                f"{model.path} contains only an autoencoder, expected a denoiser too; "
                "train one with 'fastdiff train diffusion'"
            )
        if model.schedule is None:
            raise ValueError(
                f"{model.path} does not say which noise schedule its denoiser was trained with; "
                "load it with schedule=fastdiff.diffusion.schedules.ScheduleConfig(...), or load "
                "the folder of the whole model"
            )
        config = network.config
        channels = config.out_channels // (2 if config.learned_sigma else 1)
        if first is not None and first.config.latent_channels != channels:
            raise ValueError(
                f"the denoiser's latents have {channels} channels, the autoencoder's "
                f"{first.config.latent_channels}; use the autoencoder that it was trained with"
            )
        image_channels = channels if first is None else first.config.image_channels
        factor = model.upsampling * (1 if first is None else first.downsample_factor)
        table = model.class_embedding
        rows = 0 if table is None else table.num_embeddings
        # LDM's first ImageNet model has one row for each of its 1000 classes; all later ones have
        # an extra last row for "no class".
        null = bool(config.null_class) if table is None else rows != LDM_CLASSES
        classes = config.num_classes if table is None else rows - null
        reads_text = config.context_dim is not None and table is None
        if model.picture_noise is not None:
            classes = None  # the labels are noise levels
        elif reads_text and classes is not None:
            raise ValueError(
                f"the denoiser of {model.path} reads a label beside the text, and nothing states "
                "what it means; load the folder of the whole pipeline"
            )
        _check_context(model, config)
        if first is None and "latent size" in model.provenance:
            raise ValueError(
                f"the denoiser of {model.path} works on latents, which need an autoencoder; pass "
                "the one that it was trained with as vae="
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
            extra=_extra(
                model,
                config.in_channels,
                channels,
                image_channels,
                factor,
                depth=reads_text and first is not None,
            ),
            num_classes=classes,
            null_class=null,
            class_names=tuple(model.class_names),
            reads_text=reads_text,
            pixels=first is None,
            learned_sigma=config.learned_sigma,
            classified=None if model.classifier is None else model.classifier.config.num_classes,
            names_sampler=named,
        )

    @property
    def name(self) -> str:
        """The model's name in messages."""
        return self.model.name

    @property
    def masks_as_ldm(self) -> bool:
        """Whether an inpainting denoiser reads what LDM's does (inpainting_big): the latents of the
        masked image before the mask. Models that were trained here state that they do not."""
        return not self.pixels and not self.reads_text and self.model.extra is None

    @property
    def embeds_images(self) -> bool:
        """Whether the model is conditioned on the embedding of a picture (unCLIP)."""
        return self.model.image_encoder is not None

    @property
    def reads_image(self) -> bool:
        """Whether a job that starts from noise takes a picture: the small image of an upsampler, a
        sketch, or the picture whose embedding is the condition."""
        return self.extra in ("upsampler", "sketch") or self.embeds_images

    @property
    def enlarges_to_latents(self) -> bool:
        """Whether the model reads a low-resolution picture that has the size of its latents."""
        return self.extra == "upsampler" and not self.pixels

    def picture_sides(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """The (height, width) to which a job's picture is cropped and resized; None: as it is.

        height, width: those of the job. An image encoder and an upsampler on pixels resize any
        picture themselves.
        """
        if self.enlarges_to_latents:
            small = [
                None if side is None else max(side // self.factor, 1) for side in (height, width)
            ]
            return small[0], small[1]
        if self.embeds_images or self.extra == "upsampler":
            return None, None
        return height, width

    @property
    def label_classes(self) -> int | None:
        """Number of classes that a job may ask for: those of the denoiser, or, if it has none, of
        its classifier; None if there are no classes."""
        return self.classified if self.num_classes is None else self.num_classes

    def x_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of x for an image of this size."""
        return self.channels, height // self.factor, width // self.factor

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels; None becomes the size that the model was trained on.

        Raises:
            ValueError: the networks do not support the size, or the model does not state one.
        """
        height = self.image_size if height is None else height
        width = self.image_size if width is None else width
        if height is None or width is None:
            raise ValueError(
                "the checkpoint does not say which size it was trained on; set height and width"
            )
        self.check_size(height, width)
        return height, width

    def check_size(self, height: int, width: int, *, fits: bool = False) -> None:
        """Raise ValueError, with the nearest sizes, if the networks do not support these sides.

        fits: mention `fit`, which crops or resizes pictures to a supported size.
        """
        if (only := self.only_size) is not None and (height, width) != (only, only):
            raise ValueError(
                f"the image must be {only} x {only} for this model, which learned one position "
                f"embedding per patch, got {width} x {height} (width x height)"
            )
        factor = self.size_factor
        if height % factor == 0 and width % factor == 0 and height > 0 and width > 0:
            return
        below, above = (
            [max(rounded(side / factor), 1) * factor for side in (width, height)]
            for rounded in (math.floor, math.ceil)
        )
        way_out = ", or set fit (--fit) to crop or resize" if fits else ""
        near = " or ".join(dict.fromkeys(f"{w} x {h}" for w, h in (below, above)))
        raise ValueError(
            f"the sides of the image must be positive multiples of {factor}, got "
            f"{width} x {height} (width x height); the nearest sizes are {near}{way_out}"
        )

    def label(self, wanted: int | str | None) -> int | None:
        """The number of a class given by name or number; None for no class.

        Raises:
            ValueError: the model has no such class.
        """
        count, names = self.label_classes, self.class_names
        if isinstance(wanted, str) and wanted in names:
            return names.index(wanted)
        if isinstance(wanted, str) and wanted.isdecimal() and count and int(wanted) < count:
            return int(wanted)
        if wanted is None:
            if count is not None and self.num_classes is not None and not self.null_class:
                raise ValueError(
                    f"this model has no null class, got None; pass a class from 0 to {count - 1}"
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
        """Raise ValueError unless the model supports this guidance scale."""
        if scale <= 1 or self.reads_text or self.null_class:
            return
        lacks = "has no classes" if self.num_classes is None else "was trained without a null class"
        raise ValueError(f"this model {lacks}, so it cannot be guided; set guidance_scale=1")


def check(job: Job, facts: Facts) -> Job:
    """The job as the model will run it: classes as numbers, defaults filled in.

    Raises:
        ValueError: the job does not fit the model; the message says how to fix it.
    """
    settings = resolved(job.settings, facts)
    facts.check_guidance(settings.weight)
    negative = None if isinstance(job, ClassJob) else job.text.negative
    if settings.weight == 1 and negative is not None:
        raise ValueError(
            f"guidance_scale {settings.guidance_scale:g} turns guidance off, so the negative "
            f"prompt {negative!r:.40} would have no effect; leave one of them out"
        )
    _check_condition(job, facts)
    if facts.model.projection is not None or facts.embeds_images or stage_options(job):
        check_stages(job, facts.model)
    if (cache := settings.caching) is not None and facts.model.denoiser is not None:
        check_cache(
            cache,
            facts.model.denoiser,
            pulled=bool(settings.classifier_scale or settings.clip_scale),
            controlled=bool(getattr(job, "control", ())),
        )
    _check_control(job, facts)
    if settings.clip_scale and facts.model.clip is None:
        raise ValueError(
            f"{facts.name} was loaded without a noised CLIP, so clip_scale has no effect; give "
            "clip= (--clip PATH)"
        )
    change: dict[str, Any] = {"settings": settings}
    if not isinstance(job, ClassJob):
        change["text"] = resolved_text(job.text, facts.model)
    if not isinstance(job, TextJob) and not facts.reads_text:
        change["label"] = facts.label(job.label)
        if isinstance(job, InterpolationJob) and job.to_label is not None:
            change["to_label"] = facts.label(job.to_label)
    change |= _classified(job, change, facts)
    if isinstance(job, ClassJob | TextJob | InterpolationJob):
        change["height"], change["width"] = _size(job, facts)
    return _changed(job, change)


def _size(job: ClassJob | TextJob | InterpolationJob, facts: Facts) -> tuple[int, int]:
    """(height, width) of an image that begins with noise; of an upsampler on latents, which reads a
    picture of their size, the size of the job's picture after enlarging."""
    if not facts.enlarges_to_latents or job.image is None:
        return facts.size(job.height, job.width)
    small = picture_size(job.image, *facts.picture_sides(job.height, job.width))
    height, width = (facts.factor * side for side in small)
    return facts.size(job.height or height, job.width or width)


def _check_control(job: Job, facts: Facts) -> None:
    """Raise ValueError unless the model has a ControlNet for each of a job's control pictures."""
    pictures, count = getattr(job, "control", ()), len(facts.model.controlnets)
    if pictures and not count:
        raise ValueError(
            f"{facts.name} was loaded without a ControlNet, so control has no effect; give "
            "controlnet= (--controlnet PATH)"
        )
    if pictures and len(pictures) != count:
        raise ValueError(
            f"{facts.name} was loaded with {count} ControlNets, got {len(pictures)} control "
            "pictures; give one per ControlNet (in Python None for those that add nothing)"
        )


def _classified(job: Job, change: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Changes of a job that a classifier guides: the class that it pulls towards, as a number.

    A denoiser without classes leaves the job's class to the classifier. Between two classes there
    is no single one, so the job keeps its labels, which `Conditions` does not give to the denoiser.

    change: the changes so far, with the label as a number.

    Raises:
        ValueError: there is no classifier, or no class.
    """
    settings: SampleSettings = change["settings"]
    if facts.classified is None:
        if settings.classifier_scale or settings.classifier_class is not None:
            raise ValueError(
                f"{facts.name} was loaded without a classifier, so classifier_scale and "
                "classifier_class have no effect; give classifier= (--classifier PATH)"
            )
        return {}
    label, wanted = change.get("label"), settings.classifier_class
    if wanted is not None:
        wanted = facts.label(wanted)
    elif not isinstance(job, InterpolationJob):
        wanted = label
    leaves = facts.num_classes is None and not facts.reads_text
    for own in (label, change.get("to_label")):
        if leaves and wanted is not None and own not in (None, wanted):
            raise ValueError(
                f"{facts.name} has no classes, so class {own} could only be the classifier's, "
                f"which is {wanted}; leave one of them out"
            )
    guides = settings.classifier_scale and (wanted is not None or label is not None)
    if settings.classifier_scale and not guides:
        raise ValueError(
            "guidance by a classifier needs a class to pull towards, got none; give classes= "
            "(--classes) or classifier_class, or set classifier_scale=0"
        )
    changed = {"settings": _changed(settings, {"classifier_class": wanted})}
    moved = leaves and "label" in change and not isinstance(job, InterpolationJob)
    return {**changed, "label": None} if moved else changed


def _check_condition(job: Job, facts: Facts) -> None:
    """Raise ValueError unless the job has exactly the conditions that the model reads."""
    prompt = None if isinstance(job, ClassJob) else job.prompt
    shown = isinstance(job, InterpolationJob) and job.image is not None
    if facts.reads_text and prompt is None and not (shown and facts.embeds_images):
        raise ValueError(
            f"{facts.name} generates images from a prompt and got none; pass one "
            "(model.generate('a cat'), or fastdiff txt2img PROMPT)"
        )
    prompt = getattr(job, "to_prompt", None) if prompt is None else prompt
    if not facts.reads_text and prompt is not None:
        raise ValueError(
            f"{facts.name} does not read text, got prompt {prompt!r:.40}; leave the "
            "prompt out (fastdiff sample generates images of classes)"
        )
    for name in ("label", "to_label"):
        if facts.reads_text and (label := getattr(job, name, None)) is not None:
            raise ValueError(f"this model has no classes, got class {label!r}; leave it out")
    if facts.extra == "inpainting" and not isinstance(job, InpaintJob):
        reads, what = facts.channels * 2 + 1, "the image" if facts.pixels else "latents"
        raise ValueError(
            f"this denoiser reads {reads} channels: {facts.channels} of {what}, a mask and the "
            "image to inpaint; use inpaint, with a mask of ones to generate the whole image"
        )
    _check_depth(job, facts)
    _check_image(job, facts)


def _check_image(job: Job, facts: Facts) -> None:
    """Raise ValueError unless a job has the picture that the denoiser reads behind x."""
    from_noise = isinstance(job, ClassJob | TextJob)
    shown = from_noise and getattr(job, "image", None) is not None
    needs = {
        "upsampler": "enlarges a small image, and none",
        "sketch": "draws after a sketch, black on white, and none",
    }
    if facts.extra in needs and not shown:
        command = "txt2img PROMPT" if facts.reads_text else "sample"
        raise ValueError(
            f"{facts.name} {needs[facts.extra]} was given; pass image= "
            f"(fastdiff {command} --image FILE)"
        )
    if facts.extra == "upsampler" and getattr(job, "upscale", None) is not None:
        raise ValueError(f"{facts.name} enlarges a picture itself; leave upscale out")
    if facts.extra == "sketch" and getattr(job, "upscale", None) is not None:
        raise ValueError(
            "upscale cannot be combined with a sketch, which has the size of the first pass; leave "
            "upscale out, or enlarge the result with a model for image to image"
        )
    if shown and not facts.reads_image:
        raise ValueError(
            f"{facts.name} is not an upsampler, so it takes no image; for variations of an "
            "image use an ImageToImageJob (fastdiff img2img)"
        )


def _check_depth(job: Job, facts: Facts) -> None:
    """Raise ValueError unless a job has a depth map exactly if the model reads one."""
    given = isinstance(job, ImageToImageJob) and job.depth is not None
    if facts.extra == "depth" and not given:
        raise ValueError(
            f"{facts.name} changes a picture and reads its depth map, which fastdiff does not "
            "estimate; pass image= and depth= (fastdiff img2img PROMPT --image FILE --depth FILE)"
        )
    if given and facts.extra != "depth":
        raise ValueError(f"{facts.name} reads no depth map, so depth has no effect; leave it out")


def resolved(settings: SampleSettings, facts: Facts) -> SampleSettings:
    """The settings with defaults filled in, except for those that the sampler itself decides."""
    text, named = facts.reads_text, facts.names_sampler
    guidance = facts.model.guidance_scale
    if guidance is None:
        guidance = TEXT_GUIDANCE if text else GUIDANCE if facts.null_class else 1.0
    # Pixel models are published with samplers that clip the estimate of x0 to [-1, 1], and ours are
    # previewed so. Without it the first steps of ancestral samplers can leave that range for good.
    clamp = 1.0 if facts.pixels and not named else None
    defaults: dict[str, Any] = {
        "sampler": CHECKPOINT if named else DEFAULT_SAMPLER,
        "steps": (settings.spacing and respacing_steps(settings.spacing))
        or (TEXT_STEPS if text else STEPS),
        "guidance_scale": guidance,
        "clamp": clamp,
        "tile": TEXT_TILE if text else TILE,
        "classifier_scale": None if facts.classified is None else 1.0,
        "clip_scale": None if facts.model.clip is None else 1.0,
        "upsampler_steps": UPSAMPLER_STEPS if facts.model.upsamplers else None,
    }
    return _changed(
        settings,
        {name: value for name, value in defaults.items() if getattr(settings, name) is None},
    )


def _changed(config: Checked, change: Mapping[str, Any]) -> Checked:
    """`replace`, or the same object if nothing changes: jobs of a stream are checked twice, when
    they are read and when they begin."""
    if all(getattr(config, name) is value for name, value in change.items()):
        return config
    return replace(config, **change)


def default_batch(height: int, width: int, *, text: bool) -> int:
    """Default number of samples per batch for x of this size. text: the model reads text."""
    return max(1, min(4 if text else MOST_AT_ONCE, BATCH_PIXELS // (height * width)))


def is_small(job: Job, facts: Facts, batch: int, *, on_cpu: bool) -> bool:
    """Whether a checked job certainly takes less than SMALL, so that no estimate is needed.

    batch: number of images computed at once.
    """
    height, width = getattr(job, "height", None), getattr(job, "width", None)
    if height is None or width is None or getattr(job, "upscale", None):
        return False
    if getattr(job, "control", ()):
        return False
    channels, *sides = facts.x_shape(height, width)
    assert facts.model.denoiser is not None
    pixels, first = sides[0] * sides[1], facts.model.autoencoder
    evaluated = max(2 * pixels, 1024) if on_cpu else 2 * batch * pixels
    numbers = evaluated * getattr(facts.model.denoiser.config, "model_channels", 1024)
    if first is not None:
        decoded = max(pixels, 512) if on_cpu else batch * pixels
        numbers += decoded * facts.factor**2 * first.config.model_channels
    for stage in facts.model.upsamplers:
        assert stage.denoiser is not None
        stage_width = getattr(stage.denoiser.config, "model_channels", 1024)
        numbers += evaluated * facts.model.upsampling**2 * stage_width
    numbers = ACTIVATIONS * numbers + 16 * batch * channels * pixels
    return 4 * (numbers + deep_numbers(job, facts.model, (sides[0], sides[1]), batch)) < SMALL


def deep_numbers(job: Job, model: Model, sides: tuple[int, int], samples: int) -> int:
    """How many numbers the deep features of a job's branch have that an engine keeps between steps
    (`Denoiser.keep`): two rows per sample and one that nothing reads; 0 without `cache`.

    sides: (h, w) of x.
    """
    if (cache := job.settings.caching) is None or model.denoiser is None:
        return 0
    return (2 * samples + 1) * math.prod(model.denoiser.deep_shape(cache.branch, sides))


def _extra(
    model: Model, reads: int, channels: int, image_channels: int, factor: int, *, depth: bool
) -> Extra:
    """What the channels behind x are: what the files say, else what their number tells.

    depth: whether a single channel is a depth map.
    """
    stated = model.extra
    if stated is None and reads == channels:
        return "none"
    numbers: dict[Extra, int] = {
        kind: extra_channels(kind, channels=channels, image_channels=image_channels, factor=factor)
        for kind in get_args(Extra)
    }
    if stated is not None and reads - channels != numbers[stated]:
        raise ValueError(
            f"the denoiser of {model.path} reads {reads} channels, expected "
            f"{channels + numbers[stated]} for x and {stated!r}; use the autoencoder that it was "
            "trained with"
        )
    kinds: dict[int, Extra] = {1: "depth"} if depth else {}
    kinds |= {numbers[k]: k for k in ("none", "upsampler", "inpainting")}
    if stated is None and reads - channels not in kinds:
        raise ValueError(
            f"the denoiser reads {reads} channels and predicts {channels}; fastdiff supports such "
            f"denoisers with {' or '.join(str(channels + more) for more in sorted(kinds))} input "
            "channels"
        )
    return kinds[reads - channels] if stated is None else stated


def _check_context(model: Model, config: NetworkConfig) -> None:
    """Raise ValueError unless the text encoders produce what the denoiser reads."""
    width = config.context_dim
    if width is None or model.class_embedding is not None:
        return
    on_pixels = getattr(config, "context_attention", "cross") == "appended"  # GLIDE, unCLIP
    if model.autoencoder is None and not on_pixels:
        raise ValueError(
            f"expected a text-to-image checkpoint, got one without an autoencoder ({model.path}); "
            "load the whole model, or pass the autoencoder as vae="
        )
    if not model.text_encoders:
        raise ValueError(
            f"the checkpoint {model.path} has no text encoder; load the whole model with "
            "text_encoders=True"
        )
    if model.projection is not None:
        return  # its layout has compared the widths
    have = sum(encoder.model.config.hidden_size for encoder in model.text_encoders)  # type: ignore[union-attr,misc]
    if have != width:
        raise ValueError(
            f"the denoiser reads text vectors of width {width}, the text encoders produce {have}; "
            "use the text encoders that it was trained with"
        )
