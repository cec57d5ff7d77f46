"""Workers on a Ray cluster: ``run_job(..., on="ray")``.

    driver   settles the job, starts the others, replaces workers that die or hang
    ledger   an actor: which worker makes which shard, in place of locks that other machines miss
    worker   an actor: one engine on one device

Shards go straight from the workers to the store. If the driver or the ledger dies, the job ends; it
resumes like any other, because only the names of finished shards count.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastdiff.checkpoint.open import open_device
from fastdiff.extras import import_extra
from fastdiff.jobs.processes import Crew, Task, work
from fastdiff.jobs.rows import Rows, open_rows
from fastdiff.jobs.settle import chosen_backend, session_of, settled
from fastdiff.jobs.spec import JobSpec
from fastdiff.jobs.store import Store, open_store
from fastdiff.jobs.worker import Counts

POLL = 0.5
"""Seconds between two looks at a worker's counts."""
GONE = 10.0
"""Seconds after which an actor that does not answer counts as gone."""
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class Ledger:
    """Which worker makes which shard."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}

    def take(self, worker: int, shard: int) -> bool:
        return self._held.setdefault(shard, worker) == worker

    def release(self, worker: int, shard: int) -> None:
        if self._held.get(shard) == worker:
            del self._held[shard]

    def drop(self, worker: int) -> None:
        """Forget what a worker held that is gone."""
        self._held = {shard: other for shard, other in self._held.items() if other != worker}


class LedgerClaims:
    """A worker's claims, kept in the ledger."""

    def __init__(self, ledger: Any, worker: int) -> None:
        self._ray = import_extra("ray", extra="ray")
        self._ledger, self._worker = ledger, worker

    def take(self, number: int) -> bool:
        return bool(self._ray.get(self._ledger.take.remote(self._worker, number)))

    def release(self, number: int) -> None:
        self._ray.get(self._ledger.release.remote(self._worker, number))

    def close(self) -> None:
        self._ray.get(self._ledger.drop.remote(self._worker))


class RemoteWorker:
    """A worker's actor; `run` and `counts` are called at the same time."""

    def __init__(self, line: str, ledger: Any, number: int) -> None:
        self._task, self._claims = json.loads(line), LedgerClaims(ledger, number)
        self._counts: Counts | None = None

    def run(self) -> dict[str, str] | None:
        """Make shards until there are no more. Returns the refusal, if it refuses."""
        return work(self._task, self._tell, self._claims)

    def _tell(self, counts: Counts) -> None:
        self._counts = counts

    def counts(self) -> dict[str, int] | None:
        """What it has done; None before the model is loaded."""
        return None if self._counts is None else asdict(self._counts)


class RayMember:
    """A worker as its crew sees it."""

    def __init__(self, ray: Any, actor: Any, ledger: Any, number: int) -> None:
        self.number = number
        self._ray, self._actor, self._ledger = ray, actor, ledger
        self._run = actor.run.remote()
        self._lacked_memory = False
        self._end: str | None = None
        self._gone = threading.Event()

    def lines(self) -> Iterator[str]:
        told: str | None = None
        try:
            while True:
                ended, _ = self._ray.wait([self._run], timeout=POLL)
                counts = self._ray.get(self._actor.counts.remote())
                if counts is not None and (line := json.dumps(counts)) != told:
                    told = line
                    yield line
                if ended:
                    break
            if (refusal := self._ray.get(self._run)) is not None:
                self._end = "refused the job"
                yield json.dumps(refusal)
        except self._ray.exceptions.OutOfMemoryError:
            self._lacked_memory, self._end = True, "was killed for lack of memory"
        except self._ray.exceptions.RayError as error:  # the actor, or its machine, is gone
            self._end = f"was lost ({type(error).__name__})"

    def kill(self) -> None:
        if self._gone.is_set():
            return
        self._gone.set()
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor, no_restart=True)
            self._wait()
            self._ray.get(self._ledger.drop.remote(self.number))

    def _wait(self) -> None:
        """Until the actor is gone, or does not answer."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            while True:
                self._ray.get(self._actor.counts.remote(), timeout=GONE)
                time.sleep(0.05)

    @property
    def end(self) -> str | None:
        return self._end

    @property
    def lacked_memory(self) -> bool:
        return self._lacked_memory


class Cluster:
    """The workers of a job on Ray."""

    def __init__(self, spec: JobSpec, workers: int) -> None:
        """
        Raises:
            ImportError: Ray is not installed.
            ValueError: the shards would be written where other machines cannot see them.
        """
        with_token()
        self._ray: Any = import_extra("ray", extra="ray")
        if (place := open_store(spec.out).place).startswith("memory://"):
            raise ValueError(
                f"{place} is seen by one process only; give a common folder or a store"
            )
        self.spec, self.workers = spec, workers
        self._numbers = itertools.count()
        self._began = False

    def __enter__(self) -> Cluster:
        if not self._ray.is_initialized():
            self._ray.init(
                address=os.environ.get("RAY_ADDRESS") or "local",
                include_dashboard=None if os.environ.get("RAY_ADDRESS") else False,
                log_to_driver=False,
                logging_level="ERROR",
            )
            self._began = True
        if self.spec.device == "auto":
            gpus = self._ray.cluster_resources().get("GPU", 0)
            self.spec = replace(self.spec, device="cuda" if gpus else "cpu")
        return self

    def __exit__(self, *_: object) -> None:
        if self._began:
            self._ray.shutdown()

    def settle(
        self, rows: Rows, store: Store, batch: int | None, threads: int | None
    ) -> tuple[dict[str, Any], int, int | None]:
        """As `settled`, on a machine of the cluster: the driver's may have no GPU."""
        on_cpu = self.spec.device == "cpu"
        remote = self._ray.remote(**self._resources(threads))(_settle)
        found = remote.remote(self.spec.recorded, batch, threads or 1 if on_cpu else None)
        try:
            mine, slots, count = self._ray.get(found)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return mine, slots, count

    def run(self, task: Task, *, timeout: float, tell: Callable[[Sequence[Counts]], None]) -> None:
        """Make all shards of a task."""
        ledger = self._ray.remote(num_cpus=0)(Ledger).remote()
        options = {**self._resources(task.threads), "max_concurrency": 2}
        actor = self._ray.remote(**options)(RemoteWorker)

        def start(line: str) -> RayMember:
            number = next(self._numbers)
            return RayMember(self._ray, actor.remote(line, ledger, number), ledger, number)

        task = replace(task, share_devices=False)
        Crew(task, start, timeout=timeout, tell=tell).run()

    def _resources(self, threads: int | None) -> dict[str, int]:
        if self.spec.device == "cpu":
            return {"num_cpus": threads or 1, "num_gpus": 0}
        return {"num_cpus": 1, "num_gpus": 1}


def _settle(
    recorded: dict[str, Any], batch: int | None, threads: int | None
) -> tuple[dict[str, Any], int, int | None]:
    spec = JobSpec.of_recorded(recorded)
    device, rows, store = open_device(spec.device), open_rows(spec.rows), open_store(spec.out)
    with chosen_backend(spec):
        return settled(spec, rows, session_of(spec, device), store, device, 1, batch, threads)


def with_token() -> None:
    """Turn token authentication on, and make a token for a cluster that is about to be started.

    Whoever reaches the ports of a cluster without it can run programs on it. Ray reads the mode
    when it is imported; where that was before, it turns it on itself for clusters that it starts.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    has_one = (
        any(name in os.environ for name in TOKENS) or (Path.home() / ".ray" / "auth_token").exists()
    )
    if not has_one and "RAY_ADDRESS" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
