"""The imports between the files of the package, read from the sources without running them.

`kernels/` has its installed name here, ``fastdiff.kernels``.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "fastdiff"
COMPILED = frozenset({"fastdiff.kernels._native"})
"""Modules without a Python file, which setup.py builds."""


@dataclass(frozen=True)
class Import:
    """An imported module, or a name imported from one, as in ``fastdiff.models.unet.UNet``."""

    line: int
    target: str
    for_types_only: bool
    """Whether it is inside ``if TYPE_CHECKING:`` and so never runs."""


def module_of(path: Path, root: Path = ROOT) -> str:
    """``fastdiff/models/unet.py`` -> ``fastdiff.models.unet``; ``__init__.py`` -> its folder."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, PACKAGE)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_files(root: Path = ROOT) -> dict[str, Path]:
    """Module -> its file, for all installed modules; Python files among the assets are data."""
    others = _link(root), root / PACKAGE / "assets"
    paths = [p for p in (root / PACKAGE).rglob("*.py") if not any(map(p.is_relative_to, others))]
    return {module_of(p, root): p for p in sorted([*paths, *(root / "kernels").rglob("*.py")])}


def _link(root: Path) -> Path:
    """``fastdiff/kernels``, a link to ``kernels`` whose files would otherwise count twice."""
    return root / PACKAGE / "kernels"


def imports(path: Path, module: str) -> Iterator[Import]:
    """All imports in a file, including those inside functions and literal `import_module` calls.

    Args:
        module: the module name of the file, to resolve relative imports.
    """
    is_package = path.name == "__init__.py"
    stack: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while stack:
        node, typing = stack.pop()
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            stack += [(child, True) for child in node.body]
            stack += [(child, typing) for child in node.orelse]
            continue
        stack += [(child, typing) for child in ast.iter_child_nodes(node)]
        for target in _targets(node, module, is_package):
            yield Import(getattr(node, "lineno", 0), target, typing)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _targets(node: ast.AST, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parts = module.split(".")
        dropped = node.level - is_package
        above = parts[: len(parts) - dropped] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args:
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        argument = node.args[0]
        literal = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        if name == "import_module" and literal:
            return [argument.value]
    return []


def file_of(target: str, known: dict[str, Path]) -> str | None:
    """The module that an import loads: the target, or the module that contains it as a name."""
    if target in known:
        return target
    if target in COMPILED:
        return None
    parent = target.rpartition(".")[0]
    return parent if parent in known else None


def graph(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the other modules that it imports at run time."""
    edges: dict[str, set[str]] = {module: set() for module in known}
    for module, path in known.items():
        for found in imports(path, module):
            other = file_of(found.target, known)
            if other is not None and other != module and not found.for_types_only:
                edges[module].add(other)
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The shortest import cycle through every import that is on one, without duplicates."""
    found = set()
    for start, targets in edges.items():
        for target in targets:
            way = _way(target, start, edges)
            if way is not None:
                first = way.index(min(way))
                found.add((*way[first:], *way[:first]))
    return [list(circle) for circle in sorted(found)]


def _way(start: str, end: str, edges: dict[str, set[str]]) -> list[str] | None:
    """The modules on a shortest path, including both ends; None if there is no path."""
    before: dict[str, str | None] = {start: None}
    queue = deque([start])
    while queue:
        module = queue.popleft()
        if module == end:
            way: list[str] = []
            step: str | None = end
            while step is not None:
                way.insert(0, step)
                step = before[step]
            return way
        for other in sorted(edges[module]):
            if other not in before:
                before[other] = module
                queue.append(other)
    return None


def private_uses(path: Path, module: str, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, name) of names with a leading underscore that belong to another module of `known` and
    are imported from it or accessed as its attribute."""
    tree = ast.parse(path.read_text())
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for target, alias in zip(
            _targets(node, module, path.name == "__init__.py"), node.names, strict=True
        ):
            parent, _, name = target.rpartition(".")
            if target in known:
                modules[alias.asname or (name if isinstance(node, ast.ImportFrom) else target)] = (
                    target
                )
            elif parent in known and parent != module and _is_private(name):
                yield node.lineno, f"{parent}.{name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = modules.get(ast.unparse(node.value))
            if owner is not None and owner != module and f"{owner}.{node.attr}" not in COMPILED:
                yield node.lineno, f"{owner}.{node.attr}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
