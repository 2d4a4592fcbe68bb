"""Types of command-line arguments: durations, headers, payloads. Pure but for a payload from stdin."""

import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h|)")


def duration(value: str | float) -> float:
    """Seconds as a number, or with a unit: 5, 0.25, 250ms, 5s, 2m, 1h. An option's type."""
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a duration; write seconds, or 250ms, 5s, 2m")
    return float(match[1]) * _UNITS[match[2]]


def timeout_option(default: float, help: str) -> Callable[[_Command], _Command]:
    """The option --timeout of a command, as NATS_TIMEOUT has it, too."""
    return click.option(
        "--timeout",
        type=duration,
        default=default,
        envvar="NATS_TIMEOUT",
        show_envvar=True,
        show_default=True,
        help=help,
    )


def header(value: str) -> tuple[str, str]:
    """One header as `Name:value`. An option's type."""
    name, colon, text = value.partition(":")
    if not colon or not name.strip():
        raise click.BadParameter(f"{value!r} is not a header; write Name:value")
    return name.strip(), text.strip()


def read_payload(text: str) -> bytes:
    """The bytes to send: the argument itself, or all of stdin for `-`."""
    if text == "-":
        return sys.stdin.buffer.read()
    # surrogateescape: an argument that is not UTF-8 leaves as the very bytes the shell gave.
    return text.encode("utf-8", "surrogateescape")


def group_headers(pairs: tuple[tuple[str, str], ...]) -> dict[str, list[str]] | None:
    """Headers as a mapping of name to all its values, in order; None when there are none."""
    headers: dict[str, list[str]] = {}
    for name, value in pairs:
        headers.setdefault(name, []).append(value)
    return headers or None
