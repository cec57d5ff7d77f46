"""The wheel and the sdist hold each file once; `kernels` refuses a wrong name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.resources.cuda import build_script

ROOT = Path(__file__).resolve().parent.parent
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
ASSETS = ROOT / "fastdiff" / "assets"


builds = pytest.mark.slow  # the first of them that runs waits for the C++ compiler


@pytest.fixture(scope="module", autouse=True)
def _without_cuda() -> Iterator[None]:
    """nvcc takes long, and tests/kernels/test_cuda_resources.py shows that the kernels compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_BUILD_CUDA", "0")
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks, with the objects of the last build of this tree.

    Objects whose sources have changed are compiled again.
    """
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    names = [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()]
    archive = tmp_path_factory.mktemp("archive") / "tree.tar"
    with tarfile.open(archive, "w") as tar:
        for name in names:
            tar.add(ROOT / name, name)
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    built = build_script().build_folder()
    copied = source / built.relative_to(ROOT)
    shutil.copytree(built, copied, ignore=shutil.ignore_patterns("*.cu.*", "*.so"))
    return source


@pytest.fixture(scope="module")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sdist and wheel, both from the tree, so that later builds there find what is compiled; the
    wheel from an sdist is .ci/run's."""
    out = tmp_path_factory.mktemp("dist")
    kinds = ["--no-isolation", "--sdist", "--wheel"]
    subprocess.run(
        [sys.executable, "-m", "build", *kinds, "--outdir", str(out), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    return out


@builds
def test_wheel_holds_kernels_once_and_under_our_name(dist: Path) -> None:
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
    shipped = {name for name in names if name.startswith("fastdiff/kernels/")}
    compiled = {name for name in shipped if Path(name).name.startswith("_native.")}
    assert len(compiled) == (1 if COMPILER else 0)
    sources = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "kernels").rglob("*.json")]
    reason = set() if COMPILER else {"fastdiff/kernels/_native_missing.txt"}
    expected = {f"fastdiff/{path.relative_to(ROOT)}" for path in sources}
    assert shipped - compiled == expected | reason
    assert "fastdiff/py.typed" in names
    rooms = {str(path.relative_to(ROOT)) for path in (ROOT / "fastdiff").rglob("*.py")}
    assert {name for name in rooms if not name.startswith("fastdiff/kernels/")} <= set(names)


def build_in_place(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run what ``make build`` runs in the copy."""
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@builds
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler here")
def test_a_second_build_compiles_only_what_was_edited(dist: Path, source: Path) -> None:
    first = build_in_place(source)
    assert first.returncode == 0, first.stderr
    edited = source / "csrc" / "cpu" / "geglu.cpp"
    edited.write_text(edited.read_text() + "// edited\n")
    second = build_in_place(source)
    compiled = set(re.findall(r"c\+\+ ([\w.]+)\.o", second.stdout))
    assert {name.partition(".")[0] for name in compiled} == {"geglu", "build_info"}, second.stdout
    assert list((source / "kernels").glob("_native.*"))


@builds
@pytest.mark.skipif(not COMPILER or not shutil.which("nm"), reason="no C++ compiler or nm here")
def test_no_code_of_one_instruction_set_serves_another(dist: Path, source: Path) -> None:
    """A function that is weak (a template of a header) would be taken from any of the objects, from
    one with AVX-512 too, and end the process on a CPU without. Code of theirs alone is local."""
    objects = [p for isa in ("avx2", "avx512") for p in (source / "build").rglob(f"*.{isa}.o")]
    kernels = [p for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if "binding" not in p.stem]
    assert len(objects) == 2 * len(kernels)
    for path in objects:
        result = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True)
        weak = re.findall(r"^\w* +[Wu] (.*)$", result.stdout, re.MULTILINE)
        assert not weak, (path.name, weak)


@builds
def test_without_a_compiler_there_is_one_warning(source: Path, tmp_path: Path) -> None:
    """No module of an earlier build is left that would serve other sources; the reason is kept for
    the run time until a build succeeds."""
    reason = source / "kernels" / "_native_missing.txt"
    (source / "kernels" / f"_native{EXT_SUFFIX}").touch()
    built = build_in_place(source, PATH=str(tmp_path), CXX="")
    assert built.returncode == 0, built.stderr
    assert built.stderr.count("WARNING: fastdiff is installed without its compiled kernels") == 1
    assert "no C++ compiler was found (c++, g++, clang++)" in built.stderr
    assert not list((source / "kernels").glob("_native.*"))
    assert reason.read_text().startswith("no C++ compiler was found (c++, g++, clang++)")
    if COMPILER:
        assert build_in_place(source).returncode == 0
        assert not reason.exists()


@builds
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler here")
def test_where_nvcc_fails_the_module_is_built_without_cuda(source: Path, tmp_path: Path) -> None:
    """Such as one that is too old for the C++ compiler; demanded, it fails."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\ntest "$1" = --list-gpu-code && echo sm_80 || exit 1\n')
    nvcc.chmod(0o755)
    a_gpu = {"TORCH_CUDA_ARCH_LIST": "8.0"}
    built = build_in_place(source, FASTDIFF_BUILD_CUDA="auto", NVCC=str(nvcc), **a_gpu)
    assert built.returncode == 0, built.stderr
    assert built.stderr.count(f"installed without CUDA kernels: {nvcc} failed on them") == 1
    module = next((source / "kernels").glob("_native.*"))
    result = in_the_root(
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('fastdiff.kernels._native', {str(module)!r})\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.build()['without_cuda'])"
    )
    assert result.stdout.strip() == f"{nvcc} failed on them", result.stderr
    built = build_in_place(source, FASTDIFF_BUILD_CUDA="1", NVCC=str(nvcc))
    assert built.returncode != 0
    assert "fastdiff: the C++ compiler failed" in built.stderr


