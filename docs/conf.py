"""Sphinx configuration: `make docs` builds the site into build/docs/html."""

from __future__ import annotations

import re
import sys
from dataclasses import is_dataclass
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fastdiff  # noqa: E402
import fastdiff.generate.run  # noqa: E402
from fastdiff.cli import COMMANDS  # noqa: E402
from fastdiff.cli.completion import help_text  # noqa: E402
from fastdiff.cli.train import STAGES  # noqa: E402

# The attribute is the package, which can be called; the page documents the function behind it.
fastdiff.__dict__["generate"] = fastdiff.generate.run.generate

project = "fastdiff"
author = "The fastdiff developers"
copyright = author
version = release = fastdiff.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["images", "*.json"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Docstrings: Google sections, single backticks for code, indented blocks for formulas.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
maximum_signature_line_length = 88

# References are checked, except to other packages: the build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # single backticks hold code of any kind
    ("py:.*", r"(torch|PIL|np|numpy|collections|contextlib|os|abc|types|pathlib|typing)\..*"),
    ("py:(class|exc)", r"\w+Error|Any|Image|Path|(tuple|dict)\[.*"),
    (
        "py:class",
        r"fastdiff\.(models|evaluation|kernels|training)\..*",
    ),  # parts that are not public
    (
        "py:class",
        r"fastdiff\.(checkpoint\.model\.(Model|PictureNoise)|generate\.session\.Session|diffusion\.caching\.CacheConfig)",
    ),
]

html_theme = "pydata_sphinx_theme"
html_title = f"fastdiff {version}"
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars: dict[str, list[str]] = {"index": [], "start": [], "commands": [], "search": []}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False


class CommandHelp(Directive):
    """``{command-help}``: what `fastdiff --help` and `fastdiff COMMAND --help` print."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        sections = []
        stages = [["train", stage] for stage in STAGES]
        for words in [[], *([command] for command in COMMANDS), *stages]:
            title = " ".join(["fastdiff", *words])
            section = nodes.section(ids=[title.replace(" ", "-")], names=[title])
            section += nodes.title(title, title)
            text = help_text(words)
            section += nodes.literal_block(text, text, language="text")
            sections.append(section)
        return [*sections]


SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "Examples:", "Note:")
CODE = re.compile(r"(``.+?``|`[^`]+`|^::\n(?:\n| [^\n]*\n?)+|^>>> [^\n]*)", re.M | re.S)
MARKUP = re.compile(r"[*|]|(?<=\w)_(?!\w)")


def plain_text(_: Sphinx, what: str, __: str, ___: object, ____: object, lines: list[str]) -> None:
    """Our docstrings are plain text with code in backticks: escape what reStructuredText would read
    as markup, and show indented blocks outside the sections as they are."""
    marked: list[str] = ["\\ "] if what in ("attribute", "data", "property") else []
    in_section = False  # napoleon reads "one: two" in an attribute's first line as a type
    for line in lines:
        if line.strip() and not line.startswith(" "):
            in_section = line in SECTIONS
        if line.startswith(" ") and not in_section and marked and not marked[-1]:
            marked += ["::", ""]
        marked.append(line)
    parts = CODE.split("\n".join(marked))
    parts[::2] = [MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def without_signature(
    _: Sphinx, what: str, __: str, obj: object, ___: object, signature: str, returned: str
) -> tuple[str, str] | None:
    """A dataclass has its fields below it, with types, defaults and explanations."""
    return ("", "") if what == "class" and is_dataclass(obj) else None


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-signature", without_signature)
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon
