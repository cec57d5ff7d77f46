"""The rates of `benchmarks.scenes`, on renders and on renders that are wrong in a known way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scenes import CEILING, GUIDED, UNGUIDED, ceiling, checked, page, raised, rates
from fastdiff.configs import to_dict
from fastdiff.data.scene_check import Verdict
from fastdiff.data.scenes import Scene, Thing, caption_split, render_scene, scenes

SIDE = 32
ALL = Verdict(objects=True, count=True, sizes=None, place=None, relation=None)


def test_rates_count_only_what_captions_say() -> None:
    """Five pictures, two of whose captions name a relation and one a place, by hand."""
    verdicts = [
        ALL,
        replace(ALL, relation=True),
        replace(ALL, relation=False),
        replace(ALL, count=False, place=False),
        replace(ALL, objects=False, count=False),
    ]
    found = rates(verdicts)
    assert found.count == 5
    assert (found.objects, found.number, found.right) == (4 / 5, 3 / 5, 2 / 5)
    assert (found.relation, found.place, found.sizes) == (1 / 2, 0, None)


def test_no_pictures_have_no_rates() -> None:
    with pytest.raises(ValueError, match="at least one"):
        rates([])


def test_renders_are_right_and_those_of_the_next_caption_are_not() -> None:
    asked = list(scenes(40, split="held-out"))
    assert {caption_split(scene.caption) for scene in asked} == {"held-out"}
    assert ceiling(asked, SIDE).right == 1
    shifted = [render_scene(scene, SIDE) for scene in (*asked[1:], asked[0])]
    wrong = checked(asked, shifted)
    assert wrong.objects <= 0.1
    assert wrong.relation is not None
    assert wrong.relation <= 0.1


def test_exchanged_things_break_the_relation_alone() -> None:
    left = Thing(figure="circle", colour="red", size="small", x=0.25, y=0.5, radius=0.14)
    right = Thing(figure="square", colour="blue", size="small", x=0.75, y=0.5, radius=0.14)
    scene = Scene(things=(left, right), relation="left of")
    mirrored = render_scene(scene, SIDE)[:, :, ::-1]
    found = checked([scene, scene], [render_scene(scene, SIDE), np.ascontiguousarray(mirrored)])
    assert (found.objects, found.number, found.relation, found.right) == (1, 1, 0.5, 0.5)


def test_a_picture_is_needed_for_every_caption() -> None:
    asked = list(scenes(2, split="held-out"))
    with pytest.raises(ValueError, match="zip"):
        checked(asked, [render_scene(asked[0], SIDE)])


def test_overlapping_seeds_show_nothing() -> None:
    base = rates([ALL])
    low, middle, high = (replace(base, objects=share) for share in (0.5, 0.6, 0.7))
    assert raised([high, middle], [low], "objects")
    assert not raised([high, low], [low, low], "objects")
    assert not raised([high, middle], [low, middle], "objects")
    with pytest.raises(ValueError, match="no caption names a relation"):
        raised([base], [base], "relation")


def test_the_page_has_every_row() -> None:
    rows = {GUIDED: [0.8125, 0.75], UNGUIDED: [0.5]}
    base = to_dict(rates([ALL]))
    record = {
        **dict.fromkeys(("command", "commit", "date", "weights"), "here"),
        "settings": {"sampler": "dpmpp-2m", "steps": 30, "guidance_scale": 3.0},
        CEILING: base,
        "rates": {name: [{**base, "objects": o} for o in own] for name, own in rows.items()},
        "raised": {"objects": True, "relation": False},
    }
    text = page(record)
    for row in (
        "| renders | 100.0% | 100.0% | none |",
        "| guided, sampling 0 | 81.2% |",
        "| guided, sampling 1 | 75.0% |",
        "| unguided, sampling 0 | 50.0% |",
        "objects: yes; relation: no",
    ):
        assert row in text
