"""`linear_geglu` on a CPU: PyTorch's product, and the kernel of `geglu`."""

from __future__ import annotations

from ..cpu import cpu_backend
from ..geglu import cpu as geglu
from .composed import backward_by, forward_by

BACKEND = cpu_backend(forward=forward_by(geglu.forward), backward=backward_by(geglu.backward))
