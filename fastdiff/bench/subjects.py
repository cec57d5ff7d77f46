"""Every op's `Subject`, as the files of `fastdiff.bench.ops` declare them."""

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
"""Op -> its subject, of the ops that networks are made of."""
NETWORK_OPS = tuple(SUBJECTS.values())


def own_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """The cases of ops that no network calls, which declare them themselves."""
    found = [file.gpu_cases for file in _FILES if hasattr(file, "gpu_cases")]
    return [case for cases in found for case in cases(size, batches)]
