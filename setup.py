"""Build script: `kernels/` is installed as `fastdiff.kernels`, `csrc/` as its module `_native`.

The module holds no torch header, so it builds in seconds and serves every torch version. Ninja
compiles it: in parallel, and after an edit only what depends on it (``make build``). Every CPU
kernel is compiled once per instruction set, and the module takes the best one when it is loaded.

Environment:
    CXX                    the C++ compiler; else c++, g++ or clang++ from PATH
    FASTDIFF_BUILD_CUDA    1: the CUDA kernels too, or fail; 0: without; auto, the default: for the
                           GPUs of this machine if there are any and nvcc is found
    TORCH_CUDA_ARCH_LIST   such as "8.0;9.0a+PTX": what to compile for, whatever GPU is here;
                           without it, 1 compiles for all of `ARCHITECTURES`, which takes minutes
    NVCC, CUDA_HOME        where nvcc is; else from PATH or /usr/local/cuda
    FASTDIFF_SANITIZE      1: AddressSanitizer and UBSan, without CUDA; for tests, not to install

Without a C++ compiler the package installs without the module: every op then runs on its other
backends. pip hides what a build prints, so the reason is installed in the module's place
(`MISSING`): `fastdiff doctor` tells it, and the first op that a CPU kernel would have served warns.
Where nvcc fails, the CUDA kernels are left out, and the module itself holds the reason.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0")
ISAS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512",
}
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=fast -fno-math-errno "
    "-fno-trapping-math -fopenmp-simd"
)
# A loop that starts with a few odd elements until the address is round would add up in an order
# that depends on the address, and so on a sample's place in its batch.
GCC_FLAGS = "--param=vect-max-peeling-for-alignment=0 -Wno-maybe-uninitialized"
SANITIZERS = (
    "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined "
    "-fno-sanitize-recover=undefined -fsanitize-recover=address"
)
MISSING = "_native_missing.txt"
"""File with the reason that the module was not built, read by `kernels/compiled.py`."""


SANITIZED = os.environ.get("FASTDIFF_SANITIZE") == "1"


class CannotBuildError(Exception):
    """Why the module is not built, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """nvcc and the architectures to compile for."""

    nvcc: str
    architectures: tuple[str, ...]
    """As in TORCH_CUDA_ARCH_LIST: "9.0a"; "+PTX" asks for the intermediate code too."""

    @property
    def flags(self) -> str:
        codes = []
        for name in self.architectures:
            number, _, ptx = name.partition("+")
            digits = number.replace(".", "")
            codes.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
            if ptx:
                codes.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
        return " ".join(codes)


def find_compiler() -> str:
    """The C++ compiler. Raises CannotBuildError."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["c++", "g++", "clang++"]
    for name in names:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return name
    raise CannotBuildError(
        f"no C++ compiler was found ({', '.join(names)}); install g++ or clang++ "
        "and install fastdiff again"
    )


def find_ninja() -> str:
    """Ninja of this Python's environment or of the system. Raises CannotBuildError."""
    try:
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        path = None
    path = path or shutil.which("ninja")
    if path is None:
        raise CannotBuildError("ninja was not found; pip install ninja")
    return path


def find_cuda() -> Cuda | str:
    """nvcc and what to compile for, or why there will be no CUDA kernels.

    Raises:
        SystemExit: FASTDIFF_BUILD_CUDA is 1 and they cannot be had, or a variable makes no sense.
    """
    asked = os.environ.get("FASTDIFF_BUILD_CUDA") or "auto"
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"FASTDIFF_BUILD_CUDA must be 0, 1 or auto, got {asked!r}")
    if asked == "0" or SANITIZED:
        return (
            "FASTDIFF_BUILD_CUDA was 0" if asked == "0" else "it is built for tests of CPU kernels"
        )
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    here = () if asked == "1" or listed else gpus()
    if asked == "auto" and not listed and not here:
        return "no GPU was found here; FASTDIFF_BUILD_CUDA=1 builds them all the same"
    cuda = cuda_for(here)
    if isinstance(cuda, str) and asked == "1":
        raise SystemExit(f"fastdiff: FASTDIFF_BUILD_CUDA=1, but {cuda}")
    return cuda


