"""The ledger of workers on Ray. `python -m tests.jobs.kill --on ray` kills real ones."""

from __future__ import annotations

from fastdiff.jobs.cluster import Ledger


def test_a_shard_belongs_to_one_worker_until_it_is_gone() -> None:
    ledger = Ledger()
    assert [ledger.take(0, 5), ledger.take(1, 5), ledger.take(0, 5)] == [True, False, True]
    ledger.release(1, 5)  # not its own
    assert not ledger.take(1, 5)
    ledger.drop(0)
    assert ledger.take(1, 5)
    ledger.release(1, 5)
    assert ledger.take(2, 5)