def test_cuda_that_is_demanded_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    script = build_script()
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.setenv("FASTDIFF_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTDIFF_BUILD_CUDA=1, but nvcc was not found; set"):
        script.find_cuda()
    monkeypatch.setenv("FASTDIFF_BUILD_CUDA", "auto")
    monkeypatch.setattr(script, "gpus", lambda: ("9.0a",))
    assert script.find_cuda() == "nvcc was not found; set CUDA_HOME"


def nvcc_and_gpus(folder: Path, *capabilities: str) -> None:
    """Executables that answer as nvcc and nvidia-smi do."""
    codes = " ".join(f"sm_{code}" for code in ("75", "80", "86", "89", "90", "100", "120"))
    for name, output in (("nvcc", codes), ("nvidia-smi", "\n".join(capabilities))):
        (folder / name).write_text(f"#!/bin/sh\necho '{output}'\n")
        (folder / name).chmod(0o755)


def test_cuda_kernels_are_built_for_the_gpus_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For two kinds of GPU both; for none nothing, unless it is demanded or listed."""
    script = build_script()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("FASTDIFF_BUILD_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc_and_gpus(tmp_path, "9.0", "9.0", "12.0")
    assert script.find_cuda().architectures == ("9.0a", "12.0")
    nvcc_and_gpus(tmp_path, "7.5")
    assert "share none of the architectures 7.5" in script.find_cuda()
    nvcc_and_gpus(tmp_path, "No devices were found")
    assert script.find_cuda() == (
        "no GPU was found here; FASTDIFF_BUILD_CUDA=1 builds them all the same"
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert script.find_cuda().architectures == ("8.0",)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("FASTDIFF_BUILD_CUDA", "1")
    assert script.find_cuda().architectures == script.ARCHITECTURES
    (tmp_path / "nvidia-smi").unlink()
    assert script.gpus() == ()


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The build then goes on without the module, with this reason."""
    script = build_script()
    monkeypatch.setattr(script.shutil, "which", lambda name, path=None: None)
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(script.CannotBuildError, match="ninja was not found; pip install ninja"):
        script.find_ninja()
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(script.CannotBuildError, match="pybind11 was not found; pip install"):
        script.run_ninja(Path("_native.so"), "1", "no CUDA")
    monkeypatch.setenv("CXX", "clang++-99 -O2")
    with pytest.raises(script.CannotBuildError, match=r"no C\+\+ compiler was found \(clang"):
        script.find_compiler()


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the list that have the kernels' instructions; containers list older ones too."""
    script = build_script()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0;9.0a+PTX;12.0")
    names = script.architectures("nvcc")
    assert names == ("8.0", "9.0a+PTX", "12.0")
    assert script.Cuda(nvcc="nvcc", architectures=names[:2]).flags.split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 9.0+PTX")  # attention needs TMA and wgmma
    assert script.architectures("nvcc") == ("9.0a", "9.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(SystemExit, match=r"numbers such as 8.0;9.0a\+PTX, got 'Ampere'"):
        script.architectures("nvcc")


@builds
def test_a_build_that_has_to_have_cuda_fails_without(source: Path, tmp_path: Path) -> None:
    built = build_in_place(source, PATH=str(tmp_path), CXX="", FASTDIFF_BUILD_CUDA="1")
    assert built.returncode != 0
    assert "fastdiff: no C++ compiler was found" in built.stderr
    built = build_in_place(source, FASTDIFF_BUILD_CUDA="maybe")
    assert "FASTDIFF_BUILD_CUDA must be 0, 1 or auto, got 'maybe'" in built.stderr


@builds
def test_wheel_holds_every_asset(dist: Path) -> None:
    names = set(zipfile.ZipFile(next(dist.glob("*.whl"))).namelist())
    assets = {str(p.relative_to(ROOT)) for p in ASSETS.rglob("*") if p.is_file()}
    assert assets <= names


@builds
def test_sdist_holds_kernels_once(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as tar:
        files = [Path(*Path(m.name).parts[1:]) for m in tar.getmembers() if not m.isdir()]
    assert len(files) == len(set(files))
    assert Path("kernels/__init__.py") in files
    assert {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*")} <= set(files)
    assert not [f for f in files if f.suffix in (".pyc", ".so", ".o") or f.name == "__pycache__"]
    assert not [f for f in files if f.parts[:2] == ("fastdiff", "kernels")]


@pytest.mark.parametrize(
    "statement",
    [
        "from kernels import attention",
        "import kernels; kernels.get_kernel",
        "from kernels import *",
    ],
)
def test_kernels_refuses_a_wrong_name(statement: str) -> None:
    ran = in_the_root(statement)
    assert ran.returncode == 1
    assert "this package is 'fastdiff.kernels'" in ran.stderr


def test_kernels_submodules_have_no_second_name() -> None:
    ran = in_the_root("import kernels.attention")
    assert ran.returncode == 1
    assert "No module named 'kernels.attention'" in ran.stderr


def test_peers_that_probe_for_kernels_work_in_the_root() -> None:
    ran = in_the_root("from diffusers import UNet2DModel")
    assert ran.returncode == 0, ran.stderr


def in_the_root(statement: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", statement]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
