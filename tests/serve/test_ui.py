"""The page of `fastdiff ui`, in headless Chromium."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import fastdiff
from fastdiff.cli.ui import Ui, read_users
from fastdiff.generate.recipe import read
from fastdiff.images import RECIPE_KEY, to_pil

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("gradio", reason="needs fastdiff[ui]")
chromium = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium is None, reason="chromium is not installed"),
]
DONE = "document.querySelector('#status').innerText.includes('steps/s')"
WAIT = 60_000
STEPS = 8


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of the command's page for the digits."""
    command = [sys.executable, "-m", "fastdiff", "ui", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as p:
        assert p.stdout is not None
        said = []
        for line in p.stdout:
            said.append(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise AssertionError("".join(said))
        yield found[0]
        p.terminate()
        assert p.wait(30) == 0, p.stdout.read()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield made
        made.close()


@pytest.fixture
def visit(url: str, browser: Any) -> Iterator[Any]:
    """Opens the page as another visitor each time; foreign requests fail the test."""
    contexts, foreign = [], list[str]()

    def opened() -> Any:
        context = browser.new_context(viewport={"width": 1250, "height": 1500})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: foreign.append(r.url) if not local(r.url, url) else None)
        page.goto(url)
        page.wait_for_selector("#start")
        field(page, "steps", STEPS)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not foreign


def local(address: str, url: str) -> bool:
    return address.startswith((url.rstrip("/"), "data:", "blob:"))


def field(page: Any, name: str, value: object) -> None:
    """Type into a field of the form."""
    box = page.locator(f"#{name} input, #{name} textarea").first
    box.fill(str(value))
    box.press("Tab")


def choose(page: Any, label: str) -> None:
    """Choose a class."""
    page.click("#prompt input")
    page.get_by_role("option", name=label, exact=True).click()


def generate(page: Any) -> Image.Image:
    page.click("#start")
    page.wait_for_function(DONE, timeout=WAIT)
    return shown(page)


def shown(page: Any) -> Image.Image:
    """The picture on the page, as its file."""
    page.wait_for_selector("#image img")
    source = page.get_attribute("#image img", "src")
    answer = page.request.get(source)
    assert answer.ok
    return Image.open(io.BytesIO(answer.body()))


def expected(label: int, seed: int, steps: int = STEPS) -> Image.Image:
    """The image that the model makes alone."""
    [made] = fastdiff.load("digits").generate(classes=label, seeds=seed, steps=steps)
    return to_pil(made.image)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def test_a_class_is_chosen_and_its_picture_appears(visit: Any) -> None:
    page = visit()
    choose(page, "7")
    field(page, "seed", 12)
    made = generate(page)
    assert same(made, expected(7, 12))
    recipe = read(json.loads(made.info[RECIPE_KEY]))
    assert (recipe.job.seed, recipe.job.label) == (12, 7)
    status = page.inner_text("#status")
    assert re.fullmatch(
        rf"32 x 32, {STEPS} steps in [\d.]+ s \([\d.]+ steps/s\), backend [a-z, ]+, seed 12", status
    )
    assert page.locator("#history img").count() == 1


def test_two_visitors_at_once_do_not_mix(visit: Any) -> None:
    pages = [visit(), visit()]
    for page, label in zip(pages, ("3", "8"), strict=True):
        choose(page, label)
        field(page, "seed", 5)
        field(page, "steps", 60)
    for page in pages:
        page.click("#start")
    for page in pages:
        page.wait_for_function(DONE, timeout=WAIT)
    for page, label in zip(pages, (3, 8), strict=True):
        assert same(shown(page), expected(label, 5, steps=60))
        assert page.locator("#history img").count() == 1


def test_settings_come_back_from_the_history(visit: Any) -> None:
    page = visit()
    field(page, "seed", 4)
    generate(page)
    field(page, "seed", "")
    page.click("#again")
    page.wait_for_function("document.querySelector('#seed textarea, #seed input').value == '4'")


def test_an_error_can_be_read(visit: Any) -> None:
    page = visit()
    field(page, "seed", "many")
    page.click("#start")
    page.wait_for_selector("text=seed must be a whole number, or empty, got 'many'")
    field(page, "seed", 1)
    generate(page)  # and the page goes on


def test_the_brushed_part_alone_is_repainted(visit: Any, tmp_path: Path) -> None:
    """The rest of the picture keeps its pixels."""
    picture = Image.new("RGB", (32, 32), "black")
    ImageDraw.Draw(picture).rectangle((4, 4, 27, 9), fill="white")
    picture.save(tmp_path / "given.png")
    page = visit()
    page.click("#canvas button")
    page.get_by_text("repaint what is brushed").click()
    page.click("#start")
    page.wait_for_selector("text=the canvas is empty; open a picture or draw one")
    page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "given.png")
    page.wait_for_timeout(1500)
    page.click("#start")
    page.wait_for_selector("text=nothing is brushed; brush over the part of the picture")
    brush(page)
    made = []
    for seed in (1, 2):
        field(page, "seed", seed)
        page.click("#start")
        page.wait_for_function(f"document.querySelector('#status').innerText.endsWith('{seed}')")
        made.append(pixels(shown(page)))
    before = pixels(picture)
    assert torch.equal(made[0][:16], made[1][:16])
    assert (made[0][:16] - before[:16]).abs().mean() < 12  # the canvas smooths what it enlarges
    assert (made[0][24:] - made[1][24:]).abs().max() > 24


def pixels(picture: Image.Image) -> torch.Tensor:
    grey = bytearray(picture.convert("L").tobytes())
    return torch.frombuffer(grey, dtype=torch.uint8).reshape(32, 32).float()


def brush(page: Any) -> None:
    """A stroke through the lower part of the picture."""
    page.click("#editor button[aria-label='Brush']")
    box = page.locator("#editor canvas").first.bounding_box()
    y = box["y"] + 0.68 * box["height"]
    page.mouse.move(box["x"] + 0.35 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.65 * box["width"], y, steps=10)
    page.mouse.up()
    page.wait_for_timeout(500)


def test_only_this_machine_without_passwords(tmp_path: Path) -> None:
    from fastdiff.cli.ui import run

    with pytest.raises(
        ValueError, match=r"--host 0\.0\.0\.0 lets other machines connect; set --pa"
    ):
        run(Ui(host="0.0.0.0"))
    users = tmp_path / "users.txt"
    for text, message in (
        ("", "contains no user"),
        ("me", "line 1 of .* must be NAME:PASSWORD"),
        ("me:short", "the password in line 1 of .* must have at least 12 characters"),
    ):
        users.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_users(users)
    users.write_text("me:correct horse: battery\n")
    assert read_users(users) == [("me", "correct horse: battery")]
