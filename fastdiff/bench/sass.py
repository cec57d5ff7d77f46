"""Instructions, blocks and bytes in flight of the kernels, counted in machine code for an H200.

    python -m fastdiff.bench.counts sass
    python -m fastdiff.bench.counts sass --docs

Every kernel is compiled ahead of time for sm_90, in bf16, with the launch that a real network
makes, and disassembled. No GPU is needed. Counted are the instructions of one iteration of the main
loop (of the whole kernel where it has no loop), divided by the numbers that a thread treats in it.
An H200 at copy speed leaves 31 thread instructions for a bf16 number that is read and written:
132 multiprocessors x 4 warp instructions a clock x 1.98 GHz against 4.3 TB/s.

The CUDA rows need nvcc and `csrc/`, the Triton rows the package triton; without them the rows are
left out, and the reason is printed.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastdiff import kernels
from fastdiff.bench import compile as ahead
from fastdiff.bench import launches
from fastdiff.bench.disassembly import (
    Instruction,
    NoToolError,
    Way,
    disassembled,
    loads_in_flight,
    loops,
    main_loop,
    registers,
    shortest_path,
)
from fastdiff.bench.record import ROOT
from fastdiff.bench.report import table
from fastdiff.bench.shapes import GPU_JOBS
from fastdiff.kernels.choose import bound_arguments
from fastdiff.kernels.triton import Launch, recording_launches

SOURCES = ROOT / "csrc"
ARCHITECTURE = "sm_90"
MULTIPROCESSORS = 132
THREADS, REGISTERS, SHARED = 2048, 65536, 228 * 1024
"""Of a multiprocessor; a block takes 1 KiB of shared memory more than it asks for."""
SHARED_PER_BLOCK = 227 * 1024
CLUSTER = 16
FLIGHT = 3.8e6
"""Bytes that must be on their way at a time: 4.8 TB/s x 0.8 us."""
BLOCKS = 128
GROUPS = 32
NORMS = "SD 1.5 U-Net", "SDXL U-Net", "KL-f8 decoder"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Instructions per number, or per 64 keys and 16 queries."""

    kernel: str
    backend: str
    parts: dict[str, float]
    """Loop -> its instructions."""
    aim: float | None = None
    flight: float | None = None
    """Bytes of the inputs on their way at a time, at most, when the kernel fills the chip."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


# CUDA

CUDA_KERNELS = """
#include "attention_hopper.cuh"
#include "geglu.cuh"
#include "group_norm_silu_on_chip.cuh"
#include "norm_plan.h"
namespace fastdiff {
template __global__ void norm_on_chip_columns<bfloat16, 8, true, false>(
    Norm<bfloat16>, NormShape, int, int64_t);
template __global__ void norm_on_chip_columns<bfloat16, 8, true, true>(
    Norm<bfloat16>, NormShape, int, int64_t);
template __global__ void norm_moments_columns<bfloat16, 8, false>(
    Norm<bfloat16>, NormShape, Chunks, int, float*);
template __global__ void norm_moments_columns<bfloat16, 8, true>(
    Norm<bfloat16>, NormShape, Chunks, int, float*);
template __global__ void norm_apply_columns<bfloat16, 8>(
    Norm<bfloat16>, NormShape, Chunks, int);
template __global__ void geglu_forward<bfloat16, 8>(
    const bfloat16*, bfloat16*, GegluShape, int64_t);
template __global__ void attention_streaming<bfloat16, 40, 2, false>(Attention<bfloat16>);
template __global__ void attention_streaming<bfloat16, 64, 2, false>(Attention<bfloat16>);
template __global__ void attention_streaming<bfloat16, 80, 2, false>(Attention<bfloat16>);
template __global__ void attention_streaming<bfloat16, 160, 1, false>(Attention<bfloat16>);
#define MAP const __grid_constant__ TensorMap
template __global__ void attention_hopper<bfloat16, 40>(MAP, MAP, MAP, Attention<bfloat16>);
template __global__ void attention_hopper<bfloat16, 64>(MAP, MAP, MAP, Attention<bfloat16>);
template __global__ void attention_hopper<bfloat16, 80>(MAP, MAP, MAP, Attention<bfloat16>);
template __global__ void attention_hopper<bfloat16, 160>(MAP, MAP, MAP, Attention<bfloat16>);
}
"""
"""What is counted, in the instances that a call in bf16 uses."""
CUDA_PLAN = f"""
#include "norm_plan.h"
FASTDIFF_EXPORT void norm_plan(int64_t n, int64_t c, int64_t s, int64_t groups, int64_t* out) {{
  const fastdiff::NormShape shape{{n, s, int(c), int(groups), int(c / groups), int(c)}};
  fastdiff::plan_norm({{shape, 2, true, true, false}}, {{{SHARED_PER_BLOCK}, {CLUSTER}, false}})
      .write(out);
}}
"""
FIELDS = (
    *("on_chip", "vector", "slab", "threads", "shared", "chunks", "length", "columns"),
    *("workspace", "cluster"),
)
"""Of NormPlan in csrc/cuda/norm_plan.h."""


def nvcc(text: str, output: str, *options: str) -> bytes:
    """Compile CUDA source that includes files of csrc/ for an H200.

    Raises:
        NoToolError: nvcc or csrc/ is missing.
    """
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise NoToolError("nvcc was not found; install the CUDA toolkit")
    if not (SOURCES / "cuda").is_dir():
        raise NoToolError(f"{SOURCES} does not exist; run this in a checkout of fastdiff")
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "counted.cu", Path(folder) / output
        source.write_text(text)
        includes = [f"-I{SOURCES / name}" for name in ("cuda", "common")]
        command = [found, "-std=c++17", "-O3", f"-arch={ARCHITECTURE}a", *options, *includes]
        subprocess.run([*command, "-o", str(target), str(source)], check=True, capture_output=True)
        return target.read_bytes()


@dataclass(frozen=True, kw_only=True)
class Code:
    """A compiled kernel."""

    instructions: list[Instruction]
    registers: int
    threads: int = 256
    shared: int = 0

    def flight(self, way: Way) -> float:
        """Bytes in flight while all multiprocessors go this way."""
        blocks = MULTIPROCESSORS * resident(self.registers, self.threads, self.shared)
        return blocks * self.threads * 16 * loads_in_flight(way.instructions)


@cache
def cuda_code() -> dict[str, Code]:
    """Kernel and its integer template arguments, such as "geglu_forward 8" -> its code."""
    cubin = nvcc(CUDA_KERNELS, "counted.cubin", "-cubin")
    used = registers(cubin)
    found = {}
    for symbol, code in disassembled(cubin).items():
        name = re.match(r"_ZN8fastdiff\d+([a-z_]+)I", symbol)
        assert name is not None, symbol
        numbers = re.findall(r"L[ib](\d+)E", symbol)
        found[" ".join([name[1], *numbers])] = Code(instructions=code, registers=used[symbol])
    return found


def per_number(code: Code, unit: str, numbers: int, avoid: str | None = None) -> float:
    """Instructions per number in the loop where a unit of work is that many numbers."""
    way = main_loop(code.instructions, unit, avoid=avoid)
    return len(way.instructions) / way.units / numbers


def around(code: Sequence[Instruction], inner: Way, unit: str) -> Way:
    """An iteration of the loop around a loop, with the inner loop's body once."""
    first, last = inner.instructions[0].address, inner.instructions[-1].address
    bodies = [b for b in loops(code) if b[0].address < first and last < b[-1].address]
    return shortest_path(min(bodies, key=len), unit)


