"""What noise is for."""

from __future__ import annotations

from enum import IntEnum


class Stream(IntEnum):
    """What the noise is for: the last word of the counter, so that no two uses share a number."""

    INITIAL_NOISE = 0
    SAMPLER_NOISE = 1
    POSTERIOR_NOISE = 2


INITIAL_NOISE, SAMPLER_NOISE, POSTERIOR_NOISE = Stream
