"""Install fastdiff as strangers do, in fresh environments: ``make install-check``.

    python -m tests.install_check                     all, some minutes
    python -m tests.install_check no-compiler sdist   some of them

Every check works on a copy of what git tracks (or its sdist), installs into a virtual environment
of its own under a temporary folder and runs from there, so that neither this checkout nor an
earlier build can help. torch and the other dependencies are installed once (with constraints.txt)
and shared by path.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("CXX", "NVCC", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "FASTDIFF_BUILD_CUDA")

FACTS = """
import pathlib, torch
import fastdiff.kernels
from fastdiff.kernels import compiled
home = pathlib.Path(fastdiff.kernels.__file__).resolve()
assert "site-packages" in home.parts and not (home.parents[2] / "csrc").exists(), home
native = compiled.native
x = torch.randn(3, 2 * 40)
with fastdiff.backend("reference"):
    expected = fastdiff.kernels.geglu(x)
"""
COMPILED = """
assert native is not None, compiled.MISSING
assert fastdiff.kernels.explain("geglu", x).chosen == "cpu"
torch.testing.assert_close(fastdiff.kernels.geglu(x), expected)
assert native.has_parallel_for()
print("compiled:", native.isa(), native.build()["compiler"])
"""


class FailedError(Exception):
    """A check does not hold; the text says what was seen."""


@dataclass(frozen=True)
class Place:
    """Where one check works."""

    base: Path
    """The environment that has the dependencies."""
    folder: Path
    """Empty, for this check alone."""

    def run(self, *command: str | Path, fails: bool = False, **environment: str) -> str:
        """Standard output and errors of a command. Raises FailedError if it ends otherwise."""
        given = {k: v for k, v in os.environ.items() if k not in VARIABLES and k != "PYTHONPATH"}
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=self.folder, env={**given, **environment}, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if (done.returncode != 0) != fails:
            raise FailedError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def environment(self) -> Path:
        """A new virtual environment that sees the dependencies; its Python."""
        home = self.folder / "venv"
        python = make_environment(home)
        shared = next(self.base.glob("lib/python*/site-packages"))
        own = next(home.glob("lib/python*/site-packages"))
        (own / "dependencies.pth").write_text(f"{shared}\n")
        return python

    def source(self) -> Path:
        """A copy of what git tracks or would."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        copy = self.folder / "source"
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).exists():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
        return copy

    def install(self, python: Path, what: Path, *options: str, **environment: str) -> str:
        """What pip says; then the source is removed, if it was a folder."""
        output = self.run(
            python, "-m", "pip", "install", "--no-deps", *options, what, **environment
        )
        if what.is_dir():
            shutil.rmtree(what)
        return output


def make_environment(home: Path) -> Path:
    venv.create(home, with_pip=True, symlinks=True)
    return home / "bin" / "python"


def expect(text: str, output: str, times: int | None = None) -> None:
    if text not in output or (times is not None and output.count(text) != times):
        raise FailedError(f"expected {text!r} {times or 'some'} times in:\n{output}")


def no_compiler(place: Place) -> str:
    """An empty PATH: installs, works with the other backends, and says once why it is slow."""
    python, empty = place.environment(), place.folder / "empty"
    empty.mkdir()
    reason = "no C++ compiler was found (c++, g++, clang++)"
    output = place.install(python, place.source(), "-v", PATH=str(empty))
    expect("WARNING: fastdiff is installed without its compiled kernels", output, times=1)
    call = "fastdiff.kernels.geglu(x); fastdiff.kernels.layer_norm(x)"
    output = place.run(python, "-c", FACTS + call, PATH=str(empty))
    expect("fastdiff runs without its cpu kernels", output, times=1)
    expect(reason, output, times=1)
    triton = 'torch.testing.assert_close(fastdiff.kernels.geglu(x), expected)\nprint("equal")'
    forced = {"FASTDIFF_BACKEND": "triton", "TRITON_INTERPRET": "1", "PATH": str(empty)}
    expect("equal", place.run(python, "-c", FACTS + triton, **forced))
    expect(reason, place.run(python, "-m", "fastdiff", "doctor", PATH=str(empty), COLUMNS="500"))
    out = place.folder / "out"
    place.run(python, "-m", "fastdiff", "sample", "--steps", "2", "--out", out, PATH=str(empty))
    if not list(out.rglob("*.png")):
        raise FailedError("fastdiff sample wrote no picture")
    return "reference and Triton serve; the reason is shown at install (-v), at run time, by doctor"


def cpu_only(place: Place) -> str:
    """FASTDIFF_BUILD_CUDA=0."""
    python = place.environment()
    place.install(python, place.source(), FASTDIFF_BUILD_CUDA="0")
    cuda = 'assert not native.build()["cuda_architectures"]\n'
    output = place.run(python, "-c", FACTS + COMPILED + cuda)
    doctor = place.run(python, "-m", "fastdiff", "doctor", COLUMNS="500")
    expect("no kernels: FASTDIFF_BUILD_CUDA was 0", doctor)
    return output.strip()


