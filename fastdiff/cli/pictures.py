"""What ``txt2img``, ``img2img`` and ``inpaint`` share: a text-conditioned checkpoint to PNGs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import torch
import tyro
from torch import Tensor

from fastdiff.cli.console import Clock, backends_line, print_pairs, progress
from fastdiff.cli.machine import (
    BackendName,
    DtypeName,
    check_room,
    chosen_backend,
    device_and_dtype,
    output_folder,
)
from fastdiff.cli.parsing import OptionalPath
from fastdiff.diffusion.sampling import OnStep, Step
from fastdiff.generate.core import MAX_SEED, SampleSettings
from fastdiff.generate.image_to_image import first_step
from fastdiff.generate.text import PLAIN_TEXT, TEXT_SETTINGS, TextDiffusion, TextSettings
from fastdiff.images import contact_sheet, save_png

if TYPE_CHECKING:
    from fastdiff.cli.again import Original

SHEET_IMAGES = 64
PREVIEW_SIDE = 256
PREVIEW = "preview.png"


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The options that the three commands share."""

    count: int = 1
    """Images to make."""
    seed: int = 0
    """Seed of the first image; the next ones count up from it."""
    text: Annotated[TextSettings, tyro.conf.arg(name="")] = field(
        default_factory=lambda: PLAIN_TEXT
    )
    settings: Annotated[SampleSettings, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TEXT_SETTINGS
    )
    tokenizer: tuple[Path, ...] = ()
    """Folder of the CLIP tokenizer, one per text encoder, for files that hold none."""
    out: Path = Path("out")
    """Folder for the images; made if it is missing."""
    preview: bool = False
    """Write out/preview.png after each step: a cheap look at what is being made."""
    backend: BackendName = "auto"
    """Who computes the ops; auto takes the best that serves ('fastdiff doctor' lists them)."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    dtype: DtypeName = "fp32"
    """Number format of the networks; beside fp16 the autoencoder computes in fp32."""
    like: OptionalPath = None
    """Take the options from the recipe in this PNG. Without others the image is made again, bit for
    bit, compared, and written as NAME-again.png."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.settings.guidance_scale == 1 and self.text.negative is not None:
            raise ValueError(
                "guidance_scale 1 is no guidance and has no negative prompt, "
                f"got {self.text.negative!r:.40}; leave one of them out"
            )
        if not 0 <= self.seed <= MAX_SEED - (self.count - 1):
            raise ValueError(
                f"seeds must lie in 0 to 2^63 - 1, got {self.seed} to {self.seed + self.count - 1}"
            )

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.count)


