"""Packages for a machine without a package index: a folder of wheels, filled on another machine.

    python -m benchmarks.device.wheels out/wheels          here, where pip reaches an index
    python -m benchmarks.device --call 1 --wheels out/wheels     there, offline

The wheels are those of `NEEDED` at the versions of constraints.txt, all in pure Python. The other
machine must have torch, triton, numpy and the usual rest already.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device.table import ROOT

PYTHON = "3.12"
NEEDED = (
    *("diffusers", "importlib-metadata", "zipp"),
    *("cattrs", "attrs", "typing-extensions"),
    *("tyro", "docstring-parser", "typeguard"),
)
"""Packages and what they need beyond torch's own needs."""


def pinned(names: Sequence[str] = NEEDED, python: str = PYTHON) -> list[str]:
    """``name==version`` of each package, from constraints.txt, for a version of Python.

    Raises:
        ValueError: constraints.txt does not pin one of them.
    """
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin, _, marker = line.partition(";")
        name, equal, number = pin.strip().partition("==")
        if equal and _applies(marker, python):
            found[name.lower().replace("_", "-")] = number
    if absent := [name for name in names if name not in found]:
        raise ValueError(f"constraints.txt does not pin {', '.join(absent)}")
    return [f"{name}=={found[name]}" for name in names]


def _applies(marker: str, python: str) -> bool:
    """Whether a marker holds; only comparisons of ``python_version`` are understood."""
    comparison = re.search(r"python_version\s*(<|>=)\s*'(\d+)\.(\d+)'", marker)
    if comparison is None:
        return True
    have = tuple(map(int, python.split(".")))
    limit = int(comparison[2]), int(comparison[3])
    return have < limit if comparison[1] == "<" else have >= limit


def fill(folder: Path, python: str = PYTHON) -> list[str]:
    """Download the wheels into a folder, without the packages that they depend on.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    words += ["--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
    subprocess.run([*words, *pinned(python=python)], check=True)
    return sorted(path.name for path in folder.glob("*.whl"))


def install(folder: Path, site: Path) -> list[str]:
    """Install every wheel of a folder into another folder, offline. Returns the wheels' names.

    Raises:
        ValueError: the folder contains no wheels.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    found = sorted(folder.glob("*.whl"))
    if not found:
        raise ValueError(
            f"{folder} contains no wheels; fill it with: "
            f"python -m benchmarks.device.wheels {folder}"
        )
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    words += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
    subprocess.run([*words, *map(str, found)], check=True)
    return [path.name for path in found]


def main(argv: Sequence[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device.wheels",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the folder to fill")
    parser.add_argument(
        "--python", default=PYTHON, help="Python of the other machine (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        names = fill(options.folder, options.python)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"benchmarks.device.wheels: {error}", file=sys.stderr)
        return 1
    print("\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
