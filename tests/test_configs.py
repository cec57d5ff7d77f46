"""Configs survive JSON; a wrong one is rejected in one line that names the field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fastdiff.configs import LATER, from_dict, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 8
    rate: float = 0.5
    levels: tuple[int, ...] = (1, 2)
    interval: tuple[float, float] | None = None
    heads: int | tuple[int, ...] = 4

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError(f"width must be positive, got {self.width}; use 8")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    kind: Literal["kl", "vq"] = "kl"
    second: Inner | None = None
    flag: bool = False
    many: tuple[Inner, ...] = ()


def test_round_trip_through_json_keeps_values_and_types() -> None:
    config = Outer(
        inner=Inner(interval=(0.0, math.inf), heads=(1, 2)),
        second=Inner(rate=2),
        many=(Inner(), Inner(width=3)),
    )
    again = from_dict(Outer, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert type(again.inner.levels) is tuple
    assert type(again.inner.interval) is tuple


@dataclass(frozen=True, kw_only=True)
class Grown(Inner):
    added: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class Holder:
    inner: Grown | None = None


def test_a_field_that_came_later_is_left_out_where_it_says_nothing() -> None:
    """Older files and their hashes do not change."""
    assert to_dict(Grown(width=3)) == to_dict(Inner(width=3))
    assert to_dict(Holder(inner=Grown())) == {"inner": to_dict(Inner())}
    said = Grown(added=2)
    assert to_dict(said) == {**to_dict(Inner()), "added": 2}
    for config in (said, Grown()):
        assert from_dict(Holder, to_dict(Holder(inner=config))).inner == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "Outer: inner: missing"),
        ([], "expected an object"),
        ({"inner": {"width": "3"}}, "inner.width: expected int, got '3'"),
        ({"inner": {"width": True}}, "inner.width: expected int, got True"),
        ({"inner": {"width": 1.5}}, "inner.width: expected int, got 1.5"),
        ({"inner": {"widht": 3}}, "inner.widht: unknown field (known: width, rate"),
        ({"inner": {"width": -1}}, "inner: width must be positive, got -1; use 8"),
        ({"inner": {"levels": "12"}}, "inner.levels: expected a list, got '12'"),
        ({"inner": {"levels": [1, "b"]}}, "inner.levels[1]: expected int, got 'b'"),
        ({"inner": {"interval": [1.0]}}, "inner.interval: expected 2 values, got 1"),
        ({"inner": {}, "kind": "gan"}, "kind: expected one of 'kl', 'vq', got 'gan'"),
        ({"inner": {}, "flag": "no"}, "flag: expected bool, got 'no'"),
        ({"inner": {}, "many": [{}, {"rate": None}]}, "many[1].rate: expected float, got None"),
        ({"inner": 3, "kind": 4}, "kind: expected one of"),
    ],
)
def test_a_wrong_config_is_one_line_with_the_path(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^Outer: [^\n]+$") as caught:
        from_dict(Outer, data)
    assert message in str(caught.value)


def test_to_dict_refuses_what_is_not_a_config() -> None:
    with pytest.raises(ValueError, match="expected a config dataclass, got dict"):
        to_dict({"a": 1})
    with pytest.raises(ValueError, match="expected a config dataclass"):
        to_dict(Inner)
