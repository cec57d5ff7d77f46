"""Parse words into a typed options object, and report every mistake in one clear line.

tyro draws a box of five to ten lines around each mistake. The text is kept, the box is not.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tyro

T = TypeVar("T")

# None is expressed by leaving the option out: the help shows the kind of value and no default.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]


class UsageError(ValueError):
    """The command line cannot be read: one line, exit code 2."""


def parse(
    options: type[T],
    words: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    text: str | None = None,
) -> T | None:
    """Read ``words`` into a dataclass.

    Args:
        options: a frozen dataclass. The docstring of a field is its help; the "Examples:" section
            of the class's docstring is printed at the end of the help.
        default: the source of the defaults, if not the class.
        text: the text of the help, if not the class's docstring.

    Returns:
        The options, or None if help was requested and has been printed.

    Raises:
        UsageError: a word cannot be parsed.
    """
    description, _, examples = (text or inspect.getdoc(options) or "").partition("\nExamples:\n")
    if not {"-h", "--help"}.isdisjoint(words):
        print(f"{_wrapped(description)}\n")
    errors = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            return cast(
                T,
                tyro.cli(
                    options,
                    prog=prog,
                    description="",
                    args=list(words),
                    **extra,
                ),
            )
    except SystemExit as stop:
        if not stop.code:
            if examples:
                print(f"\nexamples:\n{examples.rstrip()}")
            return None
        raise UsageError(f"{_unboxed(errors.getvalue())} (see {prog} --help)") from None


def option_value(words: Sequence[str], flag: str) -> str | None:
    """The value after ``flag``, read before parsing because other defaults depend on it."""
    value = None
    for index, word in enumerate(words):
        if word == flag and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def one_of(word: str, known: Iterable[str], what: str) -> str:
    """Return ``word`` if it is one of the known names; else raise a ValueError that lists them."""
    names = list(known)
    if word not in names:
        raise ValueError(f"unknown {what} {word!r}; expected one of {', '.join(names)}")
    return word


def one_line(message: object) -> str:
    """The text of an error without line breaks, with a suggestion for a mistyped name.

    All packages write ``unknown sampler 'ddmi'; expected one of ddpm, ddim, ...``; the suggestion
    of close matches is added here for all of them. An OSError names its file.
    """
    if isinstance(message, OSError) and message.strerror:
        named = f": {message.filename}" if message.filename is not None else ""
        return f"{message.strerror}{named}"
    text = " ".join(str(message).split()) or type(message).__name__
    listed = re.search(r"'([^']+)'.*?; expected one of:? ([\w, :.'-]+)", text)
    if listed is None:
        return text
    word = listed[1].lower().replace("++", "pp")  # DPM++ 2M
    names = re.findall(r"[\w:.-]+", listed[2])
    close = difflib.get_close_matches(word, [name.lower() for name in names], n=2)
    if not close or len(word) < 3:
        return text
    proposal = " or ".join(name for name in names if name.lower() in close)
    return text.replace("; expected one of", f"; did you mean {proposal}? Expected one of", 1)


def _wrapped(text: str) -> str:
    """Wrap paragraphs to the terminal, which tyro does only for options."""
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs = (textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n"))
    return "\n\n".join(paragraphs).strip()


def _unboxed(text: str) -> str:
    """The first section of tyro's error box and the options it suggests, in one line.

    If the encoding of the output has no box characters, the box has no lines at its sides.
    """
    sections: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        if not line.startswith(("│ ", "  ")):  # the title, or the frame
            continue
        inner = line[2:].removesuffix("│").rstrip()
        if re.fullmatch(r"[─-]+", inner):
            sections.append([])
        elif inner:
            sections[-1].append(inner)
    first, *more = [section for section in sections if section] or [["cannot parse the options"]]
    if first[0].startswith("Missing from"):  # names are indented by 4, their help by 8
        names = [line.strip() for line in first if re.match(r" {4}\S", line)]
        return f"missing: {', '.join(names)}"
    message = " ".join(line.strip() for line in first).rstrip(".")
    for pattern, better in (
        (r"^Error parsing (--\S+):", r"\1:"),
        (r"^Error parsing [^:]+: ", ""),  # an error raised by a config
        (r"invalid literal for int\(\) with base 10: (.*)$", r"expected a whole number, got \1"),
        (r"could not convert string to float: (.*)$", r"expected a number, got \1"),
        (r"no type matching .*Got errors:.*: (expected .*)$", r"\1"),
        (r"\. Expected 1 values", ""),
        (r"'\. Expected one of \((.*)\)", r"'; expected one of \1"),
    ):
        message = re.sub(pattern, better, message)
    meant = [
        line.split()[0]
        for section in more
        if section[0].startswith("Perhaps you meant")
        for line in section[1:]
        if line.lstrip().startswith("--")
    ]
    if meant:
        message += f"; did you mean {' or '.join(meant[:3])}?"
    return message[:1].lower() + message[1:] if message[:2].istitle() else message
