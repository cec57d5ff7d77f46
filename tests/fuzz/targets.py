"""A small valid file or folder of each format that is read, and how it is opened."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.text_encoders import read_tokenizer
from fastdiff.cli import again, options, sample
from fastdiff.cli.train import _read
from fastdiff.data import DataConfig, open_dataset
from fastdiff.generate.job import ClassJob
from fastdiff.generate.run import generate
from fastdiff.images import read_image, save_png
from fastdiff.models.text import encode_prompt
from fastdiff.training import DiffusionRun, checkpoints
from fastdiff.training.monitor import LOG_FILE, _drop_lines_after
from fastdiff.training.task import DiffusionTask
from fastdiff.training.trainer import Trainer, open_run
from tests.checkpoint import layouts
from tests.checkpoint.pipelines import pipeline
from tests.checkpoint.test_open import compvis_state
from tests.models.test_against_diffusers import ADM, peer_model
from tests.support.diffusers_models import save_folder
from tests.support.tiny import tiny_model, tiny_pixel_model
from tests.training import runs

TENSORS = {
    "model.a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(3),
    "half": torch.arange(5).half(),
    "t": torch.arange(6.0).reshape(2, 3).T.contiguous(),
}
LIMIT = 2000
"""Characters of a warning, which may name ten files."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One thing that fastdiff opens.

    Attributes:
        make: writes it into an empty folder.
        open: opens it; a failure other than ValueError, OSError and ImportError is a finding.
        files: those that are changed; all if left out.
        share: of the cases.
        names_file: whether a refusal says which file or folder is damaged.
    """

    make: Callable[[Path], object]
    open: Callable[[Path], object]
    files: tuple[str, ...] = ("**/*",)
    share: int = 1
    names_file: bool = True

    def originals(self, folder: Path) -> dict[str, bytes]:
        """Contents of the files that are changed, by name."""
        found = {path for pattern in self.files for path in folder.glob(pattern) if path.is_file()}
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)}


def _weights(name: str, **how: Any) -> Target:
    def make(folder: Path) -> None:
        if name.endswith(".safetensors"):
            save_file(TENSORS, folder / name, metadata={"title": "a model", "step": "3"})
        else:
            torch.save({"state_dict": TENSORS, "epoch": 3, "lr": 0.1}, folder / name, **how)

    def open_(folder: Path) -> None:
        opened = open_weights(folder / name)
        for key, place in opened.places.items():
            tensor = opened.tensor(key)
            assert tensor.shape == place.shape
            opened.copy_into(key, torch.empty(place.shape))

    return Target(make, open_, share=3)


def _checked(folder: Path) -> None:
    """Any bytes of a zip changed: what loads are the numbers that were saved."""
    opened = open_weights(folder / "model.zip")
    for key in opened.places:
        assert torch.equal(opened.tensor(key), TENSORS[key]), f"{key} has changed without an error"


def _openai(folder: Path) -> None:
    """A U-Net in OpenAI's names."""
    options = {**ADM, "num_class_embeds": None, "layers_per_block": 1}
    theirs = peer_model("UNet2DModel", options, torch.float32)
    state = layouts.openai_unet(theirs.state_dict(), 1, 4, "legacy")
    torch.save(state, folder / "model.pt")


def _compvis(folder: Path) -> None:
    """A whole pipeline in one file."""
    state = compvis_state("sd1", pipeline("sd1", folder / "all", torch.float32))
    shutil.rmtree(folder / "all")
    shutil.rmtree(folder / "words")
    metadata = {"modelspec.prediction_type": "v", "modelspec.title": "a model"}
    save_file(state, folder / "model.safetensors", metadata=metadata)


