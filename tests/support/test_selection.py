"""The tests that run a second time with AVX2, and those `make check` selects for a changed file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.check import Change, changes
from tests.support.imports import ROOT
from tests.support.selection import is_numeric, mirrors

TESTS = [
    "tests/test_files.py",
    "tests/test_packaging.py",
    "tests/kernels/test_layer_norm.py",
    "tests/kernels/test_attention.py",
    "tests/kernels/test_attention_cuda.py",
    "tests/kernels/geglu/test_cuda.py",
    "tests/kernels/test_dispatch.py",
    "tests/models/test_unet.py",
    "tests/models/test_text.py",
]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("fastdiff/models/unet.py", ["tests/models/test_unet.py"]),
        ("fastdiff/files.py", ["tests/test_files.py"]),
        ("setup.py", ["tests/test_packaging.py"]),
        ("kernels/geglu/cpu.py", ["tests/kernels/geglu/test_cuda.py"]),
        ("csrc/cuda/geglu.cu", ["tests/kernels/geglu/test_cuda.py"]),
        ("csrc/layer_norm_backward.cu", ["tests/kernels/test_layer_norm.py"]),
        ("kernels/attention/__init__.py", ["tests/kernels/test_attention.py"]),
        ("tests/models/test_text.py", ["tests/models/test_text.py"]),
        # without a mirror, the whole room is selected
        ("fastdiff/models/layers.py", ["tests/models/test_text.py", "tests/models/test_unet.py"]),
        ("docs/performance.md", []),
        ("fastdiff/data/images.py", []),
    ],
)
def test_tests_of_a_changed_file(changed: str, expected: list[str]) -> None:
    assert mirrors(changed, TESTS) == expected


def test_a_changed_helper_selects_the_tests_that_import_it() -> None:
    own = "tests/support/test_selection.py"
    every = [own, "tests/support/test_parity.py"]
    assert mirrors("tests/support/selection.py", every) == [own]
    assert mirrors("tests/support/parity.py", every) == ["tests/support/test_parity.py"]


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("tests/models/test_unet.py", "test_shapes", True),
        ("tests/kernels/test_geglu.py", "test_parity[odd-torch.float32-cpu]", True),
        ("tests/kernels/test_geglu.py", "test_parity[odd-torch.float32-reference]", True),
        ("tests/kernels/test_geglu.py", "test_parity[odd-torch.float32-triton]", False),
        ("tests/kernels/test_geglu.py", "test_bad_input", False),
        ("tests/kernels/test_attention.py", "test_cpu_second_derivatives", True),
        ("tests/kernels/test_native.py", "test_philox_words", True),
        ("tests/kernels/test_attention_cuda.py", "test_parity[odd]", False),
        ("tests/kernels/test_op.py", "test_the_reference_is_traced", False),
        ("tests/models/test_prompts.py", "test_weights", False),
        ("tests/diffusion/test_schedules.py", "test_sigmas", False),
        ("tests/integrations/test_accelerate.py", "test_same_outputs_and_gradients", True),
        ("tests/test_cli.py", "test_help", False),
        ("tests/checkpoint/test_save.py", "test_save", False),
    ],
)
def test_numeric_tests_compute_on_this_cpu(path: str, name: str, expected: bool) -> None:
    assert is_numeric(path, name) == expected


def test_the_marker_is_set() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m"]
    files = ["tests/support/test_selection.py", "tests/test_layers.py"]
    done = subprocess.run(
        [*command, "numeric", *files], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "test_selection.py::test_the_marker_is_set" in done.stdout
    assert "test_layers.py" not in done.stdout


def test_changes_are_read_off_git(tmp_path: Path) -> None:
    """Committed, staged, edited, new and deleted files are found, from the branch point of main."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*arguments: str) -> None:
        names = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *names, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-b", "main")
    for name in ("kept", "edited", "committed", "deleted"):
        (root / name).write_text("1\n")
    git("add", ".")
    git("commit", "-m", "first")
    git("checkout", "-b", "branch")
    (root / "committed").write_text("2\n")
    git("commit", "-am", "second")
    (root / "edited").write_text("2\n")
    (root / "deleted").unlink()
    (root / "new").write_text("1\n")
    found = changes(root)
    assert found == Change("main", ["committed", "deleted", "edited", "new"])
    git("add", "--all")
    assert changes(root) == found
    git("commit", "-m", "third")
    git("checkout", "main")
    git("merge", "--ff-only", "branch")
    assert changes(root) == Change("HEAD~1", ["deleted", "edited", "new"])
