"""What ``txt2img``, ``img2img`` and ``inpaint`` share: a text-conditioned checkpoint to PNGs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

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
from fastdiff.images import contact_sheet, save_png
from fastdiff.pipelines.core import MAX_SEED, OnStep, Progress, SampleSettings, Step
from fastdiff.pipelines.text import PLAIN_TEXT, TEXT_SETTINGS, TextDiffusion, TextSettings

SHEET_IMAGES = 64
PREVIEW_SIDE = 256


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

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if not 0 <= self.seed <= MAX_SEED - (self.count - 1):
            raise ValueError(
                f"seeds must lie in 0 to 2^63 - 1, got {self.seed} to {self.seed + self.count - 1}"
            )

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.count)


Make = Callable[[TextDiffusion, Sequence[int], OnStep | None, Progress], Tensor]
"""Images for some of the seeds."""
Compare = Callable[[Tensor], tuple[int, list[tuple[str, str]]]]
"""An image to an exit code and what to say."""


def run(
    model: Path,
    prompt: str,
    shared: Shared,
    make: Callable[[TextDiffusion], tuple[Make, dict[str, Any]]],
    *,
    compare: Compare | None = None,
) -> int:
    """Load the checkpoint, make an image per seed, write PNGs and a contact sheet.

    make: called with the loaded model, before anything is computed; returns what makes the images,
    and what the recipe holds beside the prompt, the seed and the settings.
    compare: called with the image of a single seed, for ``--like``.
    """
    import fastdiff
    from fastdiff.kernels import record_backends

    device, dtype = device_and_dtype(shared.device, shared.dtype)
    clock = Clock()
    code = 0
    facts: list[tuple[str, str]] = []
    with output_folder(shared.out), chosen_backend(shared.backend), record_backends() as served:
        with clock("load"):
            checkpoint = fastdiff.load(
                model, device=device, dtype=dtype, tokenizer=shared.tokenizer or None
            )
            loaded = TextDiffusion(checkpoint, device=device, dtype=dtype)
        maker, more = make(loaded)
        check_room(shared.out, shared.count)
        images = _make_all(loaded, shared, maker, clock)
        more["tokenizer"] = [str(folder) for folder in shared.tokenizer]
        recipes = [
            loaded.recipe(prompt, seed, shared.text, shared.settings, **more)
            for seed in shared.seeds
        ]
        with clock("write"):
            path = _write(images, recipes, prompt, shared)
        if compare is not None:
            code, facts = compare(images[0])
    print(path)
    made = f"{loaded.core.sampling(shared.settings)[0]}, {shared.settings.steps} steps"
    print_pairs(
        [
            ("images", f"{len(images)} of {images.shape[3]} x {images.shape[2]}, {made}"),
            *facts,
            ("backends", backends_line(served)),
            ("time", clock.report()),
        ]
    )
    return code


def _make_all(model: TextDiffusion, shared: Shared, make: Make, clock: Clock) -> Tensor:
    """(N, 3, H, W), a batch of seeds at a time under one progress bar."""
    on_step = _preview_writer(model, shared.out) if shared.preview else None
    batch = shared.settings.batch
    parts: list[Tensor] = []
    with progress("sampling") as tell, clock("sample"):
        for start in range(0, shared.count, batch):
            seeds = shared.seeds[start : start + batch]

            def advance(done: int, total: int, start: int = start) -> None:
                passes = -(-shared.count // batch)
                tell(start // batch * total + done, passes * total)

            parts.append(make(model, seeds, on_step, advance))
    return torch.cat(parts)


def _preview_writer(model: TextDiffusion, folder: Path) -> OnStep:
    def write(step: Step) -> None:
        small = model.core.preview(step.denoised).float().cpu()
        path = folder / "preview.png"
        save_png(path, contact_sheet(small, cell=PREVIEW_SIDE, caption=f"{step.done}/{step.total}"))

    return write


def _write(images: Tensor, recipes: Sequence[dict[str, Any]], prompt: str, shared: Shared) -> Path:
    """A PNG per image and, of several, a sheet. Returns what to look at."""
    name = file_stem(prompt)
    paths = [shared.out / f"{name}-seed{seed}.png" for seed in shared.seeds]
    for path, image, recipe in zip(paths, images, recipes, strict=True):
        save_png(path, image, recipe)
    if len(images) == 1:
        return paths[0]
    shown = images[:SHEET_IMAGES]
    sheet = contact_sheet(
        shown,
        columns=min(len(shown), 4),
        title=prompt[:80],
        caption=f"seeds {shared.seed} to {shared.seed + len(shown) - 1}",
    )
    path = shared.out / "sheet.png"
    everything = {key: value for key, value in recipes[0].items() if key != "seed"}
    save_png(path, sheet, {**everything, "seeds": list(shared.seeds)})
    return path


def file_stem(prompt: str) -> str:
    """A file name for a prompt: its first words, as letters and digits."""
    words = re.findall(r"\w+", prompt)
    return "-".join(words)[:40].strip("-_").lower() or "image"


def identity(path: Path) -> dict[str, str]:
    """A file in a recipe: its name and the hash of its bytes."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
