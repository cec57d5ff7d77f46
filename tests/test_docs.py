"""The documentation names files that exist, its Python runs, and its commands can be read."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file

from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.cli import main
from fastdiff.images import save_png
from fastdiff.models.classifier import Classifier
from fastdiff.models.presets import CLASSIFIERS
from fastdiff.training import TRAINING_PRESETS, DiffusionRun
from tests.support.diffusers_models import save_folder
from tests.support.imports import ROOT
from tests.support.peers import import_diffusers
from tests.support.tiny import tiny_model
from tests.test_layers import LEVELS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SYSTEMS = ROOT / "docs/systems.md"
PACKAGE = ROOT / "fastdiff"


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    dead = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not dead


def missing_paths(text: str) -> list[str]:
    """Paths of Python files, and of folders in backticks, that exist neither at the root nor in the
    package; ``<op>`` matches any name."""
    files = re.findall(r"(?<![\w./<>-])[\w<>-]+(?:/[\w<>-]+)*/[\w<>]+\.py\b", text)
    folders = re.findall(r"`([\w<>-]+(?:/[\w<>-]+)*/)`", text)
    patterns = {path: re.sub(r"<\w+>", "*", path.rstrip("/")) for path in [*files, *folders]}
    return [
        path
        for path, pattern in patterns.items()
        if not any(True for base in (ROOT, PACKAGE) for _ in base.glob(pattern))
    ]


def test_systems_names_files_that_exist() -> None:
    in_a_run = ["checkpoints/", "samples/", "tensorboard/", "model/"]
    assert missing_paths(SYSTEMS.read_text()) == in_a_run
    text = '`kernels/<op>/none.py`, `kernels/<op>/cpu.py`, a["cli/no.py: x"], `lost/`, `cli/`'
    assert missing_paths(text) == ["kernels/<op>/none.py", "cli/no.py", "lost/"]


def test_systems_lists_every_room_with_its_level() -> None:
    rows = re.findall(r"^\| (\d) \| ((?:`[\w./]+`(?:, )?)+) \|", SYSTEMS.read_text(), re.M)
    listed = {
        name.removesuffix("/").removesuffix(".py"): int(level)
        for level, names in rows
        for name in re.findall(r"`([^`]+)`", names)
    }
    there = {
        name for name in LEVELS if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    }
    assert listed == {name: LEVELS[name] for name in there - {"__main__"}}


def test_the_index_lists_every_file_of_decisions() -> None:
    folder = ROOT / "docs/decisions"
    index = (folder / "README.md").read_text()
    files = {path.name for path in folder.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"^\| \[([\w.]+)\]", index, re.M)) == files


LABELS = ["Decided", "Because", "Would change if"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs/decisions").glob("[a-z]*.md")), ids=page_name)
def test_a_decision_says_why_and_what_would_change_it(page: Path) -> None:
    """Under each heading of the lowest level the three parts, in this order, and nothing else."""
    text = page.read_text()
    level = "###" if "\n### " in text else "##"
    entries = re.split(rf"^{level} (.*)$", text, flags=re.M)[1:]
    titles, bodies = entries[::2], entries[1::2]
    assert len(titles) == len(set(titles)) > 2
    for title, body in zip(titles, bodies, strict=True):
        own = re.split(r"^##? ", body, flags=re.M)[0]  # up to the next group
        assert re.findall(r"^- \*\*([^*]+)\*\*", own, re.M) == LABELS, title


def blocks(page: Path, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S))


def commands(page: Path) -> list[str]:
    return re.findall(r"^fastdiff .*$", blocks(page, "sh"), re.M)


def save_lora(pipeline: Path, path: Path) -> None:
    """A LoRA of rank 2 for one layer of the pipeline's U-Net."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    rows, columns = unet[f"{name}.weight"].shape
    down, up = torch.full((2, columns), 0.01), torch.ones(rows, 2)
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, path)


def save_controlnet(pipeline: Path, path: Path) -> None:
    """The ControlNet with which a training would begin: its zero convolutions are zero."""
    diffusers = import_diffusers("ControlNetModel", "UNet2DConditionModel")
    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet")
    diffusers.ControlNetModel.from_unet(unet).save_pretrained(path)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages speak of, small and random."""
    folder = tmp_path_factory.mktemp("things")
    save_folder("sd1", folder).rename(folder / "stable-diffusion-v1-5")
    for name in ("style", "character"):
        save_lora(folder / "stable-diffusion-v1-5", folder / f"{name}.safetensors")
    save_controlnet(folder / "stable-diffusion-v1-5", folder / "sd-controlnet-canny")
    photo = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("photo", "edges", "depth"):
        save_png(folder / f"{name}.png", photo)
    save_png(folder / "mask.png", (photo[:1] > 0).float() * 2 - 1)
    for number in range(4):
        (folder / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        save_png(folder / "photos" / "ab"[number % 2] / f"{number}.png", photo.roll(number, -1))
    save_bundle(tiny_model(), folder / "runs" / "first")
    (folder / "job.yaml").write_text("rows: rows.jsonl\n")
    digits = load_bundle("digits")
    guide = Model(
        layout="bundle",
        classifier=Classifier(CLASSIFIERS["tiny"]),
        schedule=digits.schedule,
        scale_factor=digits.scale_factor,
        image_size=32,
        image_channels=1,
    )
    save_bundle(guide, folder / "runs" / "guide")
    return folder


def small_run() -> DiffusionRun[Any]:
    run: Any = TRAINING_PRESETS["digits-diffusion"]
    return replace(
        run,
        model=replace(run.model, model_channels=16, num_res_blocks=1),
        optimization=replace(run.optimization, batch_size=2),
        preview=replace(run.preview, count=2, steps=2),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p.name != "README.md"], ids=page_name
)
def test_the_python_of_a_page_runs(
    page: Path, things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchanged, block by block, except that training is shorter and its network smaller."""
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TRAINING_PRESETS, "digits-diffusion", small_run())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = re.sub(r"\bsteps=\d{4,}", "steps=2", blocks(page, "python"))
    exec(compile(code, page.name, "exec"), {"__name__": page.stem})
    for name in re.findall(r'\.save\("(.*)"\)', code):
        assert (tmp_path / name).exists()


class _Read(BaseException):
    """The words of a command have become options."""


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=page_name)
def test_the_commands_of_a_page_can_be_read(
    page: Path, things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the moment at which they would begin to work."""
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    understand = tyro.cli

    def only_read(*args: Any, **options: Any) -> NoReturn:
        understand(*args, **options)
        raise _Read

    monkeypatch.setattr(tyro, "cli", only_read)
    for line in commands(page):
        words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
        if "--like" in words:  # reads the picture first
            words = words[: words.index("--like")]
        with pytest.raises(_Read):
            main(words)
