"""Kill a job with SIGKILL at random moments until it is done, and compare it with one left alone.

    python -m tests.jobs.kill --images 500 --kills 50 --log kills.jsonl

A trial starts `fastdiff generate` (digits, on the CPU) in one of the ways (`--on local ray
torchrun`) with one of the numbers of workers (`--workers 1 2 3`), kills it at a random moment and
starts it again, until the job is done. Each kill takes the first process, one of its workers, or
all of them; on Ray the first process is the driver, and the workers are actors of a cluster that
stays. The shards of a job that is done must equal, byte for byte, those of a job that ran alone.

The `--kills` are shared equally among the ways and numbers of workers. Each trial is a line of
`--log`, which is read when the program starts, so that an interrupted run goes on where it stopped.
Ends with 1 if a shard differs or is missing, or a job hangs or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.jobs.jobs import mixed_rows, write_rows

WAYS = ("local", "ray", "torchrun")
VICTIMS = ("first", "worker", "all")
PORT = 6391
"""Of Ray's cluster."""
AT_WORK = 0.7
"""Share of the kills that come after a shard; starting may take longer than the work."""
UNFINISHED = 3600.0
"""Seconds after which a job that was not killed counts as hanging."""


@dataclass
class Trial:
    """A job from its beginning to its end, and what was done to it."""

    on: str
    workers: int
    images: int
    kills: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        return json.dumps({**vars(self), "kills": dict(self.kills)})

    @classmethod
    def of(cls, line: str) -> Trial:
        data = json.loads(line)
        return cls(**{**data, "kills": Counter(data["kills"])})


def summary(on: str, workers: int, trials: Sequence[Trial]) -> str:
    """A line about all trials of one configuration."""
    kills = sum((trial.kills for trial in trials), Counter[str]())
    killed = ", ".join(f"{count} {victim}" for victim, count in sorted(kills.items()))
    findings = [finding for trial in trials for finding in trial.findings]
    return (
        f"{on}, {workers} workers: {kills.total()} kills ({killed}), {len(trials)} jobs, "
        f"{'; '.join(findings) or '0 findings'}, {sum(trial.seconds for trial in trials):.0f} s"
    )


def command(
    on: str, workers: int, rows: Path, out: Path, shard: int, model: str = "digits"
) -> list[str]:
    words = ["generate", str(rows), "--model", model, "--device", "cpu", "--threads", "1"]
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
    environment |= {"RAY_worker_niceness": "0"}  # else its workers stand still on a busy machine
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
    images: int
    shard: int
    expected: dict[str, bytes]
    rng: random.Random
    lasts: float
    """Seconds of a job that is left alone."""


def run_trial(bench: Bench, on: str, workers: int, kills: int) -> Trial:
    """Run one job to its end, with at most this many kills."""
    trial, since = Trial(on, workers, bench.images), time.monotonic()
    out, log = bench.folder / "out", bench.folder / "log"
    log.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        environment, cluster = dict(os.environ), None
        if on == "ray":
            more, cluster = stack.enter_context(ray_cluster(workers))
            environment |= more
        words, done = command(on, workers, bench.rows, out, bench.shard), False
        stream = stack.enter_context(log.open("ab"))
        while not done and not trial.findings:
            process = subprocess.Popen(
                words, env=environment, start_new_session=True, stdout=stream, stderr=stream
            )
            done = attempt(bench, trial, process, cluster, kills)
    if done and content(out) != bench.expected:
        trial.findings.append("the shards differ")
    if trial.findings:
        sys.stderr.write(log.read_text(errors="replace")[-4000:])
    shutil.rmtree(out, ignore_errors=True)
    trial.seconds = round(time.monotonic() - since, 1)
    return trial


def attempt(
    bench: Bench,
    trial: Trial,
    process: subprocess.Popen[bytes],
    cluster: int | None,
    kills: int,
) -> bool:
    """Let a process run until it ends or is killed. Returns whether the job is done."""
    left, most = trial.kills.total() < kills, bench.lasts
    if left and bench.rng.random() < AT_WORK:
        until_a_shard_is_finished(process, bench.folder / "out")
        most /= 5  # several kills per job
    try:
        code = process.wait(bench.rng.uniform(0, most) if left else UNFINISHED)
    except subprocess.TimeoutExpired:
        if not left:
            trial.findings.append("a job hangs that nobody killed")
            return False
        victim = strike(bench.rng.choice(VICTIMS), trial.on, process, cluster, bench.rng)
        trial.kills[victim] += 1
        if victim == "worker":  # it is replaced, and the job may go on to its end
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(2 * bench.lasts) == 0
            process.kill()
            trial.kills["first"] += 1
        return False
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if trial.on != "ray":
            end_session(process.pid)  # torchrun's ranks outlive it
    if code and trial.on != "torchrun":  # which ends with 1 when one of its ranks was killed
        trial.findings.append(f"a job ended with {code}")
    return code == 0


def until_a_shard_is_finished(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until there is one more than now, or the process has ended."""
    before, until = len(content(out)), time.monotonic() + UNFINISHED
    while len(content(out)) == before and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)


def prepared(folder: Path, images: int, steps: Sequence[int], shard: int, seed: int) -> Bench:
    """Make the job once, without killing it."""
    rows = write_rows(folder / "rows.jsonl", mixed_rows(images, steps=steps))
    alone, since = folder / "alone", time.monotonic()
    words = command("local", 1, rows, alone, shard)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    lasts, expected = time.monotonic() - since, content(alone)
    failed = sum(len(path.read_text().splitlines()) for path in alone.glob("*.errors.jsonl"))
    print(f"alone: {len(expected)} shards, {failed} errors, {lasts:.0f} s", flush=True)
    return Bench(folder, rows, images, shard, expected, random.Random(seed), lasts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.kill")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50, help="of all configurations together")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--on", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shard-size", type=int, default=20)
    parser.add_argument("--log", type=Path, default=Path("kills.jsonl"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    lines = options.log.read_text().splitlines() if options.log.exists() else []
    trials = [trial for trial in map(Trial.of, lines) if trial.images == options.images]
    ways = [(on, workers) for workers in options.workers for on in options.on]
    with tempfile.TemporaryDirectory(prefix="fastdiff-kill-") as name:
        bench = prepared(
            Path(name), options.images, options.steps, options.shard_size, seed=len(trials)
        )
        for number, (on, workers) in enumerate(ways):
            goal = options.kills // len(ways) + (number < options.kills % len(ways))
            mine = [trial for trial in trials if (trial.on, trial.workers) == (on, workers)]
            while (left := goal - sum(trial.kills.total() for trial in mine)) > 0:
                mine.append(run_trial(bench, on, workers, left))
                with options.log.open("a") as log:
                    log.write(mine[-1].line() + "\n")
                print(mine[-1].line(), flush=True)
            trials = [trial for trial in trials if trial not in mine] + mine
            print(summary(on, workers, mine), flush=True)
    return int(any(trial.findings for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
