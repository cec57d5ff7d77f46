"""A job makes each row's image once, as `generate` makes it, and resumes to the same bytes."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastdiff
from fastdiff.generate.job import (
    KINDS,
    ClassJob,
    ControlSettings,
    ImageToImageJob,
    SampleSettings,
    TextSettings,
)
from fastdiff.images import open_flat, read_recipe, save_png, to_uint8
from fastdiff.jobs import JobSpec, Status, run_job
from fastdiff.jobs.fields import field_types
from fastdiff.jobs.shards import Claims, Item
from fastdiff.jobs.store import Folder
from fastdiff.jobs.worker import Worker
from fastdiff.memory import NotEnoughMemory
from tests.jobs.jobs import content, mixed_rows, shards_of, spec_of, tiny_bundle

ROWS = mixed_rows(24)
BROKEN: list[Any] = [
    *ROWS[:5], {"label": 9}, "no json", {"steps": "x"}, *ROWS[5:15],
    {"image": "none.png", "strength": 0.5}, {"height": 17}, *ROWS[15:],
]  # fmt: skip
BAD = {5, 6, 7, 18, 19}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> JobSpec:
    """A job with five bad rows of 29, run without a stop."""
    spec = spec_of(place, BROKEN, "whole")
    run_job(spec)
    return spec


def jobs_by_hand() -> dict[int, ClassJob]:
    jobs = {}
    for row, values in enumerate(BROKEN):
        if row not in BAD:
            given = dict(values)
            label = given.pop("label")
            scale = float(given.pop("guidance_scale"))
            settings = SampleSettings(**given, guidance_scale=scale)
            jobs[row] = ClassJob(label=label, seed=row, settings=settings)
    return jobs


def items(spec: JobSpec) -> list[Item]:
    shards = shards_of(spec)
    return [item for number in range(len(shards)) for item in shards.read(number)]


def test_each_row_has_the_image_that_generate_makes(place: Path, whole: JobSpec) -> None:
    model = fastdiff.load(place / "tiny")
    jobs = jobs_by_hand()
    expected = dict(zip(jobs, fastdiff.generate(model, jobs.values(), batch=3), strict=True))
    found = items(whole)
    assert [item.row for item in found] == sorted(expected)
    for item in found:
        picture = Image.open(io.BytesIO(item.image))
        pixels = torch.tensor(bytearray(picture.tobytes())).reshape(1, *picture.size[::-1])
        assert torch.equal(pixels, to_uint8(expected[item.row].image))
        recipe = json.loads(item.recipe)
        assert recipe == {**expected[item.row].recipe, "load": {}, "model": "tiny"}
        assert json.loads(picture.info["fastdiff"]) == recipe


def test_bad_rows_are_recorded(whole: JobSpec) -> None:
    shards = shards_of(whole)
    records = [record for number in range(len(shards)) for record in shards.errors(number)]
    assert {record["row"] for record in records} == BAD
    assert [record["error"].replace(str(whole.out.parent), "") for record in records] == [
        "class must be from 0 to 3, got 9",
        "not valid JSON: Expecting value at column 1",
        "ClassJob: settings.steps: expected int, got 'x'",
        "image: no image at /none.png",
        "the sides of the image must be positive multiples of 2, got 16 x 17 (width x height); "
        "the nearest sizes are 16 x 16 or 16 x 18",
    ]
    assert records[0]["input"] == '{"label": 9}'


def broken_in_each_field(place: Path) -> dict[str, dict[str, Any]]:
    """For each field a row of a job that has it, right but for this field."""
    save_png(place / "in.png", torch.zeros(1, 16, 16))
    bases: dict[str, dict[str, Any]] = {
        "text": {"prompt": "a cat"},
        "image-to-image": {"image": "in.png"},
        "inpaint": {"image": "in.png", "mask": "in.png"},
        "upscale": {"image": "in.png"},
        "interpolation": {"to_seed": 1},
    }
    rows: dict[str, dict[str, Any]] = {}
    for name in field_types():
        kinds = [kind for kind, cls in KINDS.items() if name in names_of(cls)]
        text = name in names_of(TextSettings) | names_of(ControlSettings)
        kind = kinds[0] if kinds else "text" if text else "class"
        rows[name] = {"kind": kind, **bases.get(kind, {}), name: {"broken": True}}
    return rows


def names_of(cls: type[Any]) -> set[str]:
    return {f.name for f in fields(cls)}


def test_a_row_that_is_broken_in_any_field_is_recorded_and_named(place: Path) -> None:
    broken = broken_in_each_field(place)
    rows = [row for pair in zip(broken.values(), itertools.cycle(ROWS)) for row in pair]
    spec = spec_of(place, rows, "fields", name="fields.jsonl")
    summary = run_job(spec)
    assert (summary.errors, summary.images) == (len(broken), len(broken))
    records = [r for number in range(summary.of) for r in shards_of(spec).errors(number)]
    assert [record["row"] for record in records] == [*range(0, 2 * len(broken), 2)]
    unnamed = [
        record["error"]
        for name, record in zip(broken, records, strict=True)
        if not re.search(rf"\b{name}\b", record["error"])
    ]
    assert not unnamed


def test_archives_have_no_times_and_no_owners(whole: JobSpec) -> None:
    with tarfile.open(whole.out / "000000.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members[:2]] == ["000000000.png", "000000000.json"]
    facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members}
    assert facts == {(0, 0, 0, "", "", 0o644)}


def test_a_finished_job_is_not_made_again(whole: JobSpec) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.out.glob("0*")}
    summary = run_job(whole)
    assert (summary.status.made, summary.images, summary.errors) == (0, 24, 5)
    assert {path: path.stat().st_mtime_ns for path in whole.out.glob("0*")} == before


@pytest.mark.parametrize(("batch", "share"), [(1, (1, 1)), (5, (1, 1)), (None, (2, 3))])
def test_missing_shards_are_made_again_to_the_same_bytes(
    place: Path, whole: JobSpec, batch: int | None, share: tuple[int, int]
) -> None:
    spec = replace(whole, out=place / f"again {batch} {share[0]}")
    first = run_job(spec, batch=batch, share=share)
    assert first.shards == (5 if share == (1, 1) else 2)
    for name in ("000001.tar", "000004.tar", "000000.errors.jsonl"):
        (spec.out / name).unlink(missing_ok=True)
    (spec.out / "000000.tar").unlink(missing_ok=True)
    summary = run_job(spec)
    assert (summary.images, summary.shards) == (24, 5)
    assert content(spec.out) == content(whole.out)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_other_forms_have_the_same_images(place: Path, whole: JobSpec, kind: str) -> None:
    spec = replace(whole, out=place / kind, format=kind)  # type: ignore[arg-type]
    run_job(spec)
    expected = items(whole)
    assert [(item.row, item.image) for item in items(spec)] == [item[:2] for item in expected]
    if kind == "folder":
        assert read_recipe(spec.out / "000000/000000003.png") == json.loads(expected[3].recipe)
        assert not [*spec.out.glob("0*/*.json")]
    else:
        table = pq.read_table(spec.out / "000000.parquet").to_pylist()
        assert table[1]["image"] == {"bytes": expected[1].image, "path": "000000001.png"}
        assert json.loads(table[1]["recipe"]) == json.loads(expected[1].recipe)
    once = content(spec.out)
    run_job(replace(spec, out=place / f"{kind} twice"), batch=2)
    assert content(place / f"{kind} twice") == once


@pytest.mark.parametrize("image", ["webp", "jpeg"])
def test_lossy_images_have_their_recipe_beside_them(place: Path, image: str) -> None:
    changes = {"image": image, "format": "folder", "quality": 95, "name": f"{image}.jsonl"}
    spec = spec_of(place, ROWS[:3], image, **changes)
    plain = spec_of(place, ROWS[:3], f"{image} as png", name=f"{image}.jsonl")
    run_job(spec)
    run_job(plain)
    for lossy, exact in zip(items(spec), items(plain), strict=True):
        assert lossy.recipe == exact.recipe
        one, other = (open_flat(item.image, (0, 0, 0)).convert("L") for item in (lossy, exact))
        apart = [abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)]
        assert max(apart) < 40
        assert Image.open(io.BytesIO(lossy.image)).format == image.upper()


def test_rows_with_pictures(place: Path) -> None:
    photo = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_png(place / "photo.png", photo)
    rows = [{"image": "photo.png", "strength": 0.5, "label": n, "steps": 4} for n in range(2)]
    spec = spec_of(place, rows, "pictures", name="pictures.jsonl")
    run_job(spec)
    settings = SampleSettings(steps=4)
    jobs = [
        ImageToImageJob(image=place / "photo.png", strength=0.5, label=n, seed=n, settings=settings)
        for n in range(2)
    ]
    expected = [*fastdiff.generate(fastdiff.load(place / "tiny"), jobs)]
    for item, made in zip(items(spec), expected, strict=True):
        assert Image.open(io.BytesIO(item.image)).tobytes() == made.pil.tobytes()


# --- refusals -------------------------------------------------------------------------------------


def test_a_job_that_differs_is_refused(place: Path, whole: JobSpec) -> None:
    spec = spec_of(place, ROWS[:2], "mine", name="mine.jsonl", defaults={"steps": 1})
    run_job(spec)
    same = content(spec.out)
    other = tiny_bundle_with_other_weights(place)
    for changed, message in (
        (replace(spec, defaults={"steps": 2}), r"defaults.steps was 1, is 2"),
        (replace(spec, shard_size=8), r"shard_size was 7, is 8"),
        (replace(spec, model=str(other)), r"weights was "),
        (replace(spec, format="parquet"), r'format was "webdataset", is "parquet"; versions'),
        (replace(spec, seed=3), r"seed was 0, is 3"),
        (replace(spec, dtype="float64"), r'compute.dtype was "float32", is "float64"'),
    ):
        with pytest.raises(ValueError, match=message):
            run_job(changed)
    with pytest.raises(ValueError, match=r"compute.threads was \d+, is 7"):
        run_job(spec, threads=7)
    assert content(spec.out) == same


def test_a_changed_input_is_refused_and_a_moved_one_is_not(place: Path) -> None:
    spec = spec_of(place, ROWS[:3], "input", name="input.jsonl")
    run_job(spec)
    path = Path(spec.rows)
    text = path.read_text()
    path.write_text(text.replace('"steps": ', '"steps":  ', 1))
    with pytest.raises(
        ValueError, match=r"input.jsonl has changed \(3 rows, sha256 .*, now 3 rows"
    ):
        run_job(spec)
    moved = place / "moved.jsonl"
    moved.write_text(text)
    assert run_job(replace(spec, rows=str(moved))).status.made == 0


def tiny_bundle_with_other_weights(folder: Path) -> Path:
    from fastdiff.checkpoint.layouts.bundle import save_bundle
    from tests.support.tiny import tiny_model

    model = tiny_model()
    assert model.denoiser is not None
    next(model.denoiser.parameters()).data += 1
    save_bundle(model, folder / "other", provenance={"command": "a test"})
    return folder / "other"


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({}, [{"digit": 3}], "unknown column 'digit'"),
        ({"defaults": {"steps": -1}}, [{}], "steps must be at least 1"),
        ({"columns": {"labels": "digit"}}, [{"digit": 3}], "unknown field 'labels'"),
    ],
)
def test_what_is_wrong_with_all_rows_is_said_first(
    place: Path, tmp_path: Path, changes: dict[str, Any], rows: list[Any], message: str
) -> None:
    spec = spec_of(place, rows, name="wrong.jsonl", **changes)
    with pytest.raises(ValueError, match=message):
        run_job(replace(spec, out=tmp_path / "out"))
    assert not [*(tmp_path / "out").iterdir()]


# --- errors of single jobs, and memory ------------------------------------------------------------


def test_errors_are_retried_when_asked(place: Path) -> None:
    rows = [*ROWS[:9], {"image": "late.png", "strength": 0.5, "steps": 2}, {"label": 9}]
    spec = spec_of(place, rows, "retry", name="retry.jsonl")
    first = run_job(spec)
    assert (first.images, first.errors) == (9, 2)
    before = {item.row: item for item in items(spec)}
    save_png(place / "late.png", torch.zeros(1, 16, 16))
    assert run_job(spec).status.made == 0
    again = run_job(spec, retry_errors=True)
    assert (again.status.made, again.images, again.errors) == (1, 10, 1)
    after = {item.row: item for item in items(spec)}
    assert after.keys() - before.keys() == {9}
    assert {row: item for row, item in after.items() if row != 9} == before
    assert [record["row"] for record in shards_of(spec).errors(1)] == [10]
    fresh = replace(spec, out=place / "retry afresh")
    run_job(fresh)
    begun = {"job.json", "pictures.bin"}  # the picture was not there yet
    kept, made = content(spec.out), content(fresh.out)
    assert {name: kept[name] for name in kept.keys() - begun} == {
        name: made[name] for name in made.keys() - begun
    }


def test_an_image_that_is_not_finite_is_recorded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the network, at one class."""
    from fastdiff.models.unet import UNet

    embed = UNet.embed

    def broken(self: UNet, t: Tensor, y: Tensor | None, added: Tensor | None = None) -> Tensor:
        found = embed(self, t, y, added)
        return found if y is None else torch.where(y[:, None] == 2, torch.nan, found)

    monkeypatch.setattr(UNet, "embed", broken)
    rows = [{"label": n % 4, "steps": 2} for n in range(9)]
    spec = spec_of(place, rows, "nan", name="nan.jsonl")
    summary = run_job(spec)
    assert (summary.images, summary.errors) == (7, 2)
    record = shards_of(spec).errors(0)[0]
    assert record["row"] == 2
    assert "NaN or infinity" in record["error"]


