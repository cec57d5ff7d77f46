"""Decodes one picture in a process of its own, with limits on memory and time. Run as a script.

    python -I decoder.py MEMORY_BYTES SECONDS MAX_PIXELS < file > pixels

It imports nothing but Pillow, opens no file, and reads only formats that browsers read. stdout is
one line "MODE WIDTH HEIGHT ORIENTATION\\n", then the rows of pixels as bytes; nothing else is ever
pickled, parsed or trusted. Exit codes: 0, TOO_MANY_PIXELS, or anything else for a picture that
cannot be decoded; what the decoder says is not passed on.
"""

from __future__ import annotations

import io
import sys

FORMATS = ("PNG", "JPEG", "WEBP")
MODES = ("L", "RGB", "RGBA", "I;16")
TOO_MANY_PIXELS = 3
ORIENTATION = 0x0112
"""EXIF's tag."""


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
        image: Image.Image = file
        if file.has_transparency_data:
            image = file.convert("RGBA")
        elif file.mode not in MODES:
            image = file.convert("RGB")
        turn = turn if isinstance(turn, int) and 1 <= turn <= 8 else 1
        head = f"{image.mode} {image.width} {image.height} {turn}\n"
        sys.stdout.buffer.write(head.encode("ascii") + image.tobytes())
        return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
