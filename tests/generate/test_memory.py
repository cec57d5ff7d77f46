"""Memory estimates agree with measured peaks, and are checked before anything is computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff import memory
from fastdiff.checkpoint.open import load
from fastdiff.cli import main
from fastdiff.generate import memory as estimates
from fastdiff.generate.facts import check
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.memory import Call, need_of
from fastdiff.generate.reconstruction import reconstruct
from fastdiff.generate.run import engine_request, plan
from fastdiff.generate.session import Session
from fastdiff.images import read_image, save_png
from fastdiff.memory import NotEnoughMemory, free_memory, gib
from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.runtime.engine import Engine
from tests.support.tiny import tiny_autoencoder, tiny_model

ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for peaks")
def test_estimates_are_within_a_quarter_of_measured_peaks(tmp_path: Path) -> None:
    """Here malloc returns all freed tensors to the system, not only those above 32 MiB as by
    default: memory that it keeps would hide the differences between these small models."""
    command = [sys.executable, "-m", "tests.support.peaks", str(tmp_path)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert len(rows) == 10
    assert {what.split()[0] for what, *_ in rows} == {"digits", "text", "decode", "training"}
    wrong = [
        f"{what}: {measured / 2**20:.1f} MiB measured, {estimated / 2**20:.1f} estimated"
        for what, measured, estimated in rows
        if not 0.75 <= estimated / measured <= 1.25
    ]
    assert not wrong, "; ".join(wrong)


def test_the_estimate_needs_no_weights_and_no_dynamo() -> None:
    code = """
import sys, torch
from fastdiff.checkpoint.open import load
from fastdiff.generate import memory as estimates
from fastdiff.generate.job import ClassJob
from fastdiff.generate.memory import Call, need_of
model = load("digits", device="meta")
assert all(p.is_meta for module in model.modules.values() for p in module.parameters())
call = Call(device=torch.device("cpu"), dtype=torch.float32, count=4)
print(need_of([model], ClassJob(label=1, height=320, width=64), call, loaded=False).total)
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    call = Call(device=torch.device("cpu"), dtype=torch.float32, count=4)
    job = ClassJob(label=1, height=320, width=64)
    assert need_of([load("digits")], job, call, loaded=False).total == int(done.stdout)


def test_a_model_on_the_meta_device_has_the_shapes_of_the_loaded_one() -> None:
    planned, loaded = load("digits", device="meta", dtype=torch.bfloat16), load("digits")
    for name, module in loaded.modules.items():
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        found = planned.modules[name].state_dict()
        assert {key: tensor.shape for key, tensor in found.items()} == shapes
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert planned.weights_hash == loaded.weights_hash


def test_a_codebook_is_estimated_too() -> None:
    """Its distances of every latent to every code are 64 x 1024 numbers."""
    config = AutoencoderConfig(
        regularization="vq",
        codebook_size=1024,
        image_channels=1,
        model_channels=4,
        channel_mult=(1,),
        num_res_blocks=1,
        latent_channels=2,
        norm_groups=2,
    )
    cpu = torch.device("cpu")
    peak = estimates._first_stage(config, "decode", 1, (8, 8), cpu, torch.float32, "auto")
    assert peak.most >= 4 * 64 * 1024


