"""Compile Triton kernels for other GPUs ahead of time, and read their resources off the binary.

Each config of `kernels/tuning/tuned/<architecture>.json` is compiled with the signature of a call
on real shapes (the calls of the op's `Tunable`, recorded on meta tensors). ptxas and the AMD
backend come with triton.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from fastdiff.bench.compile import compiled_for, source_of
from fastdiff.bench.tunables import TUNABLES
from fastdiff.kernels.triton import Launch, recording_launches
from fastdiff.kernels.tuning import Config, Gpu, configs


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The limits of one multiprocessor (compute unit)."""

    backend: str
    warp_size: int = 32
    warps: int
    """Most resident warps."""
    blocks: int = 32
    shared_per_block: int
    """Most bytes of shared memory per block."""
    shared: int
    """Bytes of shared memory for all resident blocks together."""
    registers: int = 65536
    """32-bit registers."""
    matrix: str
    """The matrix instruction that a product of tiles must become."""

    def occupancy(self, *, registers: int, shared: int, warps: int) -> float:
        """Resident warps as a share of the most possible."""
        granted = max(1, -(-registers // 8) * 8) * self.warp_size
        blocks = min(self.blocks, self.warps // warps, self.registers // (granted * warps))
        if shared:
            blocks = min(blocks, self.shared // (shared + 1024))  # 1 KiB per block is reserved
        return blocks * warps / self.warps


KIB = 1024
CHIPS = {
    "sm_80": Chip(
        backend="cuda",
        warps=64,
        shared_per_block=163 * KIB,
        shared=164 * KIB,
        matrix=r"mma\.sync",
    ),
    "sm_90": Chip(
        backend="cuda",
        warps=64,
        shared_per_block=227 * KIB,
        shared=228 * KIB,
        matrix=r"wgmma\.mma_async",
    ),
    "sm_100": Chip(
        backend="cuda",
        warps=64,
        shared_per_block=227 * KIB,
        shared=228 * KIB,
        matrix=r"tcgen05\.mma|mma\.sync",
    ),
    "sm_120": Chip(
        backend="cuda",
        warps=48,
        blocks=24,
        shared_per_block=99 * KIB,
        shared=100 * KIB,
        matrix=r"mma\.sync",
    ),
    # 4 SIMDs, each with 8 waves and 512 vector registers per lane
    "gfx942": Chip(
        backend="hip",
        warp_size=64,
        warps=32,
        shared_per_block=64 * KIB,
        shared=65 * KIB,
        registers=4 * 512 * 64,
        matrix="v_mfma",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One compiled kernel."""

    tunable: str
    shape_class: str
    dtype: str
    architecture: str
    kernel: str
    config: Config
    """The config from the file of configs."""
    constants: dict[str, Any]
    """The constants the kernel was compiled with; absent tensors are None."""
    num_warps: int
    num_stages: int
    registers: int
    """Per thread."""
    spills: int
    """Bytes of registers and arrays per thread that went to memory."""
    shared: int
    """Bytes per block."""
    shared_limit: int
    occupancy: float
    dots: int
    """Products of tiles in the kernel."""
    matrix: str
    """The matrix instructions that they compile to, "" if none."""
    widest_load: int
    """Bytes per thread of the widest load from global memory."""
    narrow_loads: int
    """Number of loads from global memory with fewer than 16 bytes per thread."""
    approximations: str
    """The approximate fp32 instructions used ("ex2.approx"), "" if none; NVIDIA only."""
    doubles: int
    """fp64 instructions."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One compilation, as plain values that can be sent to another process."""

    tunable: str
    shape_class: str
    dtype: str
    architecture: str
    every: bool
    """Whether to use all calls of the class, or some."""
    index: int
    """Index among the recorded launches of this class."""

    @property
    def launch(self) -> Launch:
        known = launches(
            self.tunable, self.shape_class, self.dtype, self.architecture, every=self.every
        )
        return known[self.index]


@lru_cache(maxsize=64)
def launches(
    tunable: str, shape_class: str, dtype: str, architecture: str, *, every: bool = False
) -> list[Launch]:
    """The distinct kernels launched by the calls of a shape class."""
    known = TUNABLES[tunable]
    calls_of = known.all_calls if every and known.all_calls is not None else known.calls
    calls = calls_of(shape_class, getattr(torch, dtype), "meta")
    with recording_launches(architecture) as recorded:
        for call in calls:
            call()
    return list({identity(launch): launch for launch in recorded}.values())


def identity(launch: Launch) -> Hashable:
    """Equal for launches that compile to the same binary."""
    options = launch.num_warps, launch.num_stages
    return launch.kernel.__name__, str(source_of(launch)), options


def compile_one(task: Task) -> Resources:
    """Compile one launch and read its resources off the binary."""
    launch, chip = task.launch, CHIPS[task.architecture]
    try:
        compiled = compiled_for(launch, task.architecture)
    except Exception as error:
        raise RuntimeError(f"{task}: {launch.kernel.__name__} does not compile: {error}") from error
    if chip.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = _amd_usage(text)
        loads = [4 * int(width or 1) for width in re.findall(r"global_load_dword(?:x(\d))?", text)]
        loads += [2] * len(re.findall(r"global_load_(?:ushort|short)", text))
        loads += [4 * int(width or 1) for width in re.findall(r"buffer_load_dword(?:x(\d))?", text)]
    else:
        text = compiled.asm["ptx"]
        registers, spills = _nvidia_usage(compiled.asm["cubin"])
        loads = _ptx_loads(text)
    shared = compiled.metadata.shared
    return Resources(
        tunable=task.tunable,
        shape_class=task.shape_class,
        dtype=task.dtype,
        architecture=task.architecture,
        kernel=launch.kernel.__name__,
        config=configs.lookup(
            task.tunable,
            Gpu("", task.architecture),
            getattr(torch, task.dtype),
            task.shape_class,
        ),
        constants={
            p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr
        },
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=registers,
        spills=spills,
        shared=shared,
        shared_limit=chip.shared_per_block,
        occupancy=chip.occupancy(registers=registers, shared=shared, warps=launch.num_warps),
        dots=len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
        matrix=" ".join(sorted(set(re.findall(chip.matrix, text)))),
        widest_load=max(loads, default=0),
        narrow_loads=sum(width < 16 for width in loads),
        approximations=" ".join(sorted(set(re.findall(r"\b\w+\.approx\b", text)))),
        doubles=len(re.findall(r"^\s*(?:@\S+ )?[\w.]+[._]f64\b", text, re.MULTILINE)),
    )


def _ptx_loads(text: str) -> list[int]:
    """Bytes per thread of each load from global memory."""
    widths = []
    for vector, bits in re.findall(r"ld\.global[\w:.]*?(?:\.v(\d))?\.[bfus](\d+)\b", text):
        widths.append(int(vector or 1) * int(bits) // 8)
    widths += [
        int(size, 0) for size in re.findall(r"cp\.async\.\w+\.shared\.global.*?, (\w+)", text)
    ]
    if "cp.async.bulk" in text:
        widths.append(16)
    return widths


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_usage(text: str) -> tuple[int, int]:
    found = {
        name: int(value)
        for name, value in re.findall(
            r"\.(vgpr_count|agpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text
        )
    }
    spilled = max(4 * found["vgpr_spill_count"], found["private_segment_fixed_size"])
    return found["vgpr_count"], spilled  # vgpr_count includes the accumulation registers


def tasks(
    tunables: Sequence[str],
    dtypes: Sequence[str],
    architectures: Sequence[str],
    *,
    shape_classes: Sequence[str] = (),
    every: bool = False,
) -> list[Task]:
    """Kernels of every shipped config, or of some classes; `every`: with all sizes and options
    that use it."""
    return [
        Task(
            tunable=name,
            shape_class=shape_class,
            dtype=dtype,
            architecture=architecture,
            every=every,
            index=index,
        )
        for name in tunables
        for shape_class, dtype in pairs(name, dtypes)
        if not shape_classes or shape_class in shape_classes
        for architecture in architectures
        for index in range(len(launches(name, shape_class, dtype, architecture, every=every)))
    ]


def on_one_gpu_each(todo: Sequence[Task]) -> list[Task]:
    """Keep one of the tasks that differ only in their GPU, rotating through the GPUs.

    The output of the compiler's front end (loads, double precision) does not depend on the GPU.
    AMD's GPU only gets kernels that NVIDIA's do not have, since less can be read off its code.
    """
    same: dict[Hashable, list[Task]] = {}
    for task in sorted(todo, key=lambda task: CHIPS[task.architecture].backend):  # cuda, hip
        alike = same.setdefault(identity(task.launch), [])
        if not alike or CHIPS[task.architecture].backend == CHIPS[alike[0].architecture].backend:
            alike.append(task)
    chosen = {alike[place % len(alike)] for place, alike in enumerate(same.values())}
    return [task for task in todo if task in chosen]


def pairs(tunable: str, dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs (shape class, dtype) of a tunable that have a config."""
    have = {(c, str(d).removeprefix("torch.")) for c, d in TUNABLES[tunable].pairs()}
    known = TUNABLES[tunable].shape_classes
    return [(c, dtype) for c in known for dtype in dtypes if (c, dtype) in have]


def compile_all(todo: Sequence[Task], *, workers: int | None = None) -> list[Resources]:
    """Compile in parallel, identical kernels only once, with a progress bar on stderr."""
    same: dict[Hashable, list[Task]] = {}
    for task in todo:
        same.setdefault((task.architecture, identity(task.launch)), []).append(task)
    found: dict[Task, Resources] = {}
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        # neighbors share their calls, which a worker caches; the slow ones come first
        futures = {pool.submit(compile_one, alike[0]): alike for alike in same.values()}
        try:
            for done in track(
                as_completed(futures),
                f"compiling {len(futures)} distinct kernels of {len(todo)}",
                total=len(futures),
                console=Console(stderr=True),
                transient=True,
            ):
                for task in futures[done]:
                    found[task] = replace(
                        done.result(), tunable=task.tunable, shape_class=task.shape_class
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [found[task] for task in todo]
