"""``fastdiff completion``: print a script for shell completion of commands, options and values.

The script contains a table of words, so that the shell can complete at once, without starting
Python. The table is extracted from the ``--help`` of each command, so that both always agree.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import tyro

from fastdiff.cli.parsing import parse
from fastdiff.names import SPACINGS

Shell = Literal["bash", "zsh", "fish"]
WIDTH = 88
"""Width of the help texts: wide enough for an option's choices, too narrow for two columns."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print a script for shell completion of commands, options and their values.

    bash and fish load it automatically from the folders below; for zsh, source the file in ~/.zshrc
    after compinit. Print it again after updating fastdiff.

    Examples:
      fastdiff completion bash > ~/.local/share/bash-completion/completions/fastdiff
      fastdiff completion zsh > ~/.fastdiff-completion.zsh
      fastdiff completion fish > ~/.config/fish/completions/fastdiff.fish
    """

    shell: tyro.conf.Positional[Shell]
    """The shell to write the script for."""


def main(words: Sequence[str]) -> int:
    options = parse(Completion, words, prog="fastdiff completion")
    return 0 if options is None else run(options)


def run(options: Completion) -> int:
    print({"bash": bash, "zsh": zsh, "fish": fish}[options.shell](table()))
    return 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The words that may follow a command."""

    line: str
    """A description of the command."""
    options: Mapping[str, Sequence[str]]
    """Option -> its values if there is a fixed choice; empty if it takes any value, or none."""
    words: Sequence[str] = ()
    """Words that may follow without an option."""


def table() -> dict[str, Entry]:
    """Command, such as ``sample`` or ``train diffusion`` -> the words that may follow it."""
    from fastdiff.cli import COMMANDS
    from fastdiff.cli.train import STAGES, run_class
    from fastdiff.data.config import CAPTIONED_SOURCES
    from fastdiff.diffusion.samplers import SAMPLERS
    from fastdiff.training import TRAINING_PRESETS

    values = {"--sampler": [*SAMPLERS, "checkpoint"], "--spacing": SPACINGS}
    words = {"samplers": [*SAMPLERS], "train": [*STAGES], "completion": [*get_args(Shell)]}
    words["data"] = [*CAPTIONED_SOURCES]
    found = {
        name: Entry(line=line, options=options_of([name], values), words=words.get(name, []))
        for name, line in COMMANDS.items()
    }
    for stage, line in STAGES.items():
        kind = run_class(stage)
        presets = [name for name, run in TRAINING_PRESETS.items() if isinstance(run, kind)]
        known = {**values, "--preset": presets}
        found[f"train {stage}"] = Entry(line=line, options=options_of(["train", stage], known))
    return found


def options_of(command: Sequence[str], values: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Option -> choices, from the help of a command.

    values: the choices of options whose help does not list them.
    """
    options: dict[str, list[str]] = {"--help": []}
    for line in help_text(command).splitlines():
        head = re.match(
            r"[│ ] ((?:-\w|--[a-z][\w.-]*)(?:,? --[a-z][\w.-]*)*)[, ]*(\{[^{} ]+\})?", line
        )
        for name in re.findall(r"--[\w.-]+", head[1]) if head else ():
            listed = head[2][1:-1].split(",") if head and head[2] else values.get(name, ())
            options[name] = [value for value in listed if value != "None"]
    return options


def help_text(command: Sequence[str]) -> str:
    """The output of ``fastdiff COMMAND --help``, without colours."""
    from fastdiff.cli import main as fastdiff

    out, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(out):
            code = fastdiff([*command, "--help"])
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    assert code == 0, command
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).rstrip()


def bash(entries: Mapping[str, Entry]) -> str:
    """The script for bash 3.2 and later."""
    commands = " ".join(name for name in entries if " " not in name)
    cases = []
    for name in sorted(entries, key=lambda name: -name.count(" ")):  # the first match is used
        entry = entries[name]
        for option, values in entry.options.items():
            if values:
                cases.append(f"    '{name} {option}') words='{' '.join(values)}' ;;")
        words, options = " ".join(entry.words), " ".join(entry.options)
        cases.append(f"    '{name} '*) words='{words}'; flags='{options}' ;;")
    return BASH.format(commands=commands, cases="\n".join(cases))


BASH = """\
_fastdiff() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}"
  local command="${{COMP_WORDS[1]}}" words='' flags=''
  COMPREPLY=()
  if [[ $cur == = ]]; then cur=''
  elif [[ $prev == = ]]; then prev="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=( $(compgen -W '{commands} --help --version' -- "$cur") )
    return
  fi
  if [[ $command == train ]] && (( COMP_CWORD > 2 )); then command="train ${{COMP_WORDS[2]}}"; fi
  case "$command $prev" in
{cases}
  esac
  [[ $cur == -* ]] && words="$flags"
  COMPREPLY=( $(compgen -W "$words" -- "$cur") )
}}
complete -o default -F _fastdiff fastdiff"""


def zsh(entries: Mapping[str, Entry]) -> str:
    """The script for zsh, which has a layer that reads bash's."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash(entries)}"


def fish(entries: Mapping[str, Entry]) -> str:
    """The script for fish."""
    lines = []
    for name, entry in entries.items():
        *above, word = name.split()
        seen = (
            f"__fish_seen_subcommand_from {' '.join(above)}" if above else "__fish_use_subcommand"
        )
        lines.append(f"complete -c fastdiff -f -n '{seen}' -a {word} -d {shlex.quote(entry.line)}")
        here = f"__fish_seen_subcommand_from {word}"
        if name == "train":
            here += f"; and not __fish_seen_subcommand_from {' '.join(entry.words)}"
        elif entry.words:
            lines.append(f"complete -c fastdiff -f -n '{here}' -a '{' '.join(entry.words)}'")
        for option, values in entry.options.items():
            given = f" -x -a '{' '.join(values)}'" if values else ""
            lines.append(f"complete -c fastdiff -n '{here}' -l {option[2:]}{given}")
    return "\n".join(lines)
