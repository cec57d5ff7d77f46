"""Read files of `torch.save` without running code.

Tensors are returned as places in the file; `unpickle.py` interprets the pickle.

    zip (torch >= 1.6)   NAME/data.pkl; NAME/data/KEY for each storage, stored uncompressed
    older                five pickles: magic, protocol, machine, the object, the storages' keys;
                         then for each key the number of elements (int64) and the elements
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdiff.checkpoint.formats.unpickle import CodeError, Storage, TensorAt, run
from fastdiff.checkpoint.weights import Place, Record, Weights, some
from fastdiff.files import printable

MAX_TENSORS = 100_000
MAX_PICKLE_BYTES = 16 * 2**20  # names and places of MAX_TENSORS; the data is stored separately
MAX_SHARING = 8  # bytes of all tensors per byte of the file, since tensors may share storage
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STATE_DICT_KEYS = ("state_dict", "model", "string_to_param")
"""Keys under which trainers store it; the last one is that of textual inversions."""


class _ForeignError(ValueError):
    """The file is intact, but was not written by torch.save."""


def looks_like_torch_save(start: bytes) -> bool:
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"


def read_torch_save(path: Path) -> Weights:
    """Read the names and places of the tensors in a file of `torch.save`.

    Raises:
        ValueError: the file is damaged, contains code, or is not a dictionary of tensors; the
            message is one line and names the file.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        root, places = _read_zip(path) if zipped else _read_legacy(path)
    except (CodeError, _ForeignError) as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes may raise anything; no code was run
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as a file of torch.save ({printable(reason, 200)}); "
            "download the file again"
        ) from error
    state = _state_dict(root)
    if state is None:
        raise ValueError(
            f"{path}: expected a dictionary of tensors (or one under "
            f"{' or '.join(map(repr, STATE_DICT_KEYS))}), got {_held(root)}"
        )
    tensors = {key: value for key, value in state.items() if isinstance(value, TensorAt)}
    facts = {
        key: value
        for table in (root, state)
        if isinstance(table, dict)
        for key, value in table.items()
        if isinstance(key, str) and isinstance(value, str | int | float)
    }
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{path}: expected at most {MAX_TENSORS} tensors, got {len(tensors)}")
    placed = {key: places(tensor) for key, tensor in tensors.items()}
    claimed = sum(place.numel * place.dtype.itemsize for place in placed.values())
    if claimed > MAX_SHARING * (size := path.stat().st_size):
        raise ValueError(
            f"{path}: expected tensors of at most {MAX_SHARING} times the file's {size} bytes, got "
            f"{claimed} bytes, because they share storage; save copies of them"
        )
    return Weights(path, placed, facts)


def _held(value: Any) -> str:
    """Describe in a few words what a pickle contains."""
    if isinstance(value, dict):
        if not value:
            return "an empty dictionary"
        return f"a dictionary of other things under {some(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, TensorAt):
        return "a single tensor"
    plain = value is None or isinstance(value, str | bytes | int | float)
    return f"a single {type(value).__name__}" if plain else "a single object"


_Places = Callable[[TensorAt], Place]


def _state_dict(root: Any) -> dict[str, Any] | None:
    """The names in a dictionary of tensors; those in a list of them begin with "0.", "1.", ..."""
    if isinstance(root, list | tuple) and root and _named_tensors(root[0]):
        listed: dict[str, Any] = {str(i): value for i, value in enumerate(root)}
        for number, part in enumerate(root):
            if _named_tensors(part):
                listed.update({f"{number}.{key}": value for key, value in part.items()})
        return listed
    inner = [root[key] for key in STATE_DICT_KEYS if key in root] if isinstance(root, dict) else []
    for table in (*inner, root):
        if isinstance(table, dict) and any(isinstance(v, TensorAt) for v in table.values()):
            return table if _named_tensors(table) else None
    return None


def _named_tensors(table: Any) -> bool:
    """Whether a value is a dictionary with tensors in it, whose keys are all names."""
    return (
        isinstance(table, dict)
        and any(isinstance(value, TensorAt) for value in table.values())
        and all(isinstance(key, str) for key in table)
    )


