"""Decodes one picture in a process of its own, with limits on memory and time. Run as a script.

    python -I decoder.py MEMORY_BYTES SECONDS MAX_PIXELS < file > pixels

It imports nothing but Pillow and `fastdiff.colours`, opens no other file, and reads only formats
that browsers read. stdout is a line "MODE WIDTH HEIGHT ORIENTATION\\n", then the rows of pixels as
bytes; nothing else is ever pickled, parsed or trusted. Exit codes: 0, TOO_MANY_PIXELS, or anything
else for a picture that cannot be decoded; what the decoder says is not passed on.
"""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MODES = ("L", "RGB", "RGBA", "I;16")
TOO_MANY_PIXELS = 3
SIXTEEN_TO_EIGHT = [(level * 255 + 0x7FFF) // 0xFFFF for level in range(0x10000)]
ORIENTATION = 0x0112
"""EXIF's tag."""
COLOURS = Path(__file__).resolve().parents[1] / "colours.py"


def main(memory: int, seconds: int, pixels: int) -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # pipes are no files
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # its own limit is not ours
    with Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=FORMATS) as file:
        if file.width * file.height > pixels:
            return TOO_MANY_PIXELS
        file.load()
        turn = file.getexif().get(ORIENTATION)
        image = in_srgb(file)
        turn = turn if isinstance(turn, int) and 1 <= turn <= 8 else 1
        head = f"{image.mode} {image.width} {image.height} {turn}\n"
        sys.stdout.buffer.write(head.encode("ascii") + image.tobytes())
        return 0


def in_srgb(file: Image.Image) -> Image.Image:
    """A picture in one of MODES, its colours as sRGB."""
    profile, clear = file.info.get("icc_profile"), file.info.get("transparency")
    if file.mode == "I;16" and not profile and clear is None:
        return file
    if file.mode == "I;16":
        levels = file.convert("I")
        image = levels.point(SIXTEEN_TO_EIGHT, "L")
        if clear is not None:
            image.putalpha(levels.point([255 * (level != clear) for level in range(2**16)], "L"))
    elif file.has_transparency_data:
        image = file.convert("LA" if file.mode in ("1", "L", "LA") else "RGBA")
    elif file.mode in ("L", "RGB", "CMYK"):
        image = file
    else:
        image = file.convert("L" if file.mode == "1" else "RGB")
    if profile:
        image = runpy.run_path(str(COLOURS))["to_srgb"](image, profile)
    if image.mode in MODES:
        return image
    return image.convert("RGBA" if image.mode == "LA" else "RGB")


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
