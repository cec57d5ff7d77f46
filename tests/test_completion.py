"""`fastdiff completion`: the scripts in real shells."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff.cli import COMMANDS, completion, main
from fastdiff.cli.completion import options_of, table
from tests.test_docs import PAGES, commands

Ask = Callable[..., list[str]]
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_fastdiff
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, entries = tmp_path_factory.mktemp("completion"), table()
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(getattr(completion, shell)(entries) + "\n")
    return folder


@pytest.fixture
def ask(scripts: Path, tmp_path: Path) -> Ask:
    """What bash completes for the last word; PATH is empty, so it can start no other program."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")

    def asked(*words: str) -> list[str]:
        result = subprocess.run(
            [bash, "--norc", "-c", ASK, "bash", str(scripts / "bash"), *words],
            env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert not result.stderr
        return result.stdout.split()

    return asked


def test_bash_offers_commands(ask: Ask) -> None:
    assert ask("fastdiff", "") == [*COMMANDS, "--help", "--version"]
    assert ask("fastdiff", "in") == ["inpaint", "interpolate", "info"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sample", "--pre"], ["--prediction", "--preview"]),
        (["sample", "--prediction", ""], ["eps", "v", "x0", "flow"]),
        (["sample", "--prediction", "=", "e"], ["eps"]),
        (["sample", "--prediction", "="], ["eps", "v", "x0", "flow"]),
        (["convert", "--to", ""], ["diffusers", "bundle"]),
        (["sample", "--sampler", "dd"], ["ddpm", "ddim"]),
        (["samplers", "he"], ["heun"]),
        (["train", ""], ["autoencoder", "diffusion", "classifier", "clip"]),
        (["train", "classifier", "--preset", "t"], ["tiny-classifier"]),
        (["train", "diffusion", "--preset", "dig"], ["digits-diffusion"]),
        (["train", "autoencoder", "--preset", "dig"], ["digits-autoencoder"]),
        (["train", "diffusion", "--optimization.st"], ["--optimization.steps"]),
        (["train", "autoencoder", "--prediction"], []),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["sample", "--model", ""], []),  # bash then offers files
    ],
    ids=" ".join,
)
def test_bash_offers_what_can_follow(words: list[str], offered: list[str], ask: Ask) -> None:
    assert ask("fastdiff", *words) == offered


def test_where_nothing_is_offered_bash_offers_files(scripts: Path) -> None:
    result = subprocess.run(
        ["bash", "-c", f"source {scripts / 'bash'}; complete -p fastdiff"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == "complete -o default -F _fastdiff fastdiff\n"


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
def test_fish_offers_the_same(scripts: Path) -> None:
    lines = [
        "fastdiff sample --pre",
        "fastdiff sample --prediction ",
        "fastdiff train diffusion --preset dig",
    ]
    code = "; ".join([f"source {scripts / 'fish'}", *(f"complete -C '{line}'" for line in lines)])
    result = subprocess.run(["fish", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [
        "--prediction",
        "--preview",
        "eps",
        "flow",
        "v",
        "x0",
        "digits-diffusion",
    ]


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_reads_the_script(scripts: Path) -> None:
    code = (
        f"autoload -U compinit; compinit -u -D; source {scripts / 'zsh'}; print $_comps[fastdiff]"
    )
    result = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "_bash_complete -o default -F _fastdiff\n"
    assert not result.stderr


def test_every_option_that_the_documentation_uses_is_offered() -> None:
    entries = table()
    used = [line.split("#")[0].split() for page in PAGES for line in commands(page)]
    assert len(used) > 20
    for _, command, *rest in used:
        name = f"train {rest[0]}" if command == "train" else command
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert options <= set(entries[name].options), name


def test_an_option_of_two_names_and_one_of_two_lines_are_read() -> None:
    options = options_of(["train", "diffusion"], {"--prediction": ["not", "these"]})
    assert {"--optimization.gradient-checkpointing", "--model.no-null-class"} <= set(options)
    assert options["--prediction"] == ["eps", "v", "x0", "flow"]
    assert not [name for name in options if not re.fullmatch(r"--[a-z][a-z0-9.-]*", name)]


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    assert capsys.readouterr().out.startswith(
        "complete -c fastdiff -f -n '__fish_use_subcommand' -a sample"
    )
    assert main(["completion", "csh"]) == 2
    assert "csh" in capsys.readouterr().err
