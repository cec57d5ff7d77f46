"""Plots of sampler tables: what they show, and that a wrong path leaves no file behind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from fastdiff.diffusion.plots import _distinct, plot_tables, step_lengths
from fastdiff.diffusion.samplers import SAMPLERS, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig

SCHEDULE = NoiseSchedule(ScheduleConfig())


def test_plot(tmp_path: Path) -> None:
    tables = [build_table(name, SCHEDULE, 6) for name in SAMPLERS]
    path = tmp_path / "samplers.png"
    plot_tables(tables, path)
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73), (0xCC, 0x79, 0xA7)):
        assert colour in colours, "a sampler's line is missing"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "noise"), [("ddim", False), ("ddpm", True)])
def test_a_panel_without_noise_is_left_out(
    tmp_path: Path, name: str, noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    plot_tables([build_table(name, SCHEDULE, 6)], tmp_path / "table.svg")
    drawn = (tmp_path / "table.svg").read_text()
    assert ("Fresh noise" in drawn) == noise
    assert "Weight b of the new x0 estimate" in drawn
    assert drawn.count("network evaluation<") >= 2  # below each column


def test_equal_tables_share_a_line() -> None:
    names = ["ddim", "heun", "euler", "ddpm", "euler-ancestral"]
    groups = _distinct([build_table(name, SCHEDULE, 6) for name in names])
    assert [group for group, _ in groups] == [
        ["ddim", "euler"],
        ["heun"],
        ["ddpm", "euler-ancestral"],
    ]


def test_step_lengths() -> None:
    table = build_table("heun", SCHEDULE, 5, spacing="exponential")  # even in log sigma
    first, length = step_lengths(table)
    assert first.tolist() == [1, 3, 5, 7]  # the last, to a clean image, is infinite
    sigma = [float(SCHEDULE.sigma(t) / SCHEDULE.alpha(t)) for t in (999, 0)]
    assert length.tolist() == pytest.approx([math.log(sigma[0] / sigma[1]) / 4] * 4)


def test_bad_plots(tmp_path: Path) -> None:
    table = build_table("ddim", SCHEDULE, 5)
    with pytest.raises(ValueError, match=r"must end in one of .png, .svg, .pdf, got '.*table.txt'"):
        plot_tables([table], tmp_path / "table.txt")
    with pytest.raises(ValueError, match="at least one table to plot, got none"):
        plot_tables([], tmp_path / "table.png")
    assert not list(tmp_path.iterdir())
