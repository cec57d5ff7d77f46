"""`linear_geglu` by cuBLAS, and the CUDA kernel of `geglu`."""

from __future__ import annotations

from dataclasses import replace

from .. import cuda
from ..geglu import cuda as geglu
from .composed import backward_by, forward_by

BACKEND = replace(
    cuda.cuda_backend(forward=forward_by(geglu.forward), backward=backward_by(geglu.backward)),
    planned=False,  # a plan cannot repeat PyTorch's product
)
