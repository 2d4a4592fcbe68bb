"""Dispatcher: which subscription a sid belongs to, and the workers that run callbacks.

The table is read by the reader thread without a lock (one dict look-up) and changed under the connection's lock.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from natsync.concurrency import warn_soon
from natsync.mux import Mux
from natsync.protocol import Batch, encode_sub, encode_unsub
from natsync.subscription import SubscriptionCore
from natsync.workers import Lane, WorkerPool

log = logging.getLogger("natsync.connection")

#: Threads for callbacks of one connection. A blocked callback holds one; beyond that callbacks wait for a free one.
CALLBACK_WORKERS = 64
#: Events that may wait for on_event and hooks, if one of them blocks.
EVENTS_WAITING = 10_000


class Sink(Protocol):
    """Whatever takes the messages of one sid."""

    def deliver(self, batch: Batch) -> None: ...


class Dispatcher:
    """sid -> who takes its messages."""

    def __init__(self, name: str, workers: int = CALLBACK_WORKERS) -> None:
        self.messages = 0
        self.workers = WorkerPool(f"{name}-worker", workers)
        self._events = Lane(self.workers, EVENTS_WAITING)
        self._events_lost = 0
        self._sinks: dict[bytes, Sink] = {}
        self._subscriptions: dict[bytes, SubscriptionCore] = {}
        self._sids = itertools.count(1)
        self._muxes: dict[bytes, Mux] = {}

    def deliver(self, batch: Batch) -> None:
        """Hand a batch on; one for a subscription that was just removed is dropped. Runs on the reader."""
        self.messages += len(batch.items)
        sink = self._sinks.get(batch.sid)
        if sink is not None:
            sink.deliver(batch)

    def add(self, core: SubscriptionCore) -> bytes:
        """Give the subscription a sid; returns its SUB."""
        core.sid = self._next_sid()
        self._subscriptions[core.sid] = core
        self._sinks[core.sid] = core
        frame = self.sub(core)
        return frame if core.max_messages is None else frame + encode_unsub(core.sid, core.max_messages)

    def add_mux(self, mux: Mux) -> None:
        """Put an inbox for answers in place; it is subscribed with each new link."""
        sid = self._next_sid()
        self._muxes[sid] = mux
        self._sinks[sid] = mux

    def muxes(self) -> list[Mux]:
        return list(self._muxes.values())

    def unsub(self, core: SubscriptionCore) -> bytes | None:
        """The UNSUB of the subscription; None if it is not there or was sent already."""
        return None if core.draining or core.sid not in self._subscriptions else encode_unsub(core.sid)

    def leave(self, core: SubscriptionCore) -> None:
        """The server is to send no more: its UNSUB is on its way. What is, too, is still delivered."""
        if core.sid in self._subscriptions:
            core.draining = True

    def remove(self, core: SubscriptionCore) -> None:
        """Forget the subscription, whose UNSUB is on its way."""
        self._sinks.pop(core.sid, None)
        self._subscriptions.pop(core.sid, None)  # last: until then unsub() has one

    def resubscription(self, position: int) -> list[bytes]:
        """The frames that put a new link into the state of the old one, remaining maxima included.

        They go out first; any PING behind this position of the outbox confirms them.
        """
        frames = []
        for sid, mux in self._muxes.items():
            mux.denied = None
            frames.append(encode_sub(mux.wildcard, None, sid))
        for core in self._subscriptions.values():
            if core.draining:
                continue
            core.position = position + 1
            frames.append(self.sub(core))
            limit, received = core.limits
            if limit is not None:
                frames.append(encode_unsub(core.sid, max(1, limit - received)))
        return frames

    def interest(self) -> list[bytes]:
        """The SUBs of all that is subscribed, for a link that takes over: what has a maximum counts for itself."""
        frames = [encode_sub(mux.wildcard, None, sid) for sid, mux in self._muxes.items()]
        return frames + [self.sub(core) for core in self._subscriptions.values() if not core.draining]

    def no_interest(self) -> list[bytes]:
        """The UNSUBs of all that is subscribed."""
        left = [core.sid for core in self._subscriptions.values() if not core.draining]
        return [encode_unsub(sid) for sid in (*self._muxes, *left)]

    def concerned(self, subject: bytes, queue: bytes | None, sid: int | None) -> list[SubscriptionCore]:
        """The subscriptions that a denial is about."""
        if sid is not None:
            core = self._subscriptions.get(b"%d" % sid)
            return [] if core is None else [core]
        return [core for core in self.subscriptions() if (core.subject, core.queue) == (subject, queue)]

    def newest_unconfirmed(self, confirmed: int) -> SubscriptionCore | None:
        """The last subscription of which the server has not confirmed that it has it."""
        unconfirmed = [core for core in self.subscriptions() if core.position > confirmed]
        return unconfirmed[-1] if unconfirmed else None

    def longest(self) -> SubscriptionCore | None:
        """The subscription whose SUB is the longest; None if an inbox's is as long."""
        cores = [core for core in self.subscriptions() if not core.draining]
        core = max(cores, key=lambda core: len(self.sub(core)), default=None)
        inboxes = max((len(encode_sub(mux.wildcard, None, sid)) for sid, mux in self._muxes.items()), default=0)
        return core if core is not None and len(self.sub(core)) > inboxes else None

    def is_shared(self, sid: bytes) -> bool:
        """Whether a subscription is a member of a queue group."""
        core = self._subscriptions.get(sid)
        return core is not None and core.queue is not None

    @staticmethod
    def sub(core: SubscriptionCore) -> bytes:
        return encode_sub(core.subject, core.queue, core.sid)

    def subscriptions(self) -> Iterator[SubscriptionCore]:
        return iter(list(self._subscriptions.values()))

    def event(self, task: Callable[[], object]) -> None:
        """Run an event callback on a worker, in the order in which events happened."""
        if not self._events.submit(task) and not self.workers.closed:
            self._events_lost += 1
            if self._events_lost == 1:
                text = "on_event or a hook is stuck: %d events wait, and others are lost"
                warn_soon(log, text, EVENTS_WAITING)  # who tells of an event may hold the connection's lock

    def _next_sid(self) -> bytes:
        return b"%d" % next(self._sids)
