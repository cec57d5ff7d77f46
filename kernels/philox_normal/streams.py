"""The purposes that noise is generated for."""

from __future__ import annotations

from enum import IntEnum


class Stream(IntEnum):
    """The purpose of the noise: the last word of the counter, so that no two uses share numbers."""

    INITIAL_NOISE = 0
    SAMPLER_NOISE = 1
    POSTERIOR_NOISE = 2


INITIAL_NOISE, SAMPLER_NOISE, POSTERIOR_NOISE = Stream
