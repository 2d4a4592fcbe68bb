"""Services: subscribers that tell who they are and what they do, and how to find all of them (NATS ADR-32).

Opt in with Service(subscriber, name=..., version=...): each handler of the subscriber is then listed, with its numbers,
to whoever asks on `$SRV.PING`, `$SRV.INFO` or `$SRV.STATS`, such as the `nats` command, dashboards, and discover(),
stats() and ping() here, which see the services of other libraries too. Nothing in the core imports this.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from natsync import subject as _subject
from natsync.client import Client
from natsync.concurrency import fork_generation
from natsync.context import Context
from natsync.errors import InvalidArgument, NoRespondersError
from natsync.message import Message
from natsync.monitor import SUBJECT as MONITOR_SUBJECT
from natsync.streaming.registration import Handle
from natsync.streaming.subscriber import Subscriber
from natsync.streaming.work import Work

log = logging.getLogger("natsync.services")

T = TypeVar("T")

#: Where services are asked about themselves.
PREFIX = "$SRV"
#: Seconds that asking takes at most, unless told otherwise.
TIMEOUT = 2.0
#: Seconds after the last answer until nobody else is expected.
STALL = 0.3

_TYPE = "io.nats.micro.v1.{}_response"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER = r"(?:0|[1-9][0-9]*)"
_PART = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
#: A version by semver.org: three numbers, perhaps a pre-release behind a hyphen, perhaps a build behind a plus.
_VERSION = re.compile(
    rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_PART}(?:\.{_PART})*)?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
)
_COUNTED = ("received", "failed", "processing_ns")


class Service:
    """Lists the handlers of a subscriber, those registered later too, by ADR-32 of the NATS project.

        subscriber = natsync.Subscriber()
        Service(subscriber, name="llm", version="1.0.0", description="answers questions")

    In force as soon as the subscriber is open, and until it is closed, or stop() is called. Each process that opens
    the subscriber is an instance with an id of its own. Start several with `queue=` on their handlers to have them
    share the requests; a handler without a queue group is listed with an empty one, as each instance gets all of it.
    The answers are given by a thread of their own, also while all max_workers of the subscriber are busy.

    Args:
        subscriber: whose handlers are listed.
        name: what kind of service it is, the same in all instances: letters, digits, - and _.
        version: three numbers as of semver.org, such as "1.0.0".
        metadata: about this instance; texts. Cannot be changed later.

    Raises:
        InvalidArgument, TypeError: one of them cannot be used.
        Whatever Subscriber.subscribe() raises, if the subscriber is open.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        *,
        name: str,
        version: str,
        description: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        _check(name, version, description, metadata)
        self.name = name
        self.version = version
        self.description = description
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self._subscriber = subscriber
        self._lock = threading.Lock()
        self._generation = -1
        self._id = ""
        self._started = ""
        self._stopped = False
        self._handles: list[Handle] = []
        self._before: dict[Handle, dict[str, int]] = {}  # what reset() has to be taken off
        answers = {"PING": self.identity, "INFO": self.info, "STATS": self.stats}
        for verb, answer in answers.items():
            subscriber._record(f"{PREFIX}.{verb}", None, partial(self._listen, verb, answer))

    def _listen(self, verb: str, answer: Callable[[], dict[str, Any]]) -> Handle:
        """Answer on the three subjects of a verb; whoever opens the subscriber calls it."""

        def respond(request: Message) -> None:
            if request.reply is not None:
                request.respond(json=answer())

        for subject in (f"{PREFIX}.{verb}", f"{PREFIX}.{verb}.{self.name}", f"{PREFIX}.{verb}.{self.name}.{self.id}"):
            work = Work(Context().with_cancel(), "message", subject)  # no hooks: an id is no label
            attendant = self._subscriber._opened().attendant
            handle = self._subscriber._register(subject, None, respond, work, pool=attendant)
            self._handles.append(handle)
        if self._stopped:
            self.stop()
        return handle

    # -- what is told ----------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """This instance's, in this process."""
        if self._generation != fork_generation():
            self._renew()
        return self._id

    @property
    def started(self) -> str:
        """When this instance began to count, as ISO 8601 in UTC."""
        return self._started if self.id else ""

    def _renew(self) -> None:
        """A new instance: at the first use, in each process."""
        if self._generation >= 0:
            self._lock = threading.Lock()  # a thread of the parent may have held it at the fork
            self._before.clear()
        self._id, self._started = _subject.unique(), _now()
        self._generation = fork_generation()

    def identity(self) -> dict[str, Any]:
        """What is answered to `$SRV.PING`."""
        return self._told("ping")

    def info(self) -> dict[str, Any]:
        """What is answered to `$SRV.INFO`: the description and each endpoint's subject and queue group."""
        endpoints = [{**_endpoint(handle), "metadata": {"natsync.kind": handle.kind}} for handle in self._endpoints()]
        return {**self._told("info"), "description": self.description, "endpoints": endpoints}

    def stats(self) -> dict[str, Any]:
        """What is answered to `$SRV.STATS`: each endpoint's numbers, since its start or the last reset()."""
        endpoints = [self._numbers(handle) for handle in self._endpoints()]
        return {**self._told("stats"), "started": self.started, "endpoints": endpoints}

    def reset(self) -> None:
        """Count from here on."""
        before = {handle: _counted(handle) for handle in self._endpoints()}
        with self._lock:
            self._before = before
            self._started = _now()

    def stop(self, timeout: float | None = None) -> None:
        """Be listed no more; the handlers go on. Blocks as Handle.stop() does. Idempotent."""
        self._stopped = True
        while self._handles:
            self._handles.pop().stop(timeout)

    def _told(self, what: str) -> dict[str, Any]:
        return {
            "type": _TYPE.format(what),
            "name": self.name,
            "id": self.id,
            "version": self.version,
            "metadata": dict(self.metadata),
        }

    def _endpoints(self) -> list[Handle]:
        return [
            one
            for one in self._subscriber.handles
            if not one.subject.startswith(f"{PREFIX}.") and one.subject != MONITOR_SUBJECT
        ]

    def _numbers(self, handle: Handle) -> dict[str, Any]:
        counted, stats = _counted(handle), handle.stats
        with self._lock:
            before = self._before.get(handle, {})
        requests, errors, nanoseconds = (counted[name] - before.get(name, 0) for name in _COUNTED)
        return {
            **_endpoint(handle),
            "num_requests": requests,
            "num_errors": errors,
            "last_error": (handle.last_error or "") if errors else "",
            "processing_time": nanoseconds,
            "average_processing_time": nanoseconds // requests if requests else 0,
            "data": {"kind": handle.kind, **{name: stats[name] for name in ("active", "cancelled", "dropped")}},
        }

    def __repr__(self) -> str:
        return f"<Service {self.name} {self.version}: {len(self._endpoints())} endpoints>"


