"""``fastdiff reconstruct``: pass images through the autoencoder and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastdiff.cli.console import about_files, print_pairs
from fastdiff.cli.machine import Compute, at_work, device_and_dtype
from fastdiff.cli.options import FLAT, NO_NONE, LoadOptions
from fastdiff.cli.parsing import one_line, parse

if TYPE_CHECKING:
    from torch import Tensor


SHEET_COLUMNS = 12
SHEET = "reconstruction.png"
SSIM_WINDOW = 11


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Pass images through the autoencoder and back, and measure the loss.

    Writes reconstruction.png with the originals above their reconstructions, and for each image
    that is named NAME-reconstructed.png. Without images, the held-out digits are used.

    Examples:
      fastdiff reconstruct
      fastdiff reconstruct photo.jpg other.png --model runs/autoencoder --out out/pairs
      fastdiff reconstruct photos/ --model runs/autoencoder --batch 8
    """

    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="[PATH ...]", help_behavior_hint=""),
    ] = ()
    """Image files, or one folder of images; they are cropped and resized to the model's size."""
    model: str = "digits"
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    out: Path = Path("out")
    """Folder for the pictures, created if it is missing."""
    batch: int = 64
    """Number of images processed at once: limits memory, does not change the images."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    compute: Annotated[Compute, FLAT, NO_NONE] = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, got {self.batch}")


def main(words: Sequence[str]) -> int:
    options = parse(Reconstruct, words, prog="fastdiff reconstruct")
    return 0 if options is None else run(options)


def run(options: Reconstruct) -> int:
    import torch

    from fastdiff.checkpoint.open import load
    from fastdiff.generate.recipe import identity
    from fastdiff.generate.reconstruction import reconstruct, ssim
    from fastdiff.images import add_png, contact_sheet

    device, dtype = device_and_dtype(options.compute)
    said = replace(options.load, text_encoders=False)
    with at_work(options.out, options.compute) as work:
        with work.clock("load"):
            model = load(options.model, device=device, dtype=dtype, options=said)
            if model.autoencoder is None:
                raise ValueError(
                    f"{model.path} has no autoencoder, because its denoiser works on pixels; give "
                    "one with --vae"
                )
            if model.image_size is None or model.image_channels is None:
                raise ValueError(
                    f"{model.path} does not state the size of its images; give --image-size, or "
                    "the folder of the whole model"
                )
            images, files = _read(options.images, model.image_size, model.image_channels)
        with work.clock("reconstruct"):
            result = reconstruct(model.autoencoder, images, batch=options.batch)
        recipe = {"model": model.name, "weights": model.weights_hash}
        count = min(len(images), SHEET_COLUMNS)
        latents = " x ".join(map(str, result.latent_shape))
        summary = f"{result.psnr.mean():.2f} dB on average, {result.psnr.min():.2f} dB at worst"
        similar = _similarity(images, result.images, ssim)
        with work.clock("write"):
            for file, image in zip(files, result.images, strict=False):
                of = {"reconstruction_of": identity(file)}
                add_png(options.out / f"{file.stem}-reconstructed.png", image, {**recipe, **of})
            sheet = contact_sheet(
                torch.cat([images[:count], result.images[:count]]),
                ["original", "decoded"],
                title=model.name,
                caption=f"{summary} over {len(images)} images, latents {latents}",
            )
            shown: list[Any] = [identity(file) for file in files] or list(map(str, options.images))
            path = add_png(options.out / SHEET, sheet, {**recipe, "reconstructions_of": shown})
    print(path)
    shape = " x ".join(map(str, images.shape[1:]))
    ratio = images[0].numel() / torch.Size(result.latent_shape).numel()
    print_pairs(
        [
            (
                "images",
                f"{len(images)} of {shape}, latents {latents} ({ratio:.3g} times fewer numbers)",
            ),
            ("PSNR", summary),
            ("SSIM", similar),
            *about_files(model),
            *work.report(),
        ]
    )
    return 0


def _similarity(images: Tensor, back: Tensor, ssim: Callable[[Tensor, Tensor], Tensor]) -> str:
    if min(images.shape[2:]) < SSIM_WINDOW:
        return f"none: needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW}"
    try:
        values = ssim(back, images)
    except ImportError as error:  # the rest of the command works without it
        return f"none: {one_line(error)}"
    return f"{values.mean():.4f} on average, {values.min():.4f} at worst"


def _read(paths: Sequence[Path], image_size: int, image_channels: int) -> tuple[Tensor, list[Path]]:
    """Images (N, C, H, W) at the model's size, and the paths of those given individually."""
    import torch

    from fastdiff.data import DataConfig, open_dataset
    from fastdiff.data.dataset import to_float
    from fastdiff.data.decode import decode
    from fastdiff.images import UNREADABLE, reason

    def data(path: Path) -> DataConfig:
        return DataConfig(
            source="folder",
            path=str(path),
            image_size=image_size,
            channels=image_channels,
        )

    if not paths:
        if image_channels != 1:
            raise ValueError(
                "the digits are grey, but this model expects RGB images; name images to reconstruct"
            )
        digits = open_dataset(DataConfig(split="held-out", image_size=image_size))
        return to_float(digits.images), []
    if len(paths) == 1 and paths[0].is_dir():
        return to_float(open_dataset(data(paths[0])).images), []
    images = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no image at {path}; give image files, or one folder of them")
        try:
            pixels = decode(path, data(path.parent))
        except UNREADABLE as error:
            raise ValueError(f"{path} cannot be read: {reason(error)}") from error
        images.append(torch.tensor(pixels))
    return to_float(torch.stack(images)), list(paths)
