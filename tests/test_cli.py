"""The command line: what it makes, what it says, and how it refuses.

In-process through `main(argv)` wherever that shows the same thing; a subprocess only for signals,
exit codes, tracebacks and what is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from PIL import Image

from fastdiff import __version__, kernels
from fastdiff.checkpoint.layouts import openai
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.cli import COMMANDS, main
from fastdiff.cli.again import Original
from fastdiff.cli.parsing import one_line
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.evaluation import Results, Scores
from fastdiff.generate.job import ClassJob, TextJob
from fastdiff.generate.recipe import Recipe
from fastdiff.images import read_recipe
from fastdiff.kernels import OPS, compiled, record_backends
from fastdiff.kernels.choose import UNAVAILABLE
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.unet import UNet, UNetConfig

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    ["train", "autoencoder"],
    ["train", "diffusion"],
    ["train", "classifier"],
    ["train", "clip"],
]
HELPS = [*([name] for name in COMMANDS), *STAGES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of the digits' layout with random weights and few channels."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", seed=0)


UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_depth=(0, 1),
    num_heads=2,
    num_classes=10,
    null_class=True,
    norm_groups=4,
)
AUTOENCODER = AutoencoderConfig(
    image_channels=1, model_channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4
)


def make_bundle(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    unet = UNet(UNET)
    for parameter in unet.parameters():  # a fresh one returns zeros, whatever it is asked
        parameter.data.normal_(std=0.1)
    model = Model(
        layout="bundle",
        image_size=32,
        image_channels=1,
        autoencoder=Autoencoder(AUTOENCODER),
        denoiser=unet,
        schedule=ScheduleConfig(),
        class_names=tuple("0123456789"),
    )
    save_bundle(model, folder, provenance={"command": "a test"})
    return str(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call the program in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def python(code: str, *words: str, cwd: Path, **kwargs: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("FASTDIFF_DEBUG", None)
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        **{"stdout": subprocess.PIPE, **kwargs},
    )


CLI = (
    # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from fastdiff.cli import main; sys.exit(main(sys.argv[1:]))"
)


# --- help and version ---------------------------------------------------------------------------


def test_help_lists_every_command(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", out, re.MULTILINE)


def test_version(run) -> None:
    assert run("--version") == (0, f"fastdiff {__version__}\n", "")


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_ends_with_three_examples_that_can_be_read(
    words: list[str], run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(*words, "--help")
    assert (code, err) == (0, "")
    _, _, tail = out.partition("\nexamples:\n")
    examples = tail.strip().splitlines()
    assert len(examples) == 3
    ran = []
    for module in COMMANDS:
        command = importlib.import_module(f"fastdiff.cli.{module}")
        monkeypatch.setattr(command, "run", lambda *options: ran.append(options) or 0)
    jobs = {"sample": ClassJob(label=3), "txt2img": TextJob(prompt="a cat")}

    def original(command: str, like: str) -> Original:
        facts = {"weights": "", "backend": "auto", "device": "cpu", "dtype": "float32"}
        recipe = Recipe(version=2, job=jobs[command], model="digits", **facts)
        return Original(Path(like), recipe, {})

    monkeypatch.setattr("fastdiff.cli.again.original", original)
    for example in examples:
        parts = shlex.split(example.partition(">")[0])
        assert main(parts[parts.index("fastdiff") + 1 :]) == 0, example
    assert len(ran) == 3


def test_help_and_wrong_options_are_answered_without_torch(tmp_path: Path) -> None:
    code = """
import sys
from fastdiff.cli import COMMANDS, main
for name in COMMANDS:
    main([name, "--help"])
    main([name, "--bogus"])
for words in (["--help"], ["--version"], ["nonsense"], ["samplers", "--steps", "x"],
              ["sample", "--count", "0"], ["sample", "--steps", "x"], ["sample", "--seed", "-1"],
              ["txt2img"], ["convert", "a", "b", "--prediction", "x"]):
    assert main(words) in (0, 2), words
