"""The documentation names tests, files and each other: all of them exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST = re.compile(r"(test_\w+\.py)(?:::(\w+))?")
LINK = re.compile(r"\]\(([^)#:]+)(?:#([\w-]+))?\)")


@functools.cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    missing = []
    for file, name in TEST.findall(page.read_text("utf-8")):
        path = ROOT / "tests" / file
        if not path.exists() or (name and name not in functions(path)):
            missing.append(f"{file}::{name}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_and_sections_that_a_page_links_to_exist(page: Path) -> None:
    for target, section in LINK.findall(page.read_text("utf-8")):
        path = page.parent / target
        assert path.exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, section


def test_the_reliability_page_names_many_tests() -> None:
    named = {name for _, name in TEST.findall((ROOT / "docs" / "reliability.md").read_text("utf-8")) if name}
    assert len(named) > 50
