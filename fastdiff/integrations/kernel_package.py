"""Export the ops as a package in the layout of the library `kernels` of Hugging Face.

    python -m fastdiff.integrations.kernel_package OUT
    python -m fastdiff.integrations.kernel_package OUT --repository my-name/fastdiff-ops

OUT becomes a repository that can be uploaded as it is, or loaded with
``get_local_kernel(Path("OUT"))``: a copy of the ops for each backend of the library (Triton
compiles at first use, so there is nothing to build), `layers` for `kernelize`, metadata, a card, a
test and a benchmark. The ops are registered under the package's own name, so they do not meet those
of an installed fastdiff, nor those of another version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import fastdiff
import fastdiff.kernels
from fastdiff.files import atomic_folder, write_text

NAME = "fastdiff-ops"
BACKENDS = ("cuda", "cpu")
"""Of the library: a build without machine code is named torch-<backend>."""
KERNELS = Path(fastdiff.kernels.__file__).parent
HUB = Path(fastdiff.__file__).parent / "assets/hub"
MISSING = "this package contains the Triton kernels only; those of CUDA and CPUs come with fastdiff"
LEAST_LIBRARY = "0.17.0"


def sources() -> list[Path]:
    """The files of the ops, relative to `KERNELS`."""
    kinds = {".py", ".json"}
    return sorted(
        path.relative_to(KERNELS)
        for path in KERNELS.rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    )


def export(out: Path, *, repository: str = f"fastdiff/{NAME}", commit: str = "unknown") -> Path:
    """Write the package; the folder must not exist or be empty.

    Args:
        repository: where it will be uploaded, for the card.
        commit: of the sources, for the card.

    Raises:
        FileExistsError: the folder contains something.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another folder or remove it")
    with atomic_folder(out) as folder:
        digest = hashlib.sha256()
        for path in (*(KERNELS / p for p in sources()), HUB / "layers.py"):
            digest.update(path.read_bytes())
        for backend in BACKENDS:
            _variant(folder / "build" / f"torch-{backend}", backend, digest.hexdigest()[:8])
        card = (HUB / "card.md").read_text()
        facts = {"repository": repository, "version": fastdiff.__version__, "commit": commit}
        for name, value in facts.items():
            card = card.replace(f"{{{name}}}", value)
        write_text(folder / "README.md", card)
        for name, place in (
            ("parity.py", "tests/test_parity.py"),
            ("benchmark.py", "benchmarks/benchmark.py"),
        ):
            (folder / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(HUB / name, folder / place)
    return out


def _variant(folder: Path, backend: str, digest: str) -> None:
    for path in sources():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(KERNELS / path, target)
    shutil.copyfile(HUB / "layers.py", folder / "layers.py")
    write_text(folder / "_native_missing.txt", MISSING)
    package = folder / "__init__.py"
    lines = 'from . import layers as layers  # noqa: E402\n\n__all__ += ["layers"]\n'
    write_text(package, f"{package.read_text().rstrip()}\n\n{lines}")
    metadata = {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{digest}",
        "name": NAME,
        "version": 1,
        "license": "Apache-2.0",
        "kernels-minver": LEAST_LIBRARY,
        "python-depends": [],
        "backend": {"type": backend},
    }
    write_text(folder / "metadata.json", json.dumps(metadata, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff.integrations.kernel_package",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--repository", default=f"fastdiff/{NAME}", help="where it will be (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        print(export(options.out, repository=options.repository))
    except OSError as error:
        print(f"kernel_package: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