def nvcc_without_cuda_torch(place: Place) -> str:
    """The CUDA kernels are compiled, for one architecture here, and do not disturb a CPU torch."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        return "SKIPPED: no nvcc here"
    python = place.environment()
    place.install(python, place.source(), FASTDIFF_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0")
    cuda = """
assert torch.version.cuda is None, "this torch has CUDA"
assert native.build()["cuda_architectures"] == "8.0"
choice = fastdiff.kernels.explain("group_norm_silu", torch.zeros(1, 8, 4, 4), 4)
assert choice.chosen == "cpu", choice
assert "runs on cuda, got tensors on cpu" in choice.reasons["cuda"], choice
"""
    return place.run(python, "-c", FACTS + COMPILED + cuda).strip()


def cuda_demanded(place: Place) -> str:
    """FASTDIFF_BUILD_CUDA=1 where it cannot be is an error that pip shows, without -v too.

    Asked for an architecture that is too old, so that a machine with nvcc fails as one without."""
    python, source = place.environment(), place.source()
    output = place.run(
        python, "-m", "pip", "install", "--no-deps", source,
        fails=True, FASTDIFF_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="5.0",
    )  # fmt: skip
    expect("fastdiff: FASTDIFF_BUILD_CUDA=1, but ", output)
    return next(
        line.strip() for line in output.splitlines() if "FASTDIFF_BUILD_CUDA=1, but" in line
    )


def sdist_to_wheel(place: Place) -> str:
    """An sdist, a wheel made of it, installed elsewhere: nothing of the checkout helps."""
    python = place.environment()
    source = place.source()
    builder = make_environment(place.folder / "builder")
    place.run(builder, "-m", "pip", "install", "--quiet", "build")
    place.run(builder, "-m", "build", "--sdist", "--outdir", place.folder / "dist", source)
    shutil.rmtree(source)
    sdist = next((place.folder / "dist").glob("*.tar.gz"))
    with tarfile.open(sdist) as tar:
        held = {Path(*Path(name).parts[1:]).as_posix() for name in tar.getnames()}
    sources = (ROOT / "csrc").rglob("*.*")
    missing = {path.relative_to(ROOT).as_posix() for path in sources} - held
    if missing:
        raise FailedError(f"the sdist lacks {', '.join(sorted(missing))}")
    wheels = place.folder / "wheels"
    command = [builder, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, sdist]
    place.run(*command, FASTDIFF_BUILD_CUDA="0")
    shutil.rmtree(place.folder / "builder")
    sdist.unlink()
    wheel = next(wheels.glob("*.whl"))
    place.install(python, wheel, PATH="")  # installing a wheel needs no compiler
    return f"{wheel.name}: {place.run(python, '-c', FACTS + COMPILED).strip()}"


CHECKS: dict[str, Callable[[Place], str]] = {
    "no-compiler": no_compiler,
    "cpu-only": cpu_only,
    "nvcc-without-cuda-torch": nvcc_without_cuda_torch,
    "cuda-demanded": cuda_demanded,
    "sdist": sdist_to_wheel,
}


def chosen(words: list[str]) -> list[str]:
    """The checks that are asked for; help and wrong names end the process."""
    lines = [f"  {name:<24} {inspect.getdoc(check) or ''}" for name, check in CHECKS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m tests.install_check",
        description=__doc__,
        epilog="\n".join(["checks:", *(line.partition("\n")[0] for line in lines)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("check", nargs="*", help="which of the checks below; none: all")
    names: list[str] = parser.parse_args(words).check
    if unknown := set(names) - set(CHECKS):
        parser.error(f"unknown {', '.join(unknown)}; expected of {', '.join(CHECKS)}")
    return names or list(CHECKS)


def main(words: list[str]) -> int:
    names, failed = chosen(words), 0
    with tempfile.TemporaryDirectory(prefix="fastdiff-install-") as temporary:
        base = Path(temporary) / "base"
        python, started = make_environment(base), time.monotonic()
        required = importlib.metadata.requires("fastdiff") or []
        dependencies = [name for name in required if "extra ==" not in name]
        constraints = ["-c", str(ROOT / "constraints.txt")]
        command = [str(python), "-m", "pip", "install", "--quiet", *constraints]
        subprocess.run([*command, *dependencies], check=True)
        print(f"dependencies: {time.monotonic() - started:.0f} s", flush=True)
        for name in names:
            folder, started = Path(temporary) / name, time.monotonic()
            folder.mkdir()
            try:
                result = CHECKS[name](Place(base, folder))
            except FailedError as error:
                result, failed = f"FAILED: {error}", failed + 1
            print(f"{name} ({time.monotonic() - started:.0f} s): {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
