"""Prompt syntax: the weights and ``BREAK`` of AUTOMATIC1111's web UI.

    (a)      weight times 1.1        (a:1.3)  weight times 1.3
    [a]      weight by 1.1           BREAK    the rest goes into a new chunk of 77 tokens

Brackets nest, and their factors multiply. An opening bracket that is never closed applies to the
end of the prompt; a closing bracket that was never opened is ordinary text. `fastdiff.models.text`
describes how a weight changes the vectors of the text.

Web UIs support more syntax: scheduled words, ``AND``, LoRA files, wildcards. fastdiff rejects by
name what it does not support (`UNSUPPORTED`), because CLIP would read it as words. A preceding
backslash turns any of it into text: ``\\(``, ``\\BREAK``, ``\\<lora:x:1>``, ``[a\\:b\\:0.5]``.

This module does not import torch, so that a prompt can be checked before a model is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BRACKET = 1.1
"""Factor of a pair of round brackets; a pair of square brackets divides by it."""
MAX_WEIGHT = 100.0
"""Largest weight; anything above is taken for a typing mistake."""
MAX_DEPTH = 50
"""Deepest nesting; that many round brackets already exceed MAX_WEIGHT."""
BREAK = "BREAK"
SHOWN = 60
"""Number of characters of a prompt that a message quotes."""

_CONSTRUCTS = {
    "combined": r"\bAND\b",
    "network": r"<\w+:[^<>]+>",
    "wildcard": r"__(?!_)[\w/*.-]+?(?<!_)__(?!_)",
    "variants": r"\{[^{}]*\|[^{}]*\}",
    "embedding": r"\bembedding:\S+",
}
UNSUPPORTED = {
    "combined": "AND combines prompts in web UIs",
    "network": "<...> loads a LoRA, LyCORIS or hypernetwork file in web UIs",
    "wildcard": "__...__ stands for a random line of a file in web UIs",
    "variants": "{...|...} stands for a random choice in web UIs",
    "embedding": "embedding:... is a textual inversion in web UIs",
    "scheduled": "[from:to:when] changes words between two steps in web UIs",
    "alternating": "[a|b] alternates between words in web UIs",
}
"""Constructs of web UIs that are rejected, and what they mean there."""

_KEYWORD = "|".join((rf"\b{BREAK}\b", *_CONSTRUCTS.values()))
_PIECES = re.compile(
    rf"""
    \\(?P<escaped>[()\[\]\\:|] | (?={_KEYWORD}).)
    | (?P<keyword>{_KEYWORD})
    | :\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<closing>[)\]])
    | (?P<bracket>[()\[\]])
    | (?P<text>(?:(?!{_KEYWORD})[^\\()\[\]:|])+ | [\\:|])
    """,
    re.VERBOSE,
)
_CLOSES = {")": "(", "]": "["}


@dataclass(frozen=True)
class Fragment:
    """A piece of a prompt and its weight."""

    text: str
    weight: float = 1.0


def read_prompt(prompt: str, *, emphasis: bool = True) -> list[list[Fragment]]:
    """The fragments of each part of a prompt, as from :func:`parse_prompt`.

    Args:
        emphasis: False treats the whole prompt as text, including brackets and ``BREAK``.

    Raises:
        ValueError: the prompt is not a str or not valid Unicode; also as for `parse_prompt`.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be text, got {type(prompt).__name__}; give a str")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not valid Unicode at character {error.start}, got {prompt[:40]!r}; "
            "write it in UTF-8"
        ) from None
    return parse_prompt(prompt) if emphasis else [[Fragment(prompt)]]


def parse_prompt(prompt: str) -> list[list[Fragment]]:
    """Split a prompt at ``BREAK`` into parts, and each part into fragments of one weight.

    Brackets and escapes are removed. Neighbouring fragments of a part differ in weight, and none is
    empty; an empty part has no fragments. There is at least one part.

    Raises:
        ValueError: a construct is not supported, a weight exceeds MAX_WEIGHT, or brackets nest
            deeper than MAX_DEPTH.
    """
    pieces, weights, refused = _scan(prompt)
    if refused:
        raise ValueError(_refusal(prompt, refused[0]))
    return _parts(pieces, weights)


def as_text(prompt: str) -> str:
    """Escape everything in a prompt that older versions of fastdiff treated as text.

    Of this syntax, they only knew brackets and their escapes.
    """

    def as_it_was(piece: re.Match[str]) -> str:  # the backslash of newer escapes was text as well
        later = piece["escaped"] is not None and piece["escaped"] not in tuple("()[]\\")
        return "\\" + piece[0] if later or piece["keyword"] else piece[0]

    prompt = _PIECES.sub(as_it_was, prompt)  # may uncover keywords that an escape was hiding
    prompt = _PIECES.sub(lambda piece: "\\" + piece[0] if piece["keyword"] else piece[0], prompt)
    marks = [at for construct in _scan(prompt)[2] for at in construct.marks]
    for at in sorted(marks, reverse=True):
        prompt = f"{prompt[:at]}\\{prompt[at:]}"
    return prompt


