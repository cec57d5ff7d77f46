"""Kill a job with SIGKILL at random moments until it is done, and compare it with one left alone.

    python -m tests.jobs.kill --images 500 --kills 50 --workers 1 2 3 --on local ray torchrun

For each way to run the job and each number of workers: start `fastdiff generate` (digits, on the
CPU), kill it at a random moment of its life, start it again, until `--kills` processes were killed.
Each kill takes the first process, one of its workers, or all of them. Whenever the job is done, its
shards must equal, byte for byte, those of a job that nobody killed; then it begins afresh.

On Ray the first process is the driver, and the workers are actors of a cluster that stays.
Prints a line per configuration and ends with 1 if a shard differs or is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.jobs.jobs import mixed_rows, write_rows

WAYS = ("local", "ray", "torchrun")
VICTIMS = ("first", "worker", "all")
PORT = 6391
"""Of Ray's cluster."""
UNFINISHED = 3600.0
"""Seconds after which a job that was not killed counts as hanging."""


@dataclass
class Trials:
    """What was done with one way to run the job."""

    on: str
    workers: int
    kills: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    """Jobs that came to their end."""
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        killed = ", ".join(f"{count} {victim}" for victim, count in sorted(self.kills.items()))
        found = "; ".join(self.findings) or "0 findings"
        return (
            f"{self.on}, {self.workers} workers: {self.kills.total()} kills ({killed}), "
            f"{self.jobs} jobs done, {found}, {self.seconds:.0f} s"
        )


def command(on: str, workers: int, rows: Path, out: Path, shard: int) -> list[str]:
    words = ["generate", str(rows), "--model", "digits", "--device", "cpu", "--threads", "1"]
    words += ["--shard-size", str(shard), "--format", "webdataset", "--out", str(out)]
    if on == "torchrun":
        launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        return [sys.executable, "-m", *launch, "-m", "fastdiff", *words]
    return [sys.executable, "-m", "fastdiff", *words, "--on", on, "--workers", str(workers)]


def content(out: Path) -> dict[str, bytes]:
    """The shards of a job and their errors."""
    return {path.name: path.read_bytes() for path in out.glob("0*") if path.is_file()}


def processes() -> Iterator[tuple[int, int, int, str]]:
    """(pid, parent, session, command line) of all processes that run."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            words = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            if fields[0] != "Z":
                yield int(path.name), int(fields[1]), int(fields[3]), words


def workers_of(on: str, first: int, cluster: int | None) -> list[int]:
    """The processes that make images for the job whose first process is given."""
    if on == "ray":
        return [
            pid
            for pid, _, session, words in processes()
            if session == cluster and words.startswith("ray::RemoteWorker")
        ]
    return [pid for pid, parent, _, _ in processes() if parent == first]


@contextlib.contextmanager
def ray_cluster(cpus: int) -> Iterator[tuple[dict[str, str], int]]:
    """A cluster of this machine with a token: what finds it, and the session of its processes."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": f"127.0.0.1:{PORT}"}
    words = ["start", "--head", "--block", "--port", str(PORT), "--num-cpus", str(cpus)]
    words += ["--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words],
        env={k: v for k, v in {**os.environ, **environment}.items() if k != "RAY_ADDRESS"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield environment, process.pid
    finally:
        process.terminate()  # it ends what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        end_session(process.pid)
        process.wait()


def end_session(session: int) -> None:
    """Kill what is left of the processes of a session that this program began."""
    for pid, _, other, _ in processes():
        if other == session:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def strike(
    victim: str, on: str, process: subprocess.Popen[bytes], cluster: int | None, rng: random.Random
) -> str:
    """Kill, and return whom."""
    workers = workers_of(on, process.pid, cluster)
    if victim == "worker" and not workers:
        victim = "first"
    targets = {"first": [process.pid], "worker": workers and [rng.choice(workers)]}
    for pid in targets.get(victim, [process.pid, *workers]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return victim


@dataclass
class Bench:
    """What all trials share."""

    folder: Path
    rows: Path
    shard: int
    expected: dict[str, bytes]
    rng: random.Random
    lasts: float
    """Seconds of a job that is left alone."""


def trials(bench: Bench, on: str, workers: int, kills: int) -> Trials:
    """Kill one way to run the job."""
    found, since = Trials(on, workers), time.monotonic()
    with contextlib.ExitStack() as stack:
        environment, cluster = dict(os.environ), None
        if on == "ray":
            more, cluster = stack.enter_context(ray_cluster(workers))
            environment |= more
        while found.kills.total() < kills and not found.findings:
            out = bench.folder / f"{on}-{workers}-{found.jobs}"
            words = command(on, workers, bench.rows, out, bench.shard)
            with (bench.folder / f"{out.name}.log").open("ab") as log:
                done = False
                while not done and not found.findings:
                    process = subprocess.Popen(
                        words, env=environment, start_new_session=True, stdout=log, stderr=log
                    )
                    done = attempt(bench, found, process, cluster, kills)
            found.jobs += 1
            if not found.findings and content(out) != bench.expected:
                found.findings.append(f"{out} differs")
            shutil.rmtree(out, ignore_errors=True)
    found.seconds = time.monotonic() - since
    return found


def attempt(
    bench: Bench,
    found: Trials,
    process: subprocess.Popen[bytes],
    cluster: int | None,
    kills: int,
) -> bool:
    """Let a process run until it ends or is killed. Returns whether the job is done."""
    left, since = found.kills.total() < kills, time.monotonic()
    try:
        wait = bench.rng.uniform(0, 1.2 * bench.lasts) if left else UNFINISHED
        code = process.wait(wait)
    except subprocess.TimeoutExpired:
        if not left:
            found.findings.append("a job hangs that nobody killed")
            return False
        victim = strike(bench.rng.choice(VICTIMS), found.on, process, cluster, bench.rng)
        found.kills[victim] += 1
        if victim == "worker":  # it is replaced, and the job may go on to its end
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(2 * bench.lasts) == 0
            process.kill()
            found.kills["first"] += 1
        return False
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if found.on != "ray":
            end_session(process.pid)  # torchrun's ranks outlive it
    if code == 0:
        bench.lasts = max(time.monotonic() - since, 1.0)
    elif found.on != "torchrun":  # which ends with 1 when one of its ranks was killed
        found.findings.append(f"a job ended with {code}, see its log")
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.kill")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50, help="per configuration")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--on", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shard-size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng, wrong = random.Random(options.seed), False
    with tempfile.TemporaryDirectory(prefix="fastdiff-kill-") as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl", mixed_rows(options.images, steps=options.steps))
        alone = folder / "alone"
        since = time.monotonic()
        subprocess.run(
            command("local", 1, rows, alone, options.shard_size),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lasts, expected = time.monotonic() - since, content(alone)
        failed = sum(len(path.read_text().splitlines()) for path in alone.glob("*.errors.jsonl"))
        print(f"alone: {len(expected)} shards, {failed} errors, {lasts:.0f} s", flush=True)
        bench = Bench(folder, rows, options.shard_size, expected, rng, lasts)
        for on in options.on:
            for workers in options.workers:
                found = trials(bench, on, workers, options.kills)
                wrong = wrong or bool(found.findings)
                print(found.line(), flush=True)
                if found.findings:
                    for log in folder.glob(f"{on}-{workers}-*.log"):
                        sys.stderr.write(log.read_text(errors="replace")[-4000:])
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
