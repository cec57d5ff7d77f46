"""Count the lines of kernels/ outside Triton kernels, here or at a revision.

    python -m tests.count_kernel_lines [REV]

A line counts if it holds code or a comment: empty lines, docstrings and the functions under `@jit`
do not. What is left is what an op needs besides its maths: checks, launches, registration.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources(revision: str | None) -> Iterator[tuple[str, str]]:
    """Path -> text of the Python files of kernels/, in the working tree or at a revision."""
    if revision is None:
        for path in sorted((ROOT / "kernels").rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()
        return
    for name in _git("ls-tree", "-r", "--name-only", revision, "kernels").split():
        if name.endswith(".py"):
            yield name, _git("show", f"{revision}:{name}")


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def count(text: str) -> int:
    """The lines of a file that count."""
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and any(_is_jit(d) for d in node.decorator_list):
            first = min(d.lineno for d in node.decorator_list)
            left_out.update(range(first, node.end_lineno + 1))  # type: ignore[operator]
        documented = ast.Module, ast.ClassDef, ast.FunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            left_out.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))  # type: ignore[operator]
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for number, line in lines if line.strip() and number not in left_out)


def _is_jit(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id == "jit"


def total(revision: str | None = None) -> int:
    return sum(count(text) for _, text in sources(revision))


def main() -> None:
    revision = sys.argv[1] if len(sys.argv) > 1 else None
    for path, text in sources(revision):
        print(f"{count(text):6} {path}")
    print(f"{total(revision):6} in all")


if __name__ == "__main__":
    main()
