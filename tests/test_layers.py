"""Imports only go down: cli, then pipelines, then files, then models and maths, then ops."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "fastdiff"
LEVELS = {
    **dict.fromkeys(["cli", "serve", "__main__"], 5),
    **dict.fromkeys(["jobs", "bench"], 4),
    **dict.fromkeys(["generate", "integrations", "training", "evaluation"], 3),
    **dict.fromkeys(["runtime", "checkpoint", "data"], 2),
    **dict.fromkeys(["models", "diffusion"], 1),
    **dict.fromkeys(["kernels", "files", "configs", "images", "extras"], 0),
}
STRANGERS = {("models", "diffusion"), ("diffusion", "models")}
KERNELS_MAY_IMPORT = {"torch", "triton"}


def room(module: str) -> str:
    """``fastdiff.models.unet`` -> ``models``; the package itself (version, re-exports) -> ''."""
    return [*module.split("."), ""][1]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            if node.module == "fastdiff":
                found += [(node.lineno, f"fastdiff.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def violations(path: Path, own: str) -> list[str]:
    wrong = []
    for line, module in imports(path):
        if module.split(".")[0] != "fastdiff":
            continue
        other = room(module)
        if other in ("", "__version__") or other not in LEVELS:
            continue
        goes_up = LEVELS[other] > LEVELS[own]
        if goes_up or (own, other) in STRANGERS:
            wrong.append(f"{path.name}:{line}: {own} imports {module}")
    return wrong


def our_files() -> list[Path]:
    kernels = ROOT.parent / "kernels"
    files = [p for p in ROOT.rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts]
    return sorted(files) + sorted(kernels.rglob("*.py"))


def owner(path: Path) -> str:
    if "kernels" in path.relative_to(ROOT.parent).parts[:1]:
        return "kernels"
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_only_go_down() -> None:
    wrong = []
    for path in our_files():
        own = owner(path)
        if own == "__init__":
            continue
        assert own in LEVELS, f"{path}: give this room a level in LEVELS"
        wrong += violations(path, own)
    assert not wrong, "\n".join(wrong)


def test_kernels_import_torch_and_triton_only() -> None:
    import sys

    allowed = KERNELS_MAY_IMPORT | set(sys.stdlib_module_names) | {"fastdiff"}
    wrong = [
        f"{path.name}:{line}: {module}"
        for path in our_files()
        if owner(path) == "kernels"
        for line, module in imports(path)
        if (top := module.split(".")[0]) not in allowed
        or (top == "fastdiff" and room(module) not in ("", "kernels"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("kernels", "from fastdiff.models import unet"),
        ("models", "import fastdiff.diffusion.samplers"),
        ("diffusion", "from fastdiff import generate"),
        ("checkpoint", "def f():\n    from fastdiff.training import trainer"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path: Path, own: str, line: str) -> None:
    file = tmp_path / "guilty.py"
    file.write_text(line)
    assert violations(file, own)
