"""The stack machine of pickles, restricted so that no code can run.

It implements the instructions that build lists, dictionaries, numbers and strings, and knows the
few names with which torch writes tensors. It never imports or calls anything. Names that trainers
are known to store with the weights become inert objects; any other name is an error.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.checkpoint.weights import MAX_DIMS
from fastdiff.files import printable

MAX_INSTRUCTIONS = 4_000_000  # 100,000 tensors; one byte may create an object of 64 bytes
MAX_ARGUMENTS = 16  # arguments of a function that rebuilds a tensor
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
# Names that trainers store with the weights: kept as inert objects, never imported.
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
    *(f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "int64")),
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath")),
    "typing.Any",
}


class CodeError(ValueError):
    """A pickle contains something other than tensors and plain containers."""


@dataclass(frozen=True, eq=False)
class Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class TensorAt:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Name:
    name: str


class _Inert:
    """An object whose contents are ignored."""


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
    def __init__(self, storages: dict[str, Storage]) -> None:
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
            stack.pop()  # ignore the state of an object, which is an OrderedDict or inert
        else:
            raise CodeError(
                f"this pickle contains the instruction {name}, which torch.save never writes; "
                "expected a dictionary of tensors"
            )

    def fill(self, name: str, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Inert):
            return
        if name == "APPENDS" and isinstance(target, list):
            target.extend(items)
        elif name == "SETITEMS" and isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                # Other keys are dropped: hashing nested tuples may take forever.
                if isinstance(key, str | int | float | None):
                    target[key] = value
        else:
            raise ValueError(f"{name} on a {type(target).__name__}")

    def storage(self, words: Any) -> Storage:
        if not (isinstance(words, tuple) and len(words) >= 5 and words[0] == "storage"):
            raise ValueError("an unknown persistent id")
        kind, key, numel = words[1], words[2], words[4]
        if len(words) > 5 and words[5] is not None:
            raise ValueError("a storage that is a view of another one, as written before torch 0.4")
        name = kind.name.rpartition(".")[2] if isinstance(kind, _Name) else ""
        if name not in STORAGES or not isinstance(key, str) or not _is_size(numel):
            raise ValueError(f"a storage of kind {name or 'unknown'!r:.60}")
        storage = Storage(STORAGES[name], key, numel)
        return self.storages.setdefault(key, storage)


def run(stream: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """Interpret one pickle of the stream; returns the object that it builds."""
    machine = _Machine({} if storages is None else storages)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= MAX_INSTRUCTIONS:
            raise ValueError(f"a pickle with more than {MAX_INSTRUCTIONS} instructions")
        try:
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
        except (IndexError, KeyError):  # the stack is empty, or the memo lacks the key
            raise ValueError(
                f"its instruction {count} ({opcode.name}) needs a value that no earlier one left"
            ) from None
    raise ValueError("the pickle has no end")


def _named(module: Any, attribute: Any) -> _Name:
    """A name that a pickle refers to; it is compared with known names, never imported."""
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise ValueError("a name that is not a string")  # not shown: repr may take forever
    name = f"{module}.{attribute}"
    if (
        name in INERT_NAMES
        or name in _MEANINGS
        or name.startswith(INERT_MODULES)
        or (module in ("torch", "torch.storage") and attribute in STORAGES)
    ):
        return _Name(name)
    raise CodeError(
        f"this pickle refers to '{printable(name)}', which is not a tensor and could run code; no "
        "code was run. If you trust its source, load it with torch and save its state dict as "
        "safetensors"
    )


def _reduced(callable_: Any, arguments: Any) -> Any:
    if not isinstance(callable_, _Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of something that is not a name")
    meaning = _MEANINGS.get(callable_.name)
    if meaning is None:
        return _Inert()
    if len(arguments) > MAX_ARGUMENTS:
        raise ValueError(f"a tensor rebuilt from {len(arguments)} arguments")
    return meaning(*arguments)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorAt:
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) > MAX_DIMS:
        raise ValueError("a tensor without sizes and strides, or with too many of them")
    if len(shape) != len(stride):
        raise ValueError("a tensor with different numbers of sizes and strides")
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or not all(map(_is_size, sizes)):
        raise ValueError("a tensor without storage, offset, sizes and strides")
    if math.prod(shape) >= 2**63:
        raise ValueError("a tensor whose size exceeds 64 bits")
    return TensorAt(storage, offset, shape, stride)


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
