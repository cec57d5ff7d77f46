"""The resources nvcc gave every CUDA kernel, also for GPUs this machine does not have."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.resources import cuda as cuda_resources
from benchmarks.resources.ahead_of_time import CHIPS
from benchmarks.resources.cuda import Resources
from benchmarks.resources.kernel_names import split_name
from tests.kernels.routes import cuda_kernels

ROOT = Path(__file__).parents[2]
LOG = """
ptxas info    : 0 bytes gmem, 8 bytes cmem[2]
ptxas info    : Compiling entry function '_Z1fIfLi4EEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z1fIfLi4EEvPT_
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 44 registers, used 1 barriers, 24 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 1.000 ms
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90a'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def rows() -> list[Resources]:
    """The record of every kernel. After `make build` this compiles nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        try:
            return cuda_resources.collect()
        except cuda_resources.NoCompilerError as error:
            pytest.skip(f"CUDA kernels are not compiled here: {error}")


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_generation(rows: list[Resources]) -> None:
    names = cuda_kernels()
    assert len(names) >= 10
    for architecture in cuda_resources.DOCUMENTED:
        assert {r.kernel for r in rows if r.architecture == architecture} == names, architecture


@pytest.mark.slow
def test_nothing_spills(rows: list[Resources]) -> None:
    """On every generation tested here; the command reports the others."""
    ours = [row for row in rows if row.architecture in cuda_resources.DOCUMENTED]
    assert not [str(row) for row in ours if row.spills]


@pytest.mark.slow
def test_blocks_fit(rows: list[Resources]) -> None:
    """There are enough registers for the largest block a kernel may be launched with."""
    for row in rows:
        chip = CHIPS.get(row.architecture.rstrip("a"))
        assert row.shared <= 48 * 1024, row
        if chip is not None and row.threads is not None:
            assert row.occupancy, row


@pytest.mark.slow
def test_the_document_lists_every_kernel(rows: list[Resources]) -> None:
    text = (ROOT / "docs" / "resources-cuda.md").read_text()
    missing = sorted(name for name in cuda_kernels() if f"| {name} |" not in text)
    assert not missing, "python -m benchmarks.resources.cuda --docs"


@pytest.mark.slow
def test_launchers_query_and_launch_but_never_wait(rows: list[Resources]) -> None:
    """The CUDA runtime functions the objects link to neither wait for the device nor allocate nor
    copy, so every op can be captured in a graph."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("binutils' nm is not installed")
    command = [tool, "--undefined-only", *map(str, cuda_resources.compiled())]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = set(re.findall(r"\bU (_*cuda\w+)", symbols))
    compilers = r"__cuda(\w*[Rr]egister\w*|GetKernel|LaunchKernel|PopCallConfiguration|InitModule)"
    asking = r"cuda(DeviceGetAttribute|Func\w+|Occupancy\w+|GetError\w+|GetLastError|GetDriver\w+)"
    starting = r"cuda(SetDevice|LaunchKernelExC)"
    assert "cudaLaunchKernelExC" in wanted
    other = [x for x in wanted if not re.fullmatch(f"{compilers}|{asking}|{starting}", x)]
    assert not other


def test_the_log_of_ptxas_is_parsed() -> None:
    spilled, plain = cuda_resources.parse_log("f.cu", LOG)
    assert (spilled.symbol, spilled.architecture) == ("_Z1fIfLi4EEvPT_", "sm_80")
    assert (spilled.registers, spilled.spills, spilled.stack, spilled.shared) == (44, 12, 24, 2048)
    assert (plain.registers, plain.spills, plain.stack, plain.shared) == (255, 0, 0, 0)


@pytest.mark.parametrize(
    ("demangled", "kernel", "arguments"),
    [
        ("void fastdiff::f<float, 4>(fastdiff::P<float>)", "f", ("float", "4")),
        ("fastdiff::(anonymous namespace)::g(int)", "g", ()),
        ("void h<__half, (int)8, (bool)1>(P<__half, 2>)", "h", ("__half", "8", "1")),
        ("void a::h<b::Tile<__half, 8>, 3>(int)", "h", ("b::Tile<__half, 8>", "3")),
    ],
)
def test_names_are_parsed(demangled: str, kernel: str, arguments: tuple[str, ...]) -> None:
    assert split_name(demangled) == (kernel, arguments)


def test_a_row_shows_the_variant_with_the_most_registers() -> None:
    one = Resources(
        source="op.cu", symbol="a", kernel="f", arguments=("float", "4"), architecture="sm_80",
        registers=40, spills=0, stack=0, shared=1024, threads=256,
    )  # fmt: skip
    other = Resources(
        source="op.cu", symbol="b", kernel="f", arguments=("float", "1"), architecture="sm_80",
        registers=64, spills=12, stack=24, shared=0, threads=512,
    )  # fmt: skip
    assert one.occupancy == 0.75  # 65,536 / (40 * 256) = 6 blocks of 8 warps out of 64
    assert other.occupancy == 0.5
    text = cuda_resources.document([one, other])
    assert (
        "| f | fp32 | 2 | 256/512 | 64 / 1.0 / 50% / 24 B of stack, 12 B spilled | - | - |" in text
    )


def test_the_command_can_query_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def main(argv: list[str]) -> int:
        asked.append(argv)
        return 2

    monkeypatch.setattr(cuda_resources.cuda_device, "main", main)
    assert cuda_resources.main(cuda_resources.Options(device=True)) == 2
    assert cuda_resources.main(cuda_resources.Options(device=True, json=True)) == 2
    assert asked == [[], ["--json"]]