def _counted(handle: Handle) -> dict[str, int]:
    return {**handle.stats, "processing_ns": handle.processing_ns}


def _endpoint(handle: Handle) -> dict[str, Any]:
    return {"name": endpoint_name(handle.subject), "subject": handle.subject, "queue_group": handle.queue or ""}


def endpoint_name(subject: str) -> str:
    """The subject as the name of an endpoint, which may have letters, digits, - and _ only: llm.chat is llm_chat."""
    words = {"*": "any", ">": "all"}
    return re.sub(r"[^A-Za-z0-9_-]", "_", "_".join(words.get(token, token) for token in subject.split(".")))


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _check(name: str, version: str, description: str, metadata: Mapping[str, str] | None) -> None:
    for what, text in (("name", name), ("version", version), ("description", description)):
        if not isinstance(text, str):
            raise TypeError(f"the {what} of a service is a str, not {type(text).__name__}")
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"service name {name!r}: letters, digits, - and _ only")
    if not _VERSION.fullmatch(version):
        raise InvalidArgument(f"service version {version!r}: three numbers such as 1.0.0, by semver.org")
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in (metadata or {}).items()):
        raise TypeError("the metadata of a service maps str to str")


# -- finding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """One handler of a service. queue_group is empty if there is none."""

    name: str
    subject: str
    queue_group: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EndpointStats:
    """The numbers of one handler: requests, those that failed, and nanoseconds that they took.

    data is whatever the service adds; of natsync: kind, active, cancelled, dropped.
    """

    name: str
    subject: str
    queue_group: str = ""
    num_requests: int = 0
    num_errors: int = 0
    last_error: str = ""
    processing_time: int = 0
    average_processing_time: int = 0
    data: Any = None


@dataclass(frozen=True)
class ServicePing:
    """An instance of a service. rtt: seconds from the question to its answer."""

    name: str
    id: str
    version: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    rtt: float = 0.0


