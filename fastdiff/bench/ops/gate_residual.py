"""Gated residual sum: x and residual in, y out; the tokens of DiT-XL at 256 and 512 pixels."""

from __future__ import annotations

from torch import Tensor

from fastdiff.bench.ops.ada_layer_norm import WIDTH, arguments
from fastdiff.bench.providers import LATER, Subject
from fastdiff.bench.run import Case
from fastdiff.bench.shapes import GPU_BATCHES, Call, Job


def eager(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """The product and the sum as in the authors' DiT code."""
    return residual + gate[:, None] * x


SUBJECT = Subject(
    op="gate_residual",
    operands=lambda x: (x, (x[0], x[-1]), x),
    arguments=arguments,
    eager=eager,
)


def gpu_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """A token is a patch of 2 x 2 latents; the networks that are timed do not call this op."""
    tokens = (size // 2) ** 2
    return [
        Case(
            subject=SUBJECT,
            job_name="",
            job=Job(network="unet", preset="sd1", size=size, batch=batch),
            call=Call(
                "gate_residual", ((batch, tokens, WIDTH), (batch, WIDTH), (batch, tokens, WIDTH))
            ),
            providers=LATER,
            priority=1,
        )
        for batch in batches
    ]
