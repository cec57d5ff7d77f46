"""Which tests belong together: those that compute on this CPU, and those of a changed file."""

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
"""Tests whose results come from this CPU's arithmetic (its convolutions, its products, our kernels
for it): they run once more with AVX2."""
ON_THIS_CPU = re.compile(r"(?<![a-z])(cpu|reference)(?![a-z])")
"""In the name of a test of kernels, or in its parameters."""
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
"""In the name of a file or a test: interpreted, emulated, or nothing is computed."""


def is_numeric(path: str, name: str) -> bool:
    """Whether a test gets the marker `numeric`.

    Args:
        path: of its file, from the repository's root.
        name: of the test with its parameters.
    """
    file = PurePosixPath(path).relative_to("tests").as_posix()
    if any(word in f"{file} {name}" for word in OTHER_ARITHMETIC):
        return False
    return file.startswith(NUMERIC) or (
        file.startswith("kernels/") and ON_THIS_CPU.search(name) is not None
    )


def mirrors(changed: str, tests: Iterable[str]) -> list[str]:
    """The test files that mirror a changed file; failing that, those of its room.

    Args:
        changed: path from the repository's root.
        tests: paths of all test files, likewise.

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
"""Files that mirror nothing."""


def _words(test: str) -> set[str]:
    """``tests/kernels/geglu/test_cuda.py`` -> {"geglu", "cuda"}."""
    path = PurePosixPath(test)
    return {*path.parts[2:-1], path.stem.removeprefix("test_")}


def _alike(a: str, b: str) -> bool:
    """``layer_norm_backward`` and ``layer_norm``."""
    return a.startswith(f"{b}_") or b.startswith(f"{a}_")


def _imports(test: str, helper: str) -> bool:
    module = ".".join(PurePosixPath(helper).with_suffix("").parts).removesuffix(".__init__")
    path = ROOT / test
    own = ".".join(Path(test).with_suffix("").parts)
    return any(f"{found.target}.".startswith(f"{module}.") for found in imports(path, own))
