"""The syntax of weights in prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.models.prompts import MAX_WEIGHT, parse_prompt


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("a (cat)", [("a ", 1), ("cat", 1.1)]),
        ("a (cat:1.3), sky", [("a ", 1), ("cat", 1.3), (", sky", 1)]),
        ("a [cat] sky", [("a ", 1), ("cat", 1 / 1.1), (" sky", 1)]),
        ("((cat))", [("cat", 1.1**2)]),
        ("(a (cat:1.5) sky:0.5)", [("a ", 0.5), ("cat", 0.75), (" sky", 0.5)]),
        ("(a [cat])", [("a ", 1.1), ("cat", 1)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
        (r"(cat \(pet\):1.2)", [("cat (pet)", 1.2)]),
        ("(cat : 1.2 )", [("cat ", 1.2)]),
        ("(cat:-1)", [("cat", -1)]),
        ("(cat:.5)(dog:2.)", [("cat", 0.5), ("dog", 2)]),
        ("(cat:)", [("cat:", 1.1)]),
        ("(cat:1.2.3)", [("cat:1.2.3", 1.1)]),
        ("at 10:30, (12:45)", [("at 10:30, ", 1), ("12", 45)]),  # as the syntax says
        ("cat:1.2)", [("cat:1.2)", 1)]),
        ("[cat:1.2]", [("cat:1.2", 1 / 1.1)]),
        ("a (cat", [("a ", 1), ("cat", 1.1)]),
        ("a [cat (dog", [("a ", 1), ("cat ", 1 / 1.1), ("dog", 1)]),
        ("a) cat]", [("a) cat]", 1)]),
        ("(a] cat)", [("a] cat", 1.1)]),
        ("()", []),
        ("C:\\dir", [("C:\\dir", 1)]),
        ("(猫🐈:1.2) naïve", [("猫🐈", 1.2), (" naïve", 1)]),
    ],
)
def test_fragments(prompt: str, expected: list[tuple[str, float]]) -> None:
    fragments = parse_prompt(prompt)
    assert [fragment.text for fragment in fragments] == [text for text, _ in expected]
    for fragment, (_, weight) in zip(fragments, expected, strict=True):
        assert fragment.weight == pytest.approx(weight, rel=1e-12)


@given(st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"])))
def test_text_without_brackets_is_left_alone(text: str) -> None:
    assert "".join(fragment.text for fragment in parse_prompt(text)) == text


@given(st.text("ab:1.2()[]\\ ", max_size=30))
def test_no_text_is_an_error_of_ours(text: str) -> None:
    for fragment in parse_prompt(text):
        assert fragment.text
        assert abs(fragment.weight) <= MAX_WEIGHT


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(cat:1e9)", None),  # no number of this syntax: text
        ("(cat:101)", "weight of 'cat' in the prompt must lie within 100, got 101"),
        ("(" * 49 + "cat" + ")" * 49, "must lie within 100, got 106"),
        ("(a" * 51, r"may nest 50 deep, got more from character 100 on; .* write \\\("),
        ("(cat:" + "9" * 400 + ")", "must lie within 100, got inf"),
    ],
)
def test_weights_out_of_range(prompt: str, message: str | None) -> None:
    if message is None:
        assert parse_prompt(prompt)[0].text == "cat:1e9"
        return
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt)