def test_a_row_that_does_not_fit_in_memory_is_recorded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS[:2], {"height": 16, "width": 400_000}, {"height": 16, "width": 400_000}]
    spec = spec_of(place, rows, "large", name="large.jsonl")
    monkeypatch.setattr("fastdiff.memory.free_memory", lambda device: 2**30)
    summary = run_job(spec)
    assert (summary.images, summary.errors) == (2, 2)
    assert all("of memory" in record["error"] for record in shards_of(spec).errors(0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, NotEnoughMemory])
def test_slots_are_halved_when_memory_runs_out(
    place: Path, whole: JobSpec, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    from fastdiff.runtime.engine import Engine

    step, tries = Engine.step, []

    def limited(self: Engine, **options: Any) -> Any:
        if self.busy > 5:
            tries.append(self.busy)
            raise error("no memory")
        return step(self, **options)

    monkeypatch.setattr(Engine, "step", limited)
    spec = replace(whole, out=place / f"memory {error.__name__}")
    with pytest.warns(UserWarning, match="out of memory; going on with"):
        summary = run_job(spec, batch=16)
    assert (summary.images, summary.status.slots) == (24, 4)
    assert len(tries) == 2
    assert content(spec.out) == content(whole.out)


def test_memory_may_run_out_while_as_many_shards_are_open_as_may_be(
    place: Path, whole: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows have to be made again before one of them can be closed."""
    from fastdiff.runtime.engine import Engine

    step = Engine.step

    def limited(self: Engine, **options: Any) -> Any:
        if self.busy > 5:
            raise torch.OutOfMemoryError("no memory")
        return step(self, **options)

    monkeypatch.setattr(Engine, "step", limited)
    monkeypatch.setattr("fastdiff.jobs.worker.AHEAD", 0)  # two shards at a time
    spec = replace(whole, out=place / "open shards")
    with pytest.warns(UserWarning, match="out of memory; going on with"):
        summary = run_job(spec, batch=16)
    assert (summary.images, summary.status.slots) == (24, 4)
    assert content(spec.out) == content(whole.out)


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_row_that_does_not_fit_alone_is_recorded_and_the_others_are_made(
    place: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    from fastdiff.runtime.engine import Engine

    step = Engine.step

    def limited(self: Engine, **options: Any) -> Any:
        if self._kind.shape[-1] > 2 * self._kind.shape[-2]:  # the wide one alone
            raise RuntimeError(text)
        return step(self, **options)

    monkeypatch.setattr(Engine, "step", limited)
    rows = [*ROWS[:3], {"height": 32, "width": 128}, *ROWS[3:5]]
    spec = spec_of(place, rows, f"alone {len(text)}", name="alone.jsonl")
    with pytest.warns(UserWarning, match="out of memory; going on with"):
        summary = run_job(spec, batch=2)
    assert (summary.images, summary.errors, summary.status.slots) == (5, 1, 2)
    (record,) = shards_of(spec).errors(0)
    assert record["row"] == 3
    assert "even alone" in record["error"]


def test_other_errors_are_not_taken_for_memory(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("fastdiff.runtime.engine.Engine.step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run_job(spec_of(place, ROWS, "bug"))
    assert not [*(place / "bug").glob("0*")]


# --- several processes ----------------------------------------------------------------------------


def test_a_shard_that_another_process_holds_is_left_to_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(place, ROWS, "held", name="held.jsonl")
    other = Claims(Folder(spec.out))
    assert other.take(1)
    monkeypatch.setattr("fastdiff.jobs.worker.WAIT", 0.01)
    waiting: list[int] = []

    def listen(status: Status) -> None:
        waiting.append(status.waiting)
        if status.waiting:
            assert not (spec.out / "000001.tar").exists()
            other.close()  # it dies

    monkeypatch.setattr("fastdiff.jobs.worker.TELL", 0.0)
    assert run_job(spec, listen=listen).shards == 4
    assert 1 in waiting
    assert not [*spec.out.glob(".claims*")]


def test_a_claim_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    one, other = Claims(Folder(tmp_path)), Claims(Folder(tmp_path))
    assert one.take(3)
    assert not other.take(3)
    assert other.take(4)
    one.release(3)
    assert other.take(3)


# --- progress and report --------------------------------------------------------------------------


def test_progress_adds_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.jobs.worker.TELL", 0.0)
    spec, heard = spec_of(place, BROKEN, "told"), list[Status]()
    run_job(spec, listen=heard.append, batch=4)
    done = [status.made + status.failed for status in heard]
    assert done == sorted(done)
    assert (heard[-1].made, heard[-1].failed, heard[-1].rows, heard[-1].left) == (24, 5, 29, 0.0)
    assert {status.busy for status in heard} >= {4, 0}
    assert all(0 <= status.busy <= status.slots == 4 for status in heard)
    assert all(status.memory > 2**20 for status in heard)


def test_the_report_is_one_page(whole: JobSpec) -> None:
    page = (whole.out / "report.html").read_text()
    assert "<h1>24 images</h1>" in page
    assert len(re.findall(r"src='data:image/png;base64,[\w+/=]+'", page)) == 24
    assert not re.findall(r"(?:src|href)=(?!'data:)", page)
    for text in ("row 0", "class must be from 0 to 3, got 9", "no json", "sha256"):
        assert text in page
    assert "<script" not in page


def test_what_rows_say_is_no_markup(place: Path) -> None:
    spec = spec_of(place, [*ROWS[:1], "<script>alert(1)</script>"], "markup", name="markup.jsonl")
    run_job(spec)
    assert "<script" not in (spec.out / "report.html").read_text()


def test_few_shards_are_open_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of 40 steps among many of 1: later shards wait for it, and none of them is lost."""
    rows = [{"label": 1, "steps": 40}, *({"label": n % 4, "steps": 1} for n in range(60))]
    spec = spec_of(place, rows, "open", name="open.jsonl", shard_size=2)
    most = 0
    begin = Worker._begin

    def counted(self: Worker, number: int) -> Any:
        nonlocal most
        yield from begin(self, number)
        most = max(most, len(self._open))

    monkeypatch.setattr(Worker, "_begin", counted)
    monkeypatch.setattr("fastdiff.jobs.worker.AHEAD", 2)
    assert run_job(spec, batch=4).images == 61
    assert most <= 2 + 2 * 4 // 2