assert "torch" not in sys.modules and "rich" not in sys.modules and "PIL" not in sys.modules
"""
    process = python(code, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


# --- mistakes -----------------------------------------------------------------------------------

MISTAKES = {
    "": "usage: fastdiff COMMAND",
    "smaple": "unknown command 'smaple'; did you mean sample or samplers?",
    "--bogus": "unknown option '--bogus'",
    "doctor --jsn": "unrecognized options: --jsn; did you mean --json?",
    "info": "missing: PATH|NAME",
    "info nowhere": "nowhere is missing; give a file",
    "info nowhere.png": "no image at nowhere.png",
    "info PLAIN --num-heads 4": "is a picture, but num_heads can only be given for a model",
    "info TINY --num-heads 4": "leave num_heads out",
    "reconstruct --model TINY --prediction v": "leave prediction out",
    "evaluate --model TINY --image-size 64": "leave image_size out",
    "samplers ddmi": "unknown sampler 'ddmi'; did you mean ddpm or ddim?",
    "samplers --steps x": "--steps: expected a whole number, got 'x'",
    "samplers ddim --steps 0": "steps must be at least 1, got 0",
    "samplers ddim --eta": "missing value for argument '--eta'",
    "samplers ddim --eta nan": "eta must be a finite number, got nan",
    "samplers --spacing karas": "unknown spacing 'karas'; did you mean karras?",
    "samplers ddpm --spacing 10,15 --steps 20": "'10,15' has 25 steps, got 20; set steps to 25",
    "samplers --plot x.jpg": "must end in one of .png, .svg, .pdf",
    "sample --model nowhere": "nowhere is missing; give a file",
    "sample --model TINY --classes 10": "unknown class '10'; expected one of 0, 1",
    "sample --model TINY --image PLAIN": "is not an upsampler, so it takes no image",
    "img2img cat --image PLAIN --model TINY": "does not read text, got prompt 'cat'",
    "sample --model TINY --steps -1": "steps must be at least 1, got -1",
    "sample --model TINY --steps 0": "steps must be at least 1, got 0",
    "sample --model TINY --steps 1001": "steps must be 1 to 1000",
    "sample --model TINY --steps many": "--steps: expected a whole number, got 'many'",
    "sample --model TINY --stesp 3": "unrecognized options: --stesp",
    "sample --model TINY --sampler dpmp": "did you mean ddpm or kdpm2?",
    "sample --model TINY --sampler dpm++2m": "did you mean dpmpp-2m or dpmpp-3m?",
    "sample --model TINY --count 0": "count must be at least 1, got 0",
    "sample --model TINY --batch 0": "batch must be at least 1, got 0",
    "sample --model TINY --guidance-scale nan": "guidance scale must be a finite number",
    "sample --model TINY --guidance-scale x": "--guidance-scale: expected a number, got 'x'",
    "sample --model TINY --seed -1": "seed must be a whole number from 0 to 2**64 - 1, got -1",
    "sample --model TINY --seed 18446744073709551609": "seeds must be 0 to 2^64 - 1",
    "sample --model TINY --device gpu": "unknown device 'gpu'",
    "sample --model TINY --device cuda:99": "device 'cuda:99' is not available",
    "sample --model TINY --device cpu --dtype fp16": "dtype fp16 needs a GPU",
    "sample --model TINY --dtype int8": "invalid choice 'int8'",
    "sample --model TINY --out FILE": "the output must be a folder",
    "sample --model TINY --out FILE/x": "cannot write to the folder",
    "sample --model TINY --out /dev/full": "the output must be a folder",
    "sample --like nowhere.png": "no image at nowhere.png",
    "sample --like FILE": "is not a PNG",
    "sample --like PLAIN": "contains no recipe",
    "interpolate --model TINY": "needs a second image; give one or more of to_seed",
    "interpolate --model TINY --to-seed 1 --frames 0": "frames must be at least 1, got 0",
    "interpolate --model TINY --to-seed 1 --frames 1000000000000000": "images need",
    "interpolate --model TINY --to-seed 1 --at 0.5": "at is for a single frame, got 0.5 and 9",
    "interpolate --model TINY --label 1 --to-label 12": "unknown class '12'; expected one of",
    "reconstruct nowhere.png --model TINY": "no image at nowhere.png",
    "reconstruct FILE --model TINY": "cannot be read: not an image",
    "reconstruct --model TINY --batch 0": "batch must be at least 1",
    "evaluate --model TINY --count 10": "at least 360",
    "evaluate --model TINY --seed -1": "seeds must be",
    "train": "missing: autoencoder, diffusion, classifier or clip",
    "train autoencodr": "did you mean autoencoder?",
    "train diffusion --preset digits-difusion": "did you mean digits-diffusion?",
    "train diffusion --config nowhere.json": "no config at nowhere.json",
    "train diffusion --config FILE": "is not valid JSON",
    "train diffusion --autoencoder nowhere": "no bundle at nowhere",
    "train diffusion --prediction noise": "invalid choice 'noise'",
    "train autoencoder --resume --output.folder nowhere": "nothing to resume in nowhere",
    "train autoencoder --optimization.steps 0": "steps must be at least 1, got 0",
    "train autoencoder --data.source folder --data.path nowhere": "nowhere",
}


def test_a_mistake_is_one_line_in_any_encoding_and_width(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tyro draws another box where there are no line-drawing characters, and wraps in both."""
    lines = set()
    for lines_allowed in (True, False):
        for columns in ("40", "100"):
            monkeypatch.setenv("COLUMNS", columns)
            monkeypatch.setitem(tyro._experimental_options, "utf8_boxes", lines_allowed)
            lines.add(run("samplers", "--spacing", "karas")[2])
            lines.add(run("samplers", "--stpes", "3")[2])
            lines.add(run("info")[2])
    assert len(lines) == 3, lines