EXPONENTIAL = r"MUFU\.EX2"
"""One per number with SiLU."""


def straight(kernel: str, backend: str, code: Code) -> Row:
    """A kernel without a loop: all of its loads and stores, 16 bytes of the result per store."""
    way = shortest_path(code.instructions, r"(LDG|STG).*\.128")
    stored = sum(bool(re.match(r"STG.*\.128", i.opcode)) for i in way.instructions)
    return Row(
        kernel=kernel,
        backend=backend,
        parts={"whole kernel": len(way.instructions) / stored / 8},
        flight=code.flight(way),
    )


def in_parts_on_cuda(kernel: str, code: Mapping[str, Code], *, adds: bool) -> Row:
    """A norm in parts, whose first pass also writes the sum if it adds."""
    moments, apply = code[f"norm_moments_columns 8 {int(adds)}"], code["norm_apply_columns 8"]
    unit, avoid = (r"STG.*\.128", None) if adds else (r"LDG.*\.128", "STG")
    first, second = (
        main_loop(moments.instructions, unit, avoid=avoid),
        main_loop(apply.instructions, EXPONENTIAL),
    )
    return Row(
        kernel=kernel,
        backend="CUDA",
        parts={
            f"{'sum, ' if adds else ''}statistics": len(first.instructions) / first.units / 8,
            "result": len(second.instructions) / second.units,
        },
        aim=26,
        flight=min(moments.flight(first), apply.flight(second)),
    )


