"""Interpolation: the noise is on the great circle between two seeds, the condition on a line.

x_s = slerp(noise(seed), noise(to_seed), s), c_s = (1 - s) c_0 + s c_1; the rest is as usual.
"""

from __future__ import annotations

from torch import Tensor

from fastdiff.generate import superresolution
from fastdiff.generate.job import InterpolationJob
from fastdiff.generate.session import Pass, Session
from fastdiff.generate.slerp import slerp


def plan(session: Session, job: InterpolationJob) -> Pass:
    """Plan the pass of a frame.

    Raises:
        ValueError: the prompts or classes do not fit the model.
    """
    assert job.height is not None, "the job is checked"
    assert job.width is not None
    table = session.table(job.settings)
    x = noise_between(session, job) * table.initial_sigma
    return Pass(
        session=session,
        request=session.request(job, table, x, (job.height, job.width)),
        then=superresolution.second_pass(session, job) if session.upsamplers else None,
    )


def noise_between(session: Session, job: InterpolationJob) -> Tensor:
    """Noise (C, h, w), N(0, 1); at the ends exactly that of the seed's own image."""
    assert job.height is not None
    assert job.width is not None
    shape = session.facts.x_shape(job.height, job.width)
    if job.to_seed is None or job.at == 0:
        return session.noise(job.seed, shape)
    last = session.noise(job.to_seed, shape)
    return last if job.at == 1 else slerp(session.noise(job.seed, shape), last, job.at)
