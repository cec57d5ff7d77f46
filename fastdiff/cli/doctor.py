"""``fastdiff doctor``: describe this machine, and which backend runs each op on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from fastdiff import __version__
from fastdiff.cli.console import NO_BREAK, print_pairs
from fastdiff.cli.parsing import parse

PACKAGES = {
    "": ("torch", "triton", "numpy", "safetensors", "pillow", "rich", "tyro", "cattrs"),
    "train": ("scikit-learn", "tensorboard", "torchmetrics", "webdataset", "matplotlib"),
    "diffusers": ("diffusers", "transformers", "peft"),
    "emoji": ("resvg-py",),
    "serve": ("starlette", "uvicorn", "prometheus-client", "python-multipart"),
    "ui": ("gradio",),
}
COMPILERS = ("c++", "g++", "clang++", "nvcc", "hipcc", "ninja", "cmake")
CPU_FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve"),
)
VARIABLES = (
    *("FASTDIFF_BACKEND", "FASTDIFF_DEBUG", "OMP_NUM_THREADS", "TRITON_INTERPRET"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME"),
)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show versions, devices, CPU features, compilers, and which backend runs each op.

    If a backend cannot run an op here, the reason is given. Nothing is changed.

    Examples:
      fastdiff doctor
      fastdiff doctor --json > doctor.json
      FASTDIFF_BACKEND=reference fastdiff doctor
    """

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a JSON object, for programs and bug reports."""


def main(words: Sequence[str]) -> int:
    options = parse(Doctor, words, prog="fastdiff doctor")
    return 0 if options is None else run(options)


def run(options: Doctor) -> int:
    report = diagnose()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def diagnose() -> dict[str, Any]:
    """Everything that ``doctor`` prints, as plain dictionaries, lists, strings and numbers."""
    import torch

    from fastdiff.kernels import compiled

    gpus, native = _gpus(), compiled.describe()
    return {
        "fastdiff": __version__,
        "folder": str(Path(__file__).resolve().parent.parent),
        "python": f"{platform.python_version()} {sys.executable}",
        "system": f"{platform.platform()} {platform.machine()}",
        "packages": {
            extra or "required": {name: _version(name) for name in names}
            for extra, names in PACKAGES.items()
        },
        "torch_cuda": torch.version.cuda,
        "cpu": _cpu(),
        "gpus": gpus,
        "native": native,
        "installed": _installed(),
        "missing_cuda": [text for gpu in gpus if (text := _missing_cuda(gpu, native))],
        "compilers": {name: _compiler(name) for name in COMPILERS},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "configs": _configs(),
        "ops": _ops(),
    }


def _version(package: str) -> str | None:
    if package == "torch":
        import torch

        return str(torch.__version__)  # includes the build, which the wheel's metadata may not
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    from fastdiff.runtime.cpu_layers import packing_objection

    fields: dict[str, str] = {}
    memory = 0
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": usable,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name in CPU_FEATURES if name in flags],
        "unpacked_convolutions": packing_objection(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _installed() -> str:
    """How fastdiff came here: from a wheel, and for what, or as an editable checkout."""
    try:
        package = importlib.metadata.distribution("fastdiff")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: it runs from a folder"
    source = package.read_text("direct_url.json")
    if source and json.loads(source).get("dir_info", {}).get("editable"):
        return "an editable checkout"
    lines = (package.read_text("WHEEL") or "").splitlines()
    tags = [line.partition(": ")[2] for line in lines if line.startswith("Tag: ")]
    _, _, label = package.version.partition("+")
    return f"a wheel for {', '.join(tags)}; {f'built for {label}' if label else 'CPU kernels'}"


def _missing_cuda(gpu: dict[str, Any], native: dict[str, Any]) -> str | None:
    """What a GPU could have that this installation lacks, and how to get it; None: nothing."""
    capability = gpu["capability"]
    if float(capability) < 8:
        return None  # the kernels are written for 8.0 and later
    exact = f"{capability}a" if capability == "9.0" else capability
    built = (native.get("cuda_architectures") or "").replace(";", " ").split()
    if any(_serves(code, capability, exact) for code in built):
        return None
    return (
        f"{gpu['device']} ({capability}) could run CUDA C++ kernels that this build lacks: install "
        f"a wheel whose version names sm{exact.replace('.', '')}, or build one with "
        f"FASTDIFF_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST={exact} pip install --force-reinstall "
        "--no-deps --no-binary fastdiff fastdiff"
    )


def _serves(code: str, capability: str, exact: str) -> bool:
    """Whether code for an architecture ("8.6", "9.0a", "8.0+PTX") is the best for a GPU: for its
    own, or for a lower minor version of the same major one, unless that has features of its own."""
    code = code.partition("+")[0]
    if exact != capability or not code[-1].isdecimal():
        return code == exact
    return int(code.split(".")[0]) == int(float(capability)) and float(code) <= float(capability)


def _compiler(name: str) -> str | None:
    """The version line of ``name --version`` and the path of the program; None if not found."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({type(error).__name__}) {path}"
    lines = (done.stdout or done.stderr).strip().splitlines() or ["no version"]
    release = next((line for line in lines if "release" in line), lines[0])  # nvcc's fourth line
    return f"{release.strip()} {path}"


