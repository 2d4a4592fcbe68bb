"""Answers to `natsync top`: a Subscriber that says what it is doing. Opt-in; nothing in the core imports it.

    natsync.monitor.answer(subscriber)          # or `natsync serve --monitor module:subscriber`

Whoever may publish on the subject learns the subjects and numbers of the handlers and of single streams, the host's
name and the process id; payloads, inboxes and credentials are never part of it.
"""

from __future__ import annotations

import heapq
import os
import socket
import sys
import time
from dataclasses import asdict
from typing import Any

import natsync
from natsync.subject import unique

#: Where every monitored Subscriber answers. Permissions and account exports can name it.
SUBJECT = "$NATSYNC.STATS"
#: The type of the answers; the number changes with their form.
TYPE = "io.natsync.monitor.v1"
#: Where services are asked about themselves (natsync.services), some of it below their ids.
_SERVICES = "$SRV."

#: Single streams that one answer tells of, at most.
MOST_STREAMS = 1000

_COUNTED = ("received", "processed", "failed", "cancelled", "dropped", "active")


def answer(subscriber: natsync.Subscriber, *, name: str | None = None, subject: str = SUBJECT) -> natsync.Handle:
    """Have a subscriber answer requests on the subject with what snapshot() returns; opens the subscriber.

    A request may be a JSON object: {"streams": n} asks for the n streams that are longest under way, too. name is what
    it is shown as; the program's name if it is left out. The answers are given by a thread of their own, also while all
    max_workers of the subscriber are busy. Returns the registration; its stop() ends it.

    Raises:
        What Subscriber.subscribe() raises.
    """
    shown = name or os.path.basename(sys.argv[0]) or "python"
    identity = {"type": TYPE, "id": unique(), "name": shown, "host": socket.gethostname(), "pid": os.getpid()}
    began = time.monotonic()

    def tell(message: natsync.Message) -> None:
        if message.reply:
            numbers = snapshot(subscriber, without=subject, streams=_streams_wanted(message))
            message.respond(json={**identity, "uptime_seconds": round(time.monotonic() - began, 3), **numbers})

    subscriber._check_place("subscribe", subject, None)
    attendant = subscriber.open()._opened().attendant
    return subscriber._register_plain(subject, tell, None, None, {"pool": attendant})


def _streams_wanted(message: natsync.Message) -> int:
    try:
        asked = message.json() if message.data else None
    except ValueError:
        return 0
    wanted = asked.get("streams") if isinstance(asked, dict) else None
    return max(0, min(wanted, MOST_STREAMS)) if isinstance(wanted, int) else 0


def snapshot(subscriber: natsync.Subscriber, *, without: str | None = None, streams: int = 0) -> dict[str, Any]:
    """What a subscriber is doing, as JSON has it.

    version, status, clock_seconds (time.monotonic() of its process, for rates), streams, threads, connection (see
    Client.stats()), registrations: subject, queue and numbers of each (see Handle.stats), and open_streams: of the
    `streams` that are longest under way their registration's subject, number, mode, state, seconds, chunks and
    size_bytes (see Handle.streams()). The registration on the subject `without`, and those of a Service, are left out.
    """
    numbers = subscriber.stats()
    handles = [
        handle
        for handle in subscriber.handles
        if handle.subject != without and not handle.subject.startswith(_SERVICES)
    ]
    registrations = [
        {"subject": handle.subject, "queue": handle.queue, **{name: handle.stats[name] for name in _COUNTED}}
        for handle in handles
    ]
    found = [(handle.subject, stream) for handle in handles if streams for stream in handle.streams()]
    longest = heapq.nlargest(streams, found, key=lambda one: one[1].seconds)
    return {
        "version": natsync.__version__,
        "status": subscriber.status,
        "clock_seconds": time.monotonic(),
        "streams": numbers["streams"],
        "threads": numbers["threads"],
        "registrations": registrations,
        "open_streams": [{"subject": subject, **asdict(stream)} for subject, stream in longest],
        "connection": numbers.get("connection", {}),
    }
