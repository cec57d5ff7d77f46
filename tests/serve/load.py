"""Many clients at once, well-behaved and not: nothing is lost, mixed or left over.

``python -m tests.serve.load --clients 200 --seconds 60`` starts `fastdiff serve` in a process of
its own, sends it requests over loopback, ends it with SIGTERM, and prints what happened.
The clients hang up, read slowly, stream, upload, cancel, and send bodies that are too large or
broken. Every image is compared with the one that `model.generate` makes alone. With `--workers 2
--kills 3` there are engine processes, of which one is killed three times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastdiff
from tests.serve.client import as_pixels, file_of, form_of, pixels
from tests.support.imports import ROOT

GENERATIONS = "/v1/images/generations"
SHORT, LONG = 2, 10
"""Steps of short and of long requests."""


@dataclass(frozen=True)
class Setting:
    """An image that clients ask for; of a small set, so that each is made alone only once."""

    label: int
    seed: int
    steps: int
    sampler: str
    scale: float
    cache: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        body = {
            "prompt": str(self.label),
            "seed": self.seed,
            "num_inference_steps": self.steps,
            "sampler": self.sampler,
            "guidance_scale": self.scale,
        }
        return body if self.cache is None else {**body, "cache": self.cache}


SETTINGS = [
    Setting(label, label, steps, sampler, scale, cache)
    for steps in (SHORT, LONG)
    for label, sampler, scale, cache in (
        (3, "euler", 1.0, None),
        (8, "dpmpp-2m", 2.5, None),
        (5, "heun", 1.5, None),
        (6, "ddim", 2.0, 2),
    )
]


@dataclass
class Report:
    """What happened."""

    statuses: Counter[int] = field(default_factory=Counter)
    images: int = 0
    hung_up: int = 0
    drained: int = 0
    """Images of requests that were under way at SIGTERM."""
    killed: int = 0
    """Engine processes that were killed."""
    refused: int = 0
    """Connections after the server had ended."""
    faults: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"short": [], "long": []})
    memory: list[int] = field(default_factory=list)
    """Bytes that the server holds, sampled."""
    exit_code: int | None = None

    def lines(self) -> list[str]:
        rows = [f"answers {dict(sorted(self.statuses.items()))}, {self.images} images compared"]
        rows.append(
            f"{self.hung_up} hung up; {self.drained} drained, {self.refused} came after the end; "
            f"{self.killed} processes killed"
        )
        for name, values in self.seconds.items():
            if values:
                middle, late = np.quantile(values, (0.5, 0.95))
                rows.append(f"{name}: {len(values)}, median {middle:.2f} s, 95% {late:.2f} s")
        if self.memory:
            begin, most = self.memory[0] / 2**20, max(self.memory) / 2**20
            rows.append(f"memory {begin:.0f} MiB at first, {most:.0f} MiB at most")
        return [
            *rows,
            f"exit code {self.exit_code}",
            f"{len(self.faults)} faults",
            *self.faults[:20],
        ]


class Load:
    """The clients of one campaign."""

    def __init__(self, port: int, seed: int, *, kills: int = 0) -> None:
        """kills: number of engine processes to kill; an image may lose two of them."""
        model = fastdiff.load("digits")
        self.kills = kills
        self.port, self.draw, self.report = port, random.Random(seed), Report()
        self.draining = False
        self.expected = {
            each: as_pixels(
                model.generate(
                    classes=each.label,
                    seeds=[each.seed],
                    steps=each.steps,
                    sampler=each.sampler,
                    guidance_scale=each.scale,
                    cache=each.cache,
                )[0].image
            )
            for each in SETTINGS
        }
        self.picture = self.expected[SETTINGS[0]]
        white = np.zeros((32, 32), np.uint8)
        white[:16] = 255
        self.mask = white
        from PIL import Image

        self.edited = as_pixels(
            model.generate(
                classes=5, image=Image.fromarray(self.picture), mask=Image.fromarray(white),
                seeds=[9], steps=3,
            )[0].image
        )  # fmt: skip

    async def request(
        self, path: str, body: bytes, headers: dict[str, str], *, slow: bool = False
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request and read the whole answer."""
        reader, writer = await self.send(path, body, headers, limit=1024 if slow else 2**16)
        try:
            status, found = await head(reader)
            parts = list[bytes]()
            while part := await reader.read(300 if slow else 2**16):
                parts.append(part)
                if slow:
                    await asyncio.sleep(0.01)
            return status, found, b"".join(parts)
        finally:
            writer.close()

    async def read(self, path: str) -> str:
        """The answer to a GET."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        start = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        writer.write(start.encode())
        text = (await reader.read()).decode()
        writer.close()
        return text

    async def processes(self) -> list[dict[str, Any]]:
        """The engine processes of the server."""
        body = (await self.read("/health")).partition("\r\n\r\n")[2]
        found: list[dict[str, Any]] = json.loads(body).get("processes", [])
        return found

    async def kill(self, seconds: float) -> None:
        """Kill engine processes that have images, at equal distances."""
        for _ in range(self.kills):
            await asyncio.sleep(seconds / (self.kills + 1))
            busy = [each["pid"] for each in await self.processes() if each["images"]]
            if busy:
                os.kill(self.draw.choice(busy), signal.SIGKILL)
                self.report.killed += 1

    async def open_requests(self) -> float:
        """The number of requests that the server has taken and not answered."""
        text = await self.read("/metrics")
        return float(re.findall(r"^fastdiff_requests_open (\S+)$", text, re.M)[0])

    async def send(
        self, path: str, body: bytes, headers: dict[str, str], *, limit: int = 2**16
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        length = {"content-length": str(len(body)), **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in length.items())
        start = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{lines}\r\n"
        writer.write(start.encode() + body)
        await writer.drain()
        return reader, writer

    def check(self, got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], what: str) -> None:
        self.report.images += 1
        if not np.array_equal(got, expected):
            self.report.faults.append(f"another image: {what}")

    def expect(self, status: int, allowed: set[int], what: str) -> bool:
        """Count an answer; whether it is the success that was asked for."""
        self.report.statuses[status] += 1
        unavailable = {503} if self.draining or self.kills else set()
        if status not in allowed | {429} | unavailable:
            self.report.faults.append(f"status {status}: {what}")
        return status == 200

    async def plain(self, setting: Setting, *, slow: bool = False) -> None:
        """An image; if the queue is full, once more after the time that the server names."""
        begin = time.monotonic()
        body = json.dumps(setting.body).encode()
        for _ in range(2):
            status, headers, text = await self.request(GENERATIONS, body, JSON, slow=slow)
            if self.expect(status, {200}, "plain"):
                self.check(pixels(json.loads(text)["data"][0]["b64_json"]), self.expected[setting],
                           str(setting))  # fmt: skip
                name = "short" if setting.steps == SHORT else "long"
                self.report.seconds[name].append(time.monotonic() - begin)
                return
            if status == 429:
                assert int(headers["retry-after"]) >= 1
                await asyncio.sleep(self.draw.uniform(0.1, 1))

    async def several(self, setting: Setting) -> None:
        """Three images of one request, the first of which is known."""
        body = json.dumps({**setting.body, "n": 3}).encode()
        status, _, text = await self.request(GENERATIONS, body, JSON)
        if self.expect(status, {200}, "several"):
            data = json.loads(text)["data"]
            assert [each["seed"] for each in data] == [setting.seed + i for i in range(3)]
            self.check(pixels(data[0]["b64_json"]), self.expected[setting], f"first of {setting}")

    async def stream(self, setting: Setting) -> None:
        body = json.dumps({**setting.body, "stream": True, "partial_images": 2}).encode()
        status, _, text = await self.request(GENERATIONS, body, {**JSON})
        if not self.expect(status, {200}, "stream"):
            return
        kinds = re.findall(rb"^event: (\S+)", text, re.M)
        data = [json.loads(line) for line in re.findall(rb"^data: (.*)$", text, re.M)]
        if self.kills and kinds[-1:] == [b"error"]:
            code = data[-1]["error"]["code"]
            self.expect(503 if code == "unavailable" else 500, set(), f"stream: {code}")
            return
        if not kinds or kinds[-1] != b"image_generation.completed":
            self.report.faults.append(f"a stream without its end: {kinds}")
            return
        self.check(pixels(data[-1]["b64_json"]), self.expected[setting], f"stream of {setting}")

    async def edit(self, _: Setting) -> None:
        body, headers = form_of(
            {"image": file_of(self.picture), "mask": file_of(self.mask), "prompt": "5",
             "seed": "9", "num_inference_steps": "3"}
        )  # fmt: skip
        status, _headers, text = await self.request("/v1/images/edits", body, headers)
        if self.expect(status, {200}, "edit"):
            self.check(pixels(json.loads(text)["data"][0]["b64_json"]), self.edited, "edit")

    async def hang_up(self, setting: Setting) -> None:
        """Leave after a part of the request, or before the answer."""
        whole = self.draw.random() < 0.7
        body = json.dumps({**setting.body, "n": 2, "num_inference_steps": 40}).encode()
        length = {"content-length": str(len(body))}
        _, writer = await self.send(GENERATIONS, body if whole else body[:9], {**JSON, **length})
        await asyncio.sleep(self.draw.uniform(0, 0.4))
        if self.draw.random() < 0.5:
            writer.transport.abort()
        writer.close()
        self.report.hung_up += 1

    async def too_large(self, _: Setting) -> None:
        status, _headers, _body = await self.request(
            GENERATIONS, b"{" * 2000, {**JSON, "content-length": str(10**9)}
        )
        self.expect(status, {413}, "too large")

    async def broken(self, setting: Setting) -> None:
        body = json.dumps(setting.body).encode()[: self.draw.randrange(60)]
        status, *_ = await self.request(GENERATIONS, body, JSON)
        self.expect(status, {400}, "broken")

    async def client(self, more: Callable[[], bool]) -> None:
        """One request after the other. While the server ends, connections may be refused, but a
        request that was begun is answered."""
        kinds: list[tuple[int, Callable[[Setting], Coroutine[Any, Any, None]]]] = [
            (8, self.plain), (1, self.slow), (2, self.several), (2, self.stream), (1, self.edit),
            (3, self.hang_up), (1, self.too_large), (1, self.broken),
        ]  # fmt: skip
        weights = [weight for weight, _ in kinds]
        while more():
            act = self.draw.choices([kind for _, kind in kinds], weights)[0]
            try:
                await asyncio.wait_for(act(self.draw.choice(SETTINGS)), 300)
            except ConnectionRefusedError:
                if not self.draining:
                    self.report.faults.append("refused")
                self.report.refused += 1
                return
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                self.report.faults.append(f"lost: {act.__name__}: {type(error).__name__} {error}")

    async def slow(self, setting: Setting) -> None:
        await self.plain(setting, slow=True)

    async def last(self) -> None:
        """A request that was sent before SIGTERM; it is answered, whatever comes after."""
        setting = self.draw.choice(SETTINGS)
        status, _, text = await self.request(GENERATIONS, json.dumps(setting.body).encode(), JSON)
        self.report.statuses[status] += 1
        if status == 200:
            got = pixels(json.loads(text)["data"][0]["b64_json"])
            self.check(got, self.expected[setting], f"drained {setting}")
            self.report.drained += 1
        elif status != 429:
            self.report.faults.append(f"status {status}: a request before the end")


JSON = {"content-type": "application/json"}


async def head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """The status and the headers of an answer."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value for name, value in pairs}


