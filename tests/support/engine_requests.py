"""Requests of a denoiser of any family, mixed: samplers, guidance, steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.network import Network, NetworkConfig
from fastdiff.runtime.conditions import Condition
from fastdiff.runtime.engine import Request
from fastdiff.runtime.run import run

SCHEDULE = NoiseSchedule(ScheduleConfig())


def conditions_of(config: NetworkConfig, tokens: int) -> tuple[list[Condition], Condition]:
    """Three conditions, and the one to guide away from."""
    if config.context_dim is not None:
        generator = torch.Generator().manual_seed(5)
        contexts = torch.randn(4, 1, tokens, config.context_dim, generator=generator)
        made = [Condition(context=context) for context in contexts]
        return made[:3], made[3]
    assert config.num_classes is not None
    return [Condition(label=label) for label in range(3)], Condition(label=config.num_classes)


def requests_of(
    config: NetworkConfig,
    tables: Sequence[SamplerTable],
    shape: tuple[int, ...],
    *,
    count: int,
    tokens: int = 0,
) -> list[Request]:
    conditions, unconditional = conditions_of(config, tokens)
    generator = torch.Generator().manual_seed(6)
    return [
        Request(
            table=tables[index % len(tables)],
            x=torch.randn(shape, generator=generator),
            seed=index,
            condition=conditions[index % 3],
            unconditional=unconditional,
            tag=index,
        )
        for index in range(count)
    ]


def alone_and_together(
    network: Network, shape: tuple[int, ...], *, learned: bool, tokens: int = 0
) -> list[int]:
    """Which of eleven requests have other bits in a batch than alone; they must all differ."""
    variance: dict[str, Any] = {"variance": "learned"} if learned else {}
    tables = [
        build_table("ddim", SCHEDULE, 3, prediction="eps", guidance_scale=3.0),
        build_table("dpmpp-2m-sde", SCHEDULE, 4, prediction="eps"),
        build_table("ddpm", SCHEDULE, 5, prediction="eps", guidance_scale=1.5, **variance),
        build_table("heun", SCHEDULE, 2, prediction="eps"),
    ]
    requests = requests_of(network.config, tables, shape, count=11, tokens=tokens)
    together = {result.request.tag: result.x for result in run(network, requests, slots=5)}
    assert len({x.numpy().tobytes() for x in together.values()}) == 11
    different = []
    for request in requests:
        (alone,) = run(network, [request], slots=2)
        if not torch.equal(alone.x, together[request.tag]):
            different.append(request.tag)
    return different
