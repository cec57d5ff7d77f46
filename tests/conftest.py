"""Every test draws the same random numbers each time, alone or among others.

Parallel test processes (pytest -n) share the cores: if each used all of them, they would wait for
each other at every OpenMP barrier.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; that is decided before
the first import of the kernels.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import setuptools  # noqa: F401 - before anything imports distutils, which it replaces
import torch

from tests.support.costs import Costs
from tests.support.imports import ROOT
from tests.support.selection import is_numeric

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

os.environ.pop("COLUMNS", None)  # pytest -n sets it: output would wrap as on a terminal
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


# a limit in seconds for each example fails where the machine is busy
hypothesis.settings.register_profile("fastdiff", deadline=None)
hypothesis.settings.load_profile("fastdiff")

LONG = ("test_sanitizers", "test_cuda_host", "test_resources", "test_device", "test_packaging")
"""Files of few tests that take minutes, for they compile."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Costs(), "costs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_numeric(item.path.relative_to(ROOT).as_posix(), item.name):
            item.add_marker(pytest.mark.numeric)
    # begun last, a file of minutes would have one process work while the others have nothing left
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
