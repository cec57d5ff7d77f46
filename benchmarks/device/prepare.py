"""The stages before the measurements: facts, wheels, the two builds; and pytest on the device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.device import records
from benchmarks.device.table import ROOT, Failed, LeftOut, Plan
from benchmarks.device.wheels import install

TESTS = ("tests/kernels", "tests/bench/test_clock.py")
IGNORED = tuple(
    f"tests/kernels/test_{name}.py"
    for name in ("resources", "cuda_resources", "cuda_host", "cuda_matrix", "native", "sanitizers")
)
"""Tests of ahead-of-time compilation, the emulation and CPU code, which do not use the device."""
NAMED = ("triton", "diffusers", "numpy")
"""Packages whose version is a fact."""


def environment(plan: Plan) -> list[str]:
    """Write the facts that the numbers depend on to facts.json, for the other stages."""
    import torch

    from fastdiff.bench import record

    facts: dict[str, Any] = record.environment()
    if plan.commit:
        facts["commit"] = plan.commit
    if plan.dry_run:
        facts["device"] = "dry run"
    facts |= {package: _version(package) for package in NAMED}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _nvidia_smi("driver_version"),
            "clocks": _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit"),
        }
    elif not plan.dry_run:
        raise Failed("torch finds no usable GPU")
    records.set_facts(plan.out, facts)
    return [f"{name} {value}" for name, value in facts.items()]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def wheels(plan: Plan) -> list[str]:
    """Install the wheels of --wheels into a folder that is on the path of all later stages."""
    if plan.wheels is None or plan.site is None:
        raise LeftOut("no --wheels")
    try:
        return install(plan.wheels, plan.site)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise Failed(str(error)) from error


def build(plan: Plan) -> list[str]:
    """Run ``setup.py build_ext`` with the CUDA kernels, for the architecture of this GPU."""
    if plan.dry_run:
        raise LeftOut("a dry run uses the existing module")
    import torch

    major, minor = torch.cuda.get_device_capability()
    # the suffix "a" enables the accelerated features of an architecture
    architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")
    changed = {
        "FASTDIFF_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", architecture),
    }
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **changed}, check=False)
    if done.returncode:
        raise Failed("the build failed; the log has the compiler's words")
    say = "from fastdiff.kernels import compiled; print(compiled.describe())"
    module = subprocess.run(
        [sys.executable, "-c", say], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if module.returncode:
        raise Failed("the built module does not import", *module.stderr.splitlines()[-10:])
    return [module.stdout.strip(), *kernels_of_the_gpu(plan)]


def kernels_of_the_gpu(plan: Plan) -> list[str]:
    """Write the resources of every launch, as the driver reports them, to cuda-kernels.txt."""
    words = [sys.executable, "-m", "benchmarks.resources.cuda_device"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed("listing the kernels' resources failed", *done.stderr.splitlines()[-10:])
    (plan.out / "cuda-kernels.txt").write_text(done.stdout)
    return [f"{len(done.stdout.splitlines()) - 1} kinds of launches in cuda-kernels.txt"]


def tests(plan: Plan) -> list[str]:
    """Run pytest on the device, in several processes if pytest-xdist is installed."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # other versions of Python, torch and triton than CI's warn of other things
    words += ["-p", "no:benchmark", "-o", "filterwarnings=default"]
    if plan.dry_run:
        words += ["tests/kernels/test_geglu.py", "-k", "bad_input"]
    else:
        words += [*TESTS, *(f"--ignore={path}" for path in IGNORED)]
        if importlib.util.find_spec("xdist"):
            words += ["-n", str(min(8, os.cpu_count() or 1))]
    lines = []
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    lines = [line for line in lines if line]
    if process.returncode:
        failing = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise Failed(*failing[:20], *lines[-1:])
    return lines[-1:]
