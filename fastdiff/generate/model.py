"""`fastdiff.load`: a model that can generate images."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ParamSpec, overload

import torch
from PIL.Image import Image
from torch import Tensor

from fastdiff.checkpoint import open as checkpoint_open
from fastdiff.checkpoint.guide import with_classifier, with_clip
from fastdiff.checkpoint.model import Model as CheckpointModel
from fastdiff.checkpoint.open import open_classifier, open_clip, open_device
from fastdiff.diffusion.gradients import Pull
from fastdiff.diffusion.sampling import OnStep
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import (
    GROUPS,
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    Job,
    Picture,
    TextJob,
    UpscaleJob,
    frames_of,
)
from fastdiff.generate.pictures import check_same_size, read_picture
from fastdiff.generate.run import Progress, Result, generate
from fastdiff.generate.session import Session
from fastdiff.images import read_mask

AnyPicture = Picture | Image | Result
Pictures = AnyPicture | Sequence[Picture] | Sequence[Image] | Sequence[Result]


class Model(CheckpointModel):
    """The parts of a checkpoint, with methods that sample from them."""

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        classes: int | str | Sequence[int | str | None] | None = None,
        seeds: int | Sequence[int] | None = None,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        control: Pictures | Sequence[Sequence[Picture | None]] | None = None,
        depth: Pictures | None = None,
        frames: int | None = None,
        refiner: CheckpointModel | None = None,
        classifier: CheckpointModel | str | os.PathLike[str] | None = None,
        clip: CheckpointModel | str | os.PathLike[str] | None = None,
        pulls: Sequence[Pull] = (),
        progress: Progress | None = None,
        on_step: OnStep | None = None,
        log_probs: bool = False,
        **options: Any,
    ) -> Images:
        """Make images in one call; `fastdiff.generate` streams any mix of jobs.

        The arguments determine the kind of job: a mask makes an `InpaintJob`, an image with `scale`
        an `UpscaleJob`, an image an `ImageToImageJob` (with an upsampler a `ClassJob` or, with a
        prompt, a `TextJob`; with an image encoder a `TextJob`), `frames` an `InterpolationJob`, a
        prompt a `TextJob`, and anything else a `ClassJob`.

        Args:
            prompts: one for all images, or one per image.
            classes: one for all images, or one per image: a number or name, None for no class.
            seeds: one per image; None: counting up from 0, one per prompt or class.
            image, mask: a file, a Pillow image, a result of `generate`, or pixels (C, H, W) in
                [-1, 1]; the mask is white, or 1, where the image is to be replaced. One for all
                images; or one per seed, as a list or a batch (N, C, H, W).
            control: the picture that the model's ControlNet reads, given like image; for several
                ControlNets a tuple with one per ControlNet, None for those that add nothing.
            depth: the depth map of the image, for models that read one, given like mask; as a
                tensor of any size and range.
            frames: number of images from each seed's image to that of to_seed, to_prompt,
                to_label or to_image (one or more of them), including both ends; 1: the frame at
                position `at`.
            options: fields of the job, of `SampleSettings` and of `TextSettings`: steps=20,
                sampler="ddim", guidance_scale=7, negative="blurry", strength=0.5, height=512, ...
            classifier: a noisy classifier that pulls the images towards their classes, with the
                option classifier_scale: a model that contains one, or its file or folder.
            clip: a noised CLIP that pulls the images towards their prompts, with the option
                clip_scale: a model that contains one, or its folder.
            refiner, pulls, progress, on_step, log_probs: as in `fastdiff.generate`.

        Raises:
            ValueError: the arguments do not fit the model or each other.
        """
        for name, argument in (("prompt", "prompts"), ("label", "classes"), ("seed", "seeds")):
            if name in options:
                raise ValueError(f"unknown option {name!r}; give {argument}=")
        model = self._guided(classifier=classifier, clip=clip)
        classes, seeds = _listed(classes), _listed(seeds)
        count, seeds = _seeds(seeds, prompts, classes)
        facts = Facts.of(model)
        if frames is not None and (
            mask is not None or (image is not None and not facts.embeds_images)
        ):
            raise ValueError(
                "frames lie between two seeds, prompts or classes; leave image and mask out"
            )
        if frames is not None and control is not None:
            raise ValueError("an interpolation takes no control picture; leave control out")
        names = ("height", "width")
        sizes = facts.picture_sides(*(options.get(name) for name in names))
        sides = dict(zip(names, sizes, strict=True))
        if facts.embeds_images:
            prompts = "" if prompts is None and frames is None else prompts
        if isinstance(last := options.get("to_image"), Image | Result):
            options["to_image"] = _picture(last, facts.image_channels, sides)
        if any(sides.values()):
            _check_sizes(image, mask)
        given = {
            "prompt": _each("prompts", prompts, count),
            "label": _each("classes", classes, count),
            "image": _pictures("image", image, count, facts.image_channels, sides),
            "mask": _pictures("mask", mask, count, None, sides),
            "control": _control(control, count),
            "depth": _pictures("depth", depth, count, None, {}),
        }
        kind: type[Any] = InterpolationJob
        if frames is None:
            kind = _kind(facts, prompts, image, mask, options)
            if leads := [
                name for name in ("to_seed", "to_prompt", "to_label", "to_image") if name in options
            ]:
                raise ValueError(
                    f"{leads[0]} needs frames, the number of images to make (frames=1 with at= for "
                    "a single one)"
                )
        jobs: list[Job] = []
        for index, seed in enumerate(seeds):
            own = {name: each[index] for name, each in given.items() if each is not None}
            job = _make(kind, {**options, **own, "seed": seed})
            jobs += [job] if frames is None else frames_of(job, frames)
        made = generate(
            model,
            jobs,
            refiner=refiner,
            pulls=pulls,
            progress=progress,
            on_step=on_step,
            log_probs=log_probs,
        )
        return Images(list(made))

    def _guided(self, **guides: CheckpointModel | str | os.PathLike[str] | None) -> CheckpointModel:
        """This model with a classifier and a CLIP; the same object as long as all stay the same."""
        if not any(guide is not None for guide in guides.values()):
            return self
        state = (
            *(
                id(guide) if isinstance(guide, CheckpointModel | None) else os.fspath(guide)
                for guide in guides.values()
            ),
            *(id(getattr(self, field.name)) for field in fields(self)),
        )
        kept: tuple[object, CheckpointModel, object] | None = vars(self).get("_guided_model")
        if kept is None or kept[0] != state:
            device = next(next(iter(self.modules.values())).parameters()).device
            model: CheckpointModel = self
            if (other := guides["classifier"]) is not None:
                if not isinstance(other, CheckpointModel):
                    other = open_classifier(other, self, device)
                model = with_classifier(model, other)
            if (other := guides["clip"]) is not None:
                if not isinstance(other, CheckpointModel):
                    other = open_clip(other, self, device)
                model = with_clip(model, other)
            kept = vars(self)["_guided_model"] = (state, model, guides)
        return kept[1]

    def to(self, device: torch.device | str) -> Model:
        """Move all networks to a device, in place like `nn.Module.to`; returns the model itself.

        The number format is chosen when a model is loaded: `fastdiff.load(path, dtype=...)`.

        Raises:
            ValueError: this machine has no such device.
        """
        device = open_device(device)
        for module in self.modules.values():
            module.to(device)
        vars(self).pop("_session", None)  # it has buffers on the old device
        vars(self).pop("_guided_model", None)
        return self

    def preview(self, z: Tensor) -> Tensor:
        """A cheap preview of latents, such as a `Step`'s `denoised`, without decoding them.

        z: (N, C, h, w). Returns (N, image_channels, h, w) in [-1, 1].
        """
        return Session.of(self).latents.preview(z)


class Images(Sequence[Result]):
    """The results of one call, in the order of the seeds."""

    def __init__(self, results: list[Result]) -> None:
        self.results = results

    @property
    def pil(self) -> list[Image]:
        """The images as Pillow images."""
        return [result.pil for result in self.results]

    @property
    def tensor(self) -> Tensor:
        """(N, C, H, W) in [-1, 1], on the CPU."""
        return torch.stack([result.image for result in self.results])

    def __repr__(self) -> str:
        if not self.results:
            return "Images(none)"
        sizes = sorted({(*result.image.shape[1:],) for result in self.results})
        shown = ", ".join(f"{width} x {height}" for height, width in sizes)
        return f"Images({len(self)} of {shown}; .tensor, .pil, [0].save(path))"

    def __len__(self) -> int:
        return len(self.results)

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: int | slice) -> Result | Images:
        found = self.results[index]
        return Images(found) if isinstance(found, list) else found

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)


P = ParamSpec("P")


def _sampling(opener: Callable[P, CheckpointModel]) -> Callable[P, Model]:
    """Wrap a function that opens a checkpoint to return a model that can generate."""

    @functools.wraps(opener)
    def load(*args: P.args, **options: P.kwargs) -> Model:
        return with_generate(opener(*args, **options))

    return load


def with_generate(model: CheckpointModel) -> Model:
    """Add `generate` to a model."""
    if isinstance(model, Model):
        return model
    return Model(**{field.name: getattr(model, field.name) for field in fields(model)})


load = _sampling(checkpoint_open.load)


def _kind(
    facts: Facts,
    prompts: object,
    image: Pictures | None,
    mask: Pictures | None,
    options: dict[str, Any],
) -> type[Any]:
    if mask is not None:
        if image is None:
            raise ValueError("mask needs image, the picture to change; give image as well")
        return InpaintJob
    if image is not None:
        if facts.reads_image:
            return ClassJob if prompts is None else TextJob
        return UpscaleJob if "scale" in options else ImageToImageJob
    return ClassJob if prompts is None else TextJob


def _seeds(seeds: Any, prompts: Any, classes: Any) -> tuple[int, list[int]]:
    """The number of images, and a seed for each."""
    lists = []
    for name, each in (("prompts", prompts), ("classes", classes)):
        if each is not None and not _single(each):
            if not len(each):
                raise ValueError(f"{name} is empty; each of them makes one image")
            lists.append(each)
    if seeds is None:
        seeds = range(len(lists[0]) if lists else 1)
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    if not seeds:
        raise ValueError("expected at least one seed, got none; each seed makes one image")
    return len(seeds), seeds


def _listed(value: Any) -> Any:
    """NumPy's arrays and tensors as lists, or as a number if they have no dimensions."""
    return value.tolist() if hasattr(value, "tolist") else value


