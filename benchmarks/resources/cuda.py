"""The GPU resources of every CUDA kernel: registers, spills, shared memory, occupancy.

    python -m benchmarks.resources.cuda            a table for all architectures
    python -m benchmarks.resources.cuda --json > cuda.json
    python -m benchmarks.resources.cuda --docs     write docs/resources-cuda.md
    python -m benchmarks.resources.cuda --device   query this machine's GPU (cuda_device.py)

setup.py compiles the files of ``csrc/`` with nvcc and stores the output of ptxas next to each
object file, so after ``make build`` nothing has to be compiled. No GPU is needed. The exit code is
1 if a kernel spills on one of `DOCUMENTED`, and 2 if nvcc is not found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import tyro
from filelock import FileLock
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.resources import cuda_device
from benchmarks.resources.ahead_of_time import CHIPS, KIB
from benchmarks.resources.kernel_names import DTYPES, demangled, split_name
from fastdiff import __version__
from fastdiff.files import write_text

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "resources-cuda.md"
DOCUMENTED = ("sm_80", "sm_90a", "sm_100")
"""One architecture per generation; sm_86 and sm_89 have the same instructions as sm_80."""


class NoCompilerError(Exception):
    """nvcc, or a tool needed along with it, was not found."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One kernel of one file, compiled for one architecture."""

    source: str
    symbol: str
    kernel: str
    arguments: tuple[str, ...]
    """Template arguments: the dtype, elements per load, and others."""
    architecture: str
    registers: int
    """Per thread."""
    spills: int
    """Bytes of registers per thread that are stored in memory and loaded again."""
    stack: int
    """Bytes of stack per thread: arrays in memory and spilled registers."""
    shared: int
    """Bytes of static shared memory per block; a launch may add dynamic shared memory."""
    threads: int | None = None
    """Most threads per block, if the source declares it."""

    @property
    def dtype(self) -> str:
        return next((DTYPES[a] for a in self.arguments if a in DTYPES), "")

    @property
    def occupancy(self) -> float | None:
        """Resident warps as a share of the most possible, without dynamic shared memory."""
        chip = CHIPS.get(self.architecture.rstrip("af"))
        if chip is None or self.threads is None:
            return None
        return chip.occupancy(
            registers=self.registers, shared=self.shared, warps=self.threads // chip.warp_size
        )


def build_script() -> ModuleType:
    """Import setup.py, which knows the compiler flags and the location of object files."""
    spec = importlib.util.spec_from_file_location("fastdiff_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fastdiff_setup"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled() -> list[Path]:
    """The object files of the CUDA sources; compiles those that changed since the last build.

    Raises:
        NoCompilerError: nvcc, the C++ compiler or ninja was not found.
    """
    script = build_script()
    folder = script.build_folder()
    target = folder / f"_native.{folder.name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cuda = script.cuda_for()
        if isinstance(cuda, str):
            raise NoCompilerError(cuda)
        with FileLock(folder / ".compiling"):  # ninja has none, and tests come here at one time
            names = script.write_ninja(folder, target, __version__, cuda)
            command = [script.find_ninja(), "-C", str(folder), *names]
            done = subprocess.run(command, stdout=sys.stderr, check=False)
    except script.CannotBuildError as error:
        raise NoCompilerError(str(error)) from None
    if done.returncode != 0:
        raise SystemExit("nvcc failed, see its messages above")
    return [folder / name for name in names]


def parse_log(source: str, text: str) -> list[Resources]:
    """Parse the output of ``nvcc -Xptxas -v``. Names are still mangled."""
    found = []
    for part in text.split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'([^']+)'", part)[:2]
        stack, stores, loads = (
            int(n)
            for n in re.findall(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            )[0]
        )
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Resources(
                source=source,
                symbol=name,
                kernel=name,
                arguments=(),
                architecture=architecture,
                registers=int(re.findall(r"Used (\d+) registers", part)[0]),
                spills=max(stores, loads),
                stack=stack,
                shared=int(shared[1]) if shared else 0,
            )
        )
    return found


def block_sizes(objects: Sequence[Path]) -> dict[str, int]:
    """Symbol -> most threads per block (``__launch_bounds__``); empty without cuobjdump."""
    nvcc = shutil.which("nvcc")
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        return {}
    sizes: dict[str, int] = {}
    for each in objects:
        dump = subprocess.run([tool, "-elf", str(each)], capture_output=True, text=True, check=True)
        for section in re.split(r"^\.nv\.info\.", dump.stdout, flags=re.MULTILINE)[1:]:
            found = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(.*)", section)
            if found:
                x, y, z = (int(n, 0) for n in found[1].split())
                sizes[section.split("\n", 1)[0].strip()] = x * y * z
    return sizes


