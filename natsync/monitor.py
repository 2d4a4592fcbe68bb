"""Answers to `natsync top`: a Subscriber that says what it is doing. Opt-in; nothing in the core imports it.

    natsync.monitor.answer(subscriber)          # or `natsync serve --monitor module:subscriber`

Whoever may publish on the subject learns the subjects and numbers of the handlers, the host's name and the process id;
payloads and credentials are never part of it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import natsync
from natsync.subject import unique

#: Where every monitored Subscriber answers. Permissions and account exports can name it.
SUBJECT = "$NATSYNC.STATS"
#: The type of the answers; the number changes with their form.
TYPE = "io.natsync.monitor.v1"

_COUNTED = ("received", "processed", "failed", "cancelled", "dropped", "active")


def answer(subscriber: natsync.Subscriber, *, name: str | None = None, subject: str = SUBJECT) -> natsync.Handle:
    """Have a subscriber answer requests on the subject with what snapshot() returns; opens the subscriber.

    name is what it is shown as; the program's name if it is left out. The answers are given by one of the subscriber's
    workers: while all max_workers of them are busy, they wait. Returns the registration; its stop() ends it.

    Raises:
        What Subscriber.subscribe() raises.
    """
    shown = name or os.path.basename(sys.argv[0]) or "python"
    identity = {"type": TYPE, "id": unique(), "name": shown, "host": socket.gethostname(), "pid": os.getpid()}
    began = time.monotonic()

    def tell(message: natsync.Message) -> None:
        if message.reply:
            numbers = snapshot(subscriber, without=subject)
            message.respond(json={**identity, "uptime_seconds": round(time.monotonic() - began, 3), **numbers})

    return subscriber.subscribe(subject, tell)


def snapshot(subscriber: natsync.Subscriber, *, without: str | None = None) -> dict[str, Any]:
    """What a subscriber is doing, as JSON has it.

    version, status, clock_seconds (time.monotonic() of its process, for rates), streams, threads, connection (see
    Client.stats()), and registrations: subject, queue and numbers of each (see Handle.stats). The registration on the
    subject `without` is left out.
    """
    numbers = subscriber.stats()
    registrations = [
        {"subject": handle.subject, "queue": handle.queue, **{name: handle.stats[name] for name in _COUNTED}}
        for handle in subscriber.handles
        if handle.subject != without
    ]
    return {
        "version": natsync.__version__,
        "status": subscriber.status,
        "clock_seconds": time.monotonic(),
        "streams": numbers["streams"],
        "threads": numbers["threads"],
        "registrations": registrations,
        "connection": numbers.get("connection", {}),
    }
