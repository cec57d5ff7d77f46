"""Read and check the pictures of jobs, which are files or tensors."""

from __future__ import annotations

import os
from collections.abc import Hashable

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastdiff.generate.job import Fit, InpaintJob, Picture
from fastdiff.images import image_size, read_grey, read_image, read_mask


def read_picture(
    picture: Picture | bytes | Image.Image, channels: int, height: int | None, width: int | None
) -> Tensor:
    """Read an image as (C, H, W) in [-1, 1]; all but tensors are converted to the model's colours.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the picture is not such an image.
    """
    if not isinstance(picture, Tensor):
        if channels == 1:
            return read_grey(picture, height=height, width=width)
        return read_image(picture, height=height, width=width)
    image = picture[0] if picture.ndim == 4 and len(picture) == 1 else picture
    if image.ndim != 3 or image.shape[0] != channels or not image.is_floating_point():
        raise ValueError(
            f"the image must be ({channels}, H, W) floating point in [-1, 1], got "
            f"{tuple(image.shape)} {image.dtype}; fastdiff.images.read_image returns one"
        )
    if (height or image.shape[1], width or image.shape[2]) != tuple(image.shape[1:]):
        raise ValueError(
            f"height and width resize files only, got a tensor of shape {tuple(image.shape)}; "
            "leave them out"
        )
    if not image.numel():
        raise ValueError(f"the image has no pixels, got shape {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not -1.001 <= low <= high <= 1.001:
        raise ValueError(
            f"pixels must lie in [-1, 1], got {low:g} to {high:g}; "
            "fastdiff.images.read_image returns such an image"
        )
    return image


def picture_size(picture: Picture, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) of a picture after the resizing of `images.read_image`."""
    if isinstance(picture, Tensor):
        return picture.shape[-2], picture.shape[-1]
    high, wide = image_size(picture)
    if height is None and width is None:
        return high, wide
    width = width or max(round(wide * (height or 1) / high), 1)
    return height or max(round(high * width / wide), 1), width


def picture_key(picture: Picture) -> Hashable:
    """A key for what is computed from a picture: it changes with the file. Keep a tensor alive as
    long as its key."""
    if isinstance(picture, Tensor):
        return id(picture)
    facts = os.stat(picture)
    return os.fspath(picture), facts.st_mtime_ns, facts.st_size


def fitted(image: Tensor, factor: int, fit: Fit | None, *, mask: bool = False) -> Tensor:
    """Crop or resize a picture to sides that are multiples of `factor`; unchanged without `fit`.

    image: (C, H, W) in [-1, 1], or a mask of 0 and 1. "crop" keeps the centre; "resize" goes to the
    nearest multiples with an antialiased bicubic filter (masks: nearest neighbour).
    """
    height, width = image.shape[1:]
    if fit is None or not (height % factor or width % factor):
        return image
    if fit == "crop" and min(height, width) < factor:
        return image  # nothing would be left: the caller rejects its size
    if fit == "crop":
        high, wide = (side // factor * factor for side in (height, width))
        top, left = (height - high) // 2, (width - wide) // 2
        return image[:, top : top + high, left : left + wide]
    size = [max(round(side / factor), 1) * factor for side in (height, width)]
    if mask:
        return F.interpolate(image[None], size, mode="nearest-exact")[0]
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)


def read_depth(depth: Picture) -> Tensor:
    """Read a depth map as (1, H, W), in any range: of a file the grey levels, in [0, 1].

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, has several channels, or is not finite.
    """
    if not isinstance(depth, Tensor):
        return read_mask(depth)
    whole = depth[None] if depth.ndim == 2 else depth[0] if depth.ndim == 4 else depth
    if whole.ndim != 3 or len(whole) != 1 or not whole.is_floating_point():
        raise ValueError(
            f"the depth map must be (1, H, W) floating point, got {tuple(depth.shape)} "
            f"{depth.dtype}; reduce it to one channel"
        )
    if not whole.isfinite().all():
        raise ValueError("the depth map must be finite, got NaN or infinity; replace them")
    return whole


def read_mask_of(job: InpaintJob, image: Tensor) -> Tensor:
    """Read a job's mask as (1, H, W), 0 or 1, fp32. image: the job's, (C, H, W).

    Raises:
        ValueError: the mask differs in size from the image, has several channels or values that
            no mask has, or is all zeros.
    """
    mask = job.mask
    if not isinstance(mask, Tensor):
        if job.height or job.width:
            check_same_size(job.image, mask)
        mask = read_mask(mask, height=job.height, width=job.width)
    given = tuple(mask.shape)
    mask = mask[None] if mask.ndim == 2 else mask[0] if mask.ndim == 4 and len(mask) == 1 else mask
    if mask.ndim != 3 or mask.shape[0] != 1 or mask.shape[1:] != image.shape[1:]:
        height, width = image.shape[1:]
        raise ValueError(
            f"the mask must be (1, {height}, {width}), the size of the image, got {given}; "
            "resize it, or reduce it to one channel"
        )
    _check_values(mask)
    binary = (mask >= 0.5).float()
    if not binary.any():
        most = float(mask.max())
        seen = f"has no value of 0.5 or more, got at most {most:.3g}" if most else "is all zeros"
        raise ValueError(
            f"the mask {seen}, expected 1 (white) where the image is to be replaced; invert it?"
        )
    return binary


def check_same_size(image: object, mask: object) -> None:
    """Raise ValueError if a mask differs in size from its image, both files or Pillow images.

    Cropping each around its centre would move one against the other.
    """
    if not all(isinstance(each, str | os.PathLike | bytes | Image.Image) for each in (image, mask)):
        return  # tensors, which are not resized
    (high, wide), (tall, broad) = image_size(image), image_size(mask)  # type: ignore[arg-type]
    if (high, wide) != (tall, broad):
        raise ValueError(
            f"the mask must have the size of the image, {wide} x {high}, got {broad} x {tall} "
            "(width x height), because height and width crop both around their centres; resize it"
        )


def _check_values(mask: Tensor) -> None:
    """Raise ValueError unless a mask's values are within [0, 1]; those between count as rounded."""
    if mask.is_complex():
        raise ValueError(f"a mask must be bool, integers or floating point, got {mask.dtype}")
    low, high = float(mask.min()), float(mask.max())
    if not -0.001 <= low <= high <= 1.001:
        raise ValueError(
            f"the mask's values must lie in [0, 1], got {low:g} to {high:g}; "
            "fastdiff.images.read_mask returns such a mask"
        )
