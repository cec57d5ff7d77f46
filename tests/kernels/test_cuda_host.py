"""The emulation of CUDA on a CPU detects the faults it was written to detect."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import cuda_host
from tests.kernels.inner import assert_all_passed, assert_caught

pytestmark = cuda_host.needs_compiler

BARRIERS = (
    "reversed",
    "in warps",
    "reused",
    "in clusters",
    "in dynamic clusters",
    "reused in clusters",
)


def probe(name: str, order: str = "forward") -> tuple[list[float], str | None]:
    """Run a kernel of probes.cu on the 64 numbers 0, 1, ...; return the result and the fault."""
    cuda_host.set_order(order)
    function = cuda_host.library().emulation_probe
    function.restype = ctypes.c_char_p
    data = torch.arange(64, dtype=torch.float32)
    fault = function(name.encode(), ctypes.c_void_p(data.data_ptr()), 64)
    return data.tolist(), None if fault is None else fault.decode()


EXPECTED = {
    "reversed": [63.0 - i for i in range(64)],
    "in warps": [float(i ^ 31) for i in range(64)],
    "reused": [3 * (63.0 - i) for i in range(64)],
    "in clusters": [63.0 - i for i in range(64)],
    "in dynamic clusters": [63.0 - i for i in range(64)],
    "reused in clusters": [3 * (63.0 - i) for i in range(64)],
}


@pytest.mark.parametrize("order", cuda_host.ORDERS)
@pytest.mark.parametrize("name", BARRIERS)
def test_right_kernels_are_right_in_every_order(name: str, order: str) -> None:
    assert probe(name, order) == (EXPECTED[name], None)


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_shows_in_some_order(name: str) -> None:
    results = [probe(f"{name}, no barrier", order) for order in cuda_host.ORDERS]
    assert any(data != EXPECTED[name] for data, _ in results)


@pytest.mark.parametrize("order", cuda_host.ORDERS)
def test_warp_functions(order: str) -> None:
    data, fault = probe("warp numbers", order)
    assert fault is None
    for i, x in enumerate(data):
        warp = i // 32 * 32
        assert x == (sum(range(warp, warp + 32)), 1.0, warp + 5.0)[i % 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent", r"divergent barrier: 40 threads \(first 0\) at __syncthreads \(probes.cu"),
        ("two barriers", "divergent barrier: some threads at __syncthreads"),
        ("divergent shuffle", "divergent barrier: .* at __shfl_xor_sync"),
        ("misaligned", "misaligned store"),
        ("33 threads", "a multiple of 32 threads, up to 1024, got 33"),
        ("too much shared", "invalid argument"),  # CUDA's own message
        ("grid too high", "invalid grid 1,70000,1"),
        ("grid beyond 32 bits", "invalid grid 4294967295,1,1"),
        ("divergent cluster", r"32 threads \(first 0\) at cluster_wait \(probes.cu:.*at the end"),
        ("two cluster barriers", "divergent cluster barrier: some threads at cluster_arrive"),
        ("mixed barriers", r"cluster_wait \(probes.cu:\d+\): the thread has not arrived"),
        ("wait without arrive", "the thread has not arrived"),
        ("arrive without wait", "ends between cluster_arrive and cluster_wait"),
        ("arrive twice", "has arrived already and not waited"),
        ("no such rank", "no block 2 in a cluster of 2"),
        ("not shared", "not in this block's shared memory"),
        ("ragged clusters", "divide the grid's x, got 3 of 7"),
        ("cluster too large", "up to 16 blocks"),
    ],
)
def test_faults_are_named(name: str, message: str) -> None:
    _, fault = probe(name)
    assert fault is not None
    assert re.search(message, fault), fault
    assert probe("reversed") == (EXPECTED["reversed"], None)  # the emulation works after a fault


@pytest.mark.parametrize("order", cuda_host.ORDERS)
def test_shared_memory_ends_with_its_block(order: str) -> None:
    _, fault = probe("in clusters, no farewell", order)
    assert fault is not None
    assert "of the cluster has ended" in fault
    data, fault = probe("beyond the end", "forward")
    assert fault is None
    assert all(math.isnan(x) for x in data[:32])


@pytest.mark.parametrize("order", cuda_host.ORDERS)
def test_blocks_know_their_cluster(order: str) -> None:
    data, fault = probe("cluster numbers", order)
    assert fault is None
    assert data[:7] == [30, 31, 32, 30, 31, 32, 6]


def test_shared_memory_begins_as_nan() -> None:
    data, fault = probe("unwritten")
    assert fault is None
    assert all(math.isnan(x) for x in data)


def test_blocks_run_in_both_orders() -> None:
    assert probe("block numbers", "forward")[0][0] == 4
    assert probe("block numbers", "reverse")[0][0] == 0


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment for a process that runs the emulation under ASan and UBSan."""
    runtime = subprocess.run(
        [cuda_host.COMPILER, "-print-file-name=libasan.so"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if not Path(runtime).is_absolute():
        pytest.skip("AddressSanitizer's runtime is not installed")
    return {
        **os.environ,
        "FASTDIFF_CUDA_HOST": str(cuda_host.build(cuda_host.SANITIZERS)),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # use the emulation even if there is a GPU
    }


def run_python(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cuda_host.ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_out_of_bounds_is_caught(sanitized: dict[str, str]) -> None:
    code = "from tests.kernels.test_cuda_host import probe\n"
    beyond = ["beyond global", "beyond shared", "beyond dynamic", "beyond the end"]
    names = ["reversed", "in clusters", *beyond]
    code += "".join(f"print({name!r}, flush=True); probe({name!r})\n" for name in names)
    go_on = {**sanitized, "ASAN_OPTIONS": sanitized["ASAN_OPTIONS"] + ":halt_on_error=0"}
    done = run_python(["-c", code], go_on)
    reports = done.stderr.split("ERROR: AddressSanitizer")[1:]
    kernels = [name.replace(" ", "_") for name in beyond]
    # one report per place in the source, although all 32 threads reach the last one
    assert {k for k in kernels for report in reports if k in report} == set(kernels), done.stderr
    assert "in (anonymous namespace)::reversed" not in done.stderr


LARGE = (
    "silu-sd", "silu-vae", "silu-ldm", "silu-block", "u-vit", "karlo", "t5", "1152", "1280", "4100",
    "8192", "chunks_and_column_blocks[NCHW]",
)  # fmt: skip
"""Cases left out because smaller ones cover the same edges and sanitizers are 100 times slower."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "tests"),
    [
        (
            ("cuda", "geglu", "layer_norm", "sampler_step", "philox", "cuda_ops"),
            "((parity and (bfloat16 or drawn or chunks or (ragged and 8))) and test_cuda.py or "
            "cuda and (bfloat16 or drawn or rows or tiles or layout or reference or unaligned)) "
            f"and not ({' or '.join(LARGE)})",
        ),
        (("attention_cuda",), "parity and bfloat16 and shuffled"),
    ],
    ids=("others", "attention"),
)
def test_kernels_are_clean_under_sanitizers(
    files: tuple[str, ...], tests: str, sanitized: dict[str, str]
) -> None:
    """The parity tests of the CUDA kernels pass with ASan and UBSan."""
    command = ["-m", "pytest", "-s", "-rps", "-x", "-p", "no:cacheprovider", "-p", "no:costs"]
    command += ["-k", tests, "-m", "not gpu"]
    named = [f"tests/kernels/test_{name}.py" for name in files]
    done = run_python([*command, *named], sanitized)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_all_passed(done.stdout, named)
    if "geglu" in files:
        broken = [*command, "-p", "tests.kernels.one_row_too_far", "tests/kernels/test_geglu.py"]
        assert_caught(run_python(broken, sanitized))


def test_the_output_of_the_inner_pytest_is_checked() -> None:
    output = (
        "9 items / 6 deselected / 3 selected\nPASSED tests/a.py::x\nPASSED tests/a.py::y\n"
        "SKIPPED [1] tests/b.py:3: instruction set 'z' is not compiled in or not in this CPU\n"
    )
    assert_all_passed(output, ["tests/a.py"])
    for other in (
        output.replace("3 selected", "4 selected"),
        output.replace("not in this CPU", "no compiler"),
        output.replace("a.py::y", "b.py::y"),
        "no tests ran",
    ):
        with pytest.raises(AssertionError):
            assert_all_passed(other, ["tests/a.py"])
