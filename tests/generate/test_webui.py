"""The text that web UIs store in pictures: read as they write it, and written as they read it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from fastdiff.cli import main
from fastdiff.generate.job import SampleSettings, TextJob, TextSettings
from fastdiff.generate.webui import from_parameters, to_parameters
from fastdiff.images import read_parameters, read_recipe
from fastdiff.models.prompts import parse_prompt
from tests.support.diffusers_models import save_folder

PLAIN = """masterpiece, (red:1.2) cat BREAK
blue sky
Negative prompt: lowres, [bad hands]
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, Version: v1.6.0"""
QUOTED = """a cat
Steps: 24, Sampler: Euler a, Schedule type: Automatic, CFG scale: 5.5, Seed: 18446744073709551615, \
Size: 640x512, Model: "my, model", Denoising strength: 0.55, ENSD: 31337, Hires upscale: 2, \
Hires upscaler: Latent, Lora hashes: "one: 1a2b, two: 3c4d", \
TI hashes: "easynegative: c74b4e810b03", Version: v1.9.4"""
OTHER = (
    "a dog\nSteps: 4, Sampler: LCM, Schedule type: SGM Uniform, CFG scale: 1, Seed: 1, Size: 8x8"
)
VARIATION = (
    "a\nSteps: 9, Sampler: DDIM, CFG scale: 3, Seed: 2, Size: 64x64, Variation seed: 7, "
    "Variation seed strength: 0.25"
)


def test_a_real_text_is_read() -> None:
    found = from_parameters(PLAIN)
    assert found.left_out == ()
    assert found.job == TextJob(
        prompt="masterpiece, (red:1.2) cat BREAK\nblue sky",
        seed=965400086,
        width=512,
        height=768,
        text=TextSettings(negative="lowres, [bad hands]", clip_skip=1),
        settings=SampleSettings(sampler="dpmpp-2m", spacing="karras", steps=20, guidance_scale=7.0),
    )


def test_what_means_something_else_is_named() -> None:
    found = from_parameters(QUOTED)
    assert found.job.settings.sampler == "euler-ancestral"
    assert found.job.seed == 2**64 - 1
    assert (found.job.settings.guidance_scale, found.job.width, found.job.height) == (5.5, 640, 512)
    assert found.job.text.negative is None
    assert found.left_out == (
        "Denoising strength: 0.55",
        "ENSD: 31337",
        "Hires upscale: 2",
        "Hires upscaler: Latent",
        "TI hashes: easynegative: c74b4e810b03",
    )
    other = from_parameters(OTHER)
    assert other.job.settings.sampler is None
    assert other.left_out == ("Sampler: LCM", "Schedule type: SGM Uniform")
    varied = from_parameters(VARIATION).job
    assert (varied.variation_seed, varied.variation) == (7, 0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat", "has no 'Steps"),
        ("a cat\nSteps: 20, Seed: 1", "has no 'Steps"),  # words of a prompt, as web UIs have it
        ("a\nSteps: x, Sampler: DDIM, CFG scale: 7", "Steps must be a number, got 'x'"),
        ("<lora:a:1> cat\nSteps: 2, Sampler: DDIM, CFG scale: 7", "prompt syntax '<lora:a:1>'"),
        ("a\nSteps: 2, Sampler: DDIM, Seed: -1", "seed must be a whole number"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_parameters(text)


def theirs(text: str) -> tuple[str, dict[str, str]]:
    """How the web UI reads it: its own expression for the pairs."""
    *lines, last = text.split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return "\n".join(lines), dict(pairs)


def recipe_of(job: TextJob, **change: Any) -> dict[str, Any]:
    from fastdiff.generate.recipe import to_json

    return {"job": to_json(job), "model": "m", "fastdiff": "1", "sampler": None, **change}


def test_our_pictures_carry_it() -> None:
    job = TextJob(
        prompt="a (red:1.2) cat",
        seed=5,
        width=64,
        height=32,
        text=TextSettings(negative="dog", clip_skip=1),
        settings=SampleSettings(
            sampler="euler-ancestral", spacing="karras", steps=7, guidance_scale=3.5
        ),
    )
    words, pairs = theirs(str(to_parameters(recipe_of(job, model="a, b"))))
    assert words == "a (red:1.2) cat\nNegative prompt: dog"
    assert pairs == {
        "Steps": "7",
        "Sampler": "Euler a",
        "Schedule type": "Karras",
        "CFG scale": "3.5",
        "Seed": "5",
        "Size": "64x32",
        "Clip skip": "2",
        "Model": '"a, b"',
        "Version": "fastdiff 1",
    }
    assert from_parameters(str(to_parameters(recipe_of(job)))).job == job


def test_a_prompt_that_is_plain_text_is_escaped() -> None:
    job = TextJob(prompt="a (b) [c] \\", text=TextSettings(emphasis=False))
    words, _ = theirs(str(to_parameters(recipe_of(job))))
    [[fragment]] = parse_prompt(words)
    assert (fragment.text, fragment.weight) == ("a (b) [c] \\", 1)


def test_the_sampler_that_the_files_name_is_written() -> None:
    job = TextJob(prompt="a", settings=SampleSettings(sampler="checkpoint"))
    _, pairs = theirs(str(to_parameters(recipe_of(job, sampler={"sampler": "heun"}))))
    assert pairs["Sampler"] == "Heun"


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_comments_of_other_formats(ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    text = "猫\nSteps: 2, Sampler: DDIM, CFG scale: 7"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode(
        "utf-16-be"
    )
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    assert read_parameters(path) == text
    Image.new("RGB", (8, 8)).save(path)
    assert read_parameters(path) is None


@pytest.mark.filterwarnings("default")
def test_like_makes_a_new_picture_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_folder("sd1", tmp_path)
    monkeypatch.chdir(tmp_path)
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a 猫\nNegative prompt: dog\nSteps: 3, Sampler: Euler, Schedule type: Karras, "
        "CFG scale: 4, Seed: 9, Size: 64x64, ENSD: 31337",
    )
    Image.new("RGB", (64, 64)).save("web.png", pnginfo=info)
    code = main(["txt2img", "--like", "web.png", "--model", str(folder), "--device", "cpu"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "web.png was made by another program" in captured.err
    assert "a new picture is made" in captured.err
    assert "not taken: ENSD: 31337" in captured.err
    assert "identical" not in captured.out
    [made] = Path("out").glob("*.png")
    job = read_recipe(made)["job"]
    assert (job["prompt"], job["text"]["negative"], job["seed"]) == ("a 猫", "dog", 9)
    assert (job["settings"]["sampler"], job["settings"]["spacing"]) == ("euler", "karras")
    assert from_parameters(str(read_parameters(made))).job.seed == 9
    assert main(["txt2img", "--like", "web.png"]) == 2
    assert "missing: --model" in capsys.readouterr().err
    assert main(["sample", "--like", "web.png"]) == 2
    assert "use 'fastdiff txt2img --like web.png'" in capsys.readouterr().err
