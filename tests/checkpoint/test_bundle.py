"""Bundles are loaded as they were saved; damaged ones are rejected in one line and run no code."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.checkpoint.layouts import bundle as bundle_module
from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.checkpoint.model import Model
from tests.support.tiny import UNET, tiny_autoencoder, tiny_model, tiny_pixel_model, tiny_unet

UNET_FILE = "unet.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "m"
    save_bundle(tiny_model(), folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A valid bundle for tests to damage."""
    return Path(shutil.copytree(original, tmp_path / "m"))


def refused(folder: Path, message: str, kind: type[Exception] = ValueError) -> None:
    """Loading fails with one line that names the file or folder and matches."""
    with pytest.raises(kind, match=message) as caught:
        load_bundle(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    assert re.search(
        r"download (it|the file|the bundle) again|give|use|write it again|expected", text
    )


def rehash(folder: Path) -> None:
    """Put the sha256 of the changed weights into config.json, as a careful attacker would."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    for name, record in data["weights"].items():
        record["sha256"] = bundle_module._sha256(folder / name)
    path.write_text(json.dumps(data))


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file, keeping the tensors' bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_everything_comes_back(tmp_path: Path) -> None:
    autoencoder, unet = tiny_autoencoder(), tiny_unet()
    facts = {"command": "test", "steps": 3}
    model = tiny_model(autoencoder=autoencoder, denoiser=unet)
    weights_hash = save_bundle(model, tmp_path / "m", provenance=facts)
    before = torch.random.get_rng_state()
    bundle = load_bundle(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), before)  # loading draws no random numbers
    for field in dataclasses.fields(Model):
        if field.name not in ("denoiser", "autoencoder", "path", "provenance", "stored_hash"):
            assert getattr(bundle, field.name) == getattr(model, field.name), field.name
    assert bundle.provenance == {"facts": facts}
    assert bundle.weights_hash == weights_hash
    for module, loaded in ((autoencoder, bundle.autoencoder), (unet, bundle.denoiser)):
        assert loaded is not None
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        state = loaded.state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(state[key], value), key
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    y = torch.tensor([0, 4])
    assert bundle.denoiser is not None
    with torch.no_grad():
        assert torch.equal(bundle.denoiser(x, t, y=y), unet.eval()(x, t, y=y))


def test_half_precision_halves_the_file_and_comes_back_as_asked(tmp_path: Path) -> None:
    model = tiny_pixel_model()
    state = {key: value + 1 / 3 for key, value in model.denoiser.state_dict().items()}
    model.denoiser.load_state_dict(state)
    save_bundle(model, tmp_path / "full")
    save_bundle(model, tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / n / UNET_FILE).stat().st_size for n in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    unet = load_bundle(tmp_path / "half").denoiser
    assert unet is not None
    for key, value in unet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].half().float())


def test_the_hash_names_weights_and_config(tmp_path: Path) -> None:
    model = tiny_pixel_model()
    one = save_bundle(model, tmp_path / "a", provenance={"a": 1})
    assert save_bundle(model, tmp_path / "b", provenance={"b": 2}) == one
    assert save_bundle(replace(model, prediction="v"), tmp_path / "c") != one
    model.denoiser.conv_out.bias.data[0] += 1e-6
    assert save_bundle(model, tmp_path / "d") != one


def test_a_run_folder_stands_for_its_model(folder: Path) -> None:
    run = folder.parent / "run"
    run.mkdir()
    folder.rename(run / "model")
    (run / "config.json").write_text("{}")
    assert load_bundle(run).class_names == ("zero", "one", "two", "three")


@pytest.mark.parametrize("kept", [0, 5, 20, 2000, -1])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    path = folder / UNET_FILE
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "truncated")
    rehash(folder)
    refused(folder, "truncated")


def test_one_changed_bit(folder: Path) -> None:
    path = folder / UNET_FILE
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    refused(folder, "sha256 is .* config.json says")


def test_bytes_behind_the_end(folder: Path) -> None:
    with (folder / UNET_FILE).open("ab") as file:
        file.write(b"code")
    rehash(folder)
    refused(folder, "expected .* bytes according to the header, got")


class Bomb:
    """Unpickling this writes a file: the proof that code ran."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "ran")


@pytest.mark.parametrize("how", ["torch", "torch-legacy", "pickle"])
def test_a_pickle_is_not_opened(folder: Path, how: str) -> None:
    bomb = Bomb(folder / "ran")
    if how == "pickle":
        (folder / UNET_FILE).write_bytes(pickle.dumps(bomb))
    else:
        new = how == "torch"
        torch.save({"a": bomb}, folder / UNET_FILE, _use_new_zipfile_serialization=new)
    rehash(folder)
    refused(folder, "got a pickle")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10**9, 1, 0])
def test_a_header_of_absurd_length(folder: Path, length: int) -> None:
    (folder / UNET_FILE).write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    rehash(folder)
    refused(folder, f"header length of {length}")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [2**62, 2**62]}, "does not fit offsets"),
        ({"shape": [-4, -4]}, "whole numbers"),
        ({"shape": [1.5]}, "whole numbers"),
        ({"shape": "16"}, "whole numbers"),
        ({"dtype": "I64"}, "expected a tensor of F16"),
        ({"data_offsets": [0, 2**60]}, "does not fit offsets"),
        ({"data_offsets": [8]}, "does not fit offsets"),
    ],
)
def test_an_absurd_tensor(folder: Path, entry: dict[str, Any], message: str) -> None:
    with_header(folder / UNET_FILE, lambda header: header["conv_out.bias"].update(entry))
    rehash(folder)
    refused(folder, f"header is damaged.*{message}")