def _sharded(folder: Path) -> None:
    names = list(TENSORS)
    for number in range(2):
        part: dict[str, Tensor] = {key: TENSORS[key] for key in names[number::2]}
        save_file(part, folder / f"part-{number}.safetensors")
    table = {key: f"part-{index % 2}.safetensors" for index, key in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.index.json").write_text(json.dumps(index))


def _read_sharded(folder: Path) -> None:
    opened = open_weights(folder / "model.index.json")
    for key in opened.places:
        opened.tensor(key)


def _load(folder: Path) -> None:
    """What loads can be printed."""
    model = fastdiff.load(folder)
    assert all(line.isprintable() for line in str(model).splitlines()), str(model)[:2000]


def _encode(folder: Path) -> None:
    """What loads takes a prompt."""
    model = fastdiff.load(folder / "sd1")
    if model.text_encoders and model.text_encoders[0].tokenizer is not None:
        encoded = encode_prompt(model.text_encoders, "a (cat:1.2)")
        assert encoded.tokens.ndim == 3


def _component(part: str, *beside: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        saved = save_folder("sd1", folder / "all") / part
        for path in saved.iterdir():
            path.rename(folder / path.name)
        for name in beside:
            (saved.parent / name).rename(folder / Path(name).name)
        shutil.rmtree(folder / "all")

    return make


def _tokenize(folder: Path) -> None:
    words = read_tokenizer(folder)
    words("a cat")


def _picture(folder: Path) -> None:
    model = tiny_pixel_model()
    made = next(iter(generate(model, [ClassJob(label=1, seed=3)])))
    save_png(folder / "x.png", made.image, {**made.recipe, "load": {}})


def _like(folder: Path) -> None:
    original = again.original("sample", str(folder / "x.png"))
    again.options(original, sample.Sample, options.ClassOptions, classes=("1",))


def _image(name: str, **how: Any) -> Target:
    def make(folder: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        source = torch.randint(0, 256, (9, 12, 3), dtype=torch.uint8).numpy()
        Image.fromarray(source).save(folder / name, exif=exif, **how)

    return Target(make, lambda folder: read_image(folder / name))


def _shards(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(3):
            picture, target = Image.new("L", (8, 8), 50 * number), io.BytesIO()
            picture.save(target, "PNG")
            labels = {"cls": b"cat", "json": json.dumps({"label": "cat"}).encode()}
            ending = ("cls", "json")[number % 2]
            for end, data in (("png", target.getvalue()), (ending, labels[ending])):
                info = tarfile.TarInfo(f"{number}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def _images_of(source: Any, pattern: str) -> Callable[[Path], None]:
    def open_(folder: Path) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            open_dataset(DataConfig(source=source, path=str(folder / pattern), image_size=8))
        for line in (str(warning.message) for warning in caught):
            assert line.isprintable(), repr(line[:LIMIT])
            assert len(line) < LIMIT, line[:LIMIT]

    return open_


class _Run:
    """A training of two steps: its folder, and a trainer to load checkpoints with."""

    trainer: Trainer | None = None

    def make(self, folder: Path) -> None:
        torch.set_num_threads(1)
        images = runs.image_folder(folder / "images", count=4)
        run = runs.diffusion_run(images, folder / "run", optimization=runs.optimization(steps=2))
        self.trainer = Trainer(DiffusionTask(run), run)
        open_run(run, resume=False)
        for _ in range(2):
            self.trainer.step()
        self.trainer.save(folder / "run/checkpoints")
        records = [json.dumps({"step": step, "loss": 0.5, "rate": 1e-3}) for step in (1, 2)]
        (folder / "run" / LOG_FILE).write_text("\n".join(records) + "\n")

    def open(self, folder: Path) -> None:
        assert self.trainer is not None
        newest = checkpoints.latest_checkpoint(folder / "run/checkpoints")
        if newest is not None:
            self.trainer.load(newest)

    @staticmethod
    def read_log(folder: Path) -> None:
        _drop_lines_after(folder / "run" / LOG_FILE, 1)


_RUN = _Run()
TARGETS: dict[str, Target] = {
    "safetensors": _weights("model.safetensors"),
    "zip": _weights("model.pt"),
    "zip, any bytes": Target(
        lambda folder: torch.save({"state_dict": TENSORS}, folder / "model.zip"), _checked, share=2
    ),
    "legacy": _weights("model.bin", _use_new_zipfile_serialization=False),
    "sharded": Target(_sharded, _read_sharded, share=2),
    "guided-diffusion": Target(_openai, lambda folder: _load(folder / "model.pt"), share=2),
    "compvis": Target(_compvis, lambda folder: _load(folder / "model.safetensors"), share=2),
    "bundle": Target(lambda folder: save_bundle(tiny_model(), folder), _load, share=2),
    "unet": Target(_component("unet", "scheduler/scheduler_config.json"), _load, share=2),
    "scheduler": Target(
        _component("unet", "scheduler/scheduler_config.json"), _load, ("scheduler*.json",)
    ),
    "vae": Target(_component("vae"), _load, share=2),
    "text encoder": Target(_component("text_encoder"), _load, share=2),
    "tokenizer": Target(_component("tokenizer"), _tokenize, share=2),
    "pipeline": Target(
        lambda folder: save_folder("sd1", folder),
        _encode,
        ("sd1/model_index.json", "sd1/*/*.json"),
        share=2,
    ),
    "words": Target(
        lambda folder: save_folder("sd1", folder), _encode, ("sd1/t*/*.json", "sd1/t*/*.txt")
    ),
    "recipe": Target(_picture, _like, share=2),
    "run's config": Target(
        _RUN.make, lambda folder: _read(DiffusionRun, folder / "run"), ("run/config.json",), share=2
    ),
    "training checkpoint": Target(
        _RUN.make, _RUN.open, ("run/checkpoints/**/*",), share=2, names_file=False
    ),
    "log": Target(_RUN.make, _RUN.read_log, ("run/log.jsonl",)),
    "PNG": _image("x.PNG"),
    "JPEG": _image("x.jpg"),
    "WebP": _image("x.webp"),
    "TIFF": _image("x.tif"),
    "GIF": _image("x.gif"),
    "shards": Target(_shards, _images_of("shards", "a.tar")),
    "folder": Target(
        lambda folder: runs.image_folder(folder, count=2), _images_of("folder", "."), share=1
    ),
}
