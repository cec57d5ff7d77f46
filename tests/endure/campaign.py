"""The trials of a campaign, and their counts."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.cli import main
from tests.endure.child import import_what
from tests.endure.disks import Filling, can_mount, fill
from tests.endure.kills import Row, kill
from tests.endure.pairs import (
    both_make_the_job,
    both_sample,
    one_is_saved,
    one_trains,
    pair,
    undisturbed,
)
from tests.endure.work import Work, difference, job, listing, sampling, saving, training
from tests.support.tiny import tiny_model
from tests.training import runs

Trial = Callable[[Callable[[], None]], Row]
"""Runs; it calls its argument after each process that was killed, pair, or disk."""
PAIRS, DISKS = 6, 5
"""Kinds of pairs, and of commands on a full disk."""
RARE = 4
"""Evaluating, which trains a classifier each time, meets every fourth size of the disk only."""


@dataclass(frozen=True)
class Plan:
    """How many processes are killed, how many pairs and how many sizes of disks there are."""

    kills: int
    pairs: int
    disks: int
    seed: int = 0

    @property
    def total(self) -> int:
        return self.kills + self.pairs // PAIRS * PAIRS + DISKS * self.disks + self.disks // RARE


def trials(plan: Plan, root: Path) -> Iterator[tuple[str, Trial]]:
    """(name, what to run) of each kind."""
    torch.set_num_threads(1)  # processes are forked
    images = runs.image_folder(root / "images")
    bundle = root / "bundle"
    save_bundle(tiny_model(), bundle)
    rows = root / "rows.jsonl"
    to_import = {
        "training": training(images),
        "sampling": sampling(bundle),
        "job": job(bundle, rows),
    }
    for name, work in to_import.items():
        place = root / f"{name} for its imports"
        import_what(lambda work=work, place=place: work.start(place), root / f"{name} imports")
    yield from _kills(plan, root, images, bundle)
    if plan.pairs >= PAIRS:
        yield from _pairs(plan, root, images, bundle)
    if plan.disks:
        if not can_mount(root):
            raise OSError("this process may not mount a small disk; use --disks 0")
        yield from _disks(plan, root, images, bundle)


def _kills(plan: Plan, root: Path, images: Path, bundle: Path) -> Iterator[tuple[str, Trial]]:
    rows = root / "rows.jsonl"
    works: dict[str, tuple[Work, int]] = {
        "training": (training(images), plan.kills // 3),
        "sampling": (sampling(bundle), plan.kills // 6),
        "job": (job(bundle, rows), plan.kills // 4),
        "job of two workers": (job(bundle, rows, "--workers", "2"), plan.kills // 12),
        "saving": (saving(1), 0),
    }
    rest = plan.kills - sum(count for _, count in works.values())
    for name, (work, share) in works.items():
        if count := rest if name == "saving" else share:
            how: dict[str, object] = {"count": count, "seed": plan.seed}
            if name == "saving":
                how["begin"] = saving(0).start
            if name == "job of two workers":
                how["hows"] = ("time",)
            yield name, functools.partial(_kill, name, work, root, **how)


def _kill(name: str, work: Work, root: Path, tell: Callable[[], None], **how: object) -> Row:
    return kill(name, work, root, tell=tell, **how)  # type: ignore[arg-type]


def _pairs(plan: Plan, root: Path, images: Path, bundle: Path) -> Iterator[tuple[str, Trial]]:
    count = plan.pairs // PAIRS
    train, sample, other = training(images), sampling(bundle), sampling(bundle, "--steps", "3")
    alone = {
        name: undisturbed(work, root / f"{name} alone")
        for name, work in (("train", train), ("sample", sample), ("other", other))
    }
    small = job(bundle, root / "rows.jsonl")
    made = undisturbed(small, root / "job alone")
    saves = [undisturbed(saving(seed), root / f"save {seed} alone") for seed in (0, 1)]
    wanted: dict[str, tuple[Work, Work, object, float]] = {
        "two trainings": (train, train, one_trains(train, alone["train"]), 0.3),
        "a training and its resumption": (train, train, one_trains(train, alone["train"]), 2.0),
        "two samplings of one recipe": (sample, sample, both_sample(alone["sample"]), 0.3),
        "two samplings": (sample, other, both_sample(alone["sample"], alone["other"]), 0.3),
        "two jobs": (small, small, both_make_the_job(small, made), 0.3),
        "two savings": (saving(0), saving(1), one_is_saved(*saves), 0.02),
    }
    for name, (first, second, judge, apart) in wanted.items():

        def run(
            tell: Callable[[], None],
            name: str = name,
            works: tuple[Work, Work] = (first, second),
            judge: object = judge,
            apart: float = apart,
        ) -> Row:
            how = {"count": count, "judge": judge, "apart": apart, "seed": plan.seed}
            return pair(name, *works, root, tell=tell, **how)  # type: ignore[arg-type]

        yield name, run


def _disks(plan: Plan, root: Path, images: Path, bundle: Path) -> Iterator[tuple[str, Trial]]:
    train = training(images)
    config = root / "run.json"
    run = runs.with_output(runs.diffusion_run(images, Path("run")), save_every=1, keep=2)
    config.write_text(json.dumps(run.to_json()))

    def train_command(folder: Path) -> int:
        torch.set_num_threads(1)
        words = ["train", "diffusion", "--output.folder", str(folder)]
        resume = (folder / "config.json").exists()
        return main([*words, *(["--resume"] if resume else ["--config", str(config)])])

    def convert(folder: Path) -> int:
        return main(["convert", str(bundle), str(folder / "model"), "--to", "bundle"])

    def reconstruct(folder: Path) -> int:
        pictures = sorted(map(str, images.rglob("*.png")))[:3]
        model = ["--model", str(bundle), "--device", "cpu"]
        return main(["reconstruct", *pictures, *model, "--out", str(folder)])

    def evaluate(folder: Path) -> int:
        os.chdir(folder)  # the report names the folder as it was given
        code = main(["evaluate", "--count", "360", "--steps", "1", "--out", "."])
        return 0 if code == 1 else code  # 1: after a single step the limits are missed

    def readable(folder: Path) -> str:
        for path in folder.rglob("*.png"):
            with Image.open(path) as picture:
                picture.load()
        for path in folder.rglob("*.json"):
            json.loads(path.read_text())
        return ""

    def same(one: Path, other: Path) -> str:
        return difference(listing(one), listing(other))

    plain = sampling(bundle)
    wanted = {
        "training on a full disk": Work(train_command, train.whole, train.done),
        "sampling on a full disk": plain,
        "a job on a full disk": job(bundle, root / "rows.jsonl"),
        "converting on a full disk": Work(convert, lambda folder: "", same),
        "reconstructing on a full disk": Work(reconstruct, plain.whole, same),
    }
    if plan.disks >= RARE:
        wanted["evaluating on a full disk"] = Work(evaluate, readable, same)
    for name, work in wanted.items():

        def go(tell: Callable[[], None], name: str = name, work: Work = work) -> Row:
            count = plan.disks // (RARE if work.start is evaluate else 1)
            return fill(name, Filling(work), root, count=count, tell=tell)

        yield name, go
