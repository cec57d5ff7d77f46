"""Files made to do harm: the published families, a test each.

Whatever they ask for, nothing is run (an audit hook watches), nothing takes seconds or gigabytes,
and the file is refused with one line, or opened with what it holds besides.
"""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

import fastdiff
from fastdiff.checkpoint.formats import open_weights
from fastdiff.data import DataConfig, open_dataset
from tests.checkpoint.hostile import archive, code, number, numpy_scalar, tensor, text
from tests.fuzz.mutate import zip_of
from tests.fuzz.property import Watch, bounded_memory, broken

FAMILIES = tuple(code(Path("x")))
TORCH = """
import sys, warnings
import torch
from pathlib import Path
warnings.simplefilter("ignore")
for path in map(Path, sys.argv[1:]):
    try:
        torch.load(path, weights_only=False)
    except Exception:
        pass
"""


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def refused(path: Path, watch: Watch | None = None) -> str:
    """Check that a file is rejected in one line; returns the message."""
    messages: list[str] = []

    def opens() -> None:
        try:
            open_weights(path)
        except ValueError as error:
            messages.append(str(error))
            raise

    with bounded_memory():
        assert not broken(opens, watch.over(path.parent) if watch else nullcontext(), str(path))
    assert messages, f"{path.name} was opened"
    return messages[0]


def legacy(pickled: bytes) -> bytes:
    """A file in the format of torch.save before 1.6 with this pickle as its object."""
    target = io.BytesIO()
    torch.save({"x": None}, target, _use_new_zipfile_serialization=False)
    whole = target.getvalue()
    stops = [at for at in range(len(whole)) if whole[at : at + 3] == b".\x80\x02"]
    return whole[: stops[2] + 1] + pickled + whole[stops[3] + 1 :]


def test_the_families_are_hostile(tmp_path: Path) -> None:
    """torch.load runs each of them if it trusts them: the files of the next test do harm."""
    canaries = {}
    for name in FAMILIES:
        place = name.replace(" ", "-")
        canaries[name] = tmp_path / f"{place}.ran"
        (tmp_path / f"{place}.pt").write_bytes(archive(code(canaries[name])[name]))
    files = map(str, sorted(tmp_path.glob("*.pt")))
    subprocess.run([sys.executable, "-c", TORCH, *files], check=True, capture_output=True)
    assert [name for name, canary in canaries.items() if not canary.exists()] == []


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("family", FAMILIES)
def test_code_never_runs(tmp_path: Path, watch: Watch, family: str, kind: str) -> None:
    path, canary = tmp_path / "x.ckpt", tmp_path / "ran"
    pickled = code(canary)[family]
    wrap = {"zip": archive, "legacy": legacy, "bare": lambda data: data}[kind]
    path.write_bytes(wrap(pickled))
    refused(path, watch)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_objects_that_are_kept_are_not_looked_into(tmp_path: Path, watch: Watch, kind: str) -> None:
    """A numpy scalar contains another pickle; a trainer's object can be of any class."""
    path, canary = tmp_path / "x.ckpt", tmp_path / "ran"
    scalar = numpy_scalar(code(canary)["os.system"])
    trainer = b"cpytorch_lightning.cli\nRun\n" + text(f"touch {canary}") + b"\x85R"
    beside = text("beside") + scalar + b"s" + text("trainer") + trainer + b"s."
    path.write_bytes({"zip": archive, "legacy": legacy}[kind](b"\x80\x02}" + beside))
    refused(path, watch)  # it holds no tensor
    assert not canary.exists()
    assert "pytorch_lightning" not in sys.modules
    path.write_bytes(archive(tensor()[:-1] + beside))
    assert open_weights(path).places.keys() == {"a"}
    assert not canary.exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"shape": (2**38,), "numel": 2**38}, "lies outside its storage"),
        ({"numel": 2**62, "shape": (2**61,)}, "lies outside its storage"),
        ({"offset": 1}, "lies outside its storage"),
        ({"offset": -1}, "without storage, offset, sizes and strides"),
        ({"stride": (-1,)}, "without storage, offset, sizes and strides"),
        ({"shape": (-6,)}, "without storage, offset, sizes and strides"),
        ({"shape": (6.0,)}, "without storage, offset, sizes and strides"),
        ({"shape": (True,)}, "without storage, offset, sizes and strides"),
        ({"numel": -6}, "a storage of kind"),
        ({"shape": (3, 2)}, "different numbers of sizes and strides"),
        ({"shape": (2**62, 2**62), "stride": (1, 1)}, "size exceeds 64 bits"),
        ({"shape": (1,) * 65, "stride": (1,) * 65}, "too many"),
        ({"shape": (6,), "stride": (2**62,)}, "lies outside its storage"),
        ({"shape": (1000,), "stride": (0,)}, "lies outside its storage"),
        ({"key": "../../../etc/passwd"}, "damaged"),
        ({"key": "/etc/passwd"}, "damaged"),
        ({"key": "\x1b[31m" + "x" * 100_000}, "damaged"),
    ],
    ids=str,
)
def test_sizes_that_lie(tmp_path: Path, watch: Watch, sizes: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive(tensor(**sizes)))
    assert message in refused(path, watch)


