"""What a dry run uses in place of the real networks: the smallest ones, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def dry_jobs() -> dict[str, Any]:
    """The smallest networks."""
    from fastdiff.bench.shapes import Job

    return {
        "digits U-Net": Job(network="unet", preset="digits", size=2, batch=1),
        "digits decoder": Job(network="decoder", preset="digits", size=2, batch=1),
    }


def dry_cases(subjects: Sequence[Any], known: set[str]) -> list[Any]:
    """Cases for the ops of transformers, which the smallest networks lack."""
    from fastdiff.bench.run import Case
    from fastdiff.bench.shapes import Call

    (job, *_) = dry_jobs().values()
    x, weight = (1, 4, 32), (32,)
    calls = {
        "geglu": Call("geglu", (x,)),
        "layer_norm": Call("layer_norm", (x, weight, weight)),
        "add_layer_norm": Call("add_layer_norm", (x, x, weight, weight)),
    }
    return [
        Case(subject=subject, job_name="", job=job, call=calls[subject.op], direction=direction)
        for subject in subjects
        if subject.op not in known
        for direction in ("forward", "backward")
    ]
