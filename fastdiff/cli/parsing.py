"""From words to a typed options object, and every mistake on the way to one clear line.

tyro draws a box of five to ten lines around each mistake. Its text is kept, its box is not.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tyro

T = TypeVar("T")

# `None` is spelled by leaving the option out; the help shows the kind of value only.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME")]


class UsageError(ValueError):
    """The command line cannot be read: one line, exit code 2."""


def parse(
    options: type[T], words: Sequence[str], *, prog: str, default: T | None = None
) -> T | None:
    """Read ``words`` into a dataclass.

    Args:
        options: a frozen dataclass; the line under a field is its help, "Examples:" in its
            docstring goes to the end of the help.
        default: where the defaults come from, instead of the class.

    Returns:
        The options, or None when help was asked for and has been printed.

    Raises:
        UsageError: a word that cannot be read.
    """
    description, _, examples = (inspect.getdoc(options) or "").partition("\nExamples:\n")
    errors = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            return cast(
                T,
                tyro.cli(
                    options,
                    prog=prog,
                    description=description.strip(),
                    args=list(words),
                    config=(tyro.conf.FlagCreatePairsOff,),
                    **extra,
                ),
            )
    except SystemExit as stop:
        if not stop.code:
            if examples:
                print(f"\nexamples:\n{examples.rstrip()}")
            return None
        raise UsageError(f"{_unboxed(errors.getvalue())}; see {prog} --help") from None


def closest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'dpmpp-2m'?"``, or ``";"`` where no known word is close."""
    names = {name.lower(): name for name in known}
    best = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {names[best[0]]!r}?" if best else ";"


def choose(word: str, known: Iterable[str], what: str) -> str:
    """``word`` if it is one of the known names.

    Raises:
        ValueError: it is not; the message lists them and the closest.
    """
    names = list(known)
    if word in names:
        return word
    raise ValueError(
        f"unknown {what} {word!r}{closest(word, names)} expected one of: {', '.join(names)}"
    )


def one_line(message: object) -> str:
    """The text of an error without line breaks; an OSError names its file."""
    if isinstance(message, OSError) and message.strerror:
        named = f": {message.filename}" if message.filename is not None else ""
        return f"{message.strerror}{named}"
    text = " ".join(str(message).split())
    return text or type(message).__name__


def _unboxed(text: str) -> str:
    """The first section of tyro's error box, and the options it proposes, in one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip("│|+ ").strip() for line in plain.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[─╭╮╰╯\-+ ]+", line):
            sections.append([])
        elif line and not line.startswith(("╭", "╰")):
            sections[-1].append(line)
    kept = [section for section in sections if section]
    if not kept:
        return "the command line cannot be read"
    message = " ".join(kept[0])
    message = re.sub(r"^Error parsing (\S+):", r"\1:", message)
    message = re.sub(
        r"invalid literal for int\(\) with base 10: (.*)$", r"expected a whole number, got \1", message
    )
    message = re.sub(r"could not convert string to float: (.*)$", r"expected a number, got \1", message)
    message = message.replace("Expected 1 values", "Expected one value")
    meant = [
        line.split()[0]
        for section in kept[1:]
        if section[0].startswith("Perhaps you meant")
        for line in section[1:]
        if line.startswith("--")
    ]
    if meant:
        message += f"; did you mean {' or '.join(meant[:3])}?"
    return message[:1].lower() + message[1:] if message[:2].istitle() else message
