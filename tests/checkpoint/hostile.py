"""Pickles of the published families of attacks, byte by byte, and archives around them."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.fuzz.mutate import zip_of


class Calls:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def text(value: str) -> bytes:
    """Opcodes that push a string (BINUNICODE)."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: Any) -> bytes:
    """Opcodes that push an integer of any size (LONG1), a bool or a float."""
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(
    *,
    numel: Any = 6,
    offset: Any = 0,
    shape: tuple[Any, ...] = (6,),
    stride: tuple[Any, ...] = (1,),
    key: str = "0",
) -> bytes:
    """A dictionary of one tensor, "a", with sizes that torch would not write."""
    sizes = (b"(" + b"".join(map(number, row)) + b"t" for row in (shape, stride))
    return b"".join(
        [
            *(b"\x80\x02}", text("a"), b"ctorch._utils\n_rebuild_tensor_v2\n(("),
            *(text("storage"), b"ctorch\nFloatStorage\n", text(key), text("cpu")),
            *(number(numel), b"tQ", number(offset), *sizes),
            b"\x89ccollections\nOrderedDict\n)RtRs.",
        ]
    )


def archive(pickled: bytes, **members: bytes) -> bytes:
    """A zip of torch.save around a pickle, with one storage of six numbers."""
    storage = torch.arange(6.0).numpy().tobytes()
    return zip_of(
        {
            "archive/data.pkl": pickled,
            "archive/data/0": storage,
            "archive/version": b"3\n",
            **{f"archive/{name}": data for name, data in members.items()},
        }
    )


def code(canary: Path) -> dict[str, bytes]:
    """Pickles that make the file `canary` when pickle or torch reads them, each in another way."""
    touch, python = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    inner = pickle.dumps(Calls(os.system, touch), protocol=2)
    argument = text(touch) + b"\x85R."
    compiled = b"cbuiltins\ncompile\n(" + text(python) + text("x") + text("exec") + b"tR"
    names = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94"
    state = b"}" + text("__setstate__") + b"cos\nsystem\nsb"
    return {
        "os.system": inner,
        "posix.system": b"cposix\nsystem\n" + argument,
        "subprocess": pickle.dumps(Calls(subprocess.call, ["touch", str(canary)]), protocol=2),
        "eval": pickle.dumps(Calls(eval, python), protocol=4),
        "exec": pickle.dumps(Calls(exec, python), protocol=4),
        "__import__": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n"
        + text("os")
        + b"\x85R"
        + text("system")
        + b"tR"
        + argument,
        "getattr": b"cbuiltins\ngetattr\n(cpathlib\nPosixPath\n"
        + text(str(canary))
        + b"\x85R"
        + text("touch")
        + b"tR)R.",
        "attrgetter": b"coperator\nattrgetter\n"
        + text("system")
        + b"\x85Rcbuiltins\n__import__\n"
        + text("os")
        + b"\x85R\x85R"
        + argument,
        "partial": b"cfunctools\npartial\n(cos\nsystem\n" + text(touch) + b"tR)R.",
        "compile": b"cbuiltins\nexec\n" + compiled + b"\x85R.",
        "timeit": b"ctimeit\ntimeit\n(" + text("pass") + text(python) + b"tR.",
        "profile": b"ccProfile\nrun\n(" + text(python) + b"NtR.",
        "interpreter": b"cbuiltins\ngetattr\n(ccode\nInteractiveInterpreter\n)R"
        + text("runsource")
        + b"tR"
        + text(python)
        + b"\x85R.",
        "doctest": b"cdoctest\ndebug_script\n(" + text(python) + b"\x88tR.",
        "numpy": b"cnumpy.testing._private.utils\nrunstring\n(" + text(python) + b"}tR.",
        "protocol 0": pickle.dumps(Calls(os.system, touch), protocol=0),
        "INST": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
        "STACK_GLOBAL": names + b"\x93" + argument,
        "names out of the memo": names + b"00h\x00h\x01\x93" + argument,
        "names that are joined": b"\x80\x04"
        + text("torch")
        + text("os.system")
        + b"\x93"
        + argument,
        "BUILD": b"cargparse\nNamespace\n)\x81" + state + text(touch) + b"b.",
        "persistent id": inner[:-1] + b"Q.",
        "re-entry": pickle.dumps(Calls(torch.storage._load_from_bytes, inner), protocol=2),
        "object array": pickle.dumps(np.array([Calls(os.system, touch)], dtype=object), protocol=2),
        "behind the dictionary": b"\x80\x02}0" + inner[2:],
    }


def numpy_scalar(inner: bytes) -> bytes:
    """Opcodes, without the final STOP, for a numpy scalar that contains another pickle."""
    return b"".join(
        [
            *(b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(", text("O8"), b"K\x00K\x01tR"),
            *(b"c_codecs\nencode\n(", text(inner.decode("latin1")), text("latin1"), b"tRtR"),
        ]
    )