def test_the_same_tensor_without_a_lie_opens(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive(tensor()))
    assert torch.equal(open_weights(path).tensor("a"), torch.arange(6.0))


def test_pickles_that_cost_much(tmp_path: Path) -> None:
    """A few bytes that ask for gigabytes or hours."""
    memo = b"\x80\x02]r\xff\xff\xff\x7f."  # LONG_BINPUT at 2^31: an array of that size in C
    laughs = b"\x80\x04)\x94"  # a tuple of 2^200 elements
    laughs += b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(200))
    rebuild = b"(" + b"K\x01" * 10**6 + b"t\x94ctorch._utils\n_rebuild_parameter\n\x94"
    lists = b"\x80\x02]q\x00" + b"".join(
        b"]q%ch%ca0h%ch%ca0" % (n, n - 1, n, n - 1) for n in range(1, 200)
    )
    pickles = {
        "memo": memo,
        "lists of lists": lists + b"h\xc7.",
        "DUP": b"\x80\x02]" + b"2" * 10**6 + b"t.",
        "a string of 2^62": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
        "bytes of 2^31": b"\x80\x03B" + struct.pack("<I", 2**31) + b"x.",
        "a number of 2^31 bytes": b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"x.",
        "a number of 10^6 digits": b"\x80\x02I" + b"9" * 10**6 + b"\n.",
        "a key that is its own": b"\x80\x02}q\x00h\x00h\x00s.",
        "a list in itself": b"\x80\x02]q\x00h\x00a.",
        "as a key": laughs.replace(b"\x80\x04", b"\x80\x04}", 1) + b"K\x01s.",
        "as a name": laughs + b"\x8c\x01x\x93.",
        "as sizes": laughs + b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00h\xc8h\xc8tR.",
        "long calls": b"\x80\x04" + rebuild + b"h\x01h\x00R0" * 10**5 + b"}.",
        "many objects": b"\x80\x02" + b"}" * (15 * 2**20) + b".",
        "marks": b"\x80\x02" + b"(" * 10**6 + b".",
        "an extension": b"\x80\x02\x82\x01.",
        "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
        "a buffer": b"\x80\x05\x97.",
    }
    for name, raw in pickles.items():
        path = tmp_path / name
        path.write_bytes(archive(raw))
        refused(path)


def test_persistent_ids_that_are_none(tmp_path: Path, watch: Watch) -> None:
    path = tmp_path / "x.pt"
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    for words in (
        *(b"N", b"]", text("storage"), b")", number(0)),
        b"(" + text("module") + storage[1:] + number(6) + b"t",
        storage + b"t",
        storage + number(6) + b"(" + text("0") + number(0) + number(6) + b"tt",  # a view, as of 0.3
        storage.replace(b"ctorch\nFloatStorage\n", b"cbuiltins\nint\n") + number(6) + b"t",
        storage.replace(b"ctorch\nFloatStorage\n", text("FloatStorage")) + number(6) + b"t",
        storage.replace(text("0"), number(0)) + number(6) + b"t",
    ):
        path.write_bytes(archive(b"\x80\x02}" + text("a") + words + b"Qs."))
        refused(path, watch)
    path.write_bytes(archive(b"\x80\x02}" + text("a") + b"Pstorage\ns."))
    assert "instruction PERSID" in refused(path, watch)