def cuda_for(here: tuple[str, ...] = ()) -> Cuda | str:
    """nvcc and the architectures of `here` that it knows, or why there is none.

    here: none given: what TORCH_CUDA_ARCH_LIST says, else all that the kernels are written for.
    """
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("NVCC"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    nvcc = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if nvcc is None:
        return "nvcc was not found; set CUDA_HOME"
    names = architectures(nvcc, here)
    if not names:
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or ", ".join(here or ARCHITECTURES)
        return f"{nvcc} and the kernels share none of the architectures {listed}"
    return Cuda(nvcc=nvcc, architectures=names)


def gpus() -> tuple[str, ...]:
    """Architectures of the GPUs of this machine, according to nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    found = dict.fromkeys(re.findall(r"^(\d+\.\d)$", output.stdout, re.MULTILINE))
    named = {name.rstrip("a"): name for name in ARCHITECTURES}
    return tuple(named.get(number, number) for number in found)


def architectures(nvcc: str, here: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Those of TORCH_CUDA_ARCH_LIST from 8.0 on, else those of `here` that nvcc knows; none given:
    of `ARCHITECTURES`."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    names = [name for name in listed.split(";") if name]
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST must hold numbers such as 8.0;9.0a+PTX, got {name!r}"
            )
    if names:  # containers list old ones too; the kernels need the instructions of 8.0
        exact = {"9.0": "9.0a"}  # runs on the same GPUs, and has TMA and wgmma
        return tuple(exact.get(name, name) for name in names if int(name.partition(".")[0]) >= 8)
    output = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"sm_(\w+)", output.stdout))
    wanted = [name for name in here or ARCHITECTURES if int(name.partition(".")[0]) >= 8]
    return tuple(name for name in wanted if name.replace(".", "").rstrip("a") in known)


def isas() -> dict[str, str]:
    """Instruction sets to compile for -> the flags; on other CPUs than x86 only the portable."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ISAS if x86 else {"portable": ISAS["portable"]}


def digest() -> str:
    """A hash of what the module is made of: tells a module that is older than its sources."""
    total = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            total.update(path.relative_to(SOURCES).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def write_ninja(build: Path, target: Path, version: str, cuda: Cuda | str) -> list[str]:
    """Write build.ninja, leaving unchanged files untouched. Returns the CUDA objects.

    Sources are relative to the build folder, so that objects copied from another checkout together
    with the folder are up to date if the sources are the same.

    Raises:
        CannotBuildError: there is no C++ compiler.
    """
    import pybind11

    compiler = find_compiler()
    includes = [sysconfig.get_paths()["include"], sysconfig.get_paths()["platinclude"]]
    binding = " ".join(f"-isystem {p}" for p in dict.fromkeys([*includes, pybind11.get_include()]))
    # headers name themselves in errors: the module shall not depend on where they happen to be
    for folder, name in ((pybind11.get_include(), "pybind11"), (includes[0], "python")):
        binding += f" -fmacro-prefix-map={folder}={name}"
    lines = rules(compiler, cuda, os.path.relpath(SOURCES / "common", build))
    objects = []

    def compile_(source: Path, name: str, extra: str = "") -> None:
        objects.append(f"{name}.o")
        path = _escape(os.path.relpath(source, build))
        lines.extend([f"build {name}.o: cxx {path}", f"  extra = {extra}"])

    sources = sorted(SOURCES.glob("*/*.cpp"))
    bound = [path for path in sources if path.stem.endswith(("_binding", "bindings"))]
    # one unit: pybind11's headers take ten times as long to compile as all that is bound
    includes_all = "".join(f'#include "{os.path.relpath(path, build)}"\n' for path in bound)
    write_if_changed(build / "all_bindings.cpp", includes_all)
    flags = f"{binding} {'-O0 -fno-sanitize=all' if SANITIZED else '-O1'}"
    compile_(build / "all_bindings.cpp", "bindings", flags)
    for source in sources:
        stem = source.stem
        if source in bound:
            continue
        if source.parent.name == "cpu":  # once per instruction set
            for isa, isa_flags in isas().items():
                compile_(source, f"{stem}.{isa}", f"-DFASTDIFF_ISA={isa} {isa_flags}")
        else:
            compile_(source, stem, facts(version, cuda) if stem == "build_info" else "")
    cuda_objects = []
    for source in sorted(SOURCES.glob("cuda/*.cu")) if isinstance(cuda, Cuda) else ():
        name = f"{source.stem}.cu.o"
        cuda_objects.append(name)
        path = _escape(os.path.relpath(source, build))
        lines.append(f"build {name} | {name}.log: nvcc {path}")
    objects += cuda_objects
    lines.append(f"build {_escape(target)}: link {' '.join(objects)}")
    text = "\n".join([*lines, f"default {_escape(target)}", ""])
    write_if_changed(build / "build.ninja", text)
    return cuda_objects


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, unless it has this text already: ninja goes by the time of its last change."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def facts(version: str, cuda: Cuda | str) -> str:
    """Facts about the build, as macros for build_info.cpp.

    The digest changes with every edit, so no other file has it on its command line.
    """
    archs, missing = (";".join(cuda.architectures), "") if isinstance(cuda, Cuda) else ("", cuda)
    macros = {
        "DIGEST": digest(),
        "VERSION": version,
        "CUDA_ARCHS": archs,
        "WITHOUT_CUDA": missing.replace('"', "'"),
        "SANITIZERS": "address undefined" if SANITIZED else "",
    }
    return " ".join(
        f"-DFASTDIFF_{name}={shlex.quote(chr(34) + text + chr(34))}"
        for name, text in macros.items()
    ).replace("$", "$$")


def rules(compiler: str, cuda: Cuda | str, headers: str) -> list[str]:
    """The head of build.ninja: how a file is compiled and the module linked.

    headers: csrc/common, from the build folder.
    """
    version = subprocess.run(
        [*shlex.split(compiler), "--version"], capture_output=True, text=True, check=False
    )
    flags = FLAGS if "clang" in version.stdout else f"{FLAGS} {GCC_FLAGS}"
    flags += f" {SANITIZERS}" if SANITIZED else ""
    common = f"-I{shlex.quote(headers)}"
    defines = f"-DFASTDIFF_ISAS='{' '.join(f'X({name})' for name in isas())}'"
    # the linker's own options: nothing of the libraries linked in (CUDA's runtime) is exported
    shared = "-shared -Wl,--exclude-libs,ALL"
    if sys.platform == "darwin":
        shared = "-bundle -undefined dynamic_lookup"
    lines = [
        f"cxx = {compiler}",
        f"flags = {flags} {common} {defines}",
        f"link = {shared} {SANITIZERS if SANITIZED else ''}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  description = c++ $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    linker = "$cxx $link"
    if isinstance(cuda, Cuda):
        # of "ccache g++" the last word is the compiler
        host = next(word for word in reversed(shlex.split(compiler)) if not word.startswith("-"))
        linker = f"$nvcc -ccbin {host} -cudart static {shared.replace('-Wl,', '-Xlinker ')}"
        lines += [
            f"nvcc = {cuda.nvcc}",
            f"nvccflags = {common} -std=c++17 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden "
            f"-Xptxas -v -ccbin {host} {cuda.flags}",
            "rule nvcc",
            # ptxas tells what each kernel takes of a GPU: benchmarks/resources/cuda.py reads it
            "  command = if $nvcc -MD -MF $out.d $nvccflags -c $in -o $out > $out.log 2>&1; "
            "then grep -i -A4 warning $out.log || true; else cat $out.log; exit 1; fi",
            "  description = nvcc $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    # nvcc knows where its own runtime library lies
    return [*lines, "rule link", f"  command = {linker} $in -o $out", "  description = link $out"]


def _escape(path: Path | str) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


def build_folder() -> Path:
    """Folder in which ninja builds incrementally; builds with sanitizers have their own."""
    tag = str(sysconfig.get_config_var("SOABI")) + ("-sanitized" if SANITIZED else "")
    folder = ROOT / "build" / "native" / tag
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_ninja(target: Path, version: str, cuda: Cuda | str) -> bool:
    """Build the module; False where a compiler fails. Raises CannotBuildError."""
    try:
        import pybind11  # noqa: F401
    except ImportError:
        raise CannotBuildError("pybind11 was not found; pip install pybind11") from None
    ninja = find_ninja()
    write_ninja(target.parent, target, version, cuda)
    return subprocess.run([ninja, "-C", str(target.parent)], check=False).returncode == 0


def warn(message: str) -> None:
    print(f"\nWARNING: {message}\n", file=sys.stderr)


class BuildNative(build_ext):
    """Builds the one extension module with ninja; where it cannot, warns and goes on without."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        reason = target.parent / MISSING
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in (target, reason):
            path.unlink(missing_ok=True)
        try:
            shutil.copy2(self.build_module(target.name), target)
        except CannotBuildError as error:
            if os.environ.get("FASTDIFF_BUILD_CUDA") == "1" or SANITIZED:
                raise SystemExit(f"fastdiff: {error}") from None
            reason.write_text(f"{error}\n")
            warn(
                f"fastdiff is installed without its compiled kernels: {error}. "
                "Every op runs on its other backends."
            )

    def build_module(self, name: str) -> Path:
        """Build the module, with CUDA kernels if possible. Raises CannotBuildError."""
        target, version = build_folder() / name, self.distribution.get_version()
        cuda = find_cuda()
        built_for = ", ".join(cuda.architectures) if isinstance(cuda, Cuda) else f"none: {cuda}"
        print(f"fastdiff: CPU kernels: {', '.join(isas())}; CUDA kernels: {built_for}", flush=True)
        if run_ninja(target, version, cuda):
            return target
        if isinstance(cuda, Cuda) and os.environ.get("FASTDIFF_BUILD_CUDA") != "1":
            without = f"{cuda.nvcc} failed on them"
            if run_ninja(target, version, without):
                warn(f"fastdiff is installed without CUDA kernels: {without}, as said above")
                return target
        raise CannotBuildError(
            "the C++ compiler failed (g++ from 11 on, clang++ from 10 on can do it)"
        )

    def copy_extensions_to_source(self) -> None:
        """--inplace, editable installs: no module and no reason of an earlier build is left."""
        assert not SANITIZED, "FASTDIFF_SANITIZE=1 is for --build-lib, not for --inplace"
        built = Path(self.build_lib) / "fastdiff" / "kernels"
        for ext in self.extensions:
            for name in (Path(self.get_ext_filename(ext.name)).name, MISSING):
                # not written over: a process may have it mapped
                (ROOT / "kernels" / name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        if (built / MISSING).exists():
            shutil.copy2(built / MISSING, ROOT / "kernels" / MISSING)


def main() -> None:
    ours = ["fastdiff", "fastdiff.*"]
    packages = [p for p in find_packages(include=ours) if not p.startswith("fastdiff.kernels")]
    packages += ["fastdiff.kernels", *(f"fastdiff.kernels.{p}" for p in find_packages("kernels"))]
    # folders of data, without code: named as packages, since setuptools warns about them otherwise
    assets = [f"fastdiff.assets.{p.name}" for p in sorted(Path("fastdiff/assets").iterdir())]
    assets.append("fastdiff.kernels.tuning.tuned")
    setup(
        packages=packages + assets,
        package_dir={"fastdiff": "fastdiff", "fastdiff.kernels": "kernels"},
        package_data={"fastdiff": ["py.typed"], **{name: ["*"] for name in assets}},
        ext_modules=[Extension("fastdiff.kernels._native", sources=[], optional=True)],
        cmdclass={"build_ext": BuildNative},
    )


if __name__ == "__main__":  # as pip and build run it; benchmarks/resources/cuda.py imports it
    main()
