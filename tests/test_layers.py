"""The layers of natsync: a module imports only what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support import ROOT

#: Every module of the core, from the top: each may import those before it and none of those behind.
CORE = [
    "_version", "_pynats2",
    "errors", "server_errors", "server_info", "nkey", "headers", "subject", "message", "concurrency", "timers",  # words
    "closing", "closable", "context", "hooks", "middleware", "options",
    "protocol",  # wire
    "auth", "servers", "workers", "resolver", "transport", "backlog", "outbox", "session", "handover",  # link
    "settling", "mux", "subscription", "dispatcher", "supervisor", "links",
    "connection",  # connection
    "reply", "replies", "retry_budget", "retry",  # use
    "streaming", "streaming.terms", "streaming.frames", "streaming.window", "streaming.peers", "streaming.inlet",
    "streaming.calls", "streaming.plain_receiver", "streaming.framed_receiver", "streaming.call",
    "streaming.stream", "streaming.framing", "streaming.sender", "streaming.plain_sender", "streaming.framed_sender",
    "streaming.handlers", "streaming.watched", "streaming.passing", "streaming.work",
    "streaming.responder", "streaming.registration", "streaming.serving", "streaming.subscriber", "client",
    "pooling", "pooling.health", "pooling.store", "pooling.keeper", "pool",
]  # fmt: skip
#: What the core never imports: these may import all of it.
EDGES = ("__init__", "__main__", "testing", "monitor", "cli", "contrib", "services")

PACKAGE = ROOT / "natsync"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def is_edge(module: str) -> bool:
    return module.partition(".")[0] in EDGES


def imports(path: Path) -> set[str]:
    """Full names of everything the file imports, wherever in it; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """Modules of natsync that the file imports; "__init__" for names of the package itself."""
    names = {name.partition(".")[2] for name in imports(path) if name.partition(".")[0] == "natsync"}
    return {next((one for one in (name, name.rpartition(".")[0]) if one in FILES), "__init__") for name in names}


def test_every_module_has_its_place() -> None:
    assert sorted(module for module in FILES if not is_edge(module)) == sorted(CORE)


@pytest.mark.parametrize("module", CORE)
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    above = CORE[: CORE.index(module)]
    assert sorted(own_imports(FILES[module]) - set(above)) == []


def test_only_one_module_imports_pynats2() -> None:
    importers = [module for module, path in FILES.items() if "pynats2" in path.read_text("utf-8")]
    users = [
        module for module in importers if any(name.partition(".")[0] == "pynats2" for name in imports(FILES[module]))
    ]
    named = [module for module in importers if 'import_module("pynats2")' in FILES[module].read_text("utf-8")]
    assert (users, named) == ([], ["_pynats2"])


@pytest.mark.parametrize("module", FILES)
def test_no_module_uses_asyncio(module: str) -> None:
    assert not [name for name in imports(FILES[module]) if name.partition(".")[0] == "asyncio"]