def test_archives_that_lie(tmp_path: Path, watch: Watch) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(zipfile.ZipInfo("archive/data.pkl"), b"\x80\x02}.")
        made.writestr("archive/byteorder", bytes(2**20))
    assert "compressed" in refused(path, watch)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:  # a zip bomb: 1000 to 1
        made.writestr("archive/data.pkl", bytes(2**26))
    assert "compressed" in refused(path, watch)
    path.write_bytes(archive(b"\x80\x02}" + b"N0" * 2**23 + b"."))
    assert "expected a data.pkl of at most" in refused(path, watch)
    path.write_bytes(archive(tensor(), byteorder=b"big"))
    assert "not little-endian" in refused(path, watch)
    numbers = torch.zeros(10_000)
    torch.save({f"t{index}": numbers for index in range(100)}, path)
    assert "got 4000000 bytes, because they share storage" in refused(path, watch)


def test_names_in_an_archive_lead_nowhere(tmp_path: Path, watch: Watch) -> None:
    """Absolute names, and names with .. in them: members are read where they lie, not unpacked."""
    path = tmp_path / "x.pt"
    storage = torch.arange(6.0).numpy().tobytes()
    for root in ("..", "/tmp", "/", "C:\\", "../" * 20 + "etc"):
        path.write_bytes(zip_of({f"{root}/data.pkl": tensor(), f"{root}/data/0": storage}))
        assert not broken(lambda: open_weights(path), watch.over(tmp_path), str(path))
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_a_name_that_stands_twice_in_an_archive(tmp_path: Path, watch: Watch) -> None:
    """Some readers would use the first, others the last."""
    path, target = tmp_path / "x.pt", io.BytesIO()
    with zipfile.ZipFile(target, "w") as made:
        made.writestr("archive/data.pkl", tensor())
        made.writestr("archive/data/0", torch.arange(6.0).numpy().tobytes())
        with pytest.warns(UserWarning, match="Duplicate"):
            made.writestr("archive/data/0", torch.zeros(6).numpy().tobytes())
    path.write_bytes(target.getvalue())
    assert "archive/data/0 occurs twice" in refused(path, watch)


def test_a_member_of_two_names(tmp_path: Path, watch: Watch) -> None:
    """The name in the central directory differs from that of the member itself."""
    path = tmp_path / "x.pt"
    raw = archive(tensor())
    at = raw.index(b"archive/data/0")
    path.write_bytes(raw[:at] + b"archive/data/9" + raw[at + 14 :])
    assert "archive/data/0 has another name in its local header" in refused(path, watch)


def test_an_encrypted_member(tmp_path: Path, watch: Watch) -> None:
    raw = bytearray(archive(tensor()))
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 8] |= 1
    path = tmp_path / "x.pt"
    path.write_bytes(raw)
    assert "encrypted" in refused(path, watch)


def test_two_tensors_in_the_same_bytes(tmp_path: Path) -> None:
    """Members that overlap give both tensors the bytes that lie there, and no more memory."""
    path = tmp_path / "x.pt"
    second = tensor(key="1")[3:].replace(text("a"), text("b"))
    storage = torch.arange(6.0).numpy().tobytes()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as made:
        made.writestr("archive/data.pkl", tensor()[:-1] + second)
        made.writestr("archive/data/0", storage)
        made.writestr("archive/data/1", storage)
        made.filelist[2].header_offset = made.filelist[1].header_offset
    path.write_bytes(target.getvalue())
    assert "another name in its local header" in refused(path)


