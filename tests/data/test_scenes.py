"""Rendered scenes, and the checker that reads them back, on whole and on corrupted pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.cli import main
from fastdiff.data import DataConfig, open_dataset
from fastdiff.data.drawing import COLOURS, FIGURES, SHAPES, coverage
from fastdiff.data.scene_check import check_scene, read_picture
from fastdiff.data.scenes import (
    Scene,
    Thing,
    caption_split,
    layout_mask,
    make_scene,
    render_scene,
    scenes,
    sketch,
)

SCENES = st.builds(make_scene, st.just(0), st.integers(0, 10**6))
SIZES = st.sampled_from([32, 48, 64])
QUICK = settings(max_examples=40, deadline=None)


def thing(figure: str, colour: str, x: float, y: float, radius: float = 0.14) -> Thing:
    size = "small" if radius < 0.18 else "large"
    return Thing(figure=figure, colour=colour, size=size, x=x, y=y, radius=radius)


RED, BLUE = thing("circle", "red", 0.25, 0.3), thing("square", "blue", 0.75, 0.4)
PAIR = Scene(things=(RED, BLUE), relation="left of", sized=True)


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "area"),
    [
        ("circle", np.pi),
        ("ring", np.pi * (1 - 0.52**2)),
        ("square", 1.76**2),
        ("diamond", 2 * 0.72),
        ("triangle", 1.9),
        ("cross", 4 * (2 * 0.36 - 0.36**2)),
        ("star", 10 * 0.5 * 0.42 * np.sin(np.pi / 5)),
    ],
)
def test_areas_are_those_of_geometry(figure: str, area: float) -> None:
    """Soft edges keep the area of a figure: within 1% of the closed form at 200 pixels."""
    drawn = coverage(figure, 200, x=0.5, y=0.5, radius=0.4).sum()
    assert drawn == pytest.approx(area * (0.4 * 200) ** 2, rel=0.01)


def test_a_picture_is_the_scene() -> None:
    image = render_scene(PAIR, 64)
    assert image.dtype == np.uint8
    assert image[:, 19, 16].tolist() == list(COLOURS["red"])
    assert image[:, 26, 48].tolist() == list(COLOURS["blue"])
    assert (image[:, 63] == 255).all()
    mask, lines = layout_mask(PAIR, 64), sketch(PAIR, 64)
    assert set(np.unique(mask)) == {0, 1 + FIGURES.index("circle"), 1 + FIGURES.index("square")}
    assert (mask > 0).sum() == pytest.approx((np.pi + 1.76**2) * (0.14 * 64) ** 2, rel=0.03)
    assert lines[19, 16] == 255  # inside is white,
    assert lines[19, [7, 24]].max() < 160  # the edge is dark


def test_scenes_are_functions_of_seed_and_number() -> None:
    first = list(scenes(30))
    assert first == list(scenes(30))
    assert first[7] == make_scene(0, 7)
    other = list(scenes(30, seed=1))
    assert sum(a == b for a, b in zip(first, other, strict=True)) == 0


def test_captions_say_all_kinds_of_things() -> None:
    words = Counter(word for scene in scenes(400) for word in scene.caption.split())
    for word in (*COLOURS, *SHAPES[:3], "letter", "digit", "above", "left", "large", "three", "in"):
        assert words[word] > 3, word
    assert Scene(things=(RED,) * 3).caption == "three red circles"
    assert Scene(things=(replace(RED, figure="cross"),) * 2).caption == "two red crosses"
    assert Scene(things=(replace(RED, figure="A"),) * 2).caption == "two red letters A"
    assert PAIR.caption == "a small red circle left of a small blue square"
    orange = Scene(things=(replace(RED, colour="orange", figure="7"),), place="centre")
    assert orange.caption == "an orange digit 7 in the centre"


def test_no_held_out_caption_is_trained_on() -> None:
    train = {scene.caption for scene in scenes(1500)}
    held = {scene.caption for scene in scenes(300, split="held-out")}
    assert not train & held
    assert all(caption_split(caption) == "held-out" for caption in held)


def test_a_data_set_has_its_captions() -> None:
    config = DataConfig(source="scenes", channels=3, image_size=32, scenes=20)
    data = open_dataset(config)
    assert data.images.shape == (20, 3, 32, 32)
    for number, (image, words) in enumerate(zip(data.images, data.captions, strict=True)):
        scene = make_scene(0, number)
        assert words == (scene.caption,)
        assert check_scene(scene, image.numpy()).right
    held = open_dataset(replace(config, split="held-out"))
    assert held.fingerprint != data.fingerprint == open_dataset(config).fingerprint
    assert not torch.equal(held.images, data.images)


# --- the checker --------------------------------------------------------------------------------


@QUICK
@given(scene=SCENES, size=SIZES)
def test_every_scene_is_read_back(scene: Scene, size: int) -> None:
    seen = read_picture(render_scene(scene, size))
    key = {(t.figure, t.colour, t.size) for t in scene.things}
    assert {(t.figure, t.colour, t.size) for t in seen} == key
    assert len(seen) == len(scene.things)
    for t in seen:
        nearest = min(scene.things, key=lambda own: (own.x - t.x) ** 2 + (own.y - t.y) ** 2)
        assert abs(nearest.x - t.x) < 0.5 / size
        assert abs(nearest.y - t.y) < 0.5 / size
    assert check_scene(scene, render_scene(scene, size)).right


@QUICK
@given(scene=SCENES, level=st.integers(0, 12), seed=st.integers(0, 99))
def test_small_noise_changes_nothing(scene: Scene, level: int, seed: int) -> None:
    image = render_scene(scene, 64).astype(int)
    noise = np.random.default_rng(seed).integers(-level, level + 1, image.shape)
    assert check_scene(scene, np.clip(image + noise, 0, 255).astype(np.uint8)).right


@QUICK
@given(scene=SCENES, index=st.integers(0, 3), data=st.data())
def test_a_wrong_colour_is_noticed(scene: Scene, index: int, data: st.DataObject) -> None:
    place = index % len(scene.things)
    old = scene.things[place]
    new = data.draw(st.sampled_from([c for c in COLOURS if c != old.colour]))
    things = list(scene.things)
    things[place] = replace(old, colour=new)
    verdict = check_scene(scene, render_scene(replace(scene, things=tuple(things)), 64))
    assert not verdict.objects
    assert not verdict.right
    assert verdict.count


@QUICK
@given(scene=SCENES, index=st.integers(0, 3), data=st.data())
def test_a_wrong_figure_is_noticed(scene: Scene, index: int, data: st.DataObject) -> None:
    place = index % len(scene.things)
    old = scene.things[place]
    new = data.draw(st.sampled_from([f for f in FIGURES if f != old.figure]))
    things = list(scene.things)
    things[place] = replace(old, figure=new)
    verdict = check_scene(scene, render_scene(replace(scene, things=tuple(things)), 64))
    assert not verdict.objects
    assert not verdict.right


@QUICK
@given(scene=SCENES, index=st.integers(0, 3))
def test_a_missing_thing_is_noticed(scene: Scene, index: int) -> None:
    place = index % len(scene.things)
    rest = scene.things[:place] + scene.things[place + 1 :]
    verdict = check_scene(scene, render_scene(replace(scene, things=rest), 64))
    assert (verdict.objects, verdict.count, verdict.right) == (False, False, False)


@QUICK
@given(scene=SCENES)
def test_mirrored_relations_and_places_are_wrong(scene: Scene) -> None:
    def moved(t: Thing) -> Thing:
        return replace(t, x=1 - t.x, y=1 - t.y)

    verdict = check_scene(
        scene, render_scene(replace(scene, things=tuple(map(moved, scene.things))), 64)
    )
    assert verdict.objects
    assert verdict.relation in (None, False)
    assert verdict.place in (None, scene.place == "centre")


def test_a_wrong_size_counts_only_where_sizes_are_named() -> None:
    large = replace(RED, radius=0.22)
    image = render_scene(replace(PAIR, things=(large, BLUE)), 64)
    assert check_scene(PAIR, image).sizes is False
    assert not check_scene(PAIR, image).right
    assert check_scene(replace(PAIR, sized=False), image).right


def test_a_figure_that_is_none_counts_as_one_too_many() -> None:
    image = render_scene(PAIR, 64)
    image[:, 56:59, 4:60] = 25  # a bar
    seen = read_picture(image)
    assert [t.figure for t in seen if t.colour == "black"] == [""]
    verdict = check_scene(PAIR, image)
    assert verdict.objects
    assert not verdict.count
    assert not verdict.right


def test_half_a_figure_is_not_the_figure() -> None:
    image = render_scene(PAIR, 64)
    image[:, :19, :32] = 255  # the upper half of the circle
    assert not check_scene(PAIR, image).objects


@pytest.mark.parametrize("value", [0, 128, 255])
def test_pictures_of_one_colour_show_nothing_of_it(value: int) -> None:
    verdict = check_scene(PAIR, np.full((3, 64, 64), value, np.uint8))
    assert (verdict.objects, verdict.count, verdict.right) == (False, False, False)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 64, 32), "uint8"), ((1, 64, 64), "uint8"), ((3, 64, 64), "float32")]
)
def test_other_arrays_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"expected a square uint8 picture.*{dtype}"):
        read_picture(np.zeros(shape, dtype))


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scenes.png"
    assert main(["data", "scenes", "--count", "10", "--sheet", str(path)]) == 0
    assert path.is_file()
    assert main(["data", "scenes"]) == 2
    assert "add --sheet" in capsys.readouterr().err