@dataclass
class _Opened:
    """An open bracket."""

    bracket: str
    pieces: int
    """Number of pieces before it."""
    at: int
    """Its position in the prompt."""
    bars: list[int] = field(default_factory=list)
    """Positions of the "|" characters directly inside it."""


@dataclass(frozen=True)
class _Construct:
    """A part of a prompt that is not supported."""

    kind: str
    start: int
    stop: int
    marks: tuple[int, ...]
    """Positions at which backslashes turn it into text."""


def _scan(prompt: str) -> tuple[list[str | None], list[float], list[_Construct]]:
    """The pieces of text (None: a break), their weights, and the unsupported constructs."""
    pieces: list[str | None] = []
    weights: list[float] = []
    refused: list[_Construct] = []
    opened: list[_Opened] = []

    def close(factor: float) -> None:
        start = opened.pop().pieces
        weights[start:] = [weight * factor for weight in weights[start:]]

    for piece in _PIECES.finditer(prompt):
        closing, inner = piece["closing"] or piece["bracket"], opened[-1].bracket if opened else ""
        if closing == "]" and inner == "[":
            refused += _changing_words(opened[-1], piece)
            close(1 / BRACKET)
        elif closing == ")" and inner == "(":
            close(float(piece["number"] or BRACKET))
        elif piece["bracket"] in ("(", "["):
            opened.append(_Opened(piece["bracket"], len(pieces), piece.start()))
            _check_depth(opened)
        else:
            if piece["keyword"] not in (None, BREAK):
                refused.append(_keyword(piece))
            if piece[0] == "|" and inner == "[":
                opened[-1].bars.append(piece.start())
            pieces.append(None if piece["keyword"] == BREAK else piece["escaped"] or piece[0])
            weights.append(1.0)
    while opened:
        close(BRACKET if opened[-1].bracket == "(" else 1 / BRACKET)
    return pieces, weights, sorted(refused, key=lambda construct: construct.start)


def _keyword(piece: re.Match[str]) -> _Construct:
    kind = next(k for k, pattern in _CONSTRUCTS.items() if re.fullmatch(pattern, piece[0]))
    return _Construct(kind, *piece.span(), (piece.start(),))


def _changing_words(opened: _Opened, piece: re.Match[str]) -> list[_Construct]:
    """Find square brackets that a web UI reads as words that change from step to step.

    piece: the match of the closing bracket.
    """
    marks = (*opened.bars, *([piece.start()] if piece["number"] else ()))
    kind = "alternating" if opened.bars else "scheduled"
    return [_Construct(kind, opened.at, piece.end(), marks)] if marks else []


def _refusal(prompt: str, construct: _Construct) -> str:
    found = marked = prompt[construct.start : construct.stop]
    for at in reversed(construct.marks):
        split = at - construct.start
        marked = f"{marked[:split]}\\{marked[split:]}"
    advice = {
        "combined": f"write 'and', or {marked} for the word itself",
        "network": "leave it out (LoRA files are not supported yet)",
    }.get(construct.kind, "write the words that you want")
    if construct.kind != "combined" and len(marked) <= SHOWN and marked.isprintable():
        advice += f", or {marked} for the literal text"
    return (
        f"prompt syntax {found[:SHOWN]!r} is not supported ({UNSUPPORTED[construct.kind]}); "
        f"{advice}"
    )


def _check_depth(opened: list[_Opened]) -> None:
    if len(opened) > MAX_DEPTH:
        raise ValueError(
            f"brackets in a prompt may nest {MAX_DEPTH} levels deep, got more at character "
            f"{opened[-1].at}; close them, or write \\( for the character itself"
        )


def _parts(pieces: list[str | None], weights: list[float]) -> list[list[Fragment]]:
    parts: list[list[Fragment]] = [[]]
    for text, weight in zip(pieces, weights, strict=True):
        if text is None:
            parts.append([])
            continue
        fragments = parts[-1]
        if not abs(weight) <= MAX_WEIGHT:
            raise ValueError(
                f"the weight of {text.strip()[:30]!r} in the prompt must be between "
                f"-{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, got {weight:g}; the weights of nested "
                "brackets multiply"
            )
        if fragments and fragments[-1].weight == weight:
            fragments[-1] = Fragment(fragments[-1].text + text, weight)
        else:
            fragments.append(Fragment(text, weight))
    return parts
