"""Every code block of the documentation is run, or looked at as closely as its language allows.

docs_page.py has the marks. Python runs in one process a page, in order, against a real nats-server: 127.0.0.1:4222
stands for it, and other ports of the page for free ones. Shell blocks are looked up, or run where they are marked so.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib.metadata
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

import docs_shell
from docs_page import Block, blocks
from natsync.testing import NatsServer, eventually
from processes import PATIENCE, Child, started
from support import ROOT

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Languages of blocks that are no code: what is printed, drawn, or sent; and Sphinx's own directives.
NO_CODE = {"", "text", "{toctree}", "{include} ../README.md", "{include} ../CHANGELOG.md", "{eval-rst}"}
#: Instructions of a Dockerfile.
DOCKERFILE = {
    "FROM",
    "RUN",
    "COPY",
    "WORKDIR",
    "ENV",
    "USER",
    "CMD",
    "ENTRYPOINT",
    "EXPOSE",
    "STOPSIGNAL",
    "HEALTHCHECK",
}
#: Commands that shell blocks run in the environment of the tests, as modules.
SHIMS = ("natsync", "flask", "gunicorn", "pytest")
_PORT = re.compile(r"127\.0\.0\.1:(\d{4,5})|(?<=--port )(\d{4,5})|(?<=start_http_server\()(\d{4,5})")


def free_port() -> int:
    """None of those that systems give to whoever asks for any, as a test beside this one may until it is used."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.SystemRandom().randrange(10_000, 30_000))) as one,
        ):
            return int(one.getsockname()[1])


class Reader:
    """Who reads a page and does what it says, in a directory of his own."""

    def __init__(self, page: Path, server: NatsServer, directory: Path, stack: ExitStack) -> None:
        self.page = page
        self.server = server
        self.directory = directory
        self.stack = stack
        self.ports = {"4222": str(server.port)}
        self.printed = ""
        self.files: set[str] = set()
        self._session: subprocess.Popen[bytes] | None = None
        self._bin = directory / ".bin"
        self._bin.mkdir()
        for name in SHIMS:
            self._shim(name, f"-m {name}")
        self._shim("python", "")
        points = importlib.metadata.entry_points(group="pytest11")
        if "natsync" not in points.names:  # a source tree: its plugin is not known by itself
            self._shim("pytest", "-m pytest -p natsync.testing.plugin")

    def _shim(self, name: str, arguments: str) -> None:
        path = self._bin / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        path.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}

    def local(self, text: str) -> str:
        """The text with ports of this run."""

        def port(match: re.Match[str]) -> str:
            number = match[1] or match[2] or match[3]
            return match[0].replace(number, self.ports.setdefault(number, str(free_port())))

        return _PORT.sub(port, text)

    def at(self, block: Block) -> str:
        return f"{self.page.relative_to(ROOT)}:{block.line}"

    # -- Python --------------------------------------------------------------------------------------------------

    def python(self, block: Block) -> None:
        compile(block.code, str(self.page), "exec")
        if "no-run" in block.marks:
            return
        if block.file is not None:
            (self.directory / block.file).write_text(self.local(block.text), "utf-8")
            self.files.add(block.file)
            return
        answer = self.order({"page": str(self.page), "code": self.local(block.code)})
        self.printed = answer["printed"]
        assert answer["fault"] is None, f"{self.at(block)}:\n{answer['fault']}"
        self._used(block.text)

    def order(self, order: object) -> dict[str, Any]:
        if self._session is None:
            command = (sys.executable, "-W", "error", str(ROOT / "tests" / "docs_session.py"))
            self._session = self.stack.enter_context(
                started(command, url=self.server.url, cwd=self.directory, env=self.environment,
                        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
            )  # fmt: skip
        assert self._session.stdin is not None
        assert self._session.stdout is not None
        self._session.stdin.write(json.dumps(order).encode() + b"\n")
        self._session.stdin.flush()
        line = self._session.stdout.readline()
        assert line, f"{self.page.name}: the interpreter has ended with status {self._session.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _used(self, text: str) -> None:
        """Files that the text runs or imports need not be run otherwise."""
        if re.search(r"\bpytest\b", text):
            self.files.discard("conftest.py")  # which pytest finds by itself
        self.files = {file for file in self.files if not re.search(rf"\b{re.escape(file[:-3])}\b", text)}

    # -- shell ---------------------------------------------------------------------------------------------------

    def shell(self, block: Block) -> None:
        if "no-run" in block.marks:
            return
        assert docs_shell.complaints(block.text) == [], self.at(block)
        if "run" in block.marks:
            child = self._start(block, "bash", "-e", "-c", self.local(block.text))
            status = child.wait()
            self.printed = "\n".join(child.out)
            assert status == 0, f"{self.at(block)}: {child}"
        elif "background" in block.marks:
            child = self._start(block, "bash", "-c", f"exec {self.local(block.text)}")
            self.stack.callback(child.wait)
            self.stack.callback(child.process.terminate)
            words = self.local(block.marks["background"])
            said = f"{self.at(block)} does not say {words!r}: {child}"
            eventually(lambda: any(words in line for line in child.out + child.err), PATIENCE, said)

    def _start(self, block: Block, *command: str) -> Child:
        self._used(block.text)
        process = started(command, url=self.server.url, cwd=self.directory, env=self.environment)
        return Child(self.stack.enter_context(process))

    # -- the rest ------------------------------------------------------------------------------------------------

    def read(self, block: Block) -> None:
        """Do what the block says."""
        if "output" in block.marks:
            assert self.printed.strip() == self.local(block.text).strip(), self.at(block)
        elif block.language == "python":
            self.python(block)
        elif block.language == "sh":
            self.shell(block)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            assert all(list(yaml.safe_load_all(block.text))), self.at(block)
        elif block.language == "ini":
            configparser.ConfigParser().read_string(block.text)
        elif block.language == "dockerfile":
            self.dockerfile(block)
        elif block.language not in NO_CODE:
            assert block.marks.get("no-run"), f"{self.at(block)}: what is to be done with {block.language!r}?"

    def dockerfile(self, block: Block) -> None:
        for line in filter(None, block.text.replace("\\\n", " ").splitlines()):
            instruction, _, rest = line.partition(" ")
            assert instruction in DOCKERFILE, f"{self.at(block)}: {line}"
            if instruction == "RUN":
                assert docs_shell.complaints(rest) == [], self.at(block)
            elif instruction in ("CMD", "ENTRYPOINT"):
                assert docs_shell.complaints(" ".join(json.loads(rest))) == [], self.at(block)

    def finish(self) -> None:
        if self._session is not None:
            answer = self.order(None)
            assert answer["fault"] is None, f"{self.page.name}:\n{answer['fault']}"
            assert self._session.stdin is not None
            self._session.stdin.close()
            assert self._session.wait(PATIENCE) == 0
        assert self.files == set(), f"{self.page.name} has files that nothing runs"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.timeout(120)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_page_shows_works(page: Path, make_nats_server: Any, tmp_path: Path, stack: ExitStack) -> None:
    reader = Reader(page, make_nats_server(), tmp_path, stack)
    for block in blocks(page):
        reader.read(block)
    reader.finish()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_has_a_reason(page: Path) -> None:
    reasons = [(block.line, block.marks["no-run"]) for block in blocks(page) if "no-run" in block.marks]
    assert [line for line, reason in reasons if len(reason) < 15] == []
