"""The command line: ``fastdiff COMMAND [OPTIONS]``.

A command is a module of this package with a frozen dataclass of its options and a function
``run(options) -> exit code``. tyro turns the dataclass into flags and help. Only the module of
the command that was asked for is imported, and torch not before the command runs, so that
``fastdiff --help`` and a mistyped flag answer at once.

Exit codes: 0 done, 1 the work was done but its claim does not hold (an image made again differs,
an evaluation misses its goal), 2 a mistake of the user or of the machine (one line on stderr),
130 Ctrl-C. Anything else is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from fastdiff import __version__
from fastdiff.cli.parsing import UsageError, one_line

COMMANDS = {
    "sample": "make new images: PNGs with their recipe inside, and a contact sheet",
    "txt2img": "images from a prompt, with a Stable Diffusion checkpoint",
    "img2img": "change an image after a prompt",
    "inpaint": "make a part of an image new",
    "interpolate": "make the frames between two seeds, prompts or classes",
    "reconstruct": "pass images through the autoencoder and measure what is lost",
    "evaluate": "measure samples against real images, with the floor beside each number",
    "train": "train an autoencoder, or a denoiser on its latents",
    "convert": "write a checkpoint as a diffusers folder or a bundle",
    "samplers": "list the samplers, print or draw the table of one",
    "info": "what a model folder, a run folder or a PNG holds",
    "tune": "search the launch configs of the Triton kernels on this machine's GPU",
    "doctor": "versions, devices, compilers, and which backend serves each op",
    "completion": "print a script that completes commands and options in bash, zsh or fish",
}
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. ``argv`` defaults to ``sys.argv[1:]``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _dispatch(arguments)
            sys.stdout.flush()
            return code
    except SystemExit as stop:  # a training run that was told to stop: 143 or 130, saved
        return stop.code if isinstance(stop.code, int) else EXIT_MISTAKE
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `fastdiff samplers | head`: the reader has left, and that is fine
        _abandon_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        message = _users_mistake(error)
        if message is None:
            raise
        if os.environ.get("FASTDIFF_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        _complain(message)
        return EXIT_MISTAKE
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # said above; Python would try again on its way out, and complain
            _abandon_stdout()


def _abandon_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_help(), file=sys.stderr)
        return EXIT_MISTAKE
    first, *rest = arguments
    if first in ("-h", "--help", "help"):
        print(_help())
        return 0
    if first in ("--version", "-V"):
        print(f"fastdiff {__version__}")
        return 0
    if first not in COMMANDS:
        kind = "option" if first.startswith("-") else "command"
        raise UsageError(
            f"unknown {kind} {first!r}; expected one of {', '.join(COMMANDS)} (see fastdiff --help)"
        )
    command = importlib.import_module(f"fastdiff.cli.{first}")
    code: int = command.main(rest)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        f"fastdiff {__version__}: train diffusion models and sample from them",
        "",
        "usage: fastdiff COMMAND [OPTIONS]",
        "       fastdiff COMMAND --help",
        "",
        *(f"  {name:{width}}  {line}" for name, line in COMMANDS.items()),
        "",
        "  --version, --help",
        "",
        "examples:",
        "  fastdiff sample --classes 3 7 --count 8",
        "  fastdiff samplers dpmpp-2m --steps 20",
        "  fastdiff doctor",
        "",
        "FASTDIFF_BACKEND=NAME chooses who computes each op (see fastdiff doctor),",
        "FASTDIFF_DEBUG=1 shows where an error came from.",
    ]
    return "\n".join(lines)


def _users_mistake(error: Exception) -> str | None:
    """One line for an error that the user can mend, None for a bug of ours."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return one_line(error)
    # Classes of modules that may not be loaded yet: asked for by name, so that nothing is imported.
    names = {cls.__name__ for cls in type(error).__mro__}
    if not names.isdisjoint(("BackendError", "NotEnoughMemory")):
        return one_line(error)
    text = str(error)
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or "can't allocate" in text:
        return f"not enough memory: {one_line(error)}; a smaller --batch needs less"
    return None


def _complain(message: str) -> None:
    from fastdiff.files import message_line

    print(f"fastdiff: {message_line(message)}", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _complain(f"warning: {one_line(message)}")
