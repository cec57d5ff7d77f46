"""Uploads: multipart bodies, and their pictures, decoded in processes of limited memory.

Nothing of an upload touches the disk, and the names of its files are not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from torch import Tensor

from fastdiff.generate.pictures import read_picture
from fastdiff.images import read_mask
from fastdiff.serve import decoder
from fastdiff.serve.errors import ApiError, wrong
from fastdiff.serve.limits import MIB, Limits

SCRIPT = Path(decoder.__file__)
DECODERS = 2
"""Most decoding processes at a time."""
DECODING_SECONDS = 10
MOST_FIELDS, FIELD_BYTES = 32, 2**16
FILES = ("image", "mask")
HEAD = re.compile(rb"(L|RGB|RGBA|I;16) (\d{1,9}) (\d{1,9}) ([1-8])\n")
BYTES = {"L": 1, "RGB": 3, "RGBA": 4, "I;16": 2}


@dataclass(frozen=True)
class Form:
    """A multipart body."""

    fields: dict[str, str]
    files: dict[str, bytes]


class Lease:
    """A part of the memory for uploads."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads, self._size = uploads, 0

    def resize(self, size: int) -> None:
        """Hold so many bytes from now on.

        Raises:
            ApiError: so many more are not free.
        """
        if size > self._size and self._uploads.held + size - self._size > self._uploads.most:
            message = "too many uploads are in memory; try again later"
            raise ApiError(429, message, "too_many_uploads", retry_after=1)
        self._uploads.held += size - self._size
        self._size = size


