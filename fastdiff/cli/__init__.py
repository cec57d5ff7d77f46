"""The command line: ``fastdiff COMMAND [OPTIONS]``.

A command is a module of this package with a frozen dataclass of its options and a function
``run(options) -> exit code``. tyro turns the dataclass into flags and help. Only the module of the
requested command is imported, and torch only when the command runs, so that ``fastdiff --help`` and
mistyped flags are answered at once.

Exit codes: 0 success; 1 the command ran, but its check failed (an image made again differs, an
evaluation misses a limit); 2 an error of the user or the machine (one line on stderr); 130 Ctrl-C.
Anything else is a bug in fastdiff and shows its traceback.
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
    "sample": "make new images as PNGs that contain their recipes, and a contact sheet",
    "generate": "make an image per row of a file, in shards, and resume after any stop",
    "txt2img": "make images from a prompt, with a Stable Diffusion checkpoint",
    "img2img": "change an image according to a prompt or a class",
    "inpaint": "replace a part of an image",
    "interpolate": "make the frames between two seeds, prompts or classes",
    "reconstruct": "pass images through the autoencoder and measure the loss",
    "evaluate": "measure samples against real images",
    "serve": "answer requests for images over HTTP, as OpenAI's API does",
    "ui": "open a page to try a model in, with a canvas, previews and history",
    "train": "train an autoencoder, or a denoiser on its latents",
    "data": "fetch and render captioned data sets, and look at them",
    "convert": "convert a checkpoint to a diffusers folder or a bundle",
    "samplers": "list the samplers, or print or plot their tables",
    "info": "show the contents of a model folder, a run folder or a PNG",
    "bench": "measure whether it is faster on this machine, and what limits it",
    "tune": "search for the fastest launch configs of the Triton kernels on this GPU",
    "doctor": "show versions, devices, compilers, and which backend runs each op",
    "completion": "print a script for shell completion in bash, zsh or fish",
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
    except SystemExit as stop:  # a training run was interrupted and has saved: 143 or 130
        return stop.code if isinstance(stop.code, int) else EXIT_MISTAKE
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `fastdiff samplers | head`: the reader has closed the pipe
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
        except OSError:  # reported above; at exit Python would flush again and complain
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
        "environment:",
        "  FASTDIFF_BACKEND=NAME  run all ops on this backend (see fastdiff doctor)",
        "  FASTDIFF_DEBUG=1       show the traceback of errors",
    ]
    return "\n".join(lines)


def _users_mistake(error: Exception) -> str | None:
    """One line for an error that the user can fix, None for a bug in fastdiff."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return one_line(error)
    # Compare class names, so that no module is imported just to check for its errors.
    names = {cls.__name__ for cls in type(error).__mro__}
    if not names.isdisjoint(("BackendError", "NotEnoughMemory")):
        return one_line(error)
    text = str(error)
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or "can't allocate" in text:
        return f"not enough memory: {one_line(error)}; use a smaller --batch"
    return None


def _complain(message: str) -> None:
    from fastdiff.files import message_line

    print(f"fastdiff: {message_line(message)}", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _complain(f"warning: {one_line(message)}")
