"""What a job costs in evaluations of the network, known before anything is computed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint.weights import empty_model
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import Job
from fastdiff.kernels import backend
from fastdiff.models.network import Network

TOKENS = 77
"""Tokens in a chunk of a prompt."""


def evaluations(job: Job, facts: Facts) -> float:
    """The number of full evaluations of the network that a checked job is worth, for one step of
    the sampler each, guided ones twice; one that reuses deep features counts by its FLOPs. What the
    two rows of a guided sample share is not deducted: 2.6% in Stable Diffusion 1.5.
    """
    settings = job.settings
    rows, each = settings.total, 2.0 if settings.weight > 1 else 1.0
    network: Any = facts.model.denoiser
    if (cache := settings.caching) is None or network is None:
        return rows * each
    full = sum(cache.full([settings.weight > 1] * rows))
    side = (facts.image_size or 64 * facts.factor) // facts.factor
    tokens = TOKENS if facts.reads_text else int(network.config.context_dim is not None)
    share = shallow_share(network.config, cache.branch, (side, side), tokens)
    return (full + share * (rows - full)) * each


@functools.lru_cache(maxsize=64)
def shallow_share(config: Any, branch: int, sides: tuple[int, int], tokens: int) -> float:
    """FLOPs of matrix products of an evaluation that reuses a branch's deep features, as a share of
    those of a full one. Counted on the meta device, once per config.

    sides: (h, w) of x. tokens: of the context; 0 without one.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports much

    network: Any = empty_model(config, "the config", 2**62).eval()
    with torch.no_grad():
        x, emb, context = inputs(network, 1, sides, tokens, torch.float32)
        deep = torch.empty(1, *network.deep_shape(branch, sides), device="meta")

        def flops(*reused: Any) -> int:
            with backend("reference"), FlopCounterMode(display=False) as counter:
                call = network.shallow if reused else network.body
                call(x, emb, context, *reused)
            return counter.get_total_flops()

        return flops(branch, deep) / flops()


def inputs(
    network: Network, rows: int, sides: tuple[int, int], tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Any]:
    """x, the embedding and the projected context of an evaluation, on the meta device."""
    config: Any = network.config
    t = torch.empty(rows, device="meta")
    y = added = context = None
    if config.num_classes is not None:
        y = torch.empty(rows, dtype=torch.int64, device="meta")
    if config.added_condition_dim is not None:
        added = torch.empty(rows, config.added_condition_dim, dtype=dtype, device="meta")
    emb = network.embed(t, y, added)
    if tokens:
        given = torch.empty(rows, tokens, config.context_dim, dtype=dtype, device="meta")
        context = network.project_context(given)
    shape, layout = (rows, config.in_channels, *sides), torch.channels_last
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    return x, emb, context
