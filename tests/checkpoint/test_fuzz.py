"""Whatever the bytes are, a loader loads, or raises ValueError or OSError with one line.

Never another exception, never a hang, never more memory than the files are worth. Mutations are
seeded: a failure prints its number, which makes it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors_bytes

import fastdiff
from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.layouts.bundle import save_bundle
from tests.support.tiny import tiny_model

ROUNDS = 10_000
SECONDS_PER_FILE = 5.0  # of processor time
EXTRA_BYTES = 2**30
NUMBERS = [0, 1, 2, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
ALPHABET = b'0123456789"{}[],:-.eE()tRbqQ\x85\x86\x87uasN'  # of JSON and of pickles
TENSORS = {
    "model.a": torch.randn(3, 4),
    "b": torch.arange(3),
    "half": torch.randn(5).half(),
    "t": torch.randn(2, 3).T.contiguous(),
}


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """No more than a gigabyte of addresses beyond what the process has already."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutated(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """A few changes of a few bytes, most of them near the beginning."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        end = min(len(result), within or len(result)) if rng.random() < 0.8 else len(result)
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(8)
        if kind == 0:
            result[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and result:
            at = min(at, len(result) - 1)
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del result[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            result[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif kind == 4:
            size = rng.choice((1, 2, 4, 8))
            result[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        elif kind == 5:
            other = rng.randrange(max(len(result), 1))
            result[at:at] = result[other : other + rng.choice((2, 16, 128))]
        elif kind == 6:
            result[at : at + 1] = bytes([rng.choice(ALPHABET)])
        elif rng.random() < 0.3:
            del result[at:]
    return bytes(result)


def zip_of(members: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target.getvalue()


def seeds() -> dict[str, Any]:
    saved = {}
    for name, new in (("zip", True), ("legacy", False)):
        target = io.BytesIO()
        torch.save({"state_dict": TENSORS, "epoch": 3}, target, _use_new_zipfile_serialization=new)
        saved[name] = target.getvalue()
    with zipfile.ZipFile(io.BytesIO(saved["zip"])) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    return {**saved, "safetensors": safetensors_bytes(TENSORS), "members": members}


def mutant(number: int, base: dict[str, Any]) -> bytes:
    rng = random.Random(number)
    kind = ("safetensors", "zip", "legacy", "pickle", "header")[number % 5]
    if kind == "pickle":  # inside the archive, whose checksums are right again
        members = dict(base["members"])
        name = next(name for name in members if name.endswith("data.pkl"))
        members[name] = mutated(members[name], rng)
        return zip_of(members)
    if kind == "header":  # with a length that fits
        raw = base["safetensors"]
        (length,) = struct.unpack("<Q", raw[:8])
        text = mutated(raw[8 : 8 + length], rng)
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]
    return mutated(base[kind], rng, within=1024)


def loads_or_refuses(load: Any, what: str) -> bool:
    """True if it loads; a failure other than the two kinds, or a slow one, fails the test."""
    start, refusal = time.process_time(), None
    try:
        load()
    except (ValueError, OSError) as error:
        refusal = str(error)
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refusal is None or (refusal and "\n" not in refusal), f"{what}: {refusal!r}"
    assert time.process_time() - start < SECONDS_PER_FILE, what
    return refusal is None


@pytest.mark.slow
def test_mutated_files_of_weights(tmp_path: Path) -> None:
    base, path, loaded = seeds(), tmp_path / "x", 0

    def load() -> None:
        opened = open_weights(path)
        for key, place in opened.places.items():
            tensor = opened.tensor(key)
            assert tensor.shape == place.shape
            opened.copy_into(key, torch.empty(place.shape))

    with bounded_memory():
        for number in range(ROUNDS):
            path.write_bytes(mutant(number, base))
            loaded += loads_or_refuses(load, f"mutant {number}")
    assert 0.02 * ROUNDS < loaded < 0.9 * ROUNDS  # both ways are taken


@pytest.mark.slow
def test_mutated_checkpoints(tmp_path: Path) -> None:
    """Whole checkpoints: renamed, missing and mis-shaped tensors; configs of any content."""
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
            loads_or_refuses(lambda: fastdiff.load(path), f"checkpoint {number}")


@pytest.mark.slow
def test_mutated_folders(tmp_path: Path) -> None:
    """A bundle, and a U-Net's and a scheduler's config with values of any type."""
    folder = tmp_path / "m"
    save_bundle(tiny_model(), folder)
    bundle = (folder / "config.json").read_bytes()
    unet = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    values: list[Any] = [None, True, -1, 0, 3, 10**9, 10**30, 1.5, "x", [], [1], [[]], {}, {"a": 1}]
    component = tmp_path / "u"
    component.mkdir()
    (component / "diffusion_pytorch_model.safetensors").write_bytes(safetensors_bytes(TENSORS))
    scheduler = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_start": 0.1}
    with bounded_memory():
        for number in range(300):
            rng = random.Random(number)
            changed = {**unet, rng.choice(list(unet)): rng.choice(values)}
            (component / "config.json").write_text(json.dumps(changed))
            noise = {**scheduler, rng.choice(list(scheduler)): rng.choice(values)}
            (component / "scheduler_config.json").write_text(json.dumps(noise))
            if number % 3 == 0:
                raw = mutated(json.dumps(unet).encode(), rng)
                (component / "config.json").write_bytes(raw)
            loads_or_refuses(lambda: fastdiff.load(component), f"folder {number}")
            (folder / "config.json").write_bytes(mutated(bundle, rng))
            if number % 4 == 0:
                loads_or_refuses(lambda: fastdiff.load(folder), f"bundle {number}")


def test_hostile_pickles(tmp_path: Path) -> None:
    """What no random change would find."""
    deep = b"\x80\x02" + b"(" * 10 + b"]" * 10 + b"."
    memo = b"\x80\x02]r\xff\xff\xff\x7f."  # LONG_BINPUT at 2^31: an array of that size in C
    laughs = b"\x80\x04)\x94"  # a tuple of 2^200 elements
    laughs += b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(200))
    rebuild = b"(" + b"K\x01" * 10**6 + b"t\x94ctorch._utils\n_rebuild_parameter\n\x94"
    pickles = {
        "deep": deep,
        "memo": memo,
        "as a key": laughs.replace(b"\x80\x04", b"\x80\x04}", 1) + b"K\x01s.",
        "as a name": laughs + b"\x8c\x01x\x93.",
        "as sizes": laughs + b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00h\xc8h\xc8tR.",
        "long calls": b"\x80\x04" + rebuild + b"h\x01h\x00R0" * 10**5 + b"}.",
        "many objects": b"\x80\x02" + b"}" * (15 * 2**20) + b".",
        "code": pickle.dumps(print, protocol=2),
    }
    for name, raw in pickles.items():
        members = {"archive/data.pkl": raw, "archive/version": b"3\n"}
        path = tmp_path / name
        path.write_bytes(zip_of(members))
        with bounded_memory():
            assert not loads_or_refuses(lambda path=path: open_weights(path), name)


def test_hostile_archives(tmp_path: Path) -> None:
    """A byte order that is compressed, so of any size; one storage under a hundred names."""
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), b"\x80\x02}.")
        archive.writestr("archive/byteorder", bytes(2**20))
    with pytest.raises(ValueError, match="compressed"):
        open_weights(path)
    numbers = torch.zeros(10_000)
    torch.save({f"t{index}": numbers for index in range(100)}, path)
    with pytest.raises(ValueError, match="share their numbers and claim 4000000 bytes"):
        open_weights(path)


def test_hostile_headers(tmp_path: Path) -> None:
    """A name that occurs twice among many; more sizes than can be multiplied."""
    path = tmp_path / "x"
    names = b",".join(b'"%d":{}' % number for number in range(100_000))
    sizes = json.dumps({"dtype": "F32", "shape": [2**63 - 1] * 300_000, "data_offsets": [0, 4]})
    for text, message in (
        (b"{" + names + b',"z":1,"z":2}', "z occurs twice"),
        (b'{"a":' + sizes.encode() + b"}", "300000 sizes"),
    ):
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        assert not loads_or_refuses(lambda: open_weights(path), message)
        with pytest.raises(ValueError, match=message):
            open_weights(path)