def cuda_rows() -> Iterator[Row]:
    code = cuda_code()
    wide = 8
    whole = code["norm_on_chip_columns 8 1 0"]
    yield Row(
        kernel="GroupNorm+SiLU on chip",
        backend="CUDA",
        parts={
            "copy": per_number(whole, r"LDGSTS.*\.128", wide),
            "statistics": per_number(whole, r"LDS.*\.128", wide, avoid=r"STG|MUFU\.EX2"),
            "result": per_number(whole, EXPONENTIAL, 1),
        },
        aim=22,
    )
    adding = code["norm_on_chip_columns 8 1 1"]
    yield Row(
        kernel="GroupNorm+SiLU on chip, with a sum",
        backend="CUDA",
        parts={
            "sum, statistics": per_number(adding, r"STG.*\.128", wide, avoid=r"MUFU\.EX2"),
            "result": per_number(adding, EXPONENTIAL, 1),
        },
        aim=22,
    )
    yield in_parts_on_cuda("GroupNorm+SiLU in parts", code, adds=False)
    yield in_parts_on_cuda("GroupNorm+SiLU in parts, with a sum", code, adds=True)
    yield straight("GEGLU", "CUDA", code["geglu_forward 8"])
    for d, tiles in ((40, 2), (64, 2), (80, 2), (160, 1)):
        instructions = code[f"attention_streaming {d} {tiles} 0"].instructions
        step = main_loop(instructions, "HMMA")  # 32 keys
        tile = around(instructions, step, "HMMA") if tiles > 1 else step  # 32 * tiles keys
        per_tile = len(tile.instructions) + (tiles - 1) * len(step.instructions)
        yield Row(
            kernel=f"attention, d = {d}, mma.sync",
            backend="CUDA",
            parts={"64 keys": per_tile * 64 / (32 * tiles) / tiles},
        )
    for d, keys in ((40, 128), (64, 128), (80, 128), (160, 64)):
        # the retries of its waits lie behind the exit
        way = main_loop(code[f"attention_hopper {d}"].instructions, "HGMMA", avoid="EXIT|STS")
        yield Row(
            kernel=f"attention, d = {d}",
            backend="CUDA",
            parts={"64 keys": len(way.instructions) * 64 / keys},
            aim=200 if d == 40 else None,
        )


# Triton


def triton_launches(op: str, *args: Any) -> list[Launch]:
    """What a call on meta tensors would launch on an H200."""
    forward = kernels.OPS[op].backends["triton"].forward
    with recording_launches(ARCHITECTURE) as found, torch.no_grad():
        forward(*bound_arguments(op, args, {}), False)
    return found


def triton_code(launch: Launch) -> Code:
    """Compile a recorded launch for an H200."""
    compiled = ahead.compiled_for(launch, ARCHITECTURE)
    cubin = compiled.asm["cubin"]
    [(symbol, code)] = disassembled(cubin).items()
    return Code(
        instructions=code,
        registers=registers(cubin)[symbol],
        threads=32 * launch.num_warps,
        shared=compiled.metadata.shared,
    )


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def norm_launches(n: int, c: int, size: int) -> list[Launch]:
    """What a norm of (N, C, size, size) launches."""
    x = meta(n, c, size, size).contiguous(memory_format=torch.channels_last)
    return triton_launches("group_norm_silu", x, 32, meta(c), meta(c))