class Uploads:
    """Reads uploads within the server's limits.

    Attributes:
        most: bytes of memory for all uploads.
        held: bytes that are leased.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.most, self.held = limits, limits.uploads_mib * MIB, 0
        self.body_bytes = min(len(FILES) * limits.upload_mib * MIB + MIB, self.most)
        """Most bytes of a body."""
        self._decoders = asyncio.Semaphore(DECODERS)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """Memory for a request's uploads, until it is answered."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            lease.resize(0)

    async def read(self, body: bytes, content_type: str) -> Form:
        """The parts of a multipart body.

        Raises:
            ApiError: it is not such a body, or a part is too large, unknown or there twice.
        """
        if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
            message = "the content type must be multipart/form-data"
            raise ApiError(415, message, "wrong_content_type")

        try:
            parts = await asyncio.to_thread(_split, body, content_type)
        except (FormParserError, ValueError, LookupError):
            message = f"the body is not a whole form of at most {MOST_FIELDS} fields and files"
            raise wrong(message, code="invalid_form") from None
        form = Form({}, {})
        for name, is_file, data in parts:
            own = "image" if name == "image[]" else name
            if own in form.fields or own in form.files:
                raise wrong(f"{own[:60]!r} occurs twice in the form; send it once")
            if not is_file:
                form.fields[own] = _text(own, data)
                continue
            if own not in FILES:
                raise wrong(f"unknown file {own[:60]!r}; expected image or mask")
            if len(data) > self.limits.upload_mib * MIB:
                message = f"{own} has more than {self.limits.upload_mib} MiB"
                raise ApiError(413, message, "too_large", own)
            form.files[own] = data
        return form

    async def pictures(
        self, form: Form, channels: int, height: int | None, width: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The picture and the mask of a form: (C, H, W) in [-1, 1], and (1, H, W), 1 where the
        picture is to be replaced, or None.

        The mask is transparent there, as for OpenAI, or, if it has no transparency, white.

        height, width: the size to crop and resize both to.

        Raises:
            ApiError: a file is missing or cannot be decoded, or the two differ in size.
        """
        if "image" not in form.files:
            raise wrong("image is missing; send it as a file", "image", code="missing")
        picture = await self.decode(form.files["image"], "image")
        image = read_picture(picture, channels, height, width)
        if "mask" not in form.files:
            return image, None
        shape = await self.decode(form.files["mask"], "mask")
        if shape.size != picture.size:
            raise wrong(
                f"the mask must have the size of the image, {picture.width} x {picture.height}, "
                f"got {shape.width} x {shape.height}",
                "mask",
            )
        if shape.mode == "RGBA" and shape.getchannel("A").getextrema()[0] != 255:
            exif = shape.getexif()
            shape = shape.getchannel("A").point(lambda alpha: 255 if alpha == 0 else 0)
            shape.getexif().update(exif)
        mask = (read_mask(shape, height=height, width=width) >= 0.5).to(torch.float32)
        if not mask.any():
            raise wrong("the mask marks nothing: no pixel is transparent, or white", "mask")
        return image, mask

    async def decode(self, data: bytes, name: str) -> Image.Image:
        """Decode a file in a process of its own. name: of the field, for errors.

        Raises:
            ApiError: it is not a PNG, JPEG or WebP, has too many pixels, or takes too much memory
                or time to decode.
        """
        async with self._decoders:
            code, pixels = await self._run(data)
        found = HEAD.match(pixels)
        limit = self.limits.pixels
        if code == decoder.TOO_MANY_PIXELS:
            message = f"{name} has more than {limit} pixels, which is the limit of this server"
            raise ApiError(413, message, "too_large", name)
        if code == 0 and found is not None:
            mode = found[1].decode("ascii")
            width, height, turn = int(found[2]), int(found[3]), int(found[4])
            rows = memoryview(pixels)[found.end() :]
            if 0 < width * height <= limit and len(rows) == width * height * BYTES[mode]:
                image = Image.frombytes(mode, (width, height), rows)
                image.getexif()[decoder.ORIENTATION] = turn
                return image
        raise wrong(f"{name} cannot be decoded; send a PNG, JPEG or WebP", name, code="bad_image")

    async def _run(self, data: bytes) -> tuple[int | None, bytes]:
        """The exit code of a decoder and what it wrote."""
        limits = (self.limits.decoder_mib * MIB, DECODING_SECONDS, self.limits.pixels)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(SCRIPT), *map(str, limits)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
        )
        try:
            working = process.communicate(data)
            pixels, _ = await asyncio.wait_for(working, 2 * DECODING_SECONDS)
        except asyncio.TimeoutError:
            return None, b""
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode, pixels


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise wrong(f"{name[:60]!r} is not text in UTF-8") from None


def _split(body: bytes, content_type: str) -> list[tuple[str, bool, bytes]]:
    """The parts of a multipart body: name, whether it is a file, and bytes (RFC 7578).

    Raises:
        FormParserError, ValueError, LookupError: it is not such a body, or not a whole one.
    """
    parts, header, headers = list[tuple[str, bool, bytes]](), bytearray(), dict[bytes, bytes]()
    value, data, ended = bytearray(), bytearray(), list[bool]()

    def end_of_header() -> None:
        headers[bytes(header).lower()] = bytes(value)
        header.clear()
        value.clear()

    def end_of_part() -> None:
        _, options = parse_options_header(headers.get(b"content-disposition"))
        is_file = b"filename" in options
        if len(parts) == MOST_FIELDS or (not is_file and len(data) > FIELD_BYTES):
            raise ValueError
        parts.append((options[b"name"].decode(), is_file, bytes(data)))
        headers.clear()
        data.clear()

    boundary = parse_options_header(content_type)[1][b"boundary"]
    parser = MultipartParser(
        boundary,
        {
            "on_header_field": lambda text, start, end: header.extend(text[start:end]),
            "on_header_value": lambda text, start, end: value.extend(text[start:end]),
            "on_header_end": end_of_header,
            "on_part_data": lambda text, start, end: data.extend(text[start:end]),
            "on_part_end": end_of_part,
            "on_end": lambda: ended.append(True),
        },
    )
    parser.write(body)
    if not ended:
        raise ValueError
    return parts
