"""Without a GPU, tests whose backend parameter is "cuda" run under the host emulation."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from tests import cuda_host


@pytest.fixture(autouse=True)
def emulation(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test's name determines the order of the threads, so many tests cover all orders."""
    parameters = getattr(request.node, "callspec", None)
    asked = parameters is not None and "cuda" in (
        parameters.params.get("backend"),
        parameters.params.get("backend_name"),
    )
    if not asked or torch.cuda.is_available():
        yield
        return
    orders = list(cuda_host.ORDERS)
    with cuda_host.emulated(orders[zlib.crc32(request.node.name.encode()) % len(orders)]):
        yield
