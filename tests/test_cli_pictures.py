"""``txt2img``, ``img2img`` and ``inpaint``: files, output and errors."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

import fastdiff
from fastdiff.cli import main
from fastdiff.generate.run import generate
from fastdiff.images import read_image, read_recipe, save_png
from tests.support.diffusers_models import save_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    kinds = {"sd1": "sd1", "NINE": "inpaint", "XL": "xl", "REFINER": "refiner"}
    return {name: str(save_folder(kind, root)) for name, kind in kinds.items()}


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folders: dict[str, str],
) -> Run:
    """Call the program in a folder with a photo and a mask: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    photo = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_png("photo.png", photo)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save("mask.png")
    Image.new("L", (64, 64)).save("black.png")
    Image.new("RGB", (1, 1)).save("dot.png")
    Image.new("L", (32, 64), 255).save("narrow.png")
    Path("text.png").write_text("no picture")

    def call(line: str) -> tuple[int, str, str]:
        words = [folders.get(word, word) for word in shlex.split(line)]
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


FAST = "--device cpu --steps 3"


def test_txt2img_writes_images_and_makes_one_again(run: Run) -> None:
    code, out, err = run(
        f'txt2img "a (red:1.2) cat" --model sd1 --count 3 --seed 5 --negative dog --batch 2 '
        f"--sampler dpmpp-2m-sde --preview {FAST}"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "out/sheet.png"
    assert "3 of 64 x 64, dpmpp-2m-sde, 3 steps" in out
    assert "time" in out
    names = sorted(path.name for path in Path("out").iterdir())
    stem = "a-red-1-2-cat-seed"
    assert names == [f"{stem}{seed}.png" for seed in (5, 6, 7)] + ["preview.png", "sheet.png"]
    recipe = read_recipe(f"out/{stem}6.png")
    job = recipe["job"]
    assert job["prompt"] == "a (red:1.2) cat"
    assert job["text"]["negative"] == "dog"
    assert (job["seed"], job["height"], job["kind"]) == (6, 64, "text")
    assert read_recipe("out/sheet.png")["seeds"] == [5, 6, 7]

    code, out, err = run(f"txt2img --like out/{stem}6.png")
    assert (code, err) == (0, "")
    assert f"identical to out/{stem}6.png, bit for bit" in out
    assert torch.equal(read_image(f"out/{stem}6-again.png"), read_image(f"out/{stem}6.png"))

    save_png(f"out/{stem}6.png", -read_image(f"out/{stem}6.png"), recipe)
    code, out, err = run(f"txt2img --like out/{stem}6.png --out again")
    assert code == 1
    assert "NOT identical" in out
    assert "pixels of the file were changed" in out
    before = Path(f"out/{stem}6.png").read_bytes()
    code, out, err = run(f"txt2img --like out/{stem}6.png --steps 2")
    assert (code, out.splitlines()[0]) == (0, f"out/{stem}6-2.png")
    assert Path(f"out/{stem}6.png").read_bytes() == before
    code, out, err = run(f"txt2img --like out/{stem}6.png --out other --seed 9")
    assert (code, "compared" in out) == (0, False)
    assert Path(f"other/{stem}9.png").exists()


def test_img2img(run: Run) -> None:
    line = f"img2img cat --image photo.png --model sd1 {FAST}"
    assert run(f"{line} --strength 0 --out same")[0] == 0
    assert run(f"{line} --strength 1 --out new")[0] == 0
    photo, same, new = (
        read_image(path) for path in ("photo.png", "same/cat-seed0.png", "new/cat-seed0.png")
    )
    assert not torch.equal(same, new)
    recipe = read_recipe("new/cat-seed0.png")
    assert recipe["job"]["image"]["path"] == "photo.png"
    assert len(recipe["job"]["image"]["sha256"]) == 64
    assert run(f"{line} --height 32 --width 48 --out small")[0] == 0
    assert read_image("small/cat-seed0.png").shape == (3, 32, 48)
    assert photo.shape == same.shape


@pytest.mark.parametrize("kind", ["sd1", "NINE"])
def test_inpaint(run: Run, kind: str) -> None:
    code, out, err = run(
        f"inpaint cat --image photo.png --mask mask.png --model {kind} --count 2 {FAST}"
    )
    assert (code, err) == (0, "")
    assert out.startswith("out/sheet.png")
    photo, made = read_image("photo.png"), read_image("out/cat-seed1.png")
    assert torch.equal(made[:, :16], photo[:, :16])
    assert torch.equal(made[..., 48:], photo[..., 48:])
    assert (made != photo).any(0)[16:48, 16:48].float().mean() > 0.9
    assert read_recipe("out/cat-seed0.png")["job"]["mask"]["path"] == "mask.png"


@pytest.mark.parametrize("command", ["img2img", "inpaint"])
def test_like_makes_edited_images_again(run: Run, command: str) -> None:
    mask = " --mask mask.png --no-paste" if command == "inpaint" else ""
    line = f"{command} cat --image photo.png --model sd1 --strength 0.7 --seed 3 {FAST}{mask}"
    code, out, err = run(line)
    assert (code, err) == (0, "")
    assert "2 of 3 steps" in out
    code, out, err = run(f"{command} --like out/cat-seed3.png")
    assert (code, err) == (0, "")
    assert "identical to out/cat-seed3.png, bit for bit" in out
    assert Path("out/cat-seed3-again.png").exists()

    shutil.copy("photo.png", "moved.png")
    assert "identical" in run(f"{command} --like out/cat-seed3.png --image moved.png")[1]
    save_png("moved.png", -read_image("photo.png"))  # another picture is another image
    other = run(f"{command} --like out/cat-seed3.png --image moved.png --out another")
    assert (other[0], "compared" in other[1]) == (0, False)

    save_png("photo.png", -read_image("photo.png"))
    code, out, err = run(f"{command} --like out/cat-seed3.png")
    assert code == 1
    then = read_recipe("out/cat-seed3.png")["job"]["image"]["sha256"][:12]
    assert f"image {then} then" in out
    code, out, err = run(f"{command} --like out/cat-seed3.png --strength 1 --out other")
    assert (code, "compared" in out) == (0, False)
    elsewhere = "img2img" if command == "inpaint" else "txt2img"
    assert (
        f"not a single image made by 'fastdiff {elsewhere}'"
        in run(f"{elsewhere} --like out/cat-seed3.png")[2]
    )


def test_nothing_is_written_over_and_nothing_made_twice(run: Run) -> None:
    """Prompts with one file name, other settings, and the same again."""
    lines = (
        f'txt2img "a cat!" --model sd1 --count 2 {FAST}',
        f'txt2img "A: cat?" --model sd1 --count 2 {FAST} --guidance-scale 3',
        f'txt2img "a cat!" --model sd1 --count 2 {FAST} --sampler heun',
    )
    for line in lines:
        assert run(line)[0] == 0
    made = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    stems = [f"a-cat-seed{seed}" for seed in (0, 1)] + ["sheet"]
    assert set(made) == {f"{stem}{end}.png" for stem in stems for end in ("", "-2", "-3")}
    assert len(set(made.values())) == 9
    for number, line in enumerate(lines, start=1):
        code, out, err = run(line)
        assert (code, err) == (0, "")
        end = "" if number == 1 else f"-{number}"
        assert out.splitlines() == [
            f"out/a-cat-seed1{end}.png",
            "2 of 2 already exist with the same recipe",
        ]
    Path("out/a-cat-seed0-2.png").unlink()
    code, out, err = run(lines[1])  # one of two is there
    assert (code, err) == (0, "")
    assert re.search(r"kept +1 that already exist with the same recipe", out)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == made


def test_inputs_are_never_written_over(run: Run) -> None:
    assert run(f"img2img cat --image photo.png --model sd1 {FAST}")[0] == 0
    before = Path("out/cat-seed0.png").read_bytes()
    for line in (
        "img2img cat --image out/cat-seed0.png",
        "img2img cat --image out/../out/cat-seed0.png --seed 0 --count 2",
        "inpaint cat --image photo.png --mask out/cat-seed0.png",
    ):
        assert run(f"{line} --model sd1 {FAST}")[0] == 0
        assert Path("out/cat-seed0.png").read_bytes() == before
    assert {path.name for path in Path("out").glob("cat-seed0*")} == {
        *("cat-seed0.png", "cat-seed0-2.png", "cat-seed0-3.png", "cat-seed0-4.png")
    }
    Path("out/preview.png").write_bytes(before)
    line = f"img2img cat --image out/preview.png --model sd1 --seed 5 {FAST}"
    assert "the preview would overwrite" in run(f"{line} --preview")[2]
    assert run(line)[0] == 0


def test_like_knows_other_weights(run: Run, folders: dict[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folders["sd1"], copy)
    assert run(f"txt2img cat --model model {FAST}")[0] == 0
    made = read_recipe("out/cat-seed0.png")["weights"]
    shutil.move(copy, tmp_path / "moved")
    code, out, err = run("txt2img --like out/cat-seed0.png --model moved")
    assert (code, err) == (0, "")  # the same weights elsewhere
    assert f"weights   {made[:12]}" in out

    path = tmp_path / "moved" / "text_encoder" / "model.safetensors"
    numbers = safetensors.torch.load_file(path)
    name = next(name for name in numbers if name.endswith("layers.1.mlp.fc1.weight"))
    numbers[name] += 1
    safetensors.torch.save_file(numbers, path, metadata={"format": "pt"})
    code, out, err = run("txt2img --like out/cat-seed0.png --model moved --out other")
    now = read_recipe("other/cat-seed0-again.png")["weights"]
    assert now != made
    assert code == 1
    assert f"weights {made[:12]} then, {now[:12]} now" in out


def test_upscale_and_refiner(run: Run, folders: dict[str, str]) -> None:
    code, out, err = run(f"txt2img cat --model sd1 --upscale 1.5 --upscale-strength 0.7 {FAST}")
    assert (code, err) == (0, "")
    assert "1 of 96 x 96" in out
    model = fastdiff.load(folders["sd1"])
    large = model.generate("cat", upscale=1.5, upscale_strength=0.7, steps=3)
    written = read_image("out/cat-seed0.png")
    assert (written - large[0].image).abs().max() < 1 / 127
    assert run("txt2img --like out/cat-seed0.png")[0] == 0

    code, out, err = run(
        "txt2img cat --model XL --refiner REFINER --switch 0.5 --out fine --device cpu --steps 5"
    )
    assert (code, err) == (0, "")
    base, refiner = (fastdiff.load(folders[kind]) for kind in ("XL", "REFINER"))
    image = base.generate("cat", refiner=refiner, switch=0.5, steps=5)[0].image
    assert (read_image("fine/cat-seed0.png") - image).abs().max() < 1 / 127
    assert read_recipe("fine/cat-seed0.png")["refiner"]["weights"] == refiner.weights_hash
    assert run("txt2img --like fine/cat-seed0.png")[0] == 0


def test_images_are_written_as_they_come(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped keeps its finished images."""

    def stopped(*args: Any, **options: Any) -> Any:
        yield from itertools.islice(generate(*args, **options), 4)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdiff.generate.run.generate", stopped)
    code, _, err = run(f"txt2img cat --model sd1 --count 6 --batch 2 {FAST}")
    assert (code, err) == (130, "fastdiff: interrupted\n")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        f"cat-seed{seed}.png" for seed in range(4)
    ]


@pytest.mark.parametrize(("flag", "expected"), [("", True), ("--no-graphs", False)])
def test_graphs_can_be_switched_off(
    run: Run, monkeypatch: pytest.MonkeyPatch, flag: str, expected: bool
) -> None:
    asked: list[bool] = []

    def seen(*args: Any, graphs: bool, **options: Any) -> Any:
        asked.append(graphs)
        return generate(*args, graphs=graphs, **options)

    monkeypatch.setattr("fastdiff.generate.run.generate", seen)
    code, _, err = run(f"txt2img cat --model sd1 {FAST} {flag}")
    assert (code, err) == (0, "")
    assert asked == [expected]


def test_recipes_that_cannot_be_read(run: Run) -> None:
    assert run(f"txt2img cat --model sd1 {FAST}")[0] == 0
    recipe = read_recipe("out/cat-seed0.png")
    job = recipe["job"]
    for change, message in (
        ({"dtype": ["float32"]}, "dtype must be text"),
        ({"backend": "magic"}, "unknown backend: 'magic'"),
        ({"recipe": 4}, "recipe version must be at most 3"),
        ({"load": {"tokenizer": 3}}, "tokenizer must be a list of folders"),
        ({"load": {"heads": 3}}, "unknown loading option 'heads'"),
        ({"job": None}, "unknown kind of job None"),
        ({"job": {**job, "kind": "film"}}, "unknown kind of job 'film'; expected one of class"),
        ({"job": {**job, "seed": "x"}}, "seed: expected int, got 'x'"),
        ({"job": {**job, "height": "64"}}, "height: expected int"),
        ({"job": {**job, "settings": {"sampler": "magic"}}}, "unknown sampler 'magic'"),
        ({"job": {"kind": "text"}}, "prompt: missing"),
    ):
        save_png("bad.png", read_image("photo.png"), {**recipe, **change})
        code, out, err = run("txt2img --like bad.png")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    del recipe["weights"]
    save_png("bad.png", read_image("photo.png"), recipe)
    assert (
        "the recipe in bad.png cannot be read: it lacks 'weights'"
        in run("txt2img --like bad.png")[2]
    )


@pytest.mark.filterwarnings("default")
def test_like_keeps_what_was_text_before_it_was_syntax(run: Run) -> None:
    prompt = r"'a cat \BREAK (blue:1.2) sky'"
    assert run(f"txt2img {prompt} --negative 'x [a\\|b]' --model sd1 {FAST}")[0] == 0
    [made] = Path("out").glob("*-seed0.png")
    recipe = read_recipe(made)
    job = recipe["job"]
    assert job["prompt"] == r"a cat \BREAK (blue:1.2) sky"
    before = {
        **recipe,
        "recipe": 2,
        "job": {
            **job,
            "prompt": "a cat BREAK (blue:1.2) sky",
            "text": {**job["text"], "negative": "x [a|b]"},
        },
    }
    save_png("before.png", Image.open(made), before)
    code, out, err = run("txt2img --like before.png")
    assert (code, "identical to before.png" in " ".join(out.split())) == (0, True)
    assert "was made when BREAK and other syntax of web UIs was plain text" in err
    assert read_recipe("out/before-again.png") == recipe


MISTAKES = {
    "txt2img cat": "missing: --model",
    "txt2img --model sd1": "missing: PROMPT",
    "txt2img cat --model nowhere": "nowhere is missing",
    "txt2img cat --model sd1 --width 60": "multiples of 8, got 60 x 64",
    "txt2img cat --model sd1 --count 0": "count must be at least 1, got 0",
    "txt2img cat --model sd1 --seed -1": "seed must be a whole number from 0 to 2**64 - 1",
    "txt2img cat --model sd1 --sampler dpmp": "did you mean ddpm or kdpm2?",
    "txt2img cat --model sd1 --clip-skip 3": "clip_skip must be 0 to 2",
    "txt2img cat --model sd1 --guidance-rescale 2": "guidance rescale must be in [0, 1], got 2",
    "txt2img (cat:101) --model sd1": "weight of 'cat' in the prompt must be between -100 and 100",
    "txt2img '[cat:dog:0.5] sky' --model nowhere": r"for the literal text",
    "txt2img '<lora:x:0.8> cat' --model nowhere": r"prompt syntax '<lora:x:0.8>' is not supported",
    "txt2img cat --model nowhere --negative 'a AND b'": r"prompt syntax 'AND' is not supported",
    "img2img '[cat|dog]' --model nowhere --image photo.png": "or [cat\\|dog] for the literal text",
    "txt2img cat --model sd1 --guidance-scale 1 --negative dog": "so the negative prompt 'dog'",
    "txt2img cat --model sd1 --upscale 0.5": "scale must be in [1, 16], got 0.5",
    "txt2img cat --model sd1 --upscale 2 --upscale-strength 2": "strength must be in [0, 1]",
    "txt2img cat --model sd1 --upscale 2 --refiner sd1": "give only one of them",
    "txt2img cat --model XL --refiner sd1": "must share latent channels",
    "txt2img cat --model REFINER --refiner XL": "swap the two models",
    "txt2img cat --model XL --crop -1 0": "crop must be two whole numbers >= 0, got (-1, 0)",
    "txt2img cat --model XL --original-size 0 64": "original_size must be two whole numbers >= 1",
    "txt2img cat --model REFINER --aesthetic-score nan": "aesthetic_score must be in [0, 10]",
    "txt2img cat --model sd1 --clip-skip -1": "clip_skip must be at least 0, got -1",
    "txt2img cat --model XL --refiner nowhere": "nowhere is missing",
    "txt2img cat --model XL --refiner REFINER --switch 1": "switch must leave steps",
    "txt2img cat --model NINE": "reads 9 channels",
    "txt2img cat --model digits": "fastdiff sample",
    "sample --model sd1": "sd1 generates images from a prompt and got none; pass one",
    "img2img --image photo.png --model sd1": "generates images from a prompt and got none",
    "img2img cat --label 3 --image photo.png --model sd1": "this model has no classes, got class",
    "sample --model NINE": "generates images from a prompt",
    "txt2img --like photo.png": "contains no recipe",
    "txt2img --like nowhere.png": "no image at nowhere.png",
    "img2img cat --model sd1": "missing: --image",
    "img2img cat --model sd1 --image nowhere.png": "no image at nowhere.png",
    "img2img cat --model sd1 --image text.png": "text.png cannot be read: not an image",
    "img2img cat --model sd1 --image dot.png": "got 1 x 1 (width x height); the nearest",
    "img2img cat --model sd1 --image photo.png --strength 2": "strength must be in [0, 1], got 2",
    "img2img cat --model NINE --image photo.png": "reads 9 channels",
    "img2img cat --model NINE --image photo.png --strength 0": "reads 9 channels",
    "img2img cat --model sd1 --image photo.png --height 0": "height must be 1 to 65535 pixels",
    "img2img cat --model sd1 --image photo.png --width -8": "width must be 1 to 65535 pixels, got",
    "img2img cat --model sd1 --image photo.png --height 99999999": "height must be 1 to 65535",
    "img2img cat --model sd1 --image dot.png --fit crop": "got 1 x 1 (width x height)",
    "img2img cat --model sd1 --image photo.png --fit x": "invalid choice 'x' for argument '--fit'",
    "inpaint cat --model sd1 --image photo.png": "missing: --mask",
    "inpaint cat --model sd1 --image photo.png --mask narrow.png": "mask must be (1, 64, 64)",
    "inpaint cat --model sd1 --image photo.png --mask black.png": "the mask is all zeros",
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_one_line(run: Run, line: str, message: str) -> None:
    code, out, err = run(f"{line} --device cpu" if "--model" in line else line)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("fastdiff: ")
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_without_transformers_it_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run(f"txt2img cat --model sd1 {FAST}")
    assert (code, out) == (2, "")
    assert re.search(r"pip install 'fastdiff\[diffusers\]'", err)
    assert err.count("\n") == 1