def _place(
    path: Path, start: int, available: int, tensor: TensorAt, crc: int | None = None
) -> Place:
    """The place of a tensor's data, after checking that its storage is large enough."""
    storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
    row, expected = 1, []
    for size in reversed(tensor.shape):
        expected.append(row)
        row *= max(size, 1)
    in_a_row = all(
        size == 1 or stride == usual
        for size, stride, usual in zip(tensor.shape, tensor.stride, reversed(expected), strict=True)
    )
    place = Place(
        path,
        start + tensor.offset * itemsize,
        storage.dtype,
        tensor.shape,
        None if in_a_row or 0 in tensor.shape else tensor.stride,
        None if crc is None else Record(start, available, crc),
    )
    # No more elements than the storage has: with a stride of 0 a tensor could have any size.
    if max(place.numel, tensor.offset + place.span) > min(storage.numel, available // itemsize):
        raise ValueError(
            f"a tensor of {place.numel} numbers lies outside its storage of {storage.numel} "
            f"({available} bytes)"
        )
    return place


def _read_zip(path: Path) -> tuple[Any, _Places]:
    with zipfile.ZipFile(path) as archive:
        listed = archive.infolist()
        members = {info.filename: info for info in listed}
        if len(members) != len(listed):  # readers differ in which of two equal names they use
            (twice, _), *_ = Counter(info.filename for info in listed).most_common(1)
            raise ValueError(f"{printable(twice, 60)} occurs twice")
        roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if not roots:
            raise _ForeignError(
                "expected a file of torch.save, whose zip archive contains a data.pkl; got one "
                f"that contains {some(members) or 'nothing'}"
            )
        if len(roots) != 1:
            raise ValueError(f"expected one data.pkl, got {len(roots)}")
        folder = roots[0].removesuffix("data.pkl")
        info = members[roots[0]]
        _check_stored(info)
        if info.file_size > MAX_PICKLE_BYTES:
            raise ValueError(
                f"expected a data.pkl of at most {MAX_PICKLE_BYTES} bytes, got {info.file_size}"
            )
        # torch.serialization.set_crc32_options(False) writes zeros, which zipfile would reject
        with_checksums = any(member.CRC for member in members.values())
        raw = _contents(path, info, with_checksums)
        order = members.get(f"{folder}byteorder")
        if order is not None:
            _check_stored(order)
            written = _contents(path, order, with_checksums) if order.file_size <= 16 else b""
            if written.decode() != sys.byteorder:
                raise ValueError(f"its numbers are not {sys.byteorder}-endian")

    def places(tensor: TensorAt) -> Place:
        info = members[f"{folder}data/{tensor.storage.key}"]
        _check_stored(info)
        crc = info.CRC if with_checksums else None
        return _place(path, _start(path, info), info.file_size, tensor, crc)

    return run(io.BytesIO(raw)), _reported(path, places)


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """The offset at which a member's bytes begin."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
        name = file.read(name_length)
    start: int = info.header_offset + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or start + info.file_size > path.stat().st_size:
        raise ValueError(f"member {printable(info.filename, 60)} lies outside the file")
    if name not in (info.orig_filename.encode(), info.orig_filename.encode("cp437", "replace")):
        raise ValueError(
            f"member {printable(info.filename, 60)} has another name in its local header"
        )
    return start


def _contents(path: Path, info: zipfile.ZipInfo, with_checksums: bool) -> bytes:
    """Read the bytes of a small member."""
    with path.open("rb") as file:
        file.seek(_start(path, info))
        raw = file.read(info.file_size)
    if with_checksums and zlib.crc32(raw) != info.CRC:
        raise ValueError(f"the checksum of {printable(info.filename, 60)} does not match")
    return raw


def _check_stored(info: zipfile.ZipInfo) -> None:
    if info.flag_bits & 1:
        raise ValueError(f"member {printable(info.filename, 60)} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(
            f"member {printable(info.filename, 60)} is compressed, which torch.save never does"
        )


def _read_legacy(path: Path) -> tuple[Any, _Places]:
    size = path.stat().st_size
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        first = run(stream)
        if first != MAGIC:
            raise _ForeignError(
                "expected a file of torch.save, or safetensors; got another pickle, which contains "
                f"{_held(first)}"
            )
        protocol, machine = run(stream), run(stream)
        if protocol != PROTOCOL or not isinstance(machine, dict):
            raise ValueError("an unknown protocol")
        if machine.get("little_endian") is not (sys.byteorder == "little"):
            raise ValueError(f"its numbers are not {sys.byteorder}-endian")
        storages: dict[str, Storage] = {}
        root, keys = run(stream, storages), run(stream)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("it contains no list of storages")
        starts: dict[str, int] = {}
        position = stream.tell()
        for key in keys:
            file.seek(position)
            (count,) = struct.unpack("<q", file.read(8))
            storage = storages[key]
            starts[key] = position + 8
            position += 8 + storage.numel * storage.dtype.itemsize
            if count != storage.numel or position > size:
                raise ValueError(
                    f"storage {printable(key, 60)} lies outside the file; it is truncated"
                )

    def places(tensor: TensorAt) -> Place:
        storage = tensor.storage
        available = storage.numel * storage.dtype.itemsize
        return _place(path, starts[storage.key], available, tensor)

    return root, _reported(path, places)


def _reported(path: Path, places: _Places) -> _Places:
    def place(tensor: TensorAt) -> Place:
        try:
            return places(tensor)
        except (ValueError, KeyError, struct.error, OSError, OverflowError) as error:
            raise ValueError(
                f"{path}: damaged ({printable(str(error), 200)}); download the file again"
            ) from error

    return place