def _single(value: object) -> bool:
    return isinstance(value, str) or not hasattr(value, "__len__")


def _each(name: str, value: Any, count: int) -> list[Any] | None:
    if value is None or _single(value):
        return None if value is None else [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name} must be one for all images or one per seed, got {len(value)} {name} and "
            f"{count} seeds"
        )
    return list(value)


def _pictures(
    name: str, value: Pictures | None, count: int, channels: int | None, sides: dict[str, Any]
) -> list[Picture] | None:
    """One picture for each seed: files, and tensors of what is in memory.

    channels: of the model's images; None for a mask. sides: height and width to resize to.
    """
    if value is None:
        return None
    if isinstance(value, Tensor) and value.ndim == 4 and len(value) != 1:
        value = list(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [_picture(value, channels, sides)] * count
    _check_count(name, value, count)
    return [_picture(each, channels, sides) for each in value]


def _check_sizes(image: Pictures | None, mask: Pictures | None) -> None:
    """Raise ValueError if images and masks that are to be resized differ in size."""
    images, masks = (
        list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for value in (image, mask)
    )
    count = max(len(images), len(masks))
    images, masks = (each * count if len(each) == 1 else each for each in (images, masks))
    for picture, own in zip(images, masks, strict=False):  # `_check_count` counts them
        check_same_size(picture, own)


def _check_count(name: str, value: Sequence[Any], count: int) -> None:
    if len(value) != count:
        raise ValueError(
            f"{name} must be one for all images or one per seed, got {len(value)} for {count} seeds"
        )


def _control(value: Any, count: int) -> list[Any] | None:
    """For each seed a picture, or a tuple of one per ControlNet."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return [tuple(None if each is None else _picture(each, 3, {}) for each in value)] * count
    if isinstance(value, list) and any(isinstance(each, tuple) for each in value):
        _check_count("control", value, count)
        return [found for each in value for found in _control(each, 1) or ()]
    return _pictures("control", value, count, 3, {})


def _picture(value: AnyPicture, channels: int | None, sides: dict[str, Any]) -> Picture:
    if isinstance(value, Result):
        if channels is not None:
            return value.image
        value = value.pil  # a mask is read from grey levels
    if not isinstance(value, Image):
        return value
    if channels is None:
        return read_mask(value, **sides)
    return read_picture(value, channels, **sides)


def _make(kind: type[Any], options: Mapping[str, Any]) -> Any:
    """Create a job from flat names: its own fields, and those of its settings and its text.

    Raises:
        ValueError: a name is unknown or missing, or a value is invalid.
    """
    own: dict[str, Any] = {field.name: field for field in fields(kind)}
    groups: dict[str, type[Any]] = {name: GROUPS[name] for name in own if name in GROUPS}
    given: dict[str, Any] = {name: options[name] for name in own if name in options}
    for name, group in groups.items():
        inner = {f.name: options[f.name] for f in fields(group) if f.name in options}
        if inner:
            given[name] = replace(given.get(name, own[name].default), **inner)
    known = [*own, *(f.name for group in groups.values() for f in fields(group))]
    if unknown := [name for name in options if name not in known]:
        # arguments of their own
        hidden = {*GROUPS, "prompt", "label", "seed", "image", "mask", "control", "depth"}
        names = [name for name in known if name not in hidden]
        close = " or ".join(difflib.get_close_matches(unknown[0], names, n=2))
        meant = f"did you mean {close}? Expected" if close else "expected"
        raise ValueError(f"unknown option {unknown[0]!r}; {meant} one of {', '.join(names)}")
    return kind(**given)