def bound(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": free)


@pytest.mark.parametrize("size", [{"width": 10_000_000}, {"height": 2_000_000}])
def test_sizes_that_do_not_fit_are_refused_at_once(
    size: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(monkeypatch, 16 * GIB)
    model = fastdiff.load("digits")
    words = r"needs about [\d,]+ GiB of memory, 16 GiB are free; use a smaller height, width"
    with pytest.raises(NotEnoughMemory, match=words):
        model.generate(classes=1, **size)
    with pytest.raises(MemoryError):
        next(fastdiff.generate(model, [ClassJob(label=1, **size)]))


def test_images_at_once_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, GIB // 2)
    model = fastdiff.load("digits")
    jobs = [ClassJob(label=1, settings=SampleSettings(batch=2**18, steps=1))] * 2**18
    with pytest.raises(NotEnoughMemory, match="use a smaller height, width or batch"):
        next(fastdiff.generate(model, jobs))
    small = [ClassJob(label=1, settings=SampleSettings(batch=2, steps=1))] * 2
    assert len(list(fastdiff.generate(model, small))) == 2


def test_deep_features_that_are_kept_between_steps_count_too() -> None:
    """Against the tensors of an engine with 64 slots whose job reuses features."""
    model = fastdiff.load("digits")
    session, settings = Session.of(model), SampleSettings(steps=2, cache=2, cache_branch=1)
    cached = check(ClassJob(label=1, settings=settings), session.facts)
    engine = Engine(session.network, shape=session.facts.x_shape(32, 32), slots=64)
    engine.submit(engine_request(plan(session, cached)))
    kept = sum(t.numel() * t.element_size() for t in engine._denoiser.deep.values())
    call = Call(device=torch.device("cpu"), dtype=torch.float32, count=64, batch=64)
    plain = replace(cached, settings=SampleSettings(steps=2))
    more = need_of([model], cached, call, loaded=True).work
    more -= need_of([model], plain, call, loaded=True).work
    assert kept <= more <= 1.5 * kept


def test_a_job_is_estimated_before_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, 2**10)
    monkeypatch.setattr("fastdiff.generate.facts.SMALL", 0)
    monkeypatch.setattr("fastdiff.generate.run.plan", None)
    with pytest.raises(NotEnoughMemory, match="making images of 16 x 16"):
        next(fastdiff.generate(tiny_model(), iter([ClassJob(label=1)])))


def test_where_nobody_knows_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, None)
    monkeypatch.setattr("fastdiff.generate.facts.SMALL", 0)
    model, job = tiny_model(), ClassJob(label=1, settings=SampleSettings(steps=1))
    assert len(list(fastdiff.generate(model, iter([job])))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "sample --count 1 --classes 3 --width 10000000",
        "interpolate --label 3 --to-label 4 --frames 2 --height 10000000",
        "img2img --label 3 --model digits --image wide.png --width 65504 --height 65504",
        "reconstruct --batch 64 wide.png",
    ],
)
def test_commands_refuse_in_one_line(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdiff.generate.memory.SMALL", 0)
    bound(monkeypatch, 2**10 if line.startswith("reconstruct") else 8 * GIB)
    save_png("wide.png", torch.zeros(1, 32, 32))
    code = main([*line.split(), "--device", "cpu"])
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert "GiB of memory" in captured.err
    assert "are free; use " in captured.err
    assert not Path("out").exists()


def test_large_models_are_looked_at_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdiff.cli.pictures.LARGE", 0)
    monkeypatch.setattr("fastdiff.checkpoint.weights.Weights.copy_into", None)  # nothing is read
    bound(monkeypatch, GIB)
    folder = ROOT / "fastdiff/assets/digits"
    code = main(["sample", "--model", str(folder), "--width", "1000000", "--device", "cpu"])
    assert code == 2
    assert "1 GiB are free" in capsys.readouterr().err


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.checkpoint.weights.LARGE", 0)
    bound(monkeypatch, 10)
    with pytest.raises(NotEnoughMemory, match=r"safetensors: a model of this size needs about"):
        load("digits")


def test_pictures_and_reconstructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "a.png", torch.zeros(3, 8, 8))
    bound(monkeypatch, 2**20)
    with pytest.raises(NotEnoughMemory, match="a picture of 60000 x 60000 needs about"):
        read_image(tmp_path / "a.png", height=60_000, width=60_000)
    images = torch.zeros(64, 1, 16, 16)
    bound(monkeypatch, 2**14)
    monkeypatch.setattr("fastdiff.generate.memory.SMALL", 0)
    with pytest.raises(NotEnoughMemory, match="reconstructing 64 images of 16 x 16"):
        reconstruct(tiny_autoencoder(), images)


FILES: dict[str, dict[str, str]] = {
    "no limit": {},
    "a container": {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    },
    "a group in a group": {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/memory.max": f"{5 * GIB}\n",
        "sys/fs/cgroup/user/memory.current": f"{2 * GIB}\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/job/memory.current": f"{GIB}\n",
    },
    "version 1": {
        "proc/self/cgroup": "4:memory:/a\n3:cpu:/\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{7 * GIB}\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{GIB}\n",
    },
    "used up": {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
    },
}


@pytest.mark.parametrize(("name", "free"), [*zip(FILES, (32, 2, 3, 6, 0), strict=True)])
def test_free_memory_is_what_system_and_groups_leave(
    name: str, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)
    meminfo = f"MemTotal: 99999999999 kB\nMemAvailable: {32 * GIB // 1024} kB\n"
    for path, text in {"proc/meminfo": meminfo, **FILES[name]}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert free_memory() == free * GIB


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)
    assert free_memory() is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(5 * GIB, "5 GiB"), (GIB // 4, "0.25 GiB"), (12_345 * GIB, "12,345 GiB"), (10, "0 GiB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert gib(count) == text


def test_a_batch_of_training_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    bound(monkeypatch, GIB)
    code = main(["train", "autoencoder", "--optimization.batch-size", "100000", "--device", "cpu"])
    captured = capsys.readouterr().err
    assert (code, captured.count("\n")) == (2, 1)
    assert "1 GiB are free; set a smaller optimization.batch_size" in captured
    assert not Path("runs").exists()
