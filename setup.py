"""Build script: `kernels/` is installed as `fastdiff.kernels`, `csrc/` as its module `_native`.

The module holds no torch header, so it builds in seconds and serves every torch version. Ninja
compiles it: in parallel, and after an edit only what depends on it (``make build``). Every CPU
kernel is compiled once per instruction set, and the module takes the best one when it is loaded.

Environment:
    CXX                    the C++ compiler; else c++, g++ or clang++ from PATH
    FASTDIFF_BUILD_CUDA    1: the CUDA kernels too, or fail; 0: without; auto: where nvcc is found
    TORCH_CUDA_ARCH_LIST   such as "8.0;9.0a+PTX"; default: those of `ARCHITECTURES` nvcc knows
    NVCC, CUDA_HOME        where nvcc is; else from PATH or /usr/local/cuda

Without a C++ compiler the package installs without the module, with one warning: every op then runs
on its other backends.
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
CPU_KERNELS = ("attention", "geglu", "group_norm_silu", "layer_norm", "philox", "sampler_step")
"""Files of csrc/ that are compiled once per instruction set; the others only for any CPU."""
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


class CannotBuildError(Exception):
    """Why the module is not built, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """nvcc and the architectures to compile for."""

    nvcc: str
    architectures: tuple[str, ...]
    """As in TORCH_CUDA_ARCH_LIST; "+PTX" asks for the intermediate code too."""

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


def find_cuda() -> Cuda | None:
    """Where FASTDIFF_BUILD_CUDA is not 0 and nvcc is there. Raises CannotBuildError if it is 1."""
    asked = os.environ.get("FASTDIFF_BUILD_CUDA") or "auto"
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"FASTDIFF_BUILD_CUDA must be 0, 1 or auto, got {asked!r}")
    if asked == "0" or not list(SOURCES.glob("*.cu")):
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("NVCC"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    nvcc = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if nvcc is None:
        if asked == "1":
            raise CannotBuildError("FASTDIFF_BUILD_CUDA=1, but nvcc was not found; set CUDA_HOME")
        return None
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    names = tuple(name for name in listed.split(";") if name)
    if not names:
        told = subprocess.run(
            [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False
        )
        known = set(re.findall(r"sm_(\w+)", told.stdout))
        names = tuple(name for name in ARCHITECTURES if name.replace(".", "").rstrip("a") in known)
    return Cuda(nvcc=nvcc, architectures=names)


def isas() -> dict[str, str]:
    """Instruction sets to compile for -> the flags; on other CPUs than x86 only the portable."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ISAS if x86 else {"portable": ISAS["portable"]}


def digest() -> str:
    """A hash of what the module is made of: tells a module that is older than its sources."""
    total = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def write_ninja(build: Path, target: Path, version: str) -> None:
    """Write build.ninja; what did not change is not written anew. Raises CannotBuildError."""
    import pybind11

    compiler, cuda = find_compiler(), find_cuda()
    told = subprocess.run(
        [*shlex.split(compiler), "--version"], capture_output=True, text=True, check=False
    )
    flags = FLAGS if "clang" in told.stdout else f"{FLAGS} {GCC_FLAGS}"
    includes = [sysconfig.get_paths()["include"], sysconfig.get_paths()["platinclude"]]
    binding = " ".join(f"-isystem {p}" for p in dict.fromkeys([*includes, pybind11.get_include()]))
    names = tuple(isas())
    defines = f"-DFASTDIFF_ISAS='{' '.join(f'X({name})' for name in names)}'"
    # the digest changes with every edit: only the file that holds it has it on its command line
    facts = f'-DFASTDIFF_DIGEST=\\"{digest()}\\" -DFASTDIFF_VERSION=\\"{version}\\"'
    archs = ";".join(cuda.architectures) if cuda else ""
    facts += f" -DFASTDIFF_CUDA_ARCHS='\"{archs}\"'"
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [
        f"cxx = {compiler}",
        f"flags = {flags} {defines}",
        f"link = {shared}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  description = c++ $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # nvcc knows where its own runtime library lies
        f"  command = {'$nvcc $nvcclink' if cuda else '$cxx'} $link $in -o $out",
        "  description = link $out",
    ]
    if cuda:
        lines += [
            f"nvcc = {cuda.nvcc}",
            f"nvccflags = -std=c++17 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden "
            f"-ccbin {shlex.split(compiler)[0]} {cuda.flags}",
            f"nvcclink = -ccbin {shlex.split(compiler)[0]} -cudart static",
            "rule nvcc",
            "  command = $nvcc -MD -MF $out.d $nvccflags -c $in -o $out",
            "  description = nvcc $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects = []

    def compile_(source: Path, name: str, extra: str, rule: str = "cxx") -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: {rule} {_escape(source)}", f"  extra = {extra}"])

    for source in sorted(SOURCES.glob("*.cpp")):
        stem = source.stem
        if stem in CPU_KERNELS:
            for isa, isa_flags in isas().items():
                compile_(source, f"{stem}.{isa}", f"-DFASTDIFF_ISA={isa} {isa_flags}")
        elif stem.startswith("bindings"):
            compile_(source, stem, binding)
        else:
            compile_(source, stem, facts if stem == "build_info" else "")
    for source in sorted(SOURCES.glob("*.cu")) if cuda else ():
        compile_(source, f"{source.stem}.cu", "", "nvcc")
    lines.append(f"build {_escape(target)}: link {' '.join(objects)}")
    text = "\n".join([*lines, f"default {_escape(target)}", ""])
    path = build / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _escape(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


class BuildNative(build_ext):
    """Builds the one extension module with ninja; where it cannot, warns and goes on without."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            built = self.with_ninja(target.name)
        except CannotBuildError as error:
            if os.environ.get("FASTDIFF_BUILD_CUDA") == "1":
                raise SystemExit(f"fastdiff: {error}") from None
            stale = ROOT / "kernels" / target.name
            stale.unlink(missing_ok=True)
            print(
                f"\nWARNING: fastdiff is installed without its compiled kernels: {error}. "
                "Every op runs on its other backends.\n",
                file=sys.stderr,
            )
            return
        shutil.copy2(built, target)

    def with_ninja(self, name: str) -> Path:
        """Build in build/native/, which the next build goes on from."""
        try:
            import pybind11  # noqa: F401
        except ImportError:
            raise CannotBuildError("pybind11 was not found; pip install pybind11") from None
        ninja = find_ninja()
        build = ROOT / "build" / "native" / name.partition(".")[2].replace(".so", "")
        build.mkdir(parents=True, exist_ok=True)
        write_ninja(build, build / name, self.distribution.get_version())
        done = subprocess.run([ninja, "-C", str(build)], check=False)
        if done.returncode != 0:
            raise CannotBuildError("the C++ compiler failed, its messages stand above")
        return build / name


OURS = ["fastdiff", "fastdiff.*"]
packages = [p for p in find_packages(include=OURS) if not p.startswith("fastdiff.kernels")]
kernel_packages = ["fastdiff.kernels", *(f"fastdiff.kernels.{p}" for p in find_packages("kernels"))]
# folders of data, without code: named as packages, since setuptools warns about them otherwise
assets = [f"fastdiff.assets.{p.name}" for p in sorted(Path("fastdiff/assets").iterdir())]

assets.append("fastdiff.kernels.tuned")

setup(
    packages=packages + kernel_packages + assets,
    package_dir={"fastdiff": "fastdiff", "fastdiff.kernels": "kernels"},
    package_data={
        "fastdiff": ["py.typed"],
        **{name: ["*"] for name in assets},
    },
    ext_modules=[Extension("fastdiff.kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