def test_overlapping_tensors(folder: Path) -> None:
    """Sizes and end are right, but two tensors share bytes; the format forbids it."""

    def overlap(header: dict[str, Any]) -> None:
        one, other = [e for e in header.values() if e.get("shape") == [16]][:2]
        other["data_offsets"] = one["data_offsets"]

    with_header(folder / UNET_FILE, overlap)
    rehash(folder)
    refused(folder, "not readable|damaged")


@pytest.mark.parametrize("text", [b"[1]", b"nonsense", b"[" * 100_000])
def test_a_header_that_is_no_object(folder: Path, text: bytes) -> None:
    (folder / UNET_FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    rehash(folder)
    refused(folder, "header is damaged")


def test_other_names_and_shapes(folder: Path) -> None:
    path = folder / UNET_FILE
    state = load_file(path)
    for change, message in [
        ({"stray": torch.zeros(1)}, r"0 tensors missing \(none\), 1 unknown \(stray\)"),
        ({"conv_out.bias": None}, r"1 tensors missing \(conv_out.bias\)"),
        (
            {"conv_out.bias": torch.zeros(7)},
            r"conv_out.bias has shape \(7,\), the config says \(3,\)",
        ),
    ]:
        changed = {**state, **change}
        save_file({k: v for k, v in changed.items() if v is not None}, path)
        rehash(folder)
        refused(folder, message)


def test_weights_of_another_model_are_not_read_into_memory(folder: Path) -> None:
    """The config asks for a network of terabytes: names and shapes are compared without it."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["model"]["unet"]["model_channels"] = 16 * 2**16
    path.write_text(json.dumps(data))
    refused(folder, "has shape .* the config says")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "expected format 'fastdiff bundle 1', got 'other'"),
        (lambda d: d.pop("model"), "expected an object under 'model'"),
        (lambda d: d["model"].update(size=3), "size: unknown field"),
        (
            lambda d: d["model"]["unet"].update(channel_mult=[1, "2"]),
            r"unet.channel_mult\[1\]: expe",
        ),
        (lambda d: d["model"].update(scale_factor=-1.0), "scale_factor must be positive"),
        (lambda d: d["model"].update(class_names=["a"]), "the unet has 4 classes, got 1"),
        (lambda d: d["weights"].pop(UNET_FILE), "no sha256 of unet.safetensors"),
        (lambda d: d["weights"].update({UNET_FILE: "x"}), "no sha256 of unet.safetensors"),
        (lambda d: d["weights"].update(extra="x"), "no sha256 of extra"),
        (lambda d: d["model"].update(image_size=10**9), "image_size must be at most 65536"),
        (lambda d: d["model"].update(image_channels=3), "the autoencoder has 1 image channels"),
        (lambda d: d["model"]["schedule"].update(num_timesteps=10**9), "must be at most 1000000"),
        # networks that would take for ever to build, or whose sizes do not fit into 64 bits
        (lambda d: d["model"]["unet"].update(num_res_blocks=10**9), "blocks or more"),
        (lambda d: d["model"]["autoencoder"].update(num_res_blocks=10**9), "blocks or more"),
        (lambda d: d["model"]["autoencoder"].update(channel_mult=[1] * 10**5), "blocks or more"),
        (lambda d: d["model"]["unet"].update(model_channels=16 * 10**9), "cannot be built"),
        (lambda d: d["model"]["unet"].update(in_channels=10**30), "cannot be built"),
    ],
)
def test_a_changed_config(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    refused(folder, message)


def test_a_config_that_is_no_json(folder: Path) -> None:
    for text in ("{", "[" * 100_000, "\x80"):
        (folder / "config.json").write_text(text)
        refused(folder, "not valid JSON")


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    (folder / UNET_FILE).unlink()
    refused(folder, "unet.safetensors is missing", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not a bundle", FileNotFoundError)
    refused(tmp_path / "nowhere", "no bundle at", FileNotFoundError)
    refused(folder / "config.json", "got a file")


def test_a_write_that_fails_leaves_the_old_bundle(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    broken = tiny_unet()
    broken.conv_out.bias.data[0] = float("nan")
    other = tiny_unet(replace(UNET, model_channels=32))
    other.config = UNET
    for model, message in [
        (tiny_model(denoiser=broken), "conv_out.bias is not finite"),
        (tiny_model(image_size=None), "load them with image_size="),
        (tiny_model(denoiser=other), "the config says"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_bundle(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_models_that_make_no_sense(tmp_path: Path) -> None:
    for change, message in [
        ({"image_size": 0}, "must be positive, got 0"),
        ({"autoencoder": None, "denoiser": None}, "got neither"),
        ({"schedule": None}, "needs the schedule"),
        ({"prediction": "noise"}, "got 'noise'"),
        ({"scale_factor": float("nan")}, "positive and finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_bundle(tiny_model(**change), tmp_path / "m")
    assert not any(tmp_path.iterdir())


def test_weights_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    """safetensors alone writes files that only their owner may read."""
    plain = tmp_path / "plain"
    plain.touch()
    folder = tmp_path / "bundle"
    save_bundle(tiny_model(), folder)
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, plain.stat().st_mode)


def test_a_run_s_model_is_called_after_the_run(tmp_path: Path) -> None:
    run = tmp_path / "photos"
    run.mkdir()
    save_bundle(tiny_model(), run / "model")
    assert load_bundle(run).name == load_bundle(run / "model").name == "photos"
    shutil.copytree(run / "model", tmp_path / "mine")
    assert load_bundle(tmp_path / "mine").name == "mine"