def _ops() -> dict[str, Any]:
    """Op -> device -> the backend that runs an ordinary call, and why the others do not."""
    import torch

    from fastdiff.kernels import OPS, explain

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    report: dict[str, Any] = {}
    for op in sorted(OPS):
        report[op] = {}
        for device in devices:
            choice = explain(op, **OPS[op].example(partial(torch.zeros, device=device)))
            against = {name: why for name, why in choice.reasons.items() if name != choice.chosen}
            report[op][device] = {"backend": choice.chosen, "others": against}
    return report


def _configs() -> dict[str, list[str]]:
    """GPU (or "shipped" if there is none) -> the launch configs of its Triton kernels."""
    import torch

    from fastdiff.bench import tune
    from fastdiff.kernels.tuning import configs

    def description(index: int) -> list[str]:
        try:
            return tune.describe(configs.gpu_of(torch.device("cuda", index)))
        except ValueError as error:  # a file that cannot be read
            return [str(error)]

    if not torch.cuda.is_available():
        return {"shipped": [f"{name}: {how}" for name, how in tune.shipped().items()]}
    return {f"cuda:{index}": description(index) for index in range(torch.cuda.device_count())}


def _print(report: dict[str, Any]) -> None:
    cpu = report["cpu"]
    print_pairs(
        [
            ("fastdiff", f"{report['fastdiff']}  {report['folder']}"),
            ("installed", report["installed"]),
            ("Python", report["python"]),
            ("system", report["system"]),
        ]
    )
    print("\npackages")
    for extra, versions in report["packages"].items():
        found = ", ".join(
            f"{name}{NO_BREAK}{version}" for name, version in versions.items() if version
        )
        absent = [name for name, version in versions.items() if version is None]
        missing = f"missing: {', '.join(absent)}" if absent else ""
        if absent and extra != "required":
            missing += f" (pip install 'fastdiff[{extra}]')"
        print_pairs([(extra.ljust(9), "; ".join(filter(None, [found, missing])))], indent=2)
    print("\ndevices")
    pairs = [
        (
            "cpu",
            f"{cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} threads used by torch, "
            f"{cpu['memory_gib']:g} GiB",
        ),
        (
            "",
            f"torch runs {cpu['torch_capability']}; "
            f"the CPU has {' '.join(cpu['features']) or 'no known features'}",
        ),
    ]
    if cpu["unpacked_convolutions"] is not None:
        pairs.append(("", f"slow, unpacked convolutions: {cpu['unpacked_convolutions']}"))
    for gpu in report["gpus"]:
        pairs.append(
            (
                gpu["device"],
                f"{gpu['name']}, compute capability {gpu['capability']}, "
                f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']:g} GiB",
            )
        )
    if not report["gpus"]:
        built = report["torch_cuda"]
        why = "no GPU found" if built else "this torch is built without CUDA"
        pairs.append(("cuda", f"none: {why}"))
    print_pairs(pairs, indent=2)
    print("\ncompiled module")
    print_pairs(_native(report["native"]), indent=2)
    print_pairs([("", text) for text in report["missing_cuda"]], indent=2)
    print("\ncompilers")
    print_pairs(
        [(name, found or "not found") for name, found in report["compilers"].items()], indent=2
    )
    if report["environment"]:
        print("\nenvironment")
        print_pairs(list(report["environment"].items()), indent=2)
    print("\nlaunch configs of the Triton kernels")
    print_pairs(
        [
            (name if not number else "", text)
            for name, lines in report["configs"].items()
            for number, text in enumerate(lines)
        ],
        indent=2,
    )
    _print_ops(report["ops"])


def _native(native: dict[str, Any]) -> list[tuple[str, str]]:
    if "missing" in native:
        return [("none", native["missing"])]
    built = f"{native['compiler']}, fastdiff {native['version']}, {native['path']}"
    if native["stale"]:
        built += "; csrc/ has changed since: run 'make build'"
    runs = f"{native['isa']} of {' '.join(native['isas'])}; threads: {native['threads']}"
    cuda = native["cuda_architectures"] or f"no kernels: {native['without_cuda']}"
    return [("built by", built), ("runs", runs), ("CUDA", cuda)]


def _print_ops(ops: dict[str, Any]) -> None:
    """Print the ops; those with the same backend and reasons share a paragraph."""
    paragraphs: dict[str, list[str]] = {}
    for op, devices in ops.items():
        for device, choice in devices.items():
            against = {
                # Drop the op's name, so that ops with the same reasons can share a paragraph.
                name: (why or "could run, but has lower priority or was not requested").replace(
                    f" of {op}", ""
                )
                for name, why in choice["others"].items()
            }
            same = json.dumps([device, choice["backend"] or "no backend", against])
            paragraphs.setdefault(same, []).append(op)
    for same, names in paragraphs.items():
        device, chosen, against = json.loads(same)
        print(f"\nops on {device} run by {chosen}")
        print_pairs([("", ", ".join(names))])
        print("  other backends")
        print_pairs(list(against.items()), indent=2)
