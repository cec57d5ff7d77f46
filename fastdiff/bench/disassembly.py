"""Read machine code (SASS) of NVIDIA GPUs: instructions, loops, the shortest path through a loop.

`nvdisasm` and `cuobjdump` come with the package triton and with the CUDA toolkit. No GPU is needed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE
)
LABEL = re.compile(r"^(\.L_[\w.]+):", re.MULTILINE)
FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([\w$]+),", re.MULTILINE)
WIDE_LOAD = r"LDG\b.*\.128"
"""A load of 16 bytes per thread from global memory into registers."""


class NoToolError(Exception):
    """A program that this needs was not found; the message names it."""


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    opcode: str
    operands: str
    target: int | None = None
    """Address that a branch jumps to."""

    @property
    def registers_written(self) -> range:
        """The registers that a load writes."""
        first = re.match(r"R(\d+)", self.operands)
        if first is None:
            return range(0)
        width = 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1
        return range(int(first[1]), int(first[1]) + width)


def tool(name: str) -> str:
    """Path of a program of the CUDA toolkit, from the toolkit or from the package triton.

    Raises:
        NoToolError: it was not found.
    """
    triton = importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise NoToolError(f"{name} was not found; install triton or the CUDA toolkit")
    return found


def disassembled(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in a cubin, by its mangled name."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "code.cubin"
        path.write_bytes(cubin)
        command = [tool("nvdisasm"), "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    places = [(m.start(), m[1]) for m in FUNCTION.finditer(text)]
    ends = [start for start, _ in places[1:]] + [len(text)]
    return {
        name: instructions(text[start:end]) for (start, name), end in zip(places, ends, strict=True)
    }


def instructions(text: str) -> list[Instruction]:
    """Parse the disassembly of one kernel."""
    found = [(m.start(), m) for m in LINE.finditer(text)]
    addresses = [(start, int(m[1], 16)) for start, m in found]
    labels = {}
    for label in LABEL.finditer(text):
        after = [address for start, address in addresses if start > label.start()]
        if after:
            labels[label[1]] = after[0]
    return [
        Instruction(
            address=int(m[1], 16),
            predicated=bool(m[2]) and "PT" not in m[2],
            opcode=m[3],
            operands=m[4],
            target=_target(m[3], m[4], labels),
        )
        for _, m in found
    ]


def _target(opcode: str, operands: str, labels: dict[str, int]) -> int | None:
    if not re.match(r"(BRA|BRX|JMP)\b", opcode):
        return None
    named = re.search(r"`\((\.L_[\w.]+)\)", operands)
    return labels.get(named[1]) if named else None


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops: from the target of a backward branch to the branch.

    Branches behind the last exit lead back from code that was moved out of the way.
    """
    exits = [each.address for each in code if each.opcode == "EXIT"]
    end = exits[-1] if exits else code[-1].address
    found = []
    for place, each in enumerate(code):
        if each.target is not None and each.target < each.address <= end:
            found.append([i for i in code[: place + 1] if i.address >= each.target])
    return found


@dataclass(frozen=True, kw_only=True)
class Way:
    """A path through code."""

    instructions: list[Instruction]
    units: int
    """Units of work done on the way."""


def shortest_path(code: Sequence[Instruction], unit: str, *, avoid: str | None = None) -> Way:
    """The path from the first to the last instruction with the most units of work.

    Of these, the one with the fewest instructions: a kernel's loop may contain code for options
    that a call does not use, and for the ragged end of a row. Backward branches other than the last
    instruction are not followed, so the bodies of inner loops count once. Predicated instructions
    always count: they take an issue slot.

    Args:
        unit: a pattern of opcodes; a match is one unit of work.
        avoid: a pattern of opcodes that the path must not contain.
    """
    Paths = dict[int, tuple[int, Any]]  # units -> length, and the last instruction with its path

    def keep(known: Paths, units: int, path: tuple[int, Any]) -> None:
        if units not in known or path[0] < known[units][0]:
            known[units] = path

    after = {a.address: b.address for a, b in pairwise(code)}
    found: dict[int, Paths] = {code[0].address: {0: (0, None)}}
    ends: Paths = {}
    for each in code:
        paths = found.pop(each.address, None)
        if paths is None or (avoid and re.match(avoid, each.opcode)):
            continue
        leaves = each.opcode == "EXIT"
        always = not each.predicated and not re.match(r"!?U?P\d", each.operands)
        following = []
        if each.target is not None and each.target > each.address:
            following.append(each.target)
        if not ((leaves or each.target is not None) and always) and each.address in after:
            following.append(after[each.address])
        work = bool(re.match(unit, each.opcode))
        for before, (length, link) in paths.items():
            units = before + work
            path = length + 1, (each, link)
            if each is code[-1] or leaves:
                keep(ends, units, path)
            for address in following:
                keep(found.setdefault(address, {}), units, path)
    if not ends:
        return Way(instructions=[], units=0)
    most = max(ends)
    way, link = [], ends[most][1]
    while link is not None:
        instruction, link = link
        way.append(instruction)
    return Way(instructions=way[::-1], units=most)


def main_loop(code: Sequence[Instruction], unit: str, *, avoid: str | None = None) -> Way:
    """An iteration of the innermost loop that does the most units of work.

    Compilers leave copies of an unrolled loop for the last iterations; those do fewer units.

    Args:
        unit, avoid: see `shortest_path`.

    Raises:
        ValueError: there is none.
    """
    every = loops(code)
    ways = {id(body): shortest_path(body, unit, avoid=avoid) for body in every}
    found = []
    for body in every:
        within = [
            b
            for b in every
            if b is not body
            and body[0].address <= b[0].address
            and b[-1].address <= body[-1].address
        ]
        if ways[id(body)].units and not any(ways[id(b)].units for b in within):
            found.append(ways[id(body)])
    if not found:
        raise ValueError(f"no loop contains {unit!r}")
    return max(found, key=lambda way: (way.units, -len(way.instructions)))


def loads_in_flight(code: Sequence[Instruction], load: str = WIDE_LOAD) -> int:
    """The most loads that are issued before an instruction uses the result of one of them."""
    waiting: set[int] = set()
    count = most = 0
    for each in code:
        if re.match(load, each.opcode):
            waiting |= set(each.registers_written)
            count += 1
            most = max(most, count)
            continue
        used = {int(n) for n in re.findall(r"\bR(\d+)\b", each.operands)}
        if used & waiting:
            waiting, count = set(), 0
    return most


def registers(cubin: bytes) -> dict[str, int]:
    """Registers per thread of each kernel in a cubin."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "code.cubin"
        path.write_bytes(cubin)
        command = [tool("cuobjdump"), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {m[1]: int(m[2]) for m in re.finditer(r"Function (\S+):\s+REG:(\d+)", text)}
