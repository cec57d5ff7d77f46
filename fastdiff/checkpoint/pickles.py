"""What `torch.save` wrote, read without running it.

A pickle is a program for a stack machine. This one knows the instructions that build lists,
dictionaries, numbers and strings, and what the few names mean with which torch writes tensors; it
imports and calls nothing. A name that trainers are known to leave beside the weights becomes an
inert object, any other is an error. Tensors come out as places in the file.

    zip (torch 1.6 on)   NAME/data.pkl; NAME/data/KEY, one for each storage, stored uncompressed
    before it            five pickles in a row: magic, protocol, machine, the object, the storages'
                         keys; then for each key the number of elements (int64) and the elements
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoint.weights import MAX_DIMS, Place, Weights

MAX_TENSORS = 100_000
MAX_PICKLE_BYTES = 16 * 2**20  # the names and places of so many; the numbers lie outside
MAX_INSTRUCTIONS = 4_000_000  # as many again: each may make an object of 64 bytes out of one
MAX_SHARING = 8  # bytes of all tensors to one of the file; tensors may share their storage
MAX_ARGUMENTS = 16  # of what rebuilds a tensor
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
STATE_DICT_KEYS = ("state_dict", "model")  # where trainers put it among their other things
# Names that trainers leave beside the weights: kept as inert objects, never imported.
INERT_MODULES = ("pytorch_lightning.", "lightning.", "omegaconf.")
INERT_NAMES = {
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.set",
    "__builtin__.set",
    "collections.Counter",
    "collections.defaultdict",
    "builtins.dict",
    "builtins.int",
    "builtins.float",
    "builtins.list",
    "builtins.str",
    "__builtin__.dict",
    "__builtin__.int",
    "__builtin__.list",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.device",
    "torch.Size",
    "torch.float32",
    "torch.float16",
    "typing.Any",
}


def looks_like_torch_save(start: bytes) -> bool:
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"


def read_torch_save(path: Path) -> Weights:
    """Read the names and places of the tensors in a file that `torch.save` wrote.

    Raises:
        ValueError: damaged, holds code, or no dictionary of tensors; one line that names the file.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        root, places = _read_zip(path) if zipped else _read_legacy(path)
    except CodeError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes fail in any way; none of them ran
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: not readable as what torch.save wrote ({reason:.200}); fetch the file again"
        ) from error
    state = _state_dict(root)
    if state is None:
        raise ValueError(
            f"{path}: expected a dictionary of tensors (or one under "
            f"{' or '.join(map(repr, STATE_DICT_KEYS))}), got {type(root).__name__}"
        )
    tensors = {key: value for key, value in state.items() if isinstance(value, _TensorAt)}
    facts = {
        key: value
        for table in (root, state)
        for key, value in table.items()
        if isinstance(key, str) and isinstance(value, str | int | float)
    }
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{path}: expected at most {MAX_TENSORS} tensors, got {len(tensors)}")
    placed = {key: places(tensor) for key, tensor in tensors.items()}
    claimed = sum(place.numel * place.dtype.itemsize for place in placed.values())
    if claimed > MAX_SHARING * (size := path.stat().st_size):
        raise ValueError(
            f"{path}: its tensors share their numbers and claim {claimed} bytes, expected at most "
            f"{MAX_SHARING} times the file's {size}; save copies of them"
        )
    return Weights(path, placed, facts)


class CodeError(ValueError):
    """A pickle that names what is no tensor."""


@dataclass(frozen=True, eq=False)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class _TensorAt:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Name:
    name: str


class _Inert:
    """An object that is not looked into."""


_Places = Callable[[_TensorAt], Place]


def _state_dict(root: Any) -> dict[str, Any] | None:
    inner = [root[key] for key in STATE_DICT_KEYS if key in root] if isinstance(root, dict) else []
    for table in (*inner, root):
        if isinstance(table, dict) and any(isinstance(v, _TensorAt) for v in table.values()):
            if not all(isinstance(key, str) for key in table):
                return None
            return table
    return None


