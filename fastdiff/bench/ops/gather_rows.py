"""The network's input of a guided step: latents and embeddings of Stable Diffusion, two rows for
each image."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.bench.providers import LATER, Arguments, Make, Subject
from fastdiff.bench.run import Case
from fastdiff.bench.shapes import GPU_BATCHES, Call, Job
from fastdiff.models.presets import UNETS

STEPS = 50
WIDTH = 4 * UNETS["sd1"].model_channels
"""Width of the embeddings."""


def eager(x: Tensor, samples: Tensor, embeddings: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    inputs = x.index_select(0, samples).to(embeddings.dtype)
    return inputs.contiguous(memory_format=torch.channels_last), embeddings[places]


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    shape, (rows,), table, _ = call.tensors
    samples = torch.arange(rows, device=make.device) // 2
    return (torch.randn(shape, device=make.device), samples, make(*table), samples + 1), {}


SUBJECT = Subject(
    op="gather_rows",
    arguments=arguments,
    eager=eager,
)


def gpu_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """The engine calls this op, not its network."""
    channels = UNETS["sd1"].in_channels
    return [
        Case(
            subject=SUBJECT,
            job_name="",
            job=Job(network="unet", preset="sd1", size=size, batch=batch),
            call=Call(
                "gather_rows",
                (
                    (batch, channels, size, size),
                    (2 * batch,),
                    (2 * batch * STEPS, WIDTH),
                    (2 * batch,),
                ),
            ),
            providers=LATER,
            priority=1,
        )
        for batch in batches
    ]
