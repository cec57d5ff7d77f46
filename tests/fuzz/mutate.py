"""Mutations of files: of arbitrary bytes, and of contents while lengths stay valid."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

NUMBERS = [0, 1, 2, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
ALPHABET = b'0123456789"{}[],:-.eE()tRbqQ\x85\x86\x87uasN'  # of JSON and of pickles
NASTY = "\x1b[31mred\x07\r\nnext\u202eline\u200f\udce9\x00" + "x" * 200_000
"""Escapes of a terminal, line breaks, marks of writing direction, half a surrogate; and long."""
DEEP = "deep: replaced in the text"
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, -(10**400), 0.0, -0.5, 1.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "0", NASTY, "../../etc/passwd", "\x00"),
    *([], [1], [[]], [None] * 3, [10**9] * 4, {}, {"a": 1}, {"": []}, DEEP),
]
"""What a value of a JSON file becomes."""
PNG = b"\x89PNG\r\n\x1a\n"


def mutated(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """A few changes of a few bytes, most of them among the first `within`."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        end = min(len(result), within or len(result)) if rng.random() < 0.8 else len(result)
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(9)
        if kind == 0:
            result[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and result:
            at = min(at, len(result) - 1)
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del result[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            result[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif kind == 4:
            size = rng.choice((1, 2, 4, 8))
            result[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        elif kind == 5:
            other = rng.randrange(max(len(result), 1))
            result[at:at] = result[other : other + rng.choice((2, 16, 128))]
        elif kind == 6:
            result[at : at + 1] = bytes([rng.choice(ALPHABET)])
        elif kind == 7:
            size = rng.choice((16, 64, 512))
            other = rng.randrange(max(len(result), 1))
            here, there = result[at : at + size], result[other : other + size]
            if at + size <= other and len(here) == len(there):
                result[at : at + size], result[other : other + size] = there, here
        elif rng.random() < 0.3:
            del result[at:]
    return bytes(result)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything in a JSON value, from the outside in."""
    items: Any = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        yield data, key
        if isinstance(value, dict | list):
            yield from places(value)


def mutated_json(text: bytes, rng: random.Random) -> bytes:
    """One or two values, keys or entries of a JSON file changed; sometimes its bytes."""
    if rng.random() < 0.2:
        return mutated(text, rng)
    data = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2))):
        inside = list(places(data))
        if not inside:
            break
        container, key = rng.choice(inside)
        kind = rng.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice((NASTY, "", "x", key + "s"))] = container.pop(key)
        elif kind == 2 and isinstance(container, list):
            container.insert(key, container[key])
        elif kind == 3:
            other, name = rng.choice(inside)
            container[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None
        else:
            container[key] = rng.choice(VALUES)
    deep = "[" * 100_000 + "]" * 100_000
    return json.dumps(data).replace(json.dumps(DEEP), deep).encode()


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def zip_of(members: dict[str, bytes]) -> bytes:
    """A zip file whose members are stored as they are, with the right checksums."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target.getvalue()


def mutated_zip(data: bytes, rng: random.Random) -> bytes:
    """The pickle inside, under a checksum that is right again; or any bytes."""
    if rng.random() < 0.4:
        return mutated(data, rng, within=1024)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = mutated(members[name], rng)
    return zip_of(members)


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header, with a length that fits; or any bytes."""
    if rng.random() < 0.4:
        return mutated(data, rng, within=1024)
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    text = mutated_json(header, rng) if rng.random() < 0.5 else mutated(header, rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, content) of the chunks of a PNG."""
    found, at = [], len(PNG)
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks, with the right checksums."""
    return PNG + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def mutated_png(data: bytes, rng: random.Random) -> bytes:
    """The JSON in its text chunk, or a chunk's bytes under the right checksum; or any bytes."""
    if rng.random() < 0.3:
        return mutated(data, rng)
    chunks = chunks_of(data)
    number = rng.randrange(len(chunks))
    texts = [index for index, (kind, _) in enumerate(chunks) if kind == b"tEXt"]
    if texts and rng.random() < 0.8:
        number = texts[0]
        key, _, text = chunks[number][1].partition(b"\0")
        chunks[number] = (b"tEXt", key + b"\0" + mutated_json(text, rng))
    else:
        kind, content = chunks[number]
        chunks[number] = (kind, mutated(content, rng))
    return png_of(chunks)


BY_ENDING = {
    ".json": mutated_json,
    ".png": mutated_png,
    ".pt": mutated_zip,
    ".safetensors": mutated_safetensors,
}


def mutant(name: str, data: bytes, rng: random.Random) -> bytes:
    """A change of the file `name` as its format has it, of any bytes where it has none."""
    return BY_ENDING.get(PurePath(name).suffix, mutated)(data, rng)
