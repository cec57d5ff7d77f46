"""Respacing strings, as the command line of IDDPM takes them (Nichol and Dhariwal 2021, section 4).

    "25"         25 timesteps over all T, both ends included
    "10,15,20"   T in three equal sections, the cleanest first, with 10, 15 and 20 timesteps
    "ddim50"     DDIM's: multiples of the integer stride that gives exactly 50

This module does not import torch, so that options are checked before it is loaded.
"""

from __future__ import annotations

import re

from fastdiff.names import SPACINGS

EXAMPLES = "'25', '10,15,20' or 'ddim50'"
_DDIM, _SECTIONS = re.compile(r"ddim(\d{1,7})"), re.compile(r"\d{1,7}(,\d{1,7})*")


def check_spacing(spacing: str) -> None:
    """Raise ValueError unless this is the name of a spacing or a respacing string."""
    if spacing not in SPACINGS and respacing_steps(spacing) is None:
        raise ValueError(
            f"unknown spacing {spacing!r}; expected one of {', '.join(SPACINGS)} "
            f"(or a respacing string such as {EXAMPLES})"
        )


def respacing_steps(spacing: str) -> int | None:
    """Number of timesteps in a respacing string; None if it is not a respacing string.

    Raises:
        ValueError: the number is 0.
    """
    if match := _DDIM.fullmatch(spacing):
        steps = int(match[1])
    elif _SECTIONS.fullmatch(spacing):
        steps = sum(map(int, spacing.split(",")))
    else:
        return None
    if not steps:
        raise ValueError(f"spacing must have at least 1 timestep, got {spacing!r}; try {EXAMPLES}")
    return steps


def check_steps(spacing: str, steps: int) -> None:
    """Raise ValueError if a respacing string has another number of timesteps."""
    wanted = respacing_steps(spacing)
    if wanted not in (None, steps):
        raise ValueError(
            f"spacing {spacing!r} has {wanted} steps, got {steps}; set steps to {wanted}"
        )


def respaced_timesteps(spacing: str, num_timesteps: int) -> list[int]:
    """The timesteps of a respacing string, highest first.

    If k of a section's n timesteps are visited, they are the first, the last, and those in between
    at strides of (n - 1) / (k - 1), rounded half to even; if k is 1, it is the first. If T is not a
    multiple of the number of sections, the first ones are one timestep longer.

    Raises:
        ValueError: this is not a respacing string, a section has fewer timesteps than it asks for,
            or no integer stride gives exactly the requested number.
    """
    wanted = respacing_steps(spacing)
    if wanted is None:
        raise ValueError(f"spacing must be like {EXAMPLES}, got {spacing!r}")
    if spacing.startswith("ddim"):
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == wanted:
                return list(reversed(range(0, num_timesteps, stride)))
        raise ValueError(
            f"no integer stride over {num_timesteps} timesteps gives exactly {wanted}, got spacing "
            f"{spacing!r}; use '{wanted}', whose stride need not be an integer"
        )
    counts = [int(count) for count in spacing.split(",")]
    length, longer = divmod(num_timesteps, len(counts))
    timesteps: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        size = length + (index < longer)
        if count > size:
            raise ValueError(
                f"spacing {spacing!r} needs {count} timesteps from a section of {size}; "
                f"use at most {size} there"
            )
        position = 0.0  # summed up as in the original, so that halves are rounded alike
        for _ in range(count):
            timesteps.append(start + round(position))
            position += (size - 1) / (count - 1) if count > 1 else 0.0
        start += size
    return timesteps[::-1]
