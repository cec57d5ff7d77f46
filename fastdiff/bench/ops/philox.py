"""Noise: nothing in, one fp32 number per element out."""

from __future__ import annotations

import torch

from fastdiff.bench.providers import LATER, Arguments, Make, Subject
from fastdiff.bench.run import Case
from fastdiff.bench.shapes import GPU_BATCHES, Call, Job
from fastdiff.models.presets import UNETS


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    n, *image = call.tensors[0]
    return (torch.arange(n, device=make.device), tuple(image)), {}


def eager(seeds: torch.Tensor, image: tuple[int, ...]) -> torch.Tensor:
    """PyTorch's generator, with one stream for all images."""
    return torch.randn(len(seeds), *image, device=seeds.device)


SUBJECT = Subject(
    op="philox_normal",
    arguments=arguments,
    eager=eager,
)


def gpu_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """The latents that Stable Diffusion starts from; no network calls this op."""
    return [
        Case(
            subject=SUBJECT,
            job_name="",
            job=Job(network="unet", preset="sd1", size=size, batch=batch),
            call=Call("philox_normal", ((batch, UNETS["sd1"].in_channels, size, size),)),
            dtype=torch.float32,
            providers=LATER,
            priority=1,
        )
        for batch in batches
    ]