class Command(Protocol):
    """What the options of each of the three commands have."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def prompt(self) -> str: ...
    @property
    def model(self) -> Path: ...
    @property
    def shared(self) -> Shared: ...


Make = Callable[..., Tensor]
"""Images for some of the seeds: make(seeds, on_step=..., progress=...)."""


def run(
    options: Command,
    prepare: Callable[[TextDiffusion], tuple[Make, dict[str, Any]]],
    *,
    inputs: Sequence[Path] = (),
    original: Original | None = None,
) -> int:
    """Load the checkpoint, make an image per seed, write PNGs and a contact sheet.

    prepare: called with the loaded model, before anything is computed; returns what makes the
    images, and what the recipe holds beside the prompt, the seed and the settings.
    inputs: files that must not be written over. original: the picture of ``--like``; if its image
    is asked for again, the new one is NAME-again.png and the two are compared.
    """
    import fastdiff
    from fastdiff.kernels import record_backends

    shared = options.shared
    again = original if original is not None and original.is_asked_again(options) else None
    paths = _paths(options, again)
    _keep([*inputs, *([original.path] if original else [])], paths, shared)
    device, dtype = device_and_dtype(shared.device, shared.dtype)
    clock = Clock()
    code = 0
    facts: list[tuple[str, str]] = []
    with output_folder(shared.out), chosen_backend(shared.backend), record_backends() as served:
        with clock("load"):
            checkpoint = fastdiff.load(
                options.model, device=device, dtype=dtype, tokenizer=shared.tokenizer or None
            )
            model = TextDiffusion(checkpoint, device=device, dtype=dtype)
        make, more = prepare(model)
        check_room(shared.out, shared.count)
        more["tokenizer"] = [str(folder) for folder in shared.tokenizer]

        def recipe(seed: int) -> dict[str, Any]:
            return model.recipe(options.prompt, seed, shared.text, shared.settings, **more)

        images = _make_all(model, shared, make, recipe, paths, clock)
        if again is not None:
            code, told = again.compared(images[0], recipe(shared.seed))
            facts = [("compared", told)]
        if shared.count > 1:
            with clock("write"):
                _save_sheet(paths[-1], images, options, recipe(shared.seed))
    print(paths[-1])
    made = f"{shared.count} of {images.shape[3]} x {images.shape[2]}, {_steps(model, shared, more)}"
    print_pairs(
        [
            ("images", made),
            ("weights", model.weights_hash[:12]),
            *facts,
            ("backends", backends_line(served)),
            ("time", clock.report()),
        ]
    )
    return code


def _steps(model: TextDiffusion, shared: Shared, more: Mapping[str, Any]) -> str:
    """The sampler, and how many steps were done."""
    asked, strength = shared.settings.steps, more.get("strength", 1.0)
    done = asked - first_step(asked, strength)
    of = "" if done == asked else f"{done} of "
    return f"{model.core.sampling(shared.settings)[0]}, {of}{asked} steps"


def _paths(options: Command, again: Original | None) -> list[Path]:
    """The files to write: one per seed, behind them the sheet of several."""
    out, seeds = options.shared.out, options.shared.seeds
    if again is not None:
        return [out / f"{again.path.stem}-again.png"]
    name = file_stem(options.prompt)
    sheet = [out / "sheet.png"] if len(seeds) > 1 else []
    return [*(out / f"{name}-seed{seed}.png" for seed in seeds), *sheet]


def _keep(inputs: Sequence[Path], paths: Sequence[Path], shared: Shared) -> None:
    """Raise ValueError if an input would be written over."""
    written = {path.resolve() for path in paths}
    if shared.preview:
        written.add((shared.out / PREVIEW).resolve())
    for path in inputs:
        if path.resolve() in written:
            raise ValueError(f"{path} would be written over; give another --out")


def _make_all(
    model: TextDiffusion,
    shared: Shared,
    make: Make,
    recipe: Callable[[int], dict[str, Any]],
    paths: Sequence[Path],
    clock: Clock,
) -> Tensor:
    """Make and write a batch of seeds at a time; returns the first ones, (N, 3, H, W)."""
    on_step = _preview_writer(model, shared.out) if shared.preview else None
    batch = shared.settings.batch
    shown: list[Tensor] = []
    with progress("sampling") as tell:
        for start in range(0, shared.count, batch):
            seeds = shared.seeds[start : start + batch]

            def advance(done: int, total: int, start: int = start, size: int = len(seeds)) -> None:
                rows = total // size  # of one image
                tell(start * rows + done, shared.count * rows)

            with clock("sample"):
                images = make(seeds, on_step=on_step, progress=advance)
            with clock("write"):
                for seed, image, path in zip(seeds, images, paths[start:], strict=False):
                    save_png(path, image, recipe(seed))
            shown += images[: SHEET_IMAGES - len(shown)]
    return torch.stack(shown)


def _preview_writer(model: TextDiffusion, folder: Path) -> OnStep:
    def write(step: Step) -> None:
        small = model.core.preview(step.denoised).float().cpu()
        save_png(
            folder / PREVIEW,
            contact_sheet(small, cell=PREVIEW_SIDE, caption=f"{step.done}/{step.total}"),
        )

    return write


def _save_sheet(path: Path, images: Tensor, options: Command, recipe: dict[str, Any]) -> None:
    seeds = options.shared.seeds
    sheet = contact_sheet(
        images,
        columns=min(len(images), 4),
        title=options.prompt[:80],
        caption=f"seeds {seeds[0]} to {seeds[len(images) - 1]}",
    )
    del recipe["seed"]
    save_png(path, sheet, {**recipe, "seeds": list(seeds)})


def file_stem(prompt: str) -> str:
    """A file name for a prompt: its first words, as letters and digits."""
    words = re.findall(r"\w+", prompt)
    return "-".join(words)[:40].strip("-_").lower() or "image"


def identity(path: Path) -> dict[str, str]:
    """A file in a recipe: where it lay and the hash of its bytes."""
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
