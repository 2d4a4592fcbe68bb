"""The settings dict NATSYNC: read, checked, turned into what natsync's constructors take.

Keys are natsync's options in capitals, URL for the servers, and those of the worker. Values are never shown in an
error: they may be credentials.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

import natsync
from natsync import subject
from natsync.options import ConnectOptions, connect_settings, parse_servers

SETTING = "NATSYNC"

#: Keys that go to natsync.Subscriber only, under their name in small letters.
SUBSCRIBER_KEYS = ("MAX_WORKERS", "MAX_STREAMS", "PENDING_MESSAGES", "PENDING_BYTES")
#: Keys of the worker: the queue group of handlers that name none.
WORKER_KEYS = ("QUEUE",)
#: Keys that are options of a connection: those of natsync.ConnectOptions.
OPTION_KEYS = tuple(field.name.upper() for field in dataclasses.fields(ConnectOptions))
KEYS = ("URL", *OPTION_KEYS, *SUBSCRIBER_KEYS, *WORKER_KEYS)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the setting; number is that of the system check."""

    number: int
    text: str
    hint: str | None = None


@dataclass(frozen=True)
class Config:
    """What the setting means.

    Attributes:
        servers: a URL, several, or None for NATS_URL or localhost.
        options: keywords of natsync.ConnectOptions.
        limits: more keywords of natsync.Subscriber.
        queue: the worker's default queue group, "" for none; None where the setting does not say.
    """

    servers: Any
    options: Mapping[str, Any] = dataclasses.field(repr=False)
    limits: Mapping[str, Any]
    queue: str | None


def configured() -> Config:
    """The present setting.

    Raises:
        ImproperlyConfigured: it cannot be used; the text says all that is wrong.
    """
    value = getattr(settings, SETTING, {})
    found = problems(value)
    if found:
        raise ImproperlyConfigured("; ".join(one.text for one in found))
    return Config(
        servers=value.get("URL"),
        options={key.lower(): value[key] for key in OPTION_KEYS if key in value},
        limits={key.lower(): value[key] for key in SUBSCRIBER_KEYS if key in value},
        queue=value.get("QUEUE"),
    )


def problems(value: object) -> list[Problem]:
    """What keeps the setting from being used; nothing is opened for it."""
    if not isinstance(value, Mapping):
        return [Problem(1, f"{SETTING} is a dict, not {type(value).__name__}")]
    found = [_unknown(key) for key in value if key not in KEYS]
    url, options = value.get("URL"), {key.lower(): value[key] for key in OPTION_KEYS if key in value}
    found += [*_url(url), *_options(None if _url(url) else url, options), *_limits(value), *_queue(value.get("QUEUE"))]
    return found


def _unknown(key: object) -> Problem:
    near = difflib.get_close_matches(str(key).upper(), KEYS, 1)
    hint = f"Did you mean {near[0]}?" if near else f"Keys are {', '.join(KEYS)}."
    return Problem(2, f"{SETTING} has no key {key!r}", hint)


def _url(value: Any) -> list[Problem]:
    try:
        parse_servers(value)
    except (TypeError, ValueError) as error:
        where = f"{SETTING}['URL']" if value is not None else "the environment variable NATS_URL"
        return [Problem(3, f"{where}: {error}", "Write nats://host:port, several with commas or in a list.")]
    return []


def _options(url: Any, options: dict[str, Any]) -> list[Problem]:
    try:
        connect_settings(url, options)
    except ModuleNotFoundError as error:
        return [Problem(4, f"{SETTING}: {error}")]
    except (TypeError, ValueError, RuntimeError) as error:
        return [Problem(4, f"{SETTING}: {error}", "Keys are natsync's options in capitals.")]
    return []


def _limits(value: Mapping[Any, Any]) -> list[Problem]:
    limits = {key.lower(): value[key] for key in SUBSCRIBER_KEYS if key in value}
    try:
        natsync.Subscriber("nats://127.0.0.1", **limits)  # opens nothing
    except (TypeError, ValueError) as error:
        return [Problem(5, f"{SETTING}: {error}")]
    return []


def _queue(value: object) -> list[Problem]:
    if value is None or value == "":
        return []
    try:
        subject.queue_name(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        return [Problem(6, f"{SETTING}['QUEUE']: {error}")]
    return []
