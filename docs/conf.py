"""Sphinx: `python -m sphinx -W -b html docs OUT`, with the extra `docs` installed. Pages are Markdown (MyST).

The pages are written to be read on a code host, too, so links name files: `../README.md`, `../examples/worker.py`. Here
README and CHANGELOG are pages; other files are copied along; a directory is only named.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import sphinx.application

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import natsync  # noqa: E402

project = "natsync"
author = "The natsync authors"
copyright = author
release = version = natsync.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"natsync {release}"
exclude_patterns = ["_build"]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# Docstrings use single backquotes for code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

_GLOB = re.compile(r"^(\[\w\]\w+\*)\n", re.MULTILINE)
_SECTION = re.compile(r"(Args|Attributes|Raises) \((.+)\):")
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[\w-]+)?\)")
#: Files outside of this directory that are pages here.
_PAGES = {ROOT / "README.md": "readme.md", ROOT / "CHANGELOG.md": "changelog.md"}


def _links(text: str, directory: Path) -> str:
    """The page's text with links that mean something in this documentation; directory is where it lies."""

    def link(match: re.Match[str]) -> str:
        path = (directory / match[2]).resolve()
        if path.is_dir():
            return match[1]
        if not path.exists():
            return match[0]
        return f"[{match[1]}]({_target(path)}{match[3] or ''})"

    return _LINK.sub(link, text)


def _target(path: Path) -> str:
    """A link to the file as MyST has it: a page, or a file that is copied along."""
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    return _PAGES.get(path) or f"path:../{path.relative_to(ROOT)}"


def _source_read(app: sphinx.application.Sphinx, page: str, content: list[str]) -> None:
    text = _links(content[0], DOCS)
    # A page that index.md stands a glob for may be missing: an integration that is not part of this distribution.
    content[0] = _GLOB.sub(lambda match: match[0] if any(DOCS.glob(f"{match[1]}.md")) else "", text)


def _include_read(app: sphinx.application.Sphinx, path: Path, page: str, content: list[str]) -> None:
    content[0] = _links(content[0], ROOT)


def _docstring(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings do without reStructuredText's noise: what is indented is code; a section's title may have a note."""
    done: list[str] = []
    for line, following, behind in zip(lines, [*lines[1:], "."], [*lines[2:], "", ""], strict=False):
        section = _SECTION.fullmatch(line)
        if section is not None:
            done += [f"({section[2]})", "", f"{section[1]}:"]
        elif line and not line.startswith(" ") and not following and behind.startswith("    "):
            done += [f"{line}:"] if line.endswith(":") else [line, "", "::"]
        else:
            done.append(line)
    lines[:] = done


def setup(app: sphinx.application.Sphinx) -> None:
    app.connect("source-read", _source_read)
    app.connect("include-read", _include_read)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # ahead of napoleon
