"""Whatever a file contains in any field, messages about it are printable and short."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.open import load
from fastdiff.cli import again, main
from fastdiff.cli.info import MAX_VALUE
from fastdiff.cli.train import _read
from fastdiff.data import DataConfig, open_dataset
from fastdiff.files import MAX_MESSAGE, message_line, one_line_errors
from fastdiff.images import RECIPE_KEY, read_recipe, save_png
from fastdiff.models.text import encode_prompt
from fastdiff.training import DiffusionRun
from fastdiff.training.checkpoints import load_checkpoint
from tests.fuzz.mutate import NASTY, chunks_of, places, png_of
from tests.fuzz.property import Bench, broken
from tests.support.tiny import tiny_model

JSON_TARGETS = ("sharded", "bundle", "unet", "vae", "text encoder", "run's config")
AT_MOST = 60
"""Changes of a file that are tried."""


def nasty_json(text: bytes) -> Iterator[bytes]:
    """The JSON with each value, and each name, in turn replaced by something unprintable."""
    data = json.loads(text)
    for number, (container, key) in enumerate(places(data)):
        if isinstance(container[key], dict | list) and number % 2:
            continue  # half of the containers: their contents come in turn anyway
        changed = copy.deepcopy(data)
        inside, _ = list(places(changed))[number]
        inside[key] = NASTY
        yield json.dumps(changed).encode()
        if isinstance(container, dict):
            changed = copy.deepcopy(data)
            inside, _ = list(places(changed))[number]
            inside[NASTY] = inside.pop(key)
            yield json.dumps(changed).encode()


def nasty(name: str, data: bytes) -> Iterator[bytes]:
    """A file with unprintable text in each of its fields in turn."""
    if name.endswith(".png"):
        chunks = chunks_of(data)
        at = next(number for number, (kind, _) in enumerate(chunks) if kind == b"tEXt")
        key, _, text = chunks[at][1].partition(b"\0")
        for changed in nasty_json(text):
            yield png_of([*chunks[:at], (b"tEXt", key + b"\0" + changed), *chunks[at + 1 :]])
    elif name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", data[:8])
        for header in nasty_json(data[8 : 8 + length]):
            yield struct.pack("<Q", len(header)) + header + data[8 + length :]
    elif name.endswith(".json"):
        yield from nasty_json(data)


@pytest.mark.slow
@pytest.mark.parametrize("target", [*JSON_TARGETS, "safetensors", "recipe"])
def test_unprintable_text_in_every_field(tmp_path: Path, target: str) -> None:
    bench = Bench.make(target, tmp_path)
    named = str(bench.folder) if bench.target.names_file else ""
    tried = 0
    for name, original in bench.originals.items():
        if target in JSON_TARGETS and name.endswith(".safetensors"):
            continue  # tensors' names, by the hundred: "safetensors" has four
        changes = list(nasty(name, original))
        for changed in changes[:: len(changes) // AT_MOST + 1]:
            (bench.folder / name).write_bytes(changed)
            found = broken(bench.open, nullcontext(), named)
            assert not found, (name, tried, found)
            tried += 1
        (bench.folder / name).write_bytes(original)
    assert tried > 10


def test_a_message_is_one_printable_line_of_bounded_length() -> None:
    assert message_line("a  b\nc") == "a b c"
    assert message_line("ünï: 'a' is missing") == "ünï: 'a' is missing"
    for text in (NASTY, "\x00" * 5000, "\U000e0001" * 900, f"{'x' * 990}\x1b[0m"):
        line = message_line(f"model.pt: {text}; fetch it again")
        assert line.isprintable()
        assert len(line) <= MAX_MESSAGE
        assert line.startswith("model.pt: ")
        assert line.endswith("; fetch it again")


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"x: {NASTY}; fetch it again"),
        FileNotFoundError(f"x: {NASTY}; fetch it again"),
        OSError(28, f"x: {NASTY}; fetch it again"),
        ImportError(f"x: {NASTY}; fetch it again"),
        UnicodeDecodeError("utf-8", b"\xff\n", 0, 1, f"x: {NASTY}; fetch it again"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_their_kind(error: Exception) -> None:
    kind = ValueError if isinstance(error, UnicodeError) else type(error)
    with pytest.raises(kind) as caught, one_line_errors():
        raise error
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= MAX_MESSAGE + len("[Errno 28] ")
    assert str(caught.value).endswith("; fetch it again")
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


def _bundle(folder: Path) -> object:
    (folder / "config.json").write_text(json.dumps({"format": NASTY}))
    return load(folder)


def _picture(folder: Path) -> object:
    save_png(folder / "x.png", torch.zeros(3, 8, 8), {"recipe": NASTY})
    return again.original("sample", str(folder / "x.png"))


def _no_recipe(folder: Path) -> object:
    info = PngInfo()
    info.add_text(RECIPE_KEY, json.dumps(NASTY))
    Image.new("L", (8, 8)).save(folder / "x.png", pnginfo=info)
    return read_recipe(folder / "x.png")


def _weights(folder: Path) -> object:
    (folder / "x.index.json").write_text(json.dumps({"weight_map": {"a": "\x00\x1b[0m"}}))
    return open_weights(folder / "x.index.json")


def _checkpoint(folder: Path) -> object:
    (folder / "state.json").write_bytes(b"\xff\n\x1b[0m")
    return load_checkpoint(folder, ())


def _run(folder: Path) -> object:
    data = {"data": {NASTY: 1}, "model": NASTY, "output": {NASTY: NASTY}}
    (folder / "config.json").write_text(json.dumps(data))
    return _read(DiffusionRun, folder)


def _data(folder: Path) -> object:
    return open_dataset(DataConfig(source="folder", path=f"{folder}/\x1b[0m"))


@pytest.mark.parametrize(
    "opens",
    [_bundle, _picture, _no_recipe, _weights, _checkpoint, _run, _data],
    ids=lambda opens: opens.__name__,
)
def test_what_opens_files_has_printable_errors(
    tmp_path: Path, opens: Callable[[Path], object]
) -> None:
    """One of each: `load`, recipes, weights, checkpoints of training, configs of runs, images."""
    with pytest.raises((ValueError, OSError)) as caught:
        opens(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= MAX_MESSAGE


def test_what_commands_print_of_a_model_is_printable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of classes, provenance, and an unknown scheduler's name."""
    names = (NASTY, "zwei\n", "\x1b[31mthree", "4" * 300)
    model = tiny_model(class_names=names)
    save_bundle(model, tmp_path / "m", provenance={NASTY: NASTY, "list": [NASTY], "by": "a\tb"})
    words: tuple[Any, ...] = ("--model", str(tmp_path / "m"), "--device", "cpu", "--steps", "1")
    for command in (
        ("info", str(tmp_path / "m")),
        ("sample", *words, "--count", "1", "--out", str(tmp_path / "out")),
        ("sample", *words, "--classes", "5", "--out", str(tmp_path / "no")),
    ):
        code = main(command)
        out, err = capsys.readouterr()
        assert code == (2 if "5" in command else 0), err
        for line in (*out.splitlines(), *err.splitlines()):
            assert line.isprintable(), (command, repr(line[:300]))
            assert len(line) < MAX_VALUE * 12, (command, line[:300])
    assert len(list((tmp_path / "out").iterdir())) == 5
    text = str(load(tmp_path / "m"))
    assert all(line.isprintable() for line in text.splitlines())


def test_a_prompt_for_a_pipeline_that_is_whole(tmp_path: Path) -> None:
    """The target "pipeline" gets as far as the vectors of a prompt."""
    bench = Bench.make("pipeline", tmp_path)
    encoders = load(bench.folder / "sd1").text_encoders
    assert encode_prompt(encoders, "a (cat:1.2)").tokens.isfinite().all()
    assert not torch.equal(
        encode_prompt(encoders, "a cat").tokens, encode_prompt(encoders, "a dog").tokens
    )