@pytest.mark.parametrize(("words", "expected"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(
    words: str, expected: str, run, tiny: str, tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("not a picture")
    Image.new("L", (8, 8)).save(tmp_path / "plain.png")
    before = sorted(tmp_path.rglob("*"))
    names = {"TINY": tiny, "FILE": "file.txt", "FILE/x": "file.txt/x", "PLAIN": "plain.png"}
    code, out, err = run(*(names.get(word, word) for word in words.split()))
    assert code == 2
    assert expected in err
    if words:
        assert out == ""
        assert re.fullmatch(r"fastdiff: [^\n]+\n", err), err
        assert not re.search(r"Traceback|[│╭─]|\bError\b", err)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_forced_backend_that_cannot_run(run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuda" not in UNAVAILABLE:
        pytest.skip("there are CUDA kernels here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("sample", "--model", tiny, "--backend", "cuda", "--steps", "1")
    assert code == 2
    assert re.fullmatch(
        r"fastdiff: backend 'cuda' cannot run \w+ \(.*reference: would run.*\n", err
    )


def test_more_images_than_the_disk_holds(run, tiny: str) -> None:
    code, _, err = run("sample", "--model", tiny, "--count", str(10**15), "--steps", "1")
    assert (code, err.count("\n")) == (2, 1)
    assert "images need" in err
    assert not Path("out").exists()


def test_the_environment_chooses_the_backend_too(
    run, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sample", "--model", tiny, "--classes", "1", "--count", "1", "--steps", "1")
    monkeypatch.setenv("FASTDIFF_BACKEND", "nonsense")
    code, _, err = run(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "FASTDIFF_BACKEND must be one of" in err
    monkeypatch.setenv("FASTDIFF_BACKEND", "reference")
    assert run(*words)[0] == 0
    assert read_recipe("out/1-seed0.png")["backend"] == "reference"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "fastdiff: interrupted\n"),
        (MemoryError(), 2, "fastdiff: not enough memory: MemoryError; "),
        (RuntimeError("[enforce fail] can't allocate memory"), 2, "fastdiff: not enough memory: "),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "fastdiff: not enough memory: CUDA"),
        (ImportError("this needs the package 'sklearn': pip install"), 2, "fastdiff: this needs"),
        (
            OSError(28, "No space left on device", "x.png"),
            2,
            "fastdiff: No space left on device: x",
        ),
        (ValueError("two\nlines"), 2, "fastdiff: two lines\n"),
        (SystemExit(143), 143, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, line: str, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("fastdiff.cli.doctor.main", fail)
    got, out, err = run("doctor")
    assert (got, out) == (code, "")
    assert err.startswith(line)
    assert err.count("\n") == bool(line)


def test_a_bug_of_ours_keeps_its_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr("fastdiff.cli.doctor.main", fail)
    with pytest.raises(KeyError, match="a bug"):
        run("doctor")


def test_debug_shows_the_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_DEBUG", "1")
    code, _, err = run("info", "nowhere")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("fastdiff: nowhere is missing")


def test_warnings_are_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(_: object) -> int:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("attention: triton\ndoes not run here", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("fastdiff.cli.doctor.main", warn)
    assert run("doctor")[2] == "fastdiff: warning: attention: triton does not run here\n"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "unknown sampler 'heum'; expected one of heun, ddim",
            "; did you mean heun? Expected one of",
        ),
        ("unknown sampler 'xyzzy'; expected one of heun, ddim", "'xyzzy'; expected one of heun"),
        ("unknown class '11'; expected one of 1, 2", "'11'; expected one of 1, 2"),
        (" a\n  b ", "a b"),
        (FileNotFoundError(2, "No such file", "x/y"), "No such file: x/y"),
        (ValueError(), "ValueError"),
    ],
)
def test_one_line(message: object, line: str) -> None:
    assert line in one_line(message)
    assert "\n" not in one_line(message)


def test_reader_that_leaves(tmp_path: Path) -> None:
    """``fastdiff --help | head -0``"""
    reader, writer = os.pipe()
    os.close(reader)
    process = python(CLI, "--help", cwd=tmp_path, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_behind_stdout(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = python(CLI, "--help", cwd=tmp_path, stdout=full)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "fastdiff: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_full_disk_leaves_nothing_half_written(tiny: str, tmp_path: Path) -> None:
    """A limit on the size of files simulates a full disk: the error is handled in the same way."""
    code = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);\
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); {CLI}"
    words = ("sample", "--model", tiny, "--steps", "1", "--classes", "1", "--count", "1")
    process = python(code, *words, "--out", "new/out", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(r"fastdiff: no space left to write new/out/1-seed0.png [^\n]+\n", err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c(tiny: str, tmp_path: Path) -> None:
    words = ("sample", "--model", tiny, "--steps", "1000", "--count", "50", "--out", "out")
    process = python(CLI, *words, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "fastdiff: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def served_by(backend: str, out: str) -> set[str]:
    """The ops of the line ``backend: op, op; other: op``, which the terminal may break."""
    found = re.search(rf"\b{backend}: ([\w,\s]+)", out)
    return set(re.split(r",\s+", found[1].strip().split("  ")[0])) if found else set()


# --- sample -------------------------------------------------------------------------------------


def test_sample_writes_images_with_recipes_and_a_sheet(run, tiny: str) -> None:
    code, out, err = run(
        *("sample", "--model", tiny, "--classes", "3", "7", "none", "--count", "2"),
        *("--seed", "5", "--steps", "3", "--sampler", "ddim", "--guidance-scale", "2"),
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "out/sheet.png"
    norms = {"add_group_norm_silu", "group_norm_silu"}
    assert served_by("cpu" if compiled.native else "reference", out) >= norms
    assert re.search(r"^time +load .*, sample .*, decode .*, write ", out, re.MULTILINE)
    names = {f"{name}-seed{seed}.png" for name in ("3", "7", "none") for seed in (5, 6)}
    assert {path.name for path in Path("out").iterdir()} == {*names, "sheet.png"}
    recipe = read_recipe("out/7-seed6.png")
    job = recipe["job"]
    assert (job["kind"], job["label"], job["seed"], job["settings"]["steps"]) == ("class", 7, 6, 3)
    assert (job["settings"]["sampler"], job["settings"]["guidance_scale"]) == ("ddim", 2)
    assert recipe["class_name"] == "7"
    assert read_recipe("out/none-seed5.png")["job"]["label"] is None
    assert read_recipe("out/sheet.png")["seeds"] == [5, 6]
    with Image.open("out/3-seed5.png") as a, Image.open("out/7-seed5.png") as b:
        assert a.size == (32, 32)
        assert a.tobytes() != b.tobytes()


def test_an_image_does_not_depend_on_its_company(run, tiny: str) -> None:
    common = ("sample", "--model", tiny, "--steps", "2")
    assert run(*common, "--count", "3", "--batch", "7", "--out", "many")[0] == 0
    code, out, _ = run(*common, "--classes", "4", "--seed", "2", "--count", "1", "--out", "one")
    assert code == 0
    assert out.splitlines()[0] == "one/4-seed2.png"  # no sheet for one image
    with Image.open("many/4-seed2.png") as a, Image.open("one/4-seed2.png") as b:
        assert a.tobytes() == b.tobytes()


def test_a_sheet_that_was_lost_is_made_again(run, tiny: str) -> None:
    """A sampling that was killed before its sheet, or before half of its images."""
    words = ("sample", "--model", tiny, "--classes", "1", "2", "--count", "2", "--steps", "2")
    assert run(*words)[0] == 0
    whole = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for lost in (["sheet"], ["sheet", "2-seed0", "2-seed1"], ["sheet", "1-seed0"]):
        for name in lost:
            Path(f"out/{name}.png").unlink()
        assert run(*words)[0] == 0
        assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == whole, lost


def test_like_makes_the_image_again_bit_for_bit(run, tiny: str, tmp_path: Path) -> None:
    common = ("--steps", "3", "--sampler", "dpmpp-2m-sde", "--guidance-scale", "2.5")
    run("sample", "--model", tiny, "--classes", "5", "--seed", "8", "--count", "1", *common)
    like = ("sample", "--like", "out/5-seed8.png", "--model", tiny)

    code, out, err = run(*like)
    assert (code, err) == (0, "")
    assert "identical to out/5-seed8.png, bit for bit" in out
    with Image.open("out/5-seed8.png") as a, Image.open("out/5-seed8-again.png") as b:
        assert a.tobytes() == b.tobytes()
    assert read_recipe("out/5-seed8-again.png") == read_recipe("out/5-seed8.png")

    # With other options it is a variation: the rest still comes from the recipe.
    code, out, _ = run(*like, "--seed", "9", "--out", "other")
    assert code == 0
    assert "bit for bit" not in out
    recipe = read_recipe("other/5-seed9.png")
    before = read_recipe("out/5-seed8.png")
    assert recipe["job"] == {**before["job"], "seed": 9}

    # A pixel that is not ours: the claim fails, and says so.
    from PIL import PngImagePlugin

    with Image.open("out/5-seed8.png") as image:
        info = PngImagePlugin.PngInfo()
        info.add_text("fastdiff", image.text["fastdiff"])
        image.putpixel((0, 0), (image.getpixel((0, 0)) + 1) % 256)
        image.save("touched.png", pnginfo=info)
    code, out, _ = run("sample", "--like", "touched.png", "--model", tiny)
    assert code == 1
    assert "NOT identical to touched.png" in out

    # Another model of the same shape: made, compared, and what differs is named.
    other = make_bundle(tmp_path / "bundle" / "tiny", seed=1)
    code, out, err = run("sample", "--like", "out/5-seed8.png", "--model", other, "--out", "no")
    assert (code, err) == (1, "")
    output = " ".join(out.split())
    now = read_recipe("no/5-seed8-again.png")["weights"]
    assert f"NOT identical to out/5-seed8.png: weights {before['weights'][:12]} then, " in output
    assert f"{now[:12]} now" in output

    # The recipe knows where the model was.
    assert before["model"] == tiny
    assert run("sample", "--like", "out/5-seed8.png", "--out", "same")[0] == 0


def test_interpolate_writes_frames_and_makes_one_again(run, tiny: str) -> None:
    words = ("--label", "3", "--to-label", "8", "--seed", "4", "--to-seed", "9", "--steps", "2")
    code, out, err = run("interpolate", "--model", tiny, *words, "--frames", "3")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "out/sheet.png"
    names = {f"3-to-8-frame{number}.png" for number in range(3)}
    assert {path.name for path in Path("out").iterdir()} == {*names, "sheet.png"}
    job = read_recipe("out/3-to-8-frame1.png")["job"]
    assert (job["kind"], job["at"], job["label"], job["to_label"]) == ("interpolation", 0.5, 3, 8)
    assert read_recipe("out/sheet.png")["frames"] == [0, 1, 2]
    assert "a contact sheet" in run("interpolate", "--like", "out/sheet.png")[2]

    for number, label, seed in ((0, "3", "4"), (2, "8", "9")):  # the ends are the images themselves
        ends = ("--classes", label, "--seed", seed, "--count", "1", "--steps", "2", "--out", "ends")
        assert run("sample", "--model", tiny, *ends)[0] == 0
        frame = f"out/3-to-8-frame{number}.png"
        with Image.open(frame) as a, Image.open(f"ends/{label}-seed{seed}.png") as b:
            assert a.tobytes() == b.tobytes()

    code, out, err = run("interpolate", "--like", "out/3-to-8-frame1.png")
    assert (code, err) == (0, "")
    assert "identical to out/3-to-8-frame1.png, bit for bit" in out


def test_like_refuses_a_sheet_and_a_strange_recipe(run, tiny: str) -> None:
    run("sample", "--model", tiny, "--classes", "1", "--count", "2", "--steps", "1")
    code, _, err = run("sample", "--like", "out/sheet.png", "--model", tiny)
    assert code == 2
    assert "it belongs to a contact sheet; use a single image" in err

    from fastdiff.images import save_png

    recipe = {**read_recipe("out/1-seed0.png"), "dtype": "float8"}
    save_png("strange.png", torch.zeros(1, 32, 32), recipe)
    code, _, err = run("sample", "--like", "strange.png", "--model", tiny)
    assert code == 2
    assert "unknown dtype: 'float8'" in err
    save_png("strange.png", torch.zeros(1, 32, 32), {**recipe, "dtype": []})
    code, _, err = run("sample", "--like", "strange.png", "--model", tiny)
    assert (code, err.count("\n")) == (2, 1)
    assert "dtype must be text, got []" in err


# --- the other commands -------------------------------------------------------------------------


def test_info_on_a_bundle_and_on_a_picture(run, tiny: str) -> None:
    code, out, _ = run("info", tiny)
    assert code == 0
    parameters = UNet(UNET).parameters()
    assert re.search(rf"denoiser +{sum(p.numel() for p in parameters):,}\n", out)
    for line in (r"denoiser.channel_mult +1, 2", r"class_names +0, 1, 2", r"command +a test"):
        assert re.search(rf"^  {line}", out, re.MULTILINE)
    code, out, _ = run("info", tiny, "--json")
    report = json.loads(out)
    assert re.fullmatch(r"[0-9a-f]{64}", report["weights hash"])

    run("sample", "--model", tiny, "--classes", "1", "--count", "1", "--steps", "1")
    code, out, _ = run("info", "out/1-seed0.png", "--json")
    assert json.loads(out)["recipe"]["weights"] == report["weights hash"]


def test_doctor_explains_calls_that_really_run(run) -> None:
    code, out, _ = run("doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["fastdiff"] == __version__
    assert report["packages"]["required"]["torch"] == torch.__version__
    assert set(report["ops"]) == set(OPS)
    for name, op in OPS.items():
        with record_backends() as served:
            getattr(kernels, name)(**op.example(torch.zeros))
        choice = report["ops"][name]["cpu"]
        assert served == {name: {choice["backend"]}}
        expected = {"cuda", "triton", "cpu", "reference", *op.backends}
        assert set(choice["others"]) == expected - {choice["backend"]}
    code, out, _ = run("doctor")
    assert code == 0
    for backend in {choice["cpu"]["backend"] for choice in report["ops"].values()}:
        assert f"ops on cpu run by {backend}" in out


def test_doctor_tells_what_the_module_is(run, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "path": "/here/_native.so", "version": "1", "compiler": "g++ 99", "isas": ("old", "new"),
        "isa": "new", "threads": "torch's pool", "stale": True, "cuda_architectures": "8.0;9.0a",
        "without_cuda": "", "sanitizers": "",
    }  # fmt: skip
    monkeypatch.setattr("fastdiff.kernels.compiled.describe", lambda: facts)
    monkeypatch.setenv("COLUMNS", "200")
    out = " ".join(run("doctor")[1].split())
    assert "g++ 99, fastdiff 1, /here/_native.so; csrc/ has changed since: run 'make build'" in out
    assert "new of old new; threads: torch's pool CUDA 8.0;9.0a" in out
    facts.update(cuda_architectures="", without_cuda="nvcc was not found")
    assert "CUDA no kernels: nvcc was not found" in " ".join(run("doctor")[1].split())
    facts.update(missing="no C++ compiler was found")
    assert "compiled module none no C++ compiler was found" in " ".join(run("doctor")[1].split())


def test_doctor_under_a_forced_backend(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_BACKEND", "reference")
    assert "FASTDIFF_BACKEND  reference" in run("doctor")[1]
    monkeypatch.setenv("FASTDIFF_BACKEND", "magic")
    code, _, err = run("doctor")
    assert code == 2
    assert "FASTDIFF_BACKEND must be one of" in err


def test_samplers_are_listed(run) -> None:
    code, out, _ = run("samplers")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(SAMPLERS)
    for line in out.splitlines():
        assert re.search(r"\d{4}|k-diffusion", line), f"no source in {line!r}"
        assert re.search(r"\[(order \d|distilled networks), [123] evaluations? per step\]$", line)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_table_is_printed(name: str, run) -> None:
    """Row by row what the sampler step is given; DDIM's numbers from its paper's equation 12."""
    code, out, _ = run("samplers", name, "--steps", "4", "--schedule", "cosine")
    assert code == 0
    heading, *rows = [line.split() for line in out.partition("\n\n")[2].splitlines()]
    assert heading[0] == "row"
    # of heun's 4, first and last are Euler's
    evaluations = {"plms": 5, "flow-heun": 7}.get(name, 2 + 2 * SAMPLERS[name].evaluations)
    if SAMPLERS[name].evaluations == 1 and name != "plms":
        evaluations = 4
    assert f"{evaluations} rows for 4 steps" in out
    assert [row[0] for row in rows] == [str(n) for n in range(evaluations)]
    assert all(len(row) == len(heading) for row in rows)
    if name != "ddim":
        return
    column = {key: [float(row[heading.index(key)]) for row in rows] for key in ("sigma", "a", "b")}
    for now, to, a, b in zip(
        column["sigma"], [*column["sigma"][1:], 0.0], column["a"], column["b"], strict=True
    ):
        alpha_now, alpha_to = (1 / (1 + s * s) ** 0.5 for s in (now, to))
        expected = (to * alpha_to) / (now * alpha_now)  # sigma' / sigma of the VP space
        assert a == pytest.approx(expected, rel=1e-3)
        assert b == pytest.approx(alpha_to - alpha_now * expected, rel=1e-3, abs=1e-5)


def test_a_wide_table_is_printed_in_blocks(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = run("samplers", "plms", "--steps", "5")
    assert code == 0
    table = out.partition("\n\n")[2]
    assert max(map(len, table.splitlines())) <= 60
    assert len(re.findall(r"^row ", table, re.MULTILINE)) > 1


def test_samplers_are_drawn(run) -> None:
    code, out, _ = run("samplers", "ddim", "heun", "--steps", "6", "--plot", "new/plot.png")
    assert (code, out) == (0, "new/plot.png\n")
    with Image.open("new/plot.png") as plot:
        colours = {colour for _, colour in plot.convert("RGB").getcolors(maxcolors=2**24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours  # a line of each


def test_reconstruct(run, tiny: str) -> None:
    run("sample", "--model", tiny, "--classes", "1", "2", "--count", "1", "--steps", "1")
    code, out, err = run("reconstruct", "out/1-seed0.png", "out/2-seed0.png", "--model", tiny)
    assert (code, err) == (0, "")
    assert "2 of 1 x 32 x 32, latents 4 x 8 x 8 (4 times fewer numbers)" in out
    assert Path("out/1-seed0-reconstructed.png").is_file()
    # PSNR from the files themselves
    values = []
    for name in ("1-seed0", "2-seed0"):
        pair = []
        for path in (f"out/{name}.png", f"out/{name}-reconstructed.png"):
            with Image.open(path) as image:
                pair.append(torch.tensor(list(image.tobytes())).double())
        values.append(10 * torch.log10(255**2 / (pair[0] - pair[1]).square().mean()).item())
    printed = re.search(r"PSNR +([\d.]+) dB on average, ([\d.]+) dB at worst", out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(sum(values) / 2, abs=0.1)
    assert float(printed[2]) == pytest.approx(min(values), abs=0.1)
    similarity = re.search(r"SSIM +(-?[\d.]+) on average, (-?[\d.]+) at worst", out)
    assert similarity is not None
    assert -1 <= float(similarity[2]) <= float(similarity[1]) < 1


def test_options_of_loading_in_commands_that_do_not_sample(
    run, tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_bundle(tmp_path_factory.mktemp("bundles") / "other", seed=1)
    run("sample", "--model", tiny, "--classes", "1", "--count", "1", "--steps", "1")
    made = []
    for out, words in (
        ("mine", ("--model", tiny)),
        ("theirs", ("--model", other)),
        ("mixed", ("--model", tiny, "--vae", f"{other}")),
    ):
        code, _, err = run("reconstruct", "out/1-seed0.png", *words, "--out", out)
        assert (code, err) == (0, "")
        with Image.open(f"{out}/1-seed0-reconstructed.png") as image:
            made.append(image.tobytes())
    assert made[2] == made[1] != made[0]

    unet = UNet(replace(UNET, num_classes=None, null_class=False, channel_mult=(1, 1)))
    shapes = {key: torch.zeros(shape) for key, shape in openai_shapes(unet).items()}
    torch.save(shapes, "unet.pt")
    heads = ("--num-heads", "4", "--num-heads-upsample", "2", "--norm-groups", "4")
    code, out, err = run("info", "unet.pt", *heads, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["provenance"]["assumed"]["schedule"]["kind"] == "linear"
    config = report["config"]["denoiser"]
    assert (config["num_heads"], config["num_heads_upsample"]) == (4, 2)
    code, _, err = run("info", "unet.pt", "--norm-groups", "4", "--strict")
    assert (code, err.count("\n")) == (2, 1)
    assert "nor a published model determines" in err
    assert "on the command line --qkv-order --num-heads --num-heads-upsample" in err


def openai_shapes(unet: UNet) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a U-Net's file in OpenAI's layout."""
    shapes: dict[str, tuple[int, ...]] = {}
    state = unet.state_dict()
    for ours, theirs in openai.names(unet).items():
        shapes[theirs[0]] = tuple(state[ours].shape)
    for key, shape in shapes.items():  # attention's linear layers are convolutions there
        if key.endswith(("qkv.weight", "proj_out.weight")):
            shapes[key] = (*shape, 1)
    return shapes


SMALL_RUN = (
    *("--model.model-channels", "8", "--model.norm-groups", "4", "--optimization.steps", "2"),
    *("--optimization.batch-size", "4", "--optimization.warmup-steps", "0"),
    *("--output.preview-every", "0", "--output.save-every", "0", "--output.no-tensorboard"),
    *("--loss.adversarial-weight", "0", "--output.folder", "runs/small"),
)


def test_train_dry_run_prints_the_config_and_writes_nothing(run, tmp_path: Path) -> None:
    words = ("train", "diffusion", "--prediction", "x0", "--optimization.steps", "777", "--dry-run")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    config = json.JSONDecoder().raw_decode(out)[0]
    assert (config["prediction"], config["optimization"]["steps"]) == ("x0", 777)
    assert list(tmp_path.iterdir()) == []


def test_train_saves_resumes_and_starts_from_a_config(run) -> None:
    code, out, err = run("train", "autoencoder", *SMALL_RUN)
    assert (code, err) == (0, "")
    assert "runs/small/model" in out
    assert run("info", "runs/small")[0] == 0

    code, _, err = run("train", "autoencoder", *SMALL_RUN)
    assert code == 2
    assert "already holds a run" in err

    # The run's own config is the start of --resume: no need to say it all again.
    code, _, err = run("train", "autoencoder", "--resume", "--output.folder", "runs/small")
    assert (code, err) == (0, "")

    code, out, _ = run("train", "autoencoder", "--config", "runs/small", "--seed", "3", "--dry-run")
    config = json.JSONDecoder().raw_decode(out)[0]
    assert (config["seed"], config["model"]["model_channels"]) == (3, 8)

    code, _, err = run("train", "diffusion", "--config", "runs/small/config.json")
    assert code == 2
    assert "is not the config of a run of this stage" in err


def scores(accuracy: float) -> Scores:
    return Scores(
        count=360,
        accuracy=accuracy,
        class_accuracy=(accuracy,) * 10,
        frechet=2.0,
        frechet_equal=2.0,
        precision=0.9,
        recall=0.8,
        near_copies=0.05,
        nearest_median=5.0,
        nearest_5_percent=3.0,
    )


@pytest.mark.parametrize(("accuracy", "expected"), [(0.97, 0), (0.94, 1)])
def test_evaluate_fails_when_a_limit_is_missed(
    accuracy: float, expected: int, run, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation has its own tests; here its result is fixed."""
    asked = {}

    def measured(model: Model, **kwargs: object) -> SimpleNamespace:
        asked.update(kwargs, weights=model.weights_hash)
        results = Results(
            samples=scores(accuracy),
            held_out=scores(0.98),
            near_copy_limit=0.5,
            frechet_ratio=1.0,
            frechet_equal_ratio=1.25,
            feature_dim=20,
            training_images=1437,
        )
        return SimpleNamespace(results=results, inception=None)

    def report(_: object, folder: Path, *, command: str) -> Path:
        asked["command"] = command
        return folder / "results.md"

    monkeypatch.setattr("fastdiff.evaluation.evaluate", measured)
    monkeypatch.setattr("fastdiff.evaluation.write_report", report)
    words = ("evaluate", "--model", tiny, "--count", "360", "--steps", "7", "--seed", "4")
    code, out, err = run(*words)
    assert (code, err) == (expected, "")
    assert (asked["count"], asked["first_seed"], asked["settings"].steps) == (360, 4, 7)
    assert asked["command"] == f"fastdiff {shlex.join(words)}"
    assert re.search(rf"^class accuracy +{accuracy:.1%} +98.0% +>= 95%$", out, re.MULTILINE)
    assert re.search(r"^ +times the floor +1.25 +1 +<= 3$", out, re.MULTILINE)
    verdict = "missed: class accuracy 94.0%" if expected else "all limits are met"
    assert re.search(rf"^verdict +{verdict}", out, re.MULTILINE)
