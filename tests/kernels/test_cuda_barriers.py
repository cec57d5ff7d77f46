"""The emulation notices when a barrier of the CUDA GroupNorm is left out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cuda_host

pytestmark = [cuda_host.needs_compiler, pytest.mark.slow]

PROGRAM = """
import sys
import torch
from fastdiff import kernels
from fastdiff.kernels.group_norm_silu import cuda
from tests import cuda_host

x = torch.randn(1, 24, 9, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
x = x.contiguous(memory_format=torch.channels_last)
x = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)
expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 6))
for order in cuda_host.ORDERS:
    for on_chip, cluster in ((None, 4), (0, None)):
        cuda.ON_CHIP, cuda.CLUSTER = on_chip, cluster
        with cuda_host.emulated(order), kernels.backend("cuda"):
            try:
                y = kernels.group_norm_silu(x, 6)
            except RuntimeError as fault:
                sys.exit(f"{order}: {fault}")
        if not (y.double() - expected).abs().max() < 0.03:
            sys.exit(f"{order}: wrong result")
"""
OMITTED = {
    "none": ("group_norm_silu.cuh", ""),
    "wait for the copies": ("group_norm_silu_on_chip.cuh", "  wait_for_copies<Left>();\n"),
    "a group per piece of the copies": ("group_norm_silu_on_chip.cuh", "    commit_copies();\n"),
    "barrier after the threads' moments": ("group_norm_silu.cuh", "  }\n  __syncthreads();\n}\n"),
    "cluster_wait before other blocks' parts": ("group_norm_silu_on_chip.cuh", "cluster_wait();"),
}
"""What is left out -> the file and the text at its first occurrence."""


@pytest.mark.parametrize("what", OMITTED)
def test_what_is_left_out_is_noticed(what: str, tmp_path: Path) -> None:
    shutil.copytree(cuda_host.ROOT / "csrc", tmp_path / "csrc")
    name, text = OMITTED[what]
    path = tmp_path / "csrc" / "cuda" / name
    source = path.read_text()
    assert text in source
    begin = source.index("void publish(") if "__syncthreads" in text else 0
    kept = text.replace("  __syncthreads();\n", "") if begin else ""
    path.write_text(source[:begin] + source[begin:].replace(text, kept, 1))
    done = run(library(tmp_path))
    if what == "none":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        assert any(order in done.stderr for order in cuda_host.ORDERS), done.stderr


def library(folder: Path) -> Path:
    """The emulation with the kernels of this folder's csrc/, without optimization."""
    csrc, target = folder / "csrc", folder / "emulation.so"
    sources = [csrc / "cuda" / "group_norm_silu.cu", csrc / "cuda" / "device.cu"]
    sources += sorted(cuda_host.HERE.glob("*.cpp"))
    flags = cuda_host.FLAGS.replace("-O1", "-O0").split()
    includes = [f"-I{path}" for path in (csrc / "cuda", csrc / "common", cuda_host.HERE)]
    command = [cuda_host.COMPILER, *flags, "-DFASTDIFF_EMULATE_CUDA", *includes]
    command += ["-shared", "-x", "c++", *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=cuda_host.ROOT, env={**os.environ, "FASTDIFF_CUDA_HOST": str(path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
