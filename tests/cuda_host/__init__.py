"""The CUDA kernels on a CPU: the same sources, compiled with g++ against emulation.h.

`emulated()` replaces the compiled module by this library, so that backend "cuda" runs on CPU
tensors. The library is built on first use, which takes a few seconds for each version of the
sources, and is kept in build/.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from fastdiff.kernels import cuda as _cuda

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = (
    "-std=c++17 -O1 -g1 -march=native -ffp-contract=fast -fPIC -fno-gnu-unique "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi"
)
SANITIZERS = (
    "-fsanitize=address,undefined -fsanitize-recover=address -fno-sanitize-recover=undefined "
    "-fno-omit-frame-pointer"
)
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "shuffled": (2, 1), "shuffled again": (2, 2)}
"""Name -> (kind, seed) of an order in which the threads of a block run."""

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason="the emulation of CUDA needs g++"
)


def sources() -> list[Path]:
    """The files that the library is compiled from."""
    folders = ((ROOT / "csrc" / "cuda", "*.cu"), (HERE, "*.cu"), (HERE, "*.cpp"))
    return [path for folder, names in folders for path in sorted(folder.glob(names))]


def build(flags: str = "") -> Path:
    """The shared library, compiled unless there is one for the current sources."""
    used = [*sources(), *(ROOT / "csrc").glob("*/*.cuh"), *(ROOT / "csrc").glob("*/*.h")]
    total = hashlib.sha256(f"{COMPILER} {FLAGS} {flags}".encode())
    for path in sorted({*used, *HERE.glob("*.h")}):
        total.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_host"
    library = folder / f"{total.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # of several test processes, only one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library, flags)
    return library


def _compile(library: Path, flags: str) -> None:
    objects = [library.parent / f"{library.stem}-{path.stem}-{os.getpid()}.o" for path in sources()]
    common = [COMPILER, *FLAGS.split(), *flags.split(), "-DFASTDIFF_EMULATE_CUDA"]
    common += [f"-I{folder}" for folder in (*(ROOT / "csrc" / r for r in ("cuda", "common")), HERE)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        commands = [
            [*common, "-c", "-x", "c++", str(path), "-o", str(target)]
            for path, target in zip(sources(), objects, strict=True)
        ]
        list(pool.map(_run, commands))
    written = library.with_suffix(f".{os.getpid()}")
    _run([*common, "-shared", *map(str, objects), "-o", str(written)])
    written.rename(library)
    for path in objects:
        path.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


@cache
def library() -> ctypes.CDLL:
    """The library. FASTDIFF_CUDA_HOST names a different one, such as a build with sanitizers."""
    return ctypes.CDLL(os.environ.get("FASTDIFF_CUDA_HOST") or str(build()))


def set_order(name: str) -> None:
    """Set the order of threads, one of ORDERS, for all following launches."""
    kind, seed = ORDERS[name]
    library().emulation_set_order(kind, ctypes.c_uint64(seed))


def call(name: str, *arguments: Tensor | int) -> None:
    """Call a C function written for tests, passing tensors as addresses and numbers as int64."""
    function = getattr(library(), name)
    function.restype = ctypes.c_char_p
    given = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a)
        for a in arguments
    ]
    error = function(*given)
    assert error is None, error.decode()


@contextmanager
def emulated(order: str = "forward") -> Iterator[None]:
    """Inside the block, backend "cuda" accepts CPU tensors."""
    set_order(order)
    with _cuda.using_library(library()):
        yield
