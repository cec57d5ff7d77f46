"""The page "From pip install to a server": its commands work, and its table is whole."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

import fastdiff
from fastdiff.serve.schema import UNSUPPORTED, Edit
from tests.serve.client import Running, as_pixels, file_of, pixels, running, service_of
from tests.support.imports import ROOT

PAGE = (ROOT / "docs/guides/serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(service_of(fastdiff.load("digits"))) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page speaks of."""
    shade = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    (tmp_path / "digit.png").write_bytes(file_of(shade))
    (tmp_path / "mask.png").write_bytes(file_of((shade > 99).astype(np.uint8) * 255))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shorter(text: str) -> str:
    return re.sub(r'(num_inference_steps"?[:=] ?)20', r"\g<1>2", text)


def test_every_field_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE, re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == {field.name for field in fields(Edit)}
    (refused,) = re.findall(r"^OpenAI's (.*) are refused", PAGE, re.M)
    assert set(re.findall(r"`(\w+)`", refused)) == set(UNSUPPORTED)


def test_the_first_commands_are_of_this_package() -> None:
    install, serve, *_ = blocks("sh")
    assert "'.[serve]'" in install
    assert "\nserve = [" in (ROOT / "pyproject.toml").read_text()
    assert serve.startswith("fastdiff serve --model digits --port 8000")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
@pytest.mark.parametrize("words", ["--port 8000", "--workers 2", "--host 0.0.0.0"])
def test_the_commands_serve_until_they_are_ended(words: str, tmp_path: Path) -> None:
    (line,) = [line for block in blocks("sh") for line in block.splitlines() if words in line]
    command = shlex.split(line, comments=True)
    assert command[:2] == ["fastdiff", "serve"]
    port = command.index("--port") if "--port" in command else None
    command = [*command[:port], *command[port + 2 :]] if port else command
    command = ["127.0.0.1" if word == "0.0.0.0" else word for word in command]
    (tmp_path / "keys.txt").write_text("a" * 20 + " priority=normal images=8\n")
    with subprocess.Popen(
        [sys.executable, "-m", *command, "--port", "0"], cwd=tmp_path, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            address = re.findall(r"http://[^/]+:(\d+)/v1", process.stdout.readline())[0]
            for _ in range(600):
                with (
                    contextlib.suppress(OSError),
                    urlopen(f"http://127.0.0.1:{address}/health") as answer,
                ):
                    health = json.load(answer)
                    break
                time.sleep(0.1)
            assert health["status"] == "ok"
            assert len(health.get("processes", [])) == (2 if "--workers" in command else 0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Running, folder: Path) -> None:
    commands = [block for block in blocks("sh") if block.startswith("curl")]
    assert len(commands) == 3
    for command in commands:
        text = shorter(command).replace(ADDRESS, server.url)
        subprocess.run(["bash", "-ec", text], check=True, timeout=300)
    answer = json.loads((folder / "answer.json").read_text())
    alone = fastdiff.load("digits").generate(classes=3, seeds=[0, 1], steps=2)
    for got, expected in zip(answer["data"], alone, strict=True):
        assert np.array_equal(pixels(got["b64_json"]), as_pixels(expected.image))
    events = re.findall(r"^event: (.*)$", (folder / "events.txt").read_text(), re.M)
    assert events[-1] == "image_generation.completed"
    edited = json.loads((folder / "edited.json").read_text())
    assert pixels(edited["data"][0]["b64_json"]).shape == (32, 32)


def test_the_client(server: Running, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("py")
    code = shorter(code).replace(ADDRESS, server.url).replace("stream=True,", "stream=True, "
        "extra_body={'num_inference_steps': 4},").replace('{"seed": 1}', '{"seed": 1, '
        '"num_inference_steps": 2}')  # fmt: skip
    names: dict[str, Any] = {}
    exec(compile(code, "serving.md", "exec"), names)
    names["client"].close()
    printed = capsys.readouterr().out
    assert re.findall(r"^image_generation\.(\w+) \d+$", printed, re.M) == [
        *["partial_image"] * 2, "completed",
    ]  # fmt: skip
    alone = fastdiff.load("digits").generate(classes=3, seeds=[0, 1], steps=2)
    for index, expected in enumerate(alone):
        data = base64.b64encode((folder / f"{index}.png").read_bytes()).decode()
        assert np.array_equal(pixels(data), as_pixels(expected.image))
