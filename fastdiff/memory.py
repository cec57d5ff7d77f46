"""Measure free memory, and raise an error for a request that would not fit.

Free memory is what the system can allocate without swapping, bounded by what the limits of the
control group (a container) and of the process leave.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

if sys.platform != "win32":
    import resource

SYSTEM = Path("/")
"""Root of /proc and /sys."""


class NotEnoughMemory(MemoryError):
    """A request needs more memory than is free; nothing has been computed yet."""


def check_memory(need: int, what: str, *, device: Any = "cpu", way_out: str) -> None:
    """Refuse what cannot fit.

    Args:
        need: bytes.
        what: needs them, such as "a picture of 99 x 99"; begins the message.
        device: a torch.device or its name.
        way_out: what needs less, such as "a smaller --width"; ends the message.

    Raises:
        NotEnoughMemory: less is free on the device. Where that is unknown nothing is refused.
    """
    free = free_memory(device)
    if free is not None and need > free:
        raise NotEnoughMemory(
            f"{what} needs about {gib(need)} of memory, {gib(free)} are free; {way_out}"
        )


def gib(count: int) -> str:
    """Bytes in GiB with two digits or more.

    >>> gib(5 * 2**30), gib(2**28), gib(123456 * 2**30)
    ('5 GiB', '0.25 GiB', '123,456 GiB')
    """
    value = count / 2**30
    digits = 0 if value >= 10 else 1 if value >= 1 else 2
    text = f"{value:,.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} GiB"


def free_memory(device: Any = "cpu") -> int | None:
    """Free bytes on a device; None where the system does not say.

    device: a torch.device or its name; a GPU's memory is asked of its driver.
    """
    if str(device).startswith("cuda"):
        import torch

        # what PyTorch holds and does not use it hands out again
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    limits = [limit for limit in (_available(), _left_of_process()) if limit is not None]
    if not limits:
        return None
    return max(min(limits + list(_left_of_groups())), 0)


def _available() -> int | None:
    """Bytes that the system could allocate without swapping."""
    for line in _lines("proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _left_of_process() -> int | None:
    """Bytes that `ulimit -v` leaves to this process; None: no limit."""
    if sys.platform == "win32":
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = next((line.split()[1] for line in _lines("proc/self/status") if "VmSize" in line), None)
    return None if limit == resource.RLIM_INFINITY or used is None else limit - int(used) * 1024


def _left_of_groups() -> Iterator[int]:
    """Bytes left by the limits of this process's control groups (version 2 or 1)."""
    for line in _lines("proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, root = ("memory.max", "memory.current"), "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            root = "sys/fs/cgroup/memory"
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        # a container sees its own group at the root, whatever its path outside is
        for folder in dict.fromkeys(("", *map(str, reversed(inside.parents)), str(inside))):
            limit, used = (_number(f"{root}/{folder}/{name}") for name in names)
            if limit is not None and used is not None:
                yield limit - used + _cache(f"{root}/{folder}/memory.stat")


def _number(path: str) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() and int(text) < 2**62 else None  # "max", or no limit in v1


def _cache(path: str) -> int:
    """Bytes of a group's usage that are page cache, which the kernel can reclaim."""
    for line in _lines(path):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _lines(path: str) -> list[str]:
    try:
        return (SYSTEM / path).read_text().splitlines()
    except OSError:
        return []