def whole(launch: Launch, unit: str) -> float:
    """Instructions per number of a kernel without a loop."""
    way = shortest_path(triton_code(launch).instructions, unit)
    return len(way.instructions) / way.units


def sums_of(launch: Launch) -> list[str]:
    """The shapes and layouts that a kernel sums, and those that it reshapes for it, in order: they
    fix the order of its additions."""
    text = ahead.compiled_for(launch, ARCHITECTURE).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", text, re.MULTILINE))
    pattern = r'"tt\.reduce".*?\}\) : \((.*?)\) ->|tt\.reshape .*? : (.*?) ->'
    found = [a or b for a, b in re.findall(pattern, text, re.DOTALL)]
    return [re.sub(r"#\w+", lambda m: layouts.get(m[0], m[0]), each) for each in found]


LOAD = r"LDG.*\.128"


def in_parts(launches: Sequence[Launch]) -> Row:
    """The two kernels of a norm in parts: their loops, and what each program does once, divided by
    its numbers. The first step of the moments' kernel is outside of its loop."""
    code = [triton_code(launch) for launch in launches]
    units = LOAD, EXPONENTIAL
    ways = [main_loop(c.instructions, unit) for c, unit in zip(code, units, strict=True)]
    steps, per_step = launches[1].arguments["steps"], ways[1].units
    statistics, result = (len(way.instructions) for way in ways)
    every = sum(
        len(shortest_path(c.instructions, unit).instructions)
        for c, unit in zip(code, units, strict=True)
    )
    return Row(
        kernel="GroupNorm+SiLU in parts",
        backend="Triton",
        parts={
            "statistics": statistics / per_step,
            "result": result / per_step,
            "once": (every - 2 * statistics - result) / (steps * per_step),
        },
        aim=26,
        flight=min(c.flight(way) for c, way in zip(code, ways, strict=True)),
    )


def triton_rows() -> Iterator[Row]:
    [small] = norm_launches(4, 1280, 8)  # no two programs share a sample's statistics
    yield Row(
        kernel="GroupNorm+SiLU on chip",
        backend="Triton",
        parts={"whole kernel": whole(small, EXPONENTIAL)},
        aim=22,
    )
    yield in_parts(norm_launches(1, 320, 128))
    [geglu] = triton_launches("geglu", meta(2, 4096, 2560))
    yield straight("GEGLU", "Triton", triton_code(geglu))
    for d, tokens, heads in ((40, 4096, 8), (64, 4096, 10), (80, 1024, 8), (160, 256, 8)):
        q = meta(2, tokens, heads, d)
        [launch] = triton_launches("attention", q, q, q)
        way = main_loop(triton_code(launch).instructions, "HGMMA")
        keys, rows = (launch.arguments[name] for name in ("BLOCK_N", "BLOCK_M"))
        tiles = rows / launch.num_warps / 16
        yield Row(
            kernel=f"attention, d = {d}",
            backend="Triton",
            parts={"64 keys": len(way.instructions) * 64 / keys / tiles},
            aim=230 if d == 40 else None,
        )
        yield from attention_backward_rows(q)


def attention_backward_rows(q: Tensor) -> Iterator[Row]:
    """The two large kernels of the backward pass of self-attention; both compute the scores again,
    so a gradient of the keys is four products and one of the queries three."""
    n, length, heads, d = q.shape
    statistics = torch.empty(2, n, heads, length, device="meta")
    inputs = q, q, q, None, None, None
    backward = kernels.OPS["attention"].backends["triton"].backward
    assert backward is not None
    with recording_launches(ARCHITECTURE) as found, torch.no_grad():
        backward(q, *inputs, d**-0.5, q, statistics, [True] * 3 + [False] * 3)
    for launch in found:
        of = re.fullmatch("_(keys|queries)_gradient_kernel", launch.kernel.__name__)
        if of is None:  # the row sums
            continue
        way = main_loop(triton_code(launch).instructions, "HGMMA|HMMA")
        tile = launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"] / launch.num_warps
        yield Row(
            kernel=f"attention, d = {d}, gradient of {of[1]}",
            backend="Triton",
            parts={"64 keys": len(way.instructions) * 64 * 16 / tile},
        )


