"""The kernels' regimes, for the tests of `group_norm_silu` and `add_group_norm_silu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastdiff.kernels import backend
from fastdiff.kernels.triton import recording_launches
from fastdiff.kernels.tuning import override_config

CONFIG = {
    "SEGMENT": 64,
    "LEAST": 8192,
    "PER_THREAD": 32,
    "COLUMNS": 64,
    "TILE": 1024,
    "APPLY_TILE": 2048,
    "UNROLL": 2,
    "FILL": 1,
    "MERGE": 64,
    "PROGRAMS": 8,
    "CHUNK": 1,
    "FINALIZE": 1024,
    "L2_MIB": 1,
    "num_warps": 4,
}
"""Few programs, since each takes the interpreter milliseconds, but several chunks, steps and
tiles."""
REGIMES = ("small", "large")
KERNELS = {
    "small": {"_small_kernel", "_small_backward_kernel"},
    "large": {
        "_moments_kernel",
        "_apply_kernel",
        "_sums_backward_kernel",
        "_finalize_backward_kernel",
        "_apply_backward_kernel",
    },
}


@contextmanager
def regime(name: str, **changes: int) -> Iterator[None]:
    """Send every size through one regime, with CONFIG and the given changes."""
    most = {"MOST": 2**20 if name == "small" else 0}
    with ExitStack() as stack:
        for tunable in ("group_norm_silu", "group_norm_silu_backward"):
            stack.enter_context(override_config(tunable, CONFIG | most | changes))
        yield


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a call launches."""
    with backend("triton"), recording_launches() as launches:
        call()
    return [launch.kernel.__name__ for launch in launches]
