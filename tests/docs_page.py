"""The code blocks of a documentation page, in order, with what hidden comments say of them.

A comment of HTML directly in front of a block, or of another such comment, marks it:

    <!-- no-run: why -->        Python: it must compile, and is not run; any other language: it is not looked at
    <!-- run -->                shell: run it (otherwise its commands and options are only looked up)
    <!-- background: text -->   shell: run it on and on, and wait until it says text
    <!-- output -->             text: this is what the block before has printed

and `<!-- python`, code on the lines below, `-->` is a block that readers do not see.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_MARK = re.compile(r"<!-- (no-run|run|background|output)(?:: (.+?))? -->")
_HIDDEN = re.compile(r"<!-- python\n(.*?)^-->", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ \t]*$", re.M | re.S)
_PIECE = re.compile(f"{_FENCE.pattern}|{_HIDDEN.pattern}|{_MARK.pattern}", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w.]+\.py)\n")


@dataclass
class Block:
    language: str
    text: str
    line: int
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str | None:
        """The file that the reader saves it as: its first line says so."""
        match = _FILE.match(self.text)
        return match[1] if match and self.language == "python" else None

    @property
    def code(self) -> str:
        """The text on the lines it has in the page, so that tracebacks point there."""
        return "\n" * (self.line - 1) + self.text


def blocks(page: Path) -> list[Block]:
    """All blocks of the page, hidden ones included."""
    text = page.read_text("utf-8")
    found: list[Block] = []
    marks: dict[str, str] = {}
    end = 0
    for match in _PIECE.finditer(text):
        if text[end : match.start()].strip():
            assert not marks, f"{page.name}: {marks} in front of no block"
        end = match.end()
        if match.group("text") is not None:
            line = text.count("\n", 0, match.start("text")) + 1
            indent = match["indent"]
            lines = [one.removeprefix(indent) for one in match["text"].splitlines(keepends=True)]
            found.append(Block(match["language"].strip(), "".join(lines), line, marks))
            marks = {}
        elif match.group(0).startswith("<!-- python"):
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block("python", match[0].split("\n", 1)[1].removesuffix("-->"), line, {"hidden": ""}))
        else:
            name, said = _MARK.fullmatch(match[0]).groups()  # type: ignore[union-attr]
            marks[name] = said or ""
    assert not marks, f"{page.name}: {marks} in front of no block"
    return found