def resident(pid: int) -> int:
    """Bytes that a process holds in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def campaign(
    clients: int,
    *,
    seconds: float | None,
    each: int | None,
    queue: int,
    seed: int = 0,
    workers: int = 1,
    kills: int = 0,
) -> Report:
    """Run clients for a time, or for a number of requests each, then end the server by SIGTERM
    while a last request of each is under way."""
    words = ("serve", "--port", "0", "--limits.queue", str(queue), "--workers", str(workers))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fastdiff", *words, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.ensure_future(process.stderr.read())
    line = (await asyncio.wait_for(process.stdout.readline(), 120)).decode()
    load = Load(int(re.findall(r":(\d+)/", line)[0]), seed, kills=kills)
    report, begin = load.report, 0.0

    def more_of() -> Callable[[], bool]:
        left = each or 0

        def more() -> bool:
            nonlocal left
            left -= 1
            return time.monotonic() < begin + seconds if seconds is not None else left >= 0

        return more

    async def watch() -> None:
        while True:
            report.memory.append(resident(process.pid))
            await asyncio.sleep(0.2)

    for _ in range(600):  # the socket listens before the processes have loaded the model
        with contextlib.suppress(ConnectionRefusedError):
            await load.read("/health")
            break
        await asyncio.sleep(0.1)
    await load.plain(SETTINGS[0])  # memory is measured after the first image
    begin = time.monotonic()
    watching = asyncio.ensure_future(watch())
    killing = asyncio.ensure_future(load.kill(seconds or 10))
    try:
        await asyncio.gather(*(load.client(more_of()) for _ in range(clients)))
        last = [asyncio.ensure_future(load.last()) for _ in range(min(clients, queue))]
        while await load.open_requests() + sum(task.done() for task in last) < len(last):
            await asyncio.sleep(0.05)  # until the server has taken them
        load.draining = True
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        await load.client(iter([True, True, False]).__next__)  # refused, and told so
        await asyncio.gather(*last)
        report.exit_code = await asyncio.wait_for(process.wait(), 60)
    finally:
        watching.cancel()
        killing.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()
        text = (await errors).decode()
        if "Traceback" in text:
            report.faults.append(text[-3000:])
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--queue", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    made = asyncio.run(
        campaign(
            given.clients,
            seconds=given.seconds,
            each=None,
            queue=given.queue,
            workers=given.workers,
            kills=given.kills,
        )
    )
    print("\n".join(made.lines()))
    sys.exit(bool(made.faults or made.exit_code))
