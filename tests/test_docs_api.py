"""The reference and the tables of names: every public name is documented, says what blocks and raises, and exists."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import natsync
import natsync.contrib.django
import natsync.contrib.flask
import natsync.contrib.msgpack
import natsync.contrib.otel
import natsync.contrib.prometheus
import natsync.contrib.pydantic
import natsync.services
import natsync.testing
from support import ROOT

DOCS = ROOT / "docs"
REFERENCE = (DOCS / "api.md").read_text("utf-8")
CONTRIB = natsync.contrib
EXTRAS = (CONTRIB.flask, CONTRIB.django, CONTRIB.prometheus, CONTRIB.otel, CONTRIB.msgpack, CONTRIB.pydantic)
MODULES = (natsync, natsync.services, natsync.testing, *EXTRAS)
#: Public in Python's sense, and of no use to users: the reference leaves them out by name, see excluded().
ENTRY = re.compile(r"^\.\. auto(?:class|exception|function):: ([\w.]+)\n((?:   :.*\n)*)", re.MULTILINE)

#: What blocks, besides everything that takes a timeout.
BLOCKING = {
    "Client.open", "Client.publish", "Subscriber.open", "Subscriber.stream_subscribe", "Subscriber.serve_forever",
    "ResponseSender.send", "ResponseSender.end", "ConnectionPool.connection", "ConnectionPool.check", "Stream",
    "Client.rtt", "connect", "ConnectionPool.publish", "ConnectionPool.request", "Client.stream_request",
    "testing.NatsServer.start", "testing.NatsCluster.start", "testing.NatsCluster.wait_joined",
}  # fmt: skip
#: What raises by way of something else, so that its own lines do not show it.
RAISING = {
    "connect", "Client.open", "Client.request", "Client.stream", "Client.stream_request", "Client.subscribe",
    "Client.flush", "Client.rtt", "Client.drain", "Stream.next", "ResponseSender.send", "ResponseSender.try_send",
    "ResponseSender.send_many", "Subscriber.stream_subscribe", "Subscriber.batch_stream_subscribe",
    "Subscriber.legacy_stream_subscribe", "Subscriber.subscribe", "Subscriber.open", "Subscriber.serve_forever",
    "Subscriber.stream", "Subscriber.handler", "ConnectionPool.connection", "ConnectionPool.getconn",
    "ConnectionPool.putconn", "ConnectionPool.publish", "ConnectionPool.request", "ConnectionPool.stream",
    "ConnectionPool.stream_request", "ConnectionPool.wait", "Headers.add", "testing.NatsServer.start",
    "testing.NatsServer.restart", "testing.NatsCluster.start", "testing.NatsCluster.restart",
}  # fmt: skip


def public_in(module: ModuleType) -> list[str]:
    """__all__, or the classes and functions that are made here and named without an underscore."""
    here = [name for name, one in vars(module).items() if getattr(one, "__module__", None) == module.__name__]
    return getattr(module, "__all__", None) or [name for name in here if not name.startswith("_")]


def public_names() -> dict[str, Any]:
    """Every public object by its name without natsync."""
    found = {}
    for module in MODULES:
        prefix = module.__name__.partition(".")[2]
        for name in public_in(module):
            if name != "__version__":
                found[f"{prefix}.{name}".lstrip(".")] = getattr(module, name)
    return found


NAMES = public_names()
ENTRIES = {match[1].removeprefix("natsync."): match[2] for match in ENTRY.finditer(REFERENCE)}


def excluded(name: str) -> set[str]:
    found = re.search(r":exclude-members: (.*)", ENTRIES.get(name, ""))
    return set(re.split(r",\s*", found[1])) if found else set()


def members() -> Iterator[tuple[str, Any]]:
    """Every public method and property of the public classes, and every public function."""
    for name, value in NAMES.items():
        if inspect.isfunction(value):
            yield name, value
        if not inspect.isclass(value) or issubclass(value, enum.Enum):
            continue
        for base in reversed(value.__mro__):
            if not base.__module__.startswith("natsync"):
                continue
            for key, member in vars(base).items():
                own = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
                if value is not natsync.Hooks and issubclass(value, natsync.Hooks) and key in vars(natsync.Hooks):
                    continue  # an exporter's part of what Hooks documents
                if own and not key.startswith("_") and key not in excluded(name):
                    yield f"{name}.{key}", getattr(value, key)


MEMBERS = dict(members())
FUNCTIONS = {name: member for name, member in MEMBERS.items() if inspect.isroutine(member)}


def text_of(name: str) -> str:
    return inspect.getdoc(MEMBERS.get(name, NAMES.get(name))) or ""


def test_the_reference_has_every_public_name_once() -> None:
    assert sorted(match[1].removeprefix("natsync.") for match in ENTRY.finditer(REFERENCE)) == sorted(
        name for name, value in NAMES.items() if inspect.isclass(value) or inspect.isroutine(value)
    )


@pytest.mark.parametrize("name", [*NAMES, *MEMBERS])
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = MEMBERS.get(name, NAMES.get(name))
    owner, _, attribute = name.rpartition(".")
    if isinstance(value, property) and re.search(rf"\b{attribute}\b", text_of(owner)):
        return  # among the attributes of its class
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own


def test_what_takes_a_timeout_or_blocks_says_so() -> None:
    waiting = {name for name, one in FUNCTIONS.items() if {"timeout", "wait"} & set(inspect.signature(one).parameters)}
    setting = {
        "Client.stream",
        "Context.with_timeout",
        "HandlerContext.with_timeout",
    }  # theirs is a deadline; they return at once
    silent = [name for name in sorted((waiting - setting) | BLOCKING) if not re.search("[Bb]lock|wait", text_of(name))]
    assert not silent, ", ".join(silent)


def raising(function: Any) -> bool:
    """Whether the function has a raise of its own, or checks arguments."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError):
        return False
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def test_what_raises_says_what() -> None:
    names = {name for name, one in FUNCTIONS.items() if raising(one)} | RAISING
    silent = [name for name in sorted(names) if not re.search(r"[Rr]aises?\b", text_of(name))]
    assert not silent, ", ".join(silent)


@pytest.mark.parametrize("page", ["from-go.md", "from-pynats2.md", "from-nats-py.md"])
def test_the_names_that_a_table_translates_to_exist(page: str) -> None:
    rows = re.findall(r"^\|(?! natsync)[^|\n]*\|([^|\n]*)\|", (DOCS / page).read_text("utf-8"), re.MULTILINE)
    forms = [form for row in rows for form in re.findall(r"`([A-Z]\w+(?:\.\w+)?)(?:\(([\w, ]*)\))?`", row)]
    assert len(forms) > 10
    missing = []
    for path, parameters in forms:
        value: Any = natsync
        name = path
        try:
            for name in path.split("."):
                if name in getattr(value, "__dataclass_fields__", {}):
                    value = None
                    break
                if not hasattr(value, name) and name in (value.__doc__ or ""):
                    value = None  # an attribute of its instances
                    break
                value = getattr(value, name)
        except AttributeError:
            missing.append(path)
            continue
        wanted = {one.strip() for one in parameters.split(",") if one.strip()}
        known = set(inspect.signature(value).parameters) if callable(value) and wanted else wanted
        missing += [f"{path}({one}=)" for one in sorted(wanted - known)]
    assert not missing, ", ".join(missing)
