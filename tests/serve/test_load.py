"""40 clients of the campaign in load.py, with a queue that overflows."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.serve.load import campaign

GROWTH = 150 * 2**20
"""Most bytes that the server's memory may grow by: images in slots, answers on their way, and what
the allocator keeps. Bodies of 40 clients that were all kept would be more."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the server's memory from /proc")
def test_many_clients_lose_nothing() -> None:
    report = asyncio.run(campaign(40, seconds=None, each=2, queue=16))
    assert not report.faults, "\n".join(report.faults)
    assert report.exit_code == 0
    assert report.images > 15
    assert report.drained > 0
    assert report.hung_up > 3
    assert report.statuses[429] > 0
    assert report.statuses[413] > 0
    assert report.statuses[400] > 0
    assert max(report.memory) - report.memory[0] < GROWTH
