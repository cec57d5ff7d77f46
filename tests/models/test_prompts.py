"""The syntax of weights in prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.models.prompts import MAX_WEIGHT, UNSUPPORTED, Fragment, as_text, parse_prompt


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
        (r"[cat\:1.2]", [("cat:1.2", 1 / 1.1)]),
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
    [fragments] = parse_prompt(prompt)
    assert [fragment.text for fragment in fragments] == [text for text, _ in expected]
    for fragment, (_, weight) in zip(fragments, expected, strict=True):
        assert fragment.weight == pytest.approx(weight, rel=1e-12)


@given(st.text(st.characters(exclude_characters="()[]\\<{_", exclude_categories=["Cs"])))
def test_text_without_brackets_is_left_alone(text: str) -> None:
    [part] = parse_prompt(text)
    assert "".join(fragment.text for fragment in part) == text


@given(st.text("ab:1.2()[]\\ ", max_size=30))
def test_no_text_is_an_error_of_ours(text: str) -> None:
    try:
        [part] = parse_prompt(text)
    except ValueError as error:
        if UNSUPPORTED["scheduled"] not in str(error):
            raise
        return
    for fragment in part:
        assert fragment.text
        assert abs(fragment.weight) <= MAX_WEIGHT


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat BREAK a dog", ["a cat ", " a dog"]),
        ("a BREAK", ["a ", ""]),
        ("BREAK BREAK a", ["", " ", " a"]),
        ("a\nBREAK\nb", ["a\n", "\nb"]),
        ("BREAKFAST, break, a_BREAK", ["BREAKFAST, break, a_BREAK"]),
        (r"a \BREAK b", ["a BREAK b"]),
    ],
)
def test_breaks(prompt: str, expected: list[str]) -> None:
    assert ["".join(f.text for f in part) for part in parse_prompt(prompt)] == expected


def test_weights_hold_across_breaks() -> None:
    assert parse_prompt("(a BREAK b:1.5) c") == [
        [Fragment("a ", 1.5)],
        [Fragment(" b", 1.5), Fragment(" c", 1.0)],
    ]


REFUSED = {
    "a AND b": "combined",
    "a cat :1.2 AND a dog :0.8": "combined",
    "<lora:x:0.8>": "network",
    "a cat<lyco:some style:1>": "network",
    "(b <hypernet:c>:1.2)": "network",
    "a __colours/warm__ cat": "wildcard",
    "{red|blue} cat": "variants",
    "(embedding:bad-hands:1.2)": "embedding",
    "[cat:dog:0.5]": "scheduled",
    "[cat:0.5]": "scheduled",
    "[cat::12 ]": "scheduled",
    "[a (red:1.2) cat:[b:c]:.5]": "scheduled",
    "[cat|dog]": "alternating",
    "a ([cat|dog|]:1.2)": "alternating",
}


@pytest.mark.parametrize(("prompt", "kind"), REFUSED.items())
def test_what_web_uis_read_otherwise_is_refused_by_name(prompt: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"^prompt syntax [^\n]* is not supported") as caught:
        parse_prompt(prompt)
    message = str(caught.value)
    assert UNSUPPORTED[kind] in message
    marked = message.rsplit(" or ", 1)[1].rsplit(" for the ", 1)[0]  # what the message advises
    assert "\\" in marked
    found = marked.replace("\\", "")
    assert found in prompt
    [part] = parse_prompt(prompt.replace(found, marked))
    bare = "".join(fragment.text for fragment in part)
    assert "\\" not in bare


@pytest.mark.parametrize(
    "prompt",
    ["brAND AND_b and sand", "a <b> < c:d", "____ and __init", "{a} b|c {", "a|b", "[a:b]", "1:2"],
)
def test_what_only_looks_like_it_is_text(prompt: str) -> None:
    [part] = parse_prompt(prompt)
    assert "".join(f.text for f in part) == prompt.translate({ord(c): None for c in "[]"})


BEFORE = {
    "a BREAK b": [("a BREAK b", 1)],
    "(a AND b:2)": [("a AND b", 2)],
    r"\BREAK \\BREAK \| \:": [(r"\BREAK \BREAK \| \:", 1)],
    "<lora:(x):1>": [("<lora:", 1), ("x", 1.1), (":1>", 1)],
    "[a|b|c:3]": [("a|b|c:3", 1 / 1.1)],
    "[a (b:2):3]": [("a ", 1 / 1.1), ("b", 2 / 1.1), (":3", 1 / 1.1)],
    "__a__ {b|c} embedding:d": [("__a__ {b|c} embedding:d", 1)],
    "a (red:1.2) cat": [("a ", 1), ("red", 1.2), (" cat", 1)],
}


@pytest.mark.parametrize(("prompt", "expected"), BEFORE.items())
def test_old_prompts_keep_their_meaning(prompt: str, expected: list[tuple[str, float]]) -> None:
    """The fragments that commit eeb7b7c made of them."""
    [part] = parse_prompt(as_text(prompt))
    assert [f.text for f in part] == [text for text, _ in expected]
    assert [f.weight for f in part] == pytest.approx([weight for _, weight in expected])
    if parse_prompt("a (red:1.2) cat") == [part]:
        assert as_text(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(cat:1e9)", None),  # no number of this syntax: text
        ("(cat:101)", "weight of 'cat' in the prompt must be between -100 and 100, got 101"),
        ("(" * 49 + "cat" + ")" * 49, "must be between -100 and 100, got 106"),
        ("(a" * 51, r"may nest 50 levels deep, got more at character 100; .* write \\\("),
        ("(cat:" + "9" * 400 + ")", "must be between -100 and 100, got inf"),
    ],
)
def test_weights_out_of_range(prompt: str, message: str | None) -> None:
    if message is None:
        assert parse_prompt(prompt)[0][0].text == "cat:1e9"
        return
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt)