def collect() -> list[Resources]:
    """Every kernel of every file for every architecture. Raises NoCompilerError."""
    objects = compiled()
    found = [
        row
        for path in objects
        for row in parse_log(path.name.removesuffix(".o"), Path(f"{path}.log").read_text())
    ]
    names, sizes = demangled([row.symbol for row in found]), block_sizes(objects)
    if names is None:
        raise NoCompilerError(
            "demangling kernel names needs c++filt or cu++filt; neither was found"
        )
    rows = []
    for row in found:
        kernel, arguments = split_name(names[row.symbol])
        threads = sizes.get(row.symbol)
        rows.append(replace(row, kernel=kernel, arguments=arguments, threads=threads))
    return rows


def cell(rows: Sequence[Resources]) -> str:
    """The resources of the most demanding variant; shows spills, which a test forbids."""
    if not rows:
        return "-"
    shares = [row.occupancy for row in rows]
    least = "?" if None in shares else f"{min(share for share in shares if share is not None):.0%}"
    spills, stack = max(row.spills for row in rows), max(row.stack for row in rows)
    text = f"{max(row.registers for row in rows)} / {max(row.shared for row in rows) / KIB:.1f} / "
    text += least
    return (
        text
        + (f" / {stack} B of stack" if stack else "")
        + (f", {spills} B spilled" * (spills > 0))
    )


def grouped(rows: Sequence[Resources]) -> dict[tuple[str, str, str], list[Resources]]:
    """(file, kernel, dtype) -> the variants of the template on all architectures."""
    groups: dict[tuple[str, str, str], list[Resources]] = {}
    for row in sorted(rows, key=lambda row: (row.source, row.kernel, row.dtype)):
        groups.setdefault((row.source, row.kernel, row.dtype), []).append(row)
    return groups


def cells(rows: Sequence[Resources], architectures: Sequence[str]) -> list[str]:
    variants = len({row.symbol for row in rows})
    threads = {row.threads for row in rows}
    sizes = "/".join(str(n) for n in sorted(n for n in threads if n is not None)) or "?"
    return [
        str(variants),
        sizes,
        *(cell([row for row in rows if row.architecture == chip]) for chip in architectures),
    ]


def document(rows: Sequence[Resources]) -> str:
    """The text of docs/resources-cuda.md."""
    lines = [
        "# GPU resources of the CUDA kernels",
        "",
        "Generated by `python -m benchmarks.resources.cuda --docs` from the output of ptxas when",
        "nvcc compiled `csrc/`; no GPU was used and no time was measured. A cell shows registers",
        "per thread / KiB of static shared memory per block / occupancy (resident warps as a share",
        "of the most possible, at the largest block that the kernel may be launched with). Dynamic",
        "shared memory depends on the shape and is not included. A row combines all variants of a",
        "kernel (vector widths, head sizes) and shows the largest value of any of them. Stack is",
        "memory for arrays indexed at run time. A test checks that nothing spills on these three",
        "architectures and that every kernel is listed.",
    ]
    groups = grouped(rows)
    for source in dict.fromkeys(key[0] for key in groups):
        heads = ("kernel", "dtype", "variants", "threads", *DOCUMENTED)
        lines += ["", f"## {source}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for (file, kernel, dtype), variants in groups.items():
            if file == source:
                row = [kernel, dtype, *cells(variants, DOCUMENTED)]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile the CUDA kernels and list the GPU resources of each.

    Examples:
      python -m benchmarks.resources.cuda
      python -m benchmarks.resources.cuda --docs
      python -m benchmarks.resources.cuda --device
    """

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a JSON list."""
    docs: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write docs/resources-cuda.md."""
    device: tyro.conf.FlagCreatePairsOff[bool] = False
    """Query this machine's GPU about the launches of real networks; can be combined with --json."""


def main(options: Options) -> int:
    if options.device:
        return cuda_device.main(["--json"] if options.json else [])
    try:
        rows = collect()
    except NoCompilerError as error:
        print(f"benchmarks.resources.cuda: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    elif options.docs:
        write_text(DOCS, document(rows))
        print(DOCS)
    else:
        chips = list(dict.fromkeys(row.architecture for row in rows))
        shown = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
        for head in ("kernel", "dtype", "variants", "threads", *chips):
            shown.add_column(head)
        for (_, kernel, dtype), variants in grouped(rows).items():
            shown.add_row(kernel, dtype, *cells(variants, chips))
        Console().print(shown)
    spilled = sorted({(row.architecture, row.kernel) for row in rows if row.spills})
    for architecture, kernel in spilled:
        print(f"{kernel} spills registers on {architecture}", file=sys.stderr)
    return 1 if any(architecture in DOCUMENTED for architecture, _ in spilled) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.resources.cuda")))