@dataclass(frozen=True)
class ServiceInfo:
    """An instance of a service, and what it answers."""

    name: str
    id: str
    version: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True)
class ServiceStats:
    """An instance of a service, and its numbers. started: as the service wrote it, ISO 8601."""

    name: str
    id: str
    version: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    started: str = ""
    endpoints: tuple[EndpointStats, ...] = ()


def ping(
    client: Client, name: str | None = None, id: str | None = None, *, timeout: float = TIMEOUT
) -> list[ServicePing]:
    """The instances that answer, those of one name if it is given, or the one of this id; the fastest first.

    Blocks until none has answered for STALL seconds, at most timeout seconds; without a first answer for all of them,
    unless there is none to ask. Raises as Client.request_many() does; without anybody to ask the list is empty.
    """
    began = time.monotonic()
    return [ServicePing(**_identity(said), rtt=at - began) for said, at in _ask(client, "PING", name, id, timeout)]


def discover(
    client: Client, name: str | None = None, id: str | None = None, *, timeout: float = TIMEOUT
) -> list[ServiceInfo]:
    """The instances that answer, with their endpoints, by name and id. Blocks and raises as ping() does."""
    found = [
        ServiceInfo(
            **_identity(said),
            description=_text(said, "description"),
            endpoints=tuple(
                Endpoint(_text(one, "name"), _text(one, "subject"), _text(one, "queue_group"), _metadata(one))
                for one in _listed(said)
            ),
        )
        for said, _ in _ask(client, "INFO", name, id, timeout)
    ]
    return sorted(found, key=lambda one: (one.name, one.id))


def stats(
    client: Client, name: str | None = None, id: str | None = None, *, timeout: float = TIMEOUT
) -> list[ServiceStats]:
    """The instances that answer, with their numbers, by name and id. Blocks and raises as ping() does."""
    found = [
        ServiceStats(
            **_identity(said), started=_text(said, "started"), endpoints=tuple(map(_endpoint_stats, _listed(said)))
        )
        for said, _ in _ask(client, "STATS", name, id, timeout)
    ]
    return sorted(found, key=lambda one: (one.name, one.id))


def _ask(
    client: Client, verb: str, name: str | None, id: str | None, timeout: float
) -> Iterator[tuple[dict[str, Any], float]]:
    """Every answer that is one, and the time.monotonic() at which it was taken."""
    if id is not None and name is None:
        raise InvalidArgument(f"id={id!r} needs the name of its service, too")
    for what, token in (("name", name), ("id", id)):
        if token is not None and not _NAME.fullmatch(token):
            raise InvalidArgument(f"service {what} {token!r}: letters, digits, - and _ only")
    subject = ".".join(filter(None, (PREFIX, verb, name, id)))
    most = None if id is None else 1
    try:
        for message in client.request_many(subject, timeout=timeout, stall=STALL, max_messages=most):
            at = time.monotonic()
            try:
                said = message.json()
            except ValueError:
                said = None
            if isinstance(said, dict) and said.get("type") == _TYPE.format(verb.lower()) and said.get("id"):
                yield said, at
            else:
                log.debug("an answer on %s that is none: %.200r", subject, message.data)
    except NoRespondersError:
        return


def _identity(said: dict[str, Any]) -> dict[str, Any]:
    return {**{key: _text(said, key) for key in ("name", "id", "version")}, "metadata": _metadata(said)}


def _endpoint_stats(said: dict[str, Any]) -> EndpointStats:
    return EndpointStats(
        name=_text(said, "name"),
        subject=_text(said, "subject"),
        queue_group=_text(said, "queue_group"),
        num_requests=_number(said, "num_requests"),
        num_errors=_number(said, "num_errors"),
        last_error=_text(said, "last_error"),
        processing_time=_number(said, "processing_time"),
        average_processing_time=_number(said, "average_processing_time"),
        data=said.get("data"),
    )


def _listed(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The endpoints; services without any say null."""
    found = said.get("endpoints")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _text(said: dict[str, Any], key: str) -> str:
    value = said.get(key)
    return value if isinstance(value, str) else ""


def _number(said: dict[str, Any], key: str) -> int:
    value = said.get(key)
    return int(value) if isinstance(value, int | float) else 0


def _metadata(said: dict[str, Any]) -> dict[str, str]:
    value = said.get("metadata")
    return {str(key): str(one) for key, one in value.items()} if isinstance(value, dict) else {}
