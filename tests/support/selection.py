"""Selections of tests: those that compute on this CPU, and those for a changed file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from tests.support.imports import ROOT, imports

NUMERIC = (
    "diffusion/test_against_diffusers.py",
    "diffusion/test_losses.py",
    "diffusion/test_slots.py",
    "generate/test_run.py",
    "integrations/test_accelerate.py",
    "integrations/test_known_blocks.py",
    "integrations/test_odd_modules.py",
    "kernels/test_native.py",
    "models/",
    "runtime/",
    "support/test_parity.py",
    "support/test_selection.py",
)
"""Tests whose results depend on this CPU's arithmetic (its convolutions, its matrix products, our
CPU kernels); they run a second time with AVX2."""
ON_THIS_CPU = re.compile(r"(?<![a-z])(cpu|reference)(?![a-z])")
"""Matches the name or the parameters of kernel tests that run on the CPU."""
OTHER_ARITHMETIC = (
    "triton",
    "cuda",
    "gpu",
    "inductor",
    "presets",
    "prompts",
    "test_op.",
    "test_choose.",
)
"""Words in the names of files or tests that are interpreted or emulated, or compute nothing."""


def is_numeric(path: str, name: str) -> bool:
    """Whether a test gets the marker `numeric`.

    Args:
        path: path of its file from the root of the repository.
        name: name of the test with its parameters.
    """
    file = PurePosixPath(path).relative_to("tests").as_posix()
    if any(word in f"{file} {name}" for word in OTHER_ARITHMETIC):
        return False
    return file.startswith(NUMERIC) or (
        file.startswith("kernels/") and ON_THIS_CPU.search(name) is not None
    )


def mirrors(changed: str, tests: Iterable[str]) -> list[str]:
    """The test files that mirror a changed file, or else all those of its room.

    Args:
        changed: path from the root of the repository.
        tests: paths of all test files, also from there.

    ``fastdiff/models/unet.py`` -> ``tests/models/test_unet.py``; ``kernels/geglu/cpu.py`` and
    ``csrc/cuda/geglu.cu`` -> ``tests/kernels/test_geglu.py`` and all of ``tests/kernels/geglu/``;
    ``setup.py`` -> ``tests/test_packaging.py``; a test file -> itself; a helper of tests -> the
    test files that import it.
    """
    path, tests = PurePosixPath(changed), sorted(tests)
    if changed in tests:
        return [changed]
    if path.parts[0] == "tests":
        return [test for test in tests if path.suffix == ".py" and _imports(test, changed)]
    if path.name in SPECIAL:
        return [test for test in tests if test == SPECIAL[path.name]]
    if path.parts[0] not in ("fastdiff", "kernels", "csrc", "benchmarks"):
        return []
    inside = PurePosixPath(*path.parts[1:]) if path.parts[0] == "fastdiff" else path
    room = {"csrc": "kernels", "benchmarks": "bench"}.get(inside.parts[0], inside.parts[0])
    if len(inside.parts) == 1:  # a file of the package's root
        return [test for test in tests if test == f"tests/test_{path.stem}.py"]
    own = [test for test in tests if test.startswith(f"tests/{room}/")]
    words = {part for part in (*inside.parts[1:-1], path.stem) if part != "__init__"}
    return (
        [test for test in own if _words(test) & words]
        or [
            test
            for test in own
            if any(_alike(word, other) for word in words for other in _words(test))
        ]
        or own
    )


SPECIAL = {
    "README.md": "tests/test_readme.py",
    "Makefile": "tests/test_packaging.py",
    "setup.py": "tests/test_packaging.py",
    "pyproject.toml": "tests/test_packaging.py",
    "MANIFEST.in": "tests/test_packaging.py",
}
"""Tests of files that have no mirror."""


def _words(test: str) -> set[str]:
    """``tests/kernels/geglu/test_cuda.py`` -> {"geglu", "cuda"}."""
    path = PurePosixPath(test)
    return {*path.parts[2:-1], path.stem.removeprefix("test_")}


def _alike(a: str, b: str) -> bool:
    """Whether one name extends the other, as ``layer_norm_backward`` does ``layer_norm``."""
    return a.startswith(f"{b}_") or b.startswith(f"{a}_")


def _imports(test: str, helper: str) -> bool:
    module = ".".join(PurePosixPath(helper).with_suffix("").parts).removesuffix(".__init__")
    path = ROOT / test
    own = ".".join(Path(test).with_suffix("").parts)
    return any(f"{found.target}.".startswith(f"{module}.") for found in imports(path, own))