def _place(path: Path, start: int, available: int, tensor: _TensorAt) -> Place:
    """Where the tensor's numbers lie, if its storage has that many."""
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
    )
    # As many numbers as the storage has, at most: a stride of 0 could ask for any size.
    if max(place.numel, tensor.offset + place.span) > min(storage.numel, available // itemsize):
        raise ValueError(
            f"a tensor of {place.numel} numbers lies outside its storage of {storage.numel} "
            f"({available} bytes)"
        )
    return place


def _read_zip(path: Path) -> tuple[Any, _Places]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise ValueError(f"expected one data.pkl in it, got {len(roots)}")
        folder = roots[0].removesuffix("data.pkl")
        info = members[roots[0]]
        _check_stored(info)
        if info.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {info.file_size} bytes, beyond {MAX_PICKLE_BYTES}")
        raw = archive.read(info)
        order = members.get(f"{folder}byteorder")
        if order is not None:
            _check_stored(order)
            if order.file_size > 16 or archive.read(order).decode() != sys.byteorder:
                raise ValueError(f"its numbers are not {sys.byteorder}-endian")
    size = path.stat().st_size

    def places(tensor: _TensorAt) -> Place:
        info = members[f"{folder}data/{tensor.storage.key}"]
        _check_stored(info)
        with path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
        start = info.header_offset + 30 + name_length + extra_length
        if signature != b"PK\x03\x04" or start + info.file_size > size:
            raise ValueError(f"member {info.filename:.60} lies outside the file")
        return _place(path, start, info.file_size, tensor)

    return _run(io.BytesIO(raw)), _reported(path, places)


def _check_stored(info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"member {info.filename:.60} is compressed, which torch.save never does")


def _read_legacy(path: Path) -> tuple[Any, _Places]:
    size = path.stat().st_size
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        if _run(stream) != MAGIC:
            raise ValueError("it does not begin as torch.save's files do")
        protocol, machine = _run(stream), _run(stream)
        if protocol != PROTOCOL or not isinstance(machine, dict):
            raise ValueError("an unknown protocol")
        if machine.get("little_endian") is not (sys.byteorder == "little"):
            raise ValueError(f"its numbers are not {sys.byteorder}-endian")
        storages: dict[str, _Storage] = {}
        root, keys = _run(stream, storages), _run(stream)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("no list of storages in it")
        starts: dict[str, int] = {}
        position = stream.tell()
        for key in keys:
            file.seek(position)
            (count,) = struct.unpack("<q", file.read(8))
            storage = storages[key]
            starts[key] = position + 8
            position += 8 + storage.numel * storage.dtype.itemsize
            if count != storage.numel or position > size:
                raise ValueError(f"storage {key:.60} lies outside the file; it is truncated")

    def places(tensor: _TensorAt) -> Place:
        storage = tensor.storage
        available = storage.numel * storage.dtype.itemsize
        return _place(path, starts[storage.key], available, tensor)

    return root, _reported(path, places)


def _reported(path: Path, places: _Places) -> _Places:
    def place(tensor: _TensorAt) -> Place:
        try:
            return places(tensor)
        except (ValueError, KeyError, struct.error, OSError, OverflowError) as error:
            raise ValueError(f"{path}: damaged ({error}); fetch the file again") from error

    return place


# --- the stack machine ---

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": _Inert,
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(self, storages: dict[str, _Storage]) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def step(self, name: str, argument: Any) -> None:  # noqa: PLR0912, a table of instructions
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.to_mark()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack.append(items)
        elif name == "TUPLE":
            stack.append(tuple(self.to_mark()))
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            self.fill(name, self.to_mark())
        elif name == "APPEND":
            self.fill("APPENDS", [stack.pop()])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.fill("SETITEMS", [key, value])
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(module, attribute))
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, callable_ = stack.pop(), stack.pop()
            stack.append(_reduced(callable_, arguments))
        elif name == "BUILD":
            stack.pop()  # the state of an object: an OrderedDict's, or an inert one's
        else:
            raise ValueError(f"instruction {name} does not occur in what torch.save writes")

    def fill(self, name: str, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Inert):
            return
        if name == "APPENDS" and isinstance(target, list):
            target.extend(items)
        elif name == "SETITEMS" and isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                # The hash of nested tuples may take for ever.
                if isinstance(key, str | int | float | None):
                    target[key] = value
        else:
            raise ValueError(f"{name} on a {type(target).__name__}")

    def storage(self, words: Any) -> _Storage:
        if not (isinstance(words, tuple) and len(words) >= 5 and words[0] == "storage"):
            raise ValueError("an unknown persistent id")
        kind, key, numel = words[1], words[2], words[4]
        if len(words) > 5 and words[5] is not None:
            raise ValueError("a storage that is part of another, as torch wrote before 0.4")
        name = kind.name.rpartition(".")[2] if isinstance(kind, _Name) else ""
        if name not in STORAGES or not isinstance(key, str) or not _is_size(numel):
            raise ValueError(f"a storage of kind {name or 'unknown'!r:.60}")
        storage = _Storage(STORAGES[name], key, numel)
        return self.storages.setdefault(key, storage)


def _run(stream: io.BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """Run one pickle of the stream; returns what it builds."""
    machine = _Machine({} if storages is None else storages)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= MAX_INSTRUCTIONS:
            raise ValueError(f"a pickle of more than {MAX_INSTRUCTIONS} instructions")
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise ValueError("the pickle has no end")


def _named(module: Any, attribute: Any) -> _Name:
    """A name that a pickle asks for: it is looked at, never imported."""
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise ValueError("a name that is no string")  # the repr of nested tuples may take for ever
    name = f"{module}.{attribute}"
    if (
        name in INERT_NAMES
        or name in _MEANINGS
        or name.startswith(INERT_MODULES)
        or (module in ("torch", "torch.storage") and attribute in STORAGES)
    ):
        return _Name(name)
    raise CodeError(
        f"this pickle asks for {name[:80]!r}, which is no tensor and could run code; nothing of it "
        "was run. If you trust where it came from, load it with torch and save its state dict as "
        "safetensors"
    )


def _reduced(callable_: Any, arguments: Any) -> Any:
    if not isinstance(callable_, _Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no name")
    meaning = _MEANINGS.get(callable_.name)
    if meaning is None:
        return _Inert()
    if len(arguments) > MAX_ARGUMENTS:
        raise ValueError(f"a tensor made of {len(arguments)} things")
    return meaning(*arguments)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _TensorAt:
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) > MAX_DIMS:
        raise ValueError("a tensor without sizes and strides, or with too many")
    if len(shape) != len(stride):
        raise ValueError("a tensor whose sizes and strides do not fit each other")
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(map(_is_size, sizes)):
        raise ValueError("a tensor without storage, offset, sizes and strides")
    if math.prod(shape) >= 2**63:
        raise ValueError("a tensor of sizes beyond 64 bits")
    return _TensorAt(storage, offset, shape, stride)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _ordered_dict(*items: Any) -> dict[Any, Any]:
    if items:
        raise ValueError("an OrderedDict with arguments")
    return {}


_MEANINGS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data, *_: data,
    "collections.OrderedDict": _ordered_dict,
}