# Blocks and bytes in flight


def cuda_plan() -> Callable[[int, int, int, int], dict[str, int]]:
    """How the CUDA kernels split a norm (N, C, S, groups) in bf16, channels_last, on an H200."""
    library = nvcc(CUDA_PLAN, "plan.so", "-shared", "-Xcompiler", "-fPIC")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.so"
        path.write_bytes(library)
        function = ctypes.CDLL(str(path)).norm_plan
    function.argtypes = [*(ctypes.c_int64,) * 4, ctypes.c_void_p]

    def plan(n: int, c: int, s: int, groups: int) -> dict[str, int]:
        fields = (ctypes.c_int64 * len(FIELDS))()
        function(n, c, s, groups, ctypes.addressof(fields))
        return dict(zip(FIELDS, fields, strict=True))

    return plan


@dataclass(frozen=True, kw_only=True)
class Start:
    """How one norm of one sample starts."""

    plan: str
    blocks: int
    """Of the launch that reads x, for one sample."""
    flight: float
    """Bytes on their way at a time when the whole chip reads x."""


def resident(code_registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds."""
    granted = -(-code_registers // 8) * 8 * threads
    blocks = min(32, THREADS // threads, REGISTERS // granted)
    return min(blocks, SHARED // (shared + 1024))


def cuda_start(plan: dict[str, int], c: int, s: int, groups: int) -> Start:
    code = cuda_code()
    if plan["on_chip"]:
        kernel = code["norm_on_chip_columns 8 1 0"]
        blocks = -(-groups // plan["slab"]) * plan["cluster"]
        width = plan["slab"] * c // groups
        name = f"{plan['cluster']} blocks for {plan['slab']} groups"
        threads = plan["threads"]
        tile = -(-s // plan["cluster"]) * width * 2
    else:
        kernel = code["norm_moments_columns 8 0"]
        blocks = plan["chunks"] * -(-c // plan["columns"])
        name, threads = f"parts of {plan['length']} places", 256
        tile = plan["length"] * plan["columns"] * 2
    at_once = min(blocks, MULTIPROCESSORS * resident(kernel.registers, threads, plan["shared"]))
    if plan["on_chip"]:  # copies fill the whole tile
        per_block = tile
    else:
        way = main_loop(kernel.instructions, r"LDG.*\.128", avoid="STG")
        per_block = min(tile, 16 * threads * loads_in_flight(way.instructions))
    return Start(plan=name, blocks=blocks, flight=min(at_once * per_block, s * c * 2))


def triton_start(launches: Sequence[Launch], c: int, s: int) -> Start:
    """How the Triton kernels start: the launch that reads x first, for a sample of (C, S).

    Its loads were counted where its program is the largest (`in_parts`); programs on chip load all
    of their tile.
    """
    first = launches[0]
    blocks, known = math.prod(first.grid), first.arguments
    if len(launches) == 1:
        shared = known["SPLIT"]
        plan = "on chip" if shared == 1 else f"on chip, {shared} for the same groups"
        return Start(plan=plan, blocks=blocks, flight=s * c * 2)
    code = triton_code(norm_launches(1, 320, 128)[0])
    at_once = min(blocks, MULTIPROCESSORS * resident(code.registers, code.threads, code.shared))
    tile = known["UNROLL"] * known["ROWS"] * known["COLUMNS"] * 2
    return Start(plan="in parts", blocks=blocks, flight=min(at_once * tile, s * c * 2))


@cache
def norm_sizes() -> list[tuple[str, int, int, int]]:
    """(network, C, height, groups) of every GroupNorm of the networks, each size once."""
    found: dict[tuple[int, int, int], str] = {}
    for name in NORMS:
        for call in GPU_JOBS[name].collect():
            if call.op.endswith("group_norm_silu"):
                _, c, h, w = call.tensors[0]
                found.setdefault((c, h, w), name)
    return [(name, c, h, GROUPS) for (c, h, _), name in sorted(found.items(), key=_by_network)]


def _by_network(item: tuple[tuple[int, int, int], str]) -> tuple[int, int, int]:
    (c, h, _), name = item
    return NORMS.index(name), -h, c


# Launches of norms


def launches_of_norms(
    name: str, plan: Callable[[int, int, int, int], dict[str, int]]
) -> tuple[int, ...]:
    """GroupNorms of an evaluation, and their launches in Triton and in CUDA (3 in parts)."""
    total = [0, 0, 0]
    for call, times in GPU_JOBS[name].collect().items():
        if call.op.endswith("group_norm_silu"):
            n, c, h, w = call.tensors[0]
            on_chip = plan(n, c, h * w, GROUPS)["on_chip"]
            launched = len(norm_launches(n, c, h)), 1 if on_chip else 3
            for i, number in enumerate((1, *launched)):
                total[i] += times * number
    return tuple(total)


def totals_with_cuda(
    name: str, plan: Callable[[int, int, int, int], dict[str, int]]
) -> tuple[int, int]:
    """Launches of an evaluation with the CUDA kernels of norms: ours, and accelerated diffusers."""

    def norms(n: int, c: int, s: int, groups: int) -> int:
        return 1 if plan(n, c, s, groups)["on_chip"] else 3

    return (
        launches.native(GPU_JOBS[name], norms).total,
        launches.of_diffusers(name, accelerated=True, norms=norms).total,
    )


# The tables

SIZE_HEAD = (
    *("network", "sample", "CUDA plan", "blocks, batch 1", "batch 2", "MB in flight"),
    *("Triton plan", "programs, batch 1", "batch 2", "MB in flight"),
)


@cache
def norm_starts() -> dict[tuple[int, int], Start]:
    """(C, height) -> how the CUDA kernels start one sample."""
    plan = cuda_plan()
    return {
        (c, h): cuda_start(plan(1, c, h * h, groups), c, h * h, groups)
        for _, c, h, groups in norm_sizes()
    }


@cache
def triton_starts() -> dict[tuple[int, int], Start]:
    """(C, height) -> how the Triton kernels start one sample."""
    return {(c, h): triton_start(norm_launches(1, c, h), c, h * h) for _, c, h, _ in norm_sizes()}


def start_cells(start: Start | None, twice: int, enough: float) -> tuple[str, ...]:
    """Cells of a row, given the blocks for two samples and the bytes that should be in flight."""
    if start is None:
        return ("-",) * 4
    short = "" if start.flight >= enough else f" of {enough / 1e6:.1f}"
    return start.plan, f"{start.blocks}", f"{twice}", f"{start.flight / 1e6:.2f}{short}"


Starts = dict[tuple[int, int], Start]


def size_rows(starts: Starts, in_triton: Starts) -> list[tuple[str, ...]]:
    """One row per norm, after the header; starts: those of the CUDA kernels."""
    found: list[tuple[str, ...]] = [SIZE_HEAD]
    for name, c, h, _ in norm_sizes():
        enough = min(FLIGHT, c * h * h * 2)
        cuda = starts.get((c, h))
        cells = start_cells(cuda, 2 * cuda.blocks if cuda else 0, enough)
        triton = in_triton.get((c, h))
        twice = math.prod(norm_launches(2, c, h)[0].grid) if triton else 0
        cells += start_cells(triton, twice, enough)
        found.append((name, f"({c}, {h}, {h})", *cells))
    return found


LAUNCHES_HEAD = (
    *("network", "GroupNorms", "launches, Triton", "CUDA"),
    *("evaluation, CUDA: fastdiff", "diffusers, accelerated"),
)
HEAD = ("kernel", "backend", "loops", "instructions", "aim", "MB in flight")


@cache
def rows() -> tuple[list[Row], list[str]]:
    """The rows, and why others are left out."""
    found, missing = [], []
    for backend, counted in (("CUDA", cuda_rows), ("Triton", triton_rows)):
        try:
            found += list(counted())
        except (NoToolError, ImportError) as error:
            missing.append(f"{backend} rows are left out: {error}")
    return sorted(found, key=lambda row: row.kernel.split(",")[0], reverse=True), missing


def row_cells(row: Row) -> tuple[str, ...]:
    attention = row.kernel.startswith("attention")
    parts = ", ".join(
        f"{name} {value:.0f}" if attention else f"{name} {value:.1f}"
        for name, value in row.parts.items()
    )
    digits = 0 if attention else 1
    aim = "" if row.aim is None else f"{row.aim:g}"
    if row.aim is not None and row.total > row.aim:
        aim += ", missed"
    flight = "" if row.flight is None else f"{row.flight / 1e6:.1f}"
    return row.kernel, row.backend, parts, f"{row.total:.{digits}f}", aim, flight


def counted() -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], list[str]]:
    """Both tables, each with its header, and what is left out of them."""
    found, missing = rows()
    starts: list[Starts] = []
    for start in (norm_starts, triton_starts):
        try:
            starts.append(start())
        except (NoToolError, ImportError):
            starts.append({})
    return [HEAD, *map(row_cells, found)], size_rows(*starts), missing


ALIKE = ((1280, 8), (1920, 16))
"""(C, height) of norms on chip, where few samples are shared by several programs."""


def facts() -> dict[str, Any]:
    """What can be counted here, as plain values."""
    found, missing = rows()
    starts = {} if missing else norm_starts()
    return {
        "missing": missing,
        "instructions": [[row.kernel, row.backend, row.total, row.flight] for row in found],
        "norms": [[c, h, start.blocks, start.flight] for (c, h), start in starts.items()],
        "triton norms": []
        if missing
        else [[c, h, start.blocks, start.flight] for (c, h), start in triton_starts().items()],
        "sums": []
        if missing
        else [[n, sums_of(norm_launches(n, c, h)[0])] for c, h in ALIKE for n in (1, 2, 4)],
        "versions": "" if missing else versions(),
        "section": "" if missing else section(),
    }


def versions() -> str:
    import triton

    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", text)
    return f"nvcc {release[1] if release else '?'} and triton {triton.__version__}"


def section() -> str:
    """The section of docs/counts.md.

    Raises:
        NoToolError: rows would be missing.
    """
    _, missing = rows()
    if missing:
        raise NoToolError("; ".join(missing))
    (head, *body), (sizes, *by_size), _ = counted()
    plan = cuda_plan()
    launched = [
        (name, *map(str, (*launches_of_norms(name, plan), *totals_with_cuda(name, plan))))
        for name in NORMS
    ]
    return SECTION.format(
        versions=versions(),
        rows=table(head, body),
        sizes=table(sizes, by_size),
        launches=table(LAUNCHES_HEAD, launched),
    )


SECTION = """\
Generated by `python -m fastdiff.bench.counts sass --docs` from the machine code that {versions}
make for an H200 (sm_90), in bf16; a test holds the limits. GroupNorm and GEGLU: instructions per
number; attention: per 64 keys, of a warp for 16 queries. Counted is the main loop, or the whole
kernel where it has no loop; of Triton's norm in parts also what each program does once, at
(320, 128, 128). An H200 has time for 31 instructions per bf16 number that is read and written.

{rows}

MB in flight are the loads that all threads issue before they use the first, on a full chip.

Blocks of the launch that reads x first, and bytes of x that are on their way at a time: 132
multiprocessors want at least 128 blocks for one sample, and 3.8 MB in flight or the whole sample.
Triton's programs cannot share their sums within a launch. So where few programs hold a sample, up
to 8 of them compute the same statistics, on multiprocessors that had nothing to do, and each its
share of the result. The count on chip above is for four samples, where each number is read once.

{sizes}

Launches of all GroupNorms of an evaluation, and of the whole evaluation with CUDA's, which `auto`
takes where the module has CUDA kernels: they norm x and a skip connection without a concatenation,
and are one launch each where a sample fits on the chip. The totals above count Triton's.

{launches}
"""
