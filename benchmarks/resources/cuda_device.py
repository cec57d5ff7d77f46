"""The resources that the CUDA kernels use on this machine's GPU, from the CUDA runtime.

    python -m benchmarks.resources.cuda_device            a table
    python -m benchmarks.resources.cuda_device --json

Registers, stack and shared memory are those of the code that this GPU's driver has loaded. Resident
blocks and clusters give the occupancy for the block sizes and shared memory that the launchers
request at the shapes of the networks (fastdiff/bench/shapes.py), with one sample. No kernel is
started. Without a GPU, `python -m benchmarks.resources.cuda` shows what ptxas reports. The exit
code is 2 if there is no GPU or no CUDA kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.resources.kernel_names import demangled, split_name
from fastdiff import kernels
from fastdiff.bench.providers import Make, Subject
from fastdiff.bench.shapes import GPU_JOBS, Call, Job
from fastdiff.bench.subjects import NETWORK_OPS, own_cases
from fastdiff.bench.watch import Launch, watched
from fastdiff.kernels import cuda as _cuda
from fastdiff.kernels.choose import UNAVAILABLE

HEADS = (
    *("kernel", "threads", "cluster", "registers", "stack", "shared", "blocks/SM", "occupancy"),
    *("clusters", "blocks", "code", "shapes", "such as"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Launches that differ only in their number of blocks, and the first call that makes one."""

    launch: Launch
    name: str
    shapes: int
    example: str

    @property
    def cells(self) -> list[str]:
        one = self.launch
        shared = (one.fixed_shared + one.shared) / 1024
        return [
            self.name, str(one.threads), str(one.cluster), str(one.registers), f"{one.stack} B",
            f"{shared:.1f} KiB", str(one.resident), f"{one.occupancy:.0%}", str(one.clusters),
            str(one.blocks), f"sm_{one.binary}", str(self.shapes), self.example,
        ]  # fmt: skip


def calls(jobs: Mapping[str, Job]) -> list[tuple[Subject, Call, Job, torch.dtype]]:
    """The distinct calls that the networks make to ops with CUDA kernels."""
    found = []
    for subject in NETWORK_OPS:
        for job in jobs.values():
            single = dataclasses.replace(job, batch=1)
            own = [call for call in single.collect() if call.op == subject.op]
            found += [(subject, call, single, torch.bfloat16) for call in own]
    for case in own_cases(64, (1,)):
        found.append((case.subject, case.call, case.job, case.dtype))
    return found


def run(subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make a call and, if CUDA kernels compute its gradients, those."""
    # attention's gradients come from Triton's kernels
    if subject.op == "attention" or not kernels.OPS[subject.op].differentiable:
        subject.ours(*args, **kwargs)
        return
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    for leaf in leaves:
        leaf.requires_grad_()
    y = subject.ours(*args, **kwargs)
    outputs = list(y) if isinstance(y, tuple) else [y]
    torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])


def collect(jobs: Mapping[str, Job] = GPU_JOBS, device: str = "cuda") -> list[Row]:
    """The launches of `calls`, forward and backward. Raises RuntimeError without CUDA kernels."""
    seen: dict[Launch, list[str]] = {}
    for subject, call, job, dtype in calls(jobs):
        args, kwargs = subject.arguments(call, job, Make(dtype, torch.device(device)))
        with kernels.backend("cuda"), watched(start=False) as launches:
            # head dims of 512 are not supported
            if kernels.explain(subject.op, *args, **kwargs).chosen == "cuda":
                run(subject, args, kwargs)
        for launch in launches:
            alike = dataclasses.replace(launch, blocks=0)
            same = (one for one in seen if dataclasses.replace(one, blocks=0) == alike)
            seen.setdefault(next(same, launch), []).append(f"{subject.op} {call}")
    names = demangled([launch.kernel for launch in seen]) or {}
    rows = []
    for launch, asked in seen.items():
        kernel, arguments = split_name(names.get(launch.kernel, launch.kernel))
        name = f"{kernel}<{', '.join(arguments)}>" if arguments else kernel
        rows.append(Row(launch=launch, name=name, shapes=len(set(asked)), example=asked[0]))
    return sorted(rows, key=lambda row: (row.name, row.launch.shared))


def table(rows: Sequence[Row]) -> str:
    lines = [list(HEADS), *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {**dataclasses.asdict(row), "occupancy": round(row.launch.occupancy, 4)} for row in rows
    ]


def missing() -> str | None:
    """Why there is nothing to query, and what to do instead; or None."""
    if not torch.cuda.is_available():
        why = "torch finds no usable GPU" if torch.version.cuda else "torch is built without CUDA"
        return f"{why}; without a GPU, use python -m benchmarks.resources.cuda"
    if not _cuda.built():
        return UNAVAILABLE.get("cuda", "the compiled module has no CUDA kernels")
    return _cuda.refusal(torch.cuda.current_device())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources.cuda_device",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(argv)
    if (reason := missing()) is not None:
        print(f"benchmarks.resources.cuda_device: {reason}", file=sys.stderr)
        return 2
    rows = collect()
    print(json.dumps(as_json(rows), indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
