"""Turn mangled names of CUDA kernels into readable ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

DTYPES = {"float": "fp32", "__half": "fp16", "__nv_bfloat16": "bf16"}


def split_name(demangled: str) -> tuple[str, tuple[str, ...]]:
    """``void fastdiff::f<float, 4>(...)`` -> ("f", ("float", "4"))."""
    head, depth = "", 0
    for letter in demangled.removeprefix("void "):  # up to the parameters
        if letter == "(" and depth == 0 and not head.endswith("::") and head:
            break
        depth += {"<": 1, ">": -1}.get(letter, 0)
        head += letter
    path, _, arguments = head.partition("<")
    inside = re.sub(r"\((?:int|bool|long|unsigned int)\)", "", arguments.removesuffix(">"))
    return path.rpartition("::")[2], tuple(re.split(r", (?![^<]*>)", inside)) if inside else ()


def demangled(symbols: Sequence[str]) -> dict[str, str] | None:
    """Demangle with binutils or CUDA's own tool; None if neither is installed."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return None
    names = subprocess.run(
        [tool], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return dict(zip(symbols, names.stdout.splitlines(), strict=True))
