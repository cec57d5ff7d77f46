"""Read the header of a safetensors file without trusting any number in it.

The file consists of 8 bytes with the length of the header, the header (JSON: name -> dtype, shape,
offsets), and the bytes of the tensors, without gaps between them.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoint.weights import MAX_DIMS, Place, Weights
from fastdiff.files import printable

MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def header_fits(start: bytes, size: int) -> bool:
    """Whether the first 8 bytes of a file of this size can be the length of a header."""
    return len(start) == 8 and 2 <= _length(start) <= min(size - 8, MAX_HEADER_BYTES)


def read_safetensors(path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> Weights:
    """Read and check the header.

    dtypes: the dtypes that a tensor may have, by the names used in the format.

    Raises:
        ValueError: the file is truncated, damaged or of another kind; the message is one line and
            names the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if not header_fits(start, size):
            # Check this only if no header fits, because a length may begin with these bytes too.
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise ValueError(
                    f"{path}: expected safetensors, got a pickle (torch.save), which could run "
                    "code and was not opened; save the weights as safetensors"
                )
            length = _length(start) if len(start) == 8 else -1
            raise ValueError(
                f"{path}: expected safetensors, got {size} bytes with a header length of {length}; "
                "the file is truncated or of another kind; download it again"
            )
        length = _length(start)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_object)
        if not isinstance(header, dict):
            raise ValueError(f"got {type(header).__name__}")
        facts = header.pop("__metadata__", None)
        spans = {}
        for key, entry in header.items():
            try:
                spans[key] = _span(entry, dtypes)
            except ValueError as error:
                raise ValueError(f"{printable(key)}: {error}") from None
        end = _check_in_a_row(spans)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: the safetensors header is damaged ({error}); download the file again"
        ) from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path}: expected {8 + length + end} bytes according to the header, got {size}; the "
            "file is truncated or was changed; download it again"
        )
    places = {
        key: Place(path, 8 + length + spans[key][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for key, entry in header.items()
    }
    return Weights(path, places, facts if isinstance(facts, dict) else {})


def _length(start: bytes) -> int:
    return struct.unpack("<Q", start)[0]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{printable(twice)} occurs twice")
    return data


def _span(entry: Any, dtypes: Mapping[str, torch.dtype]) -> tuple[int, int]:
    """The first byte of a tensor and the end of its bytes; dtype, shape and offsets must agree."""
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"expected a tensor of {', '.join(dtypes)}, got {entry!r:.60}")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 2**63 for n in numbers
        ):
            raise ValueError(f"expected a list of whole numbers, got {numbers!r:.60}")
        if len(numbers) > MAX_DIMS:
            raise ValueError(f"expected at most {MAX_DIMS} dimensions, got {len(numbers)}")
    itemsize = dtypes[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * itemsize:
        raise ValueError(f"shape {shape!r:.60} does not fit offsets {offsets!r:.60}")
    return offsets[0], offsets[1]


def _check_in_a_row(spans: dict[str, tuple[int, int]]) -> int:
    """Check that tensors neither overlap nor leave gaps; returns where the last one ends."""
    end = 0
    for key, (first, behind) in sorted(spans.items(), key=lambda item: item[1]):
        if first != end:
            raise ValueError(
                f"{printable(key)} begins at byte {first}, expected {end}: tensors overlap or "
                "leave a gap"
            )
        end = behind
    return end
