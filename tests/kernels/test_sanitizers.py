"""The compiled module under AddressSanitizer and UBSan, on every instruction set.

For this, a second module is built in a separate folder and tested in another process. (The
CUDA kernels have theirs in test_cuda_host.py.)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.kernels import compiled
from tests.kernels.inner import assert_all_passed, assert_caught
from tests.kernels.test_native import ROWS

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
ISAS = compiled.native.build()["isas"] if compiled.native else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiled.native is None, reason="the compiled module is not built here"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment for a process that uses the module built with sanitizers."""
    # preload the C++ runtime as well, because ASan looks up its exceptions at startup
    asan, runtime = (
        subprocess.run(
            [*COMPILER.split(), f"-print-file-name={name}"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    )  # fmt: skip
    if not Path(asan).is_absolute():
        pytest.skip("AddressSanitizer's runtime is not installed")
    out = tmp_path_factory.mktemp("sanitized")
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(out)],
        cwd=ROOT, env={**os.environ, "FASTDIFF_SANITIZE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return {
        **os.environ,
        "FASTDIFF_SANITIZED_MODULE": str(next(out.rglob("_native.*.so"))),
        "LD_PRELOAD": f"{asan}:{runtime}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",  # so that the kernels use threads
        "CUDA_VISIBLE_DEVICES": "",  # CUDA's driver and AddressSanitizer need the same addresses
    }


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


PROBE = """
import sys
import torch
from tests.kernels.sanitized import native

isa = sys.argv[1]
try:
    native.use_isa(isa)
except ValueError:
    sys.exit("not in this CPU")
x, y, short = torch.ones(4, 2 * 19), torch.zeros(4, 19), torch.zeros(4 * 19 - 1)
for what, read, write in (("nothing", x, y), ("reading", short, y), ("writing", x, short)):
    print(what, flush=True)
    print(what, file=sys.stderr, flush=True)
    native.geglu(0, read.data_ptr(), write.data_ptr(), 4, 19, 2 * 19)
print("misaligned", file=sys.stderr, flush=True)
native.geglu(0, x.data_ptr() + 1, y.data_ptr(), 3, 19, 2 * 19)
print("lived on")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_faults_are_caught(isa: str, environment: dict[str, str]) -> None:
    """An access one element too far and a misaligned one are caught on each instruction set, and
    correct accesses are not reported."""
    go_on = {**environment, "ASAN_OPTIONS": environment["ASAN_OPTIONS"] + ":halt_on_error=0"}
    done = run(["-c", PROBE, isa], go_on)
    if "not in this CPU" in done.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    parts = re.split(r"^(nothing|reading|writing|misaligned)$", done.stderr, flags=re.MULTILINE)
    after = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert "Sanitizer" not in after["nothing"], after["nothing"]
    for fault in ("reading", "writing"):
        assert "heap-buffer-overflow" in after[fault], done.stderr[-3000:]
        assert "geglu" in after[fault]
    assert "misaligned address" in after["misaligned"], done.stderr[-3000:]
    assert done.returncode != 0
    assert "lived on" not in done.stdout


def test_every_row_is_clean_on_every_instruction_set(environment: dict[str, str]) -> None:
    done = run(["-m", "tests.kernels.sanitized"], environment)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-5000:]
    ran = done.stdout.splitlines()
    there = [isa for isa in ISAS if f"skipped: instruction set '{isa}'" not in done.stdout]
    rows = [f"{isa} {op} {case}" for isa in there for op in ROWS for case in ROWS[op]]
    assert [line for line in ran if not line.startswith("skipped")] == rows


def test_drawn_shapes_noise_and_the_samplers_step_are_clean(environment: dict[str, str]) -> None:
    """With -s, since pytest would otherwise discard the output when the process aborts."""
    step = "(test_sampler_step and not triton and not cuda)"
    chosen = ["-k", f"test_normals or {step} or (drawn and cpu)"]
    files = [f"tests/kernels/test_{op}.py" for op in (*ROWS, "native")]
    files = [name for name in files if (ROOT / name).exists()]
    plugin = ["-s", "-p", "tests.kernels.sanitized", "-p", "no:cacheprovider", "-p", "no:costs"]
    command = ["-m", "pytest", "-rps", "-x", *plugin, *chosen]
    done = run([*command, *files], environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert_all_passed(done.stdout, files)
    broken = [*command, "-p", "tests.kernels.one_row_too_far", "tests/kernels/test_geglu.py"]
    assert_caught(run(broken, environment))
