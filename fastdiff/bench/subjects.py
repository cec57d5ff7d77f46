"""Collects the `Subject` of every op from the files of `fastdiff.bench.ops`."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from fastdiff.bench import ops
from fastdiff.bench.providers import Subject
from fastdiff.bench.run import Case
from fastdiff.bench.shapes import GPU_BATCHES

_FILES = [
    import_module(f"{ops.__name__}.{file.name}") for file in pkgutil.iter_modules(ops.__path__)
]
SUBJECTS: dict[str, Subject] = {
    subject.op: subject for file in _FILES for subject in getattr(file, "SUBJECTS", ())
}
"""Op -> its subject, for the ops that networks consist of."""
NETWORK_OPS = tuple(SUBJECTS.values())


def own_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """The cases of ops that no network calls; they declare their own."""
    found = [file.gpu_cases for file in _FILES if hasattr(file, "gpu_cases")]
    return [case for cases in found for case in cases(size, batches)]