def test_two_formats_in_one_file(tmp_path: Path, watch: Watch) -> None:
    """A pickle in front of a zip, and a zip behind safetensors: the first bytes decide."""
    path, canary = tmp_path / "x", tmp_path / "ran"
    pickled = code(canary)["os.system"]
    path.write_bytes(pickled + archive(tensor()))
    refused(path, watch)
    path.write_bytes(safetensors_bytes({"a": torch.zeros(2)}) + archive(pickled))
    assert "bytes according to the header, got" in refused(path, watch)
    assert not canary.exists()


def test_tar_files_with_links(tmp_path: Path, watch: Watch) -> None:
    """torch's format before 0.1.10 is refused; of shards only plain files are read."""
    secret = tmp_path / "secret.png"
    Image.new("L", (8, 8), 7).save(secret)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as made:
        for name, kind in (("0.png", tarfile.SYMTYPE), ("1.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            made.addfile(info)
        for name, kind in (("2.png", tarfile.FIFOTYPE), ("3.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            made.addfile(info)
    refused(path, watch)
    with pytest.raises(ValueError, match=r"no image could be read from .*: it contains none"):
        open_dataset(DataConfig(source="shards", path=str(path)))
    with tarfile.open(path, "w") as made:
        for name in ("../../4.png", "/5.png"):
            made.add(secret, arcname=name)
    with watch.over(tmp_path):
        assert len(open_dataset(DataConfig(source="shards", path=str(path), image_size=8))) == 2
    assert {entry.name for entry in tmp_path.iterdir()} == {"secret.png", "x.tar"}


def test_hostile_headers(tmp_path: Path) -> None:
    """A name that occurs twice among many; more sizes than can be multiplied."""
    path = tmp_path / "x"
    names = b",".join(b'"%d":{}' % number for number in range(100_000))
    sizes = json.dumps({"dtype": "F32", "shape": [2**63 - 1] * 300_000, "data_offsets": [0, 4]})
    for header, message in (
        (b"{" + names + b',"z":1,"z":2}', "z occurs twice"),
        (b'{"a":' + sizes.encode() + b"}", "got 300000"),
    ):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        assert message in refused(path)


@pytest.mark.slow
def test_tensors_of_any_name_and_shape(tmp_path: Path) -> None:
    """Whole checkpoints with renamed, missing and mis-shaped tensors."""
    keys = {
        "time_embed.0.weight": (128, 32),
        "time_embed.2.weight": (128, 128),
        "input_blocks.0.0.weight": (32, 3, 3, 3),
        "input_blocks.1.0.in_layers.2.weight": (32, 32, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (32, 128),
        "output_blocks.0.0.in_layers.0.weight": (64,),
        "output_blocks.1.0.in_layers.0.weight": (64,),
        "out.2.weight": (3, 32, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (32,),
        "encoder.down.0.block.0.conv1.weight": (32, 32, 3, 3),
        "encoder.conv_in.weight": (32, 3, 3, 3),
        "post_quant_conv.weight": (4, 4, 1, 1),
        "temb.dense.0.weight": (128, 32),
        "down.0.block.0.norm1.weight": (32,),
        "down.0.block.0.conv1.weight": (32, 32, 3, 3),
        "conv_in.weight": (32, 3, 3, 3),
        "conv_out.weight": (3, 32, 3, 3),
    }
    prefixes = ("", "", "", "model.diffusion_model.", "first_stage_model.", "model_ema.")
    path = tmp_path / "x"
    with bounded_memory():
        for number in range(400):
            rng = random.Random(number)
            chosen = [key for key in keys if rng.random() < 0.8]
            prefix = rng.choice(prefixes)
            state = {}
            for key in chosen:
                shape = [rng.choice((size, size, size, 0, 1, 7)) for size in keys[key]]
                if rng.random() < 0.05:
                    shape = shape[:-1]
                state[prefix + key] = torch.zeros(shape)
            path.write_bytes(safetensors_bytes(state))
            assert not broken(lambda: fastdiff.load(path), nullcontext(), str(path)), number
