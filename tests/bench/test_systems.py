"""The page of trained systems, and the command that measures them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import systems
from fastdiff.generate.job import SampleSettings
from fastdiff.images import open_flat
from fastdiff.training import TRAINING_PRESETS


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_settings(name: str) -> None:
    """They are valid, and so is the name of the model."""
    system = systems.SYSTEMS[name]
    settings = SampleSettings(**system.settings)
    assert settings.total >= 1
    assert settings.guidance_scale is not None
    assert system.model in (*TRAINING_PRESETS, "digits")


def test_the_page_follows_from_the_records() -> None:
    assert systems.PAGE.read_text() == systems.page(systems.records())


def test_training_cost_is_the_rate_of_the_fastest_tenth(tmp_path: Path) -> None:
    """100 steps a line; ten lines at 1 to 10 steps per second: 1,000 steps at 10 per second."""
    lines = [{"step": 100 * n, "steps_per_second": n} for n in (3, 1, 2, 4, 5, 10, 7, 8, 9, 6)]
    lines.sort(key=lambda line: line["step"])
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert systems.training_cost(tmp_path) == {"steps": 1000, "minutes": 1.7}
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no rates"):
        systems.training_cost(tmp_path)


def test_a_missing_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systems.measure("dit", tmp_path, 360)
    assert "use --train tiny-dit" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        systems.main(["dit", "--train"])
    assert "expected some of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_system_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECORDS", "PICTURES"):
        monkeypatch.setattr(systems, name, tmp_path)
    monkeypatch.setitem(systems.SYSTEMS["ldm"].settings, "steps", 2)
    systems.measure("ldm", tmp_path, 360)
    record = json.loads((tmp_path / "ldm.json").read_text())
    assert record["parameters"] == 1_698_628
    assert 0 <= record["accuracy"] <= 1
    sheet = open_flat(tmp_path / "system-ldm.png", (255, 255, 255))
    assert sheet.width > 8 * 32
    assert "| Latent diffusion, KL autoencoder | Rombach et al. 2022 |" in systems.page(
        {"ldm": record}
    )
