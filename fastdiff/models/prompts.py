"""Weights in prompts: ``(word)``, ``(word:1.3)``, ``[word]``, the syntax of AUTOMATIC1111's web UI.

    (a)      weight times 1.1        (a:1.3)  weight times 1.3
    [a]      weight by 1.1           \\( \\) \\[ \\] \\\\  the character itself

Brackets nest, and their factors multiply. One that is never closed holds to the end of the prompt,
one that was never opened is a character like any other. What a weight does to the text's vectors is
said in `fastdiff.models.text`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BRACKET = 1.1
"""Factor of a pair of round brackets; a square pair divides by it."""
MAX_WEIGHT = 100.0
"""Largest weight: more is a typing mistake."""
MAX_DEPTH = 50
"""Deepest nesting: as many round brackets give a weight beyond MAX_WEIGHT."""

_PIECES = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<weighted>\))
    | (?P<bracket>[()\[\]])
    | (?P<text>[^\\()\[\]:]+ | [\\:])
    """,
    re.VERBOSE,
)
_CLOSES = {")": "(", "]": "["}


@dataclass(frozen=True)
class Fragment:
    """A piece of a prompt and its weight."""

    text: str
    weight: float = 1.0


def parse_prompt(prompt: str) -> list[Fragment]:
    """Split a prompt into fragments of one weight each, the brackets and escapes taken out.

    Neighbours differ in weight, none is empty; an empty prompt has no fragments.

    Raises:
        ValueError: a weight beyond MAX_WEIGHT, brackets deeper than MAX_DEPTH.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []  # the bracket, and how many pieces there were before it

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    def literal(text: str) -> None:
        texts.append(text)
        weights.append(1.0)

    for piece in _PIECES.finditer(prompt):
        bracket = piece["bracket"] or ""
        if piece["weighted"] and opened and opened[-1][0] == "(":
            multiply(opened.pop()[1], float(piece["weight"]))
        elif bracket in ("(", "["):
            opened.append((bracket, len(texts)))
            if len(opened) > MAX_DEPTH:
                raise ValueError(
                    f"brackets in a prompt may nest {MAX_DEPTH} deep, got more from character "
                    f"{piece.start()} on; close them, or write \\( for the character itself"
                )
        elif bracket and opened and opened[-1][0] == _CLOSES[bracket]:
            multiply(opened.pop()[1], _factor(_CLOSES[bracket]))
        else:
            literal(piece["escaped"] or piece[0])
    for bracket, start in opened:
        multiply(start, _factor(bracket))
    return _joined(texts, weights)


def _factor(bracket: str) -> float:
    return BRACKET if bracket == "(" else 1 / BRACKET


def _joined(texts: list[str], weights: list[float]) -> list[Fragment]:
    fragments: list[Fragment] = []
    for text, weight in zip(texts, weights, strict=True):
        if not abs(weight) <= MAX_WEIGHT:
            raise ValueError(
                f"the weight of {text.strip()[:30]!r} in the prompt must lie within "
                f"{MAX_WEIGHT:g}, got {weight:g}; brackets in brackets multiply"
            )
        if fragments and fragments[-1].weight == weight:
            fragments[-1] = Fragment(fragments[-1].text + text, weight)
        else:
            fragments.append(Fragment(text, weight))
    return fragments
