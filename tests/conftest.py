"""Every test draws the same random numbers each time, alone or among others.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; that is decided before
the first import of the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
