"""Files of weights are loaded exactly; damaged or hostile ones are rejected in one line."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.checkpoint import weights as weights_module
from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.open import load

TENSORS: dict[str, Tensor] = {
    "a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(7, generator=torch.Generator().manual_seed(1)).half(),
    "brain": torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "wide": torch.randn(5, generator=torch.Generator().manual_seed(3)).double(),
    "whole": torch.arange(6).view(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
}
FORMATS = ("safetensors", "zip", "legacy")


def write(path: Path, tensors: Any, kind: str) -> Path:
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_number_comes_back(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(weights_module, "CHUNK", 8)  # conversions in pieces
    opened = open_weights(write(tmp_path / "file.with.any.name", TENSORS, kind))
    assert opened.shapes == {key: tuple(value.shape) for key, value in TENSORS.items()}
    for key, value in TENSORS.items():
        got = opened.tensor(key)
        assert got.dtype == value.dtype
        assert torch.equal(got, value), key
        for dtype in (torch.float32, torch.float64, value.dtype):
            out = torch.full(value.shape, -1, dtype=dtype)
            opened.copy_into(key, out)
            assert torch.equal(out, value.to(dtype)), key


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_views_and_shared_storage(tmp_path: Path, kind: str) -> None:
    """Transposed, cut out of a larger tensor, twice the same: as torch.save keeps them."""
    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": whole.T,
        "columns": whole[:, 1:3],
        "row": whole[2],
        "steps": whole[::2, ::3],
        "parameter": torch.nn.Parameter(whole),
    }
    root = OrderedDict(state_dict=OrderedDict(tensors), epoch=3, name="x", steps=[{1: {2.5}}])
    opened = open_weights(write(tmp_path / "x", root, kind))
    assert opened.facts == {"epoch": 3, "name": "x"}
    for key, value in tensors.items():
        assert torch.equal(opened.tensor(key), value), key
        out = torch.empty(value.shape, dtype=torch.float64)
        opened.copy_into(key, out)
        assert torch.equal(out, value.double()), key


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_what_trainers_leave_beside_the_weights_is_not_looked_into(
    tmp_path: Path, kind: str
) -> None:
    root = {"state_dict": TENSORS, "loss": np.float64(0.5), "seen": {1, 2}, "order": OrderedDict()}
    root["hyper_parameters"] = {"dtype": torch.bfloat16, "data": Path("images")}
    opened = open_weights(write(tmp_path / "x", root, kind))
    assert opened.places.keys() == TENSORS.keys()


class Code:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, kind: str, protocol: int) -> None:
    target = tmp_path / "ran"
    for code in (
        Code(os.system, f"touch {target}"),
        Code(eval, f"open({str(target)!r}, 'w')"),
        Code(getattr, Path(target), "touch"),
        Code(Path.touch, target),
    ):
        path = tmp_path / "x.ckpt"
        torch.save(
            {"state_dict": TENSORS, "callbacks": code},
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=kind == "zip",
        )
        refused(path, "could run code; no code was run|does not occur")
        assert not target.exists()


def test_shards(tmp_path: Path) -> None:
    keys = list(TENSORS)
    parts = {"one.safetensors": keys[:3], "two.bin": keys[3:]}
    for name, part in parts.items():
        kind = "safetensors" if name.endswith("s") else "zip"
        write(tmp_path / name, {key: TENSORS[key] for key in part}, kind)
    index = tmp_path / "model.safetensors.index.json"
    table = {key: name for name, part in parts.items() for key in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    opened = open_weights(index)
    assert all(torch.equal(opened.tensor(key), value) for key, value in TENSORS.items())

    def changed(**change: Any) -> None:
        index.write_text(json.dumps({"weight_map": {**table, **change}}))

    changed(stray="one.safetensors")
    with pytest.raises(ValueError, match=r"its tensors are not those of .*stray"):
        open_weights(index)
    for outside in ("../one.safetensors", str(tmp_path / "one.safetensors"), "..", index.name):
        changed(stray=outside)
        refused(index, "must be a file in the folder of the index")
    changed(stray="three.safetensors")
    with pytest.raises(FileNotFoundError, match=r"three\.safetensors is missing: .* 1 tensors"):
        open_weights(index)
    for text in ("[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{", "[" * 10**5):
        index.write_text(text)
        refused(index, "expected|not valid JSON")


def with_header(path: Path, change: Any) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = change(header) or json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["half"].update(data_offsets=[0, 2**60]), "does not fit offsets"),
        (lambda h: h["half"].update(shape=[2**62, 2**62]), "does not fit offsets"),
        (lambda h: h["half"].update(shape=[-7]), "whole numbers"),
        (lambda h: h["half"].update(shape=[7.0]), "whole numbers"),
        (lambda h: h["half"].update(shape=[True] * 7), "whole numbers"),
        (lambda h: h["half"].update(dtype="F4"), "expected a tensor of"),
        (lambda h: h["half"].update(dtype=["F32"]), "expected a tensor of"),
        (lambda h: h.update(more={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}), "overlap"),
        (lambda h: h.pop("wide") and None, "overlap or leave a gap|promises"),
        (lambda h: json.dumps(h)[:-1].encode() + b',"half":{}}', "half occurs twice"),
        (lambda h: b"[" * 10**5, "damaged"),
        (lambda h: b"\xff\xfe" * 8, "damaged"),
    ],
    ids=range(12),
)
def test_a_header_that_lies(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path / "x", TENSORS, "safetensors")
    with_header(path, change)
    refused(path, message)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file(tmp_path: Path, kind: str) -> None:
    whole = write(tmp_path / "x", TENSORS, kind).read_bytes()
    for kept in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:kept])
        refused(tmp_path / "x", "truncated|not readable|lies outside|expected")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "x", TENSORS, "safetensors")
    opened = open_weights(path)
    path.write_bytes(path.read_bytes()[:-16])
    last = max(opened.places, key=lambda key: opened.places[key].offset)
    with pytest.raises(ValueError, match="the file ends inside a tensor"):
        opened.tensor(last)


def test_sizes_beyond_the_storage_and_compressed_members(tmp_path: Path) -> None:
    """Strides of 0 ask for any size out of one number, compression too: neither is believed."""
    path = tmp_path / "x"
    for kind in ("zip", "legacy"):
        write(path, {"a": torch.zeros(1).expand(1000, 1000)}, kind)
        refused(path, "lies outside its storage of 1")
    write(path, TENSORS, "zip")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refused(path, "compressed")


def test_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"<html>not found</html>")
    refused(path, "expected safetensors or a file of torch.save")
    torch.save([torch.zeros(3)], path)
    refused(path, "expected a dictionary of tensors")
    torch.save({1: torch.zeros(3)}, path)
    refused(path, "expected a dictionary of tensors")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(path, r"contains a data\.pkl; got one that contains a\.txt")
    with pytest.raises(FileNotFoundError, match="is missing"):
        open_weights(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="not a file"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + bytes(40), "got GGUF; download the safetensors"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "got HDF5"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer, .* git lfs pull",
        ),
        (b"<!DOCTYPE html><html>sign in</html>", "got a web page; the address wants a login"),
        (b"", "the file is empty; download it again"),
        (pickle.dumps([1, 2, 3]), "got another pickle, which contains a list of 3"),
        (
            pickle.dumps({"lr": 0.1, "x": 2}),
            "which contains a dictionary of other things under lr, x",
        ),
        (pickle.dumps(None), "which contains a single NoneType"),
        (pickle.dumps({"a": 1}, protocol=0), "got a pickle in text form"),
        (
            pickle.dumps(frozenset([1])),
            "the instruction FROZENSET, which torch.save never",
        ),
        (b"\x80\x02e.", r"instruction 1 \(APPENDS\) needs a value that no earlier one left"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:24],
)
def test_whole_files_of_something_else_say_what_they_are(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """Downloading such a file again would not help."""
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path / "x.bin", message)


def test_a_flipped_bit_in_a_tensor_is_seen(tmp_path: Path) -> None:
    """The zip carries a checksum of each storage; it is compared once, when a number is read."""
    path = write(tmp_path / "x.pt", TENSORS, "zip")
    opened = open_weights(path)
    place = opened.places["a.weight"]
    raw = bytearray(path.read_bytes())
    raw[place.offset + 7] ^= 0x40  # the exponent of the second number
    path.write_bytes(raw)
    damaged = open_weights(path)
    assert torch.equal(damaged.tensor("whole"), TENSORS["whole"]), "others can be read"
    for part in (damaged, damaged.renamed({"new": "a.weight"})):
        with pytest.raises(ValueError, match=r"x.pt: damaged: the checksum of the 48 bytes from"):
            part.tensor(next(iter(part.places)) if "new" in part.places else "a.weight")
    with pytest.raises(ValueError, match="damaged: the checksum"):
        open_weights(path).copy_into("a.weight", torch.empty(3, 4, dtype=torch.float64))


def test_a_flipped_bit_in_the_names_is_seen(tmp_path: Path) -> None:
    """The pickle has a checksum too, so a damaged name of a tensor is noticed."""
    path = write(tmp_path / "x.pt", TENSORS, "zip")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"a.weight", b"b.weight", 1))
    refused(path, r"the checksum of x/data\.pkl does not match")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    """torch writes zeros in their place."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path / "x.pt", TENSORS, "zip")
    finally:
        torch.serialization.set_crc32_options(before)
    opened = open_weights(path)
    for key, value in TENSORS.items():
        assert torch.equal(opened.tensor(key), value), key


NASTY = "\x1b[31mred\nnext line" + "x" * 200_000


@pytest.mark.parametrize("kind", FORMATS)
def test_names_of_a_refused_file_are_escaped_and_cut(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "x.bin", {NASTY: torch.zeros(2)}, kind)
    with pytest.raises(ValueError, match="known layout") as caught:
        load(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert r"\x1b[31mred\nnext line" in message


def test_names_in_damaged_headers_are_escaped_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({NASTY: {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(7))
    with pytest.raises(ValueError, match="does not fit offsets") as caught:
        open_weights(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
