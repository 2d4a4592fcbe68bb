"""Looking up what the shell blocks of the documentation say: commands, their options, and extras to be installed."""

from __future__ import annotations

import configparser
import re
import shlex
from collections.abc import Iterator

import click

from natsync.cli.app import app
from support import ROOT

#: Commands of others, whose options are theirs.
OTHERS = {
    ".", "cd", "curl", "docker", "eval", "export", "flask", "gunicorn", "head", "jq", "kill", "kubectl", "mkdir",
    "mypy", "nats", "nats-server", "nk", "nsc", "pip", "pytest", "python", "python3", "ruff", "set", "sleep",
    "sphinx-build", "tee", "test", "uwsgi",
}  # fmt: skip
_EXTRAS = re.compile(r"(?:natsync|\.)\[([\w,-]+)\]")
_ASSIGNMENT = re.compile(r"\w+=\S*")


def complaints(text: str) -> list[str]:
    """What a shell block says that is not so."""
    found = []
    known = _extras()
    for command in _commands(text):
        for names in _EXTRAS.findall(" ".join(command)):
            found += [f"no extra {name!r}" for name in names.split(",") if name not in known]
        name = command[0].rpartition("/")[2]
        if name == "natsync":
            found += _natsync(command[1:])
        elif command[1:3] == ["-m", "natsync"]:
            found += _natsync(command[3:])
        elif name not in OTHERS:
            found.append(f"unknown command {command[0]!r}")
    return found


def _commands(text: str) -> Iterator[list[str]]:
    """Each simple command of the block, in words."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word.strip("();&|") or not word:
                if command or not _ASSIGNMENT.fullmatch(word):
                    command.append(word)
            elif command:
                yield command
                command = []


def _extras() -> set[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return set(parser["options.extras_require"])


def _natsync(words: list[str]) -> list[str]:
    """What the natsync command does not know."""
    options = _options(app)
    command: click.Command = app
    found = []
    for word in words:
        if word.startswith("-") and word != "-":
            if word.partition("=")[0] not in options:
                found.append(f"natsync {command.name}: no option {word!r}")
        elif command is app and word in app.commands:
            command = app.commands[word]
            options |= _options(command)
    if command is app and words and not {"--help", "--version"} & set(words):
        found.append(f"natsync: no command in {words}")
    return found


def _options(command: click.Command) -> set[str]:
    context = click.Context(command)
    return {name for one in command.get_params(context) for name in (*one.opts, *one.secondary_opts)}
