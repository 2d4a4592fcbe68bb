"""Mux: one wildcard inbox for all answers of a connection; a token in the subject finds who waits for them.

Tokens are counted up and never used twice, so that a late answer cannot reach somebody else. Runs on the reader's
thread. The table needs no lock: each change and each look is one operation of a dict.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from natsync.errors import PermissionDenied
from natsync.message import Item
from natsync.protocol import Batch

log = logging.getLogger("natsync.connection")

T = TypeVar("T")


@dataclass(frozen=True)
class LinkLoss:
    """What is known of the frames of a link that was lost.

    Attributes:
        reason: why it was lost.
        position: everything put until then has at most this position.
        taken: what has at most this position was handed to the link (or taken back before).
        confirmed: what has at most this position had surely reached the server.
        waiting: id() of the frames that were not handed over and go out on the next link.
    """

    reason: Exception
    position: int
    taken: int
    confirmed: int
    waiting: frozenset[int]

    def took(self, frame: bytes, mark: int) -> bool:
        """Whether this frame was handed to the lost link."""
        return mark <= self.position and id(frame) not in self.waiting


class Waiter:
    """Who waits for answers, or answers. None of this may block or run user code.

    Attributes:
        waits: whether it counts as waiting; what only sees to it that the other side stops does not.
    """

    waits = True

    def deliver(self, items: list[Item]) -> None:
        """Take the messages of one read, in order."""
        raise NotImplementedError

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        """The server did not let a message to this subject pass; maybe this waiter's."""

    def refused(self, error: Exception) -> None:
        """The server does not let the answers that this waiter waits for reach us."""

    def breaks(self, loss: LinkLoss) -> bytes | None:
        """The link was lost. A subject whose messages that still wait must not be sent any more, or None."""
        return None

    def frames_dropped(self, dropped: list[bytes]) -> bytes | None:
        """The next server would not take these messages, so they were dropped. Returns as breaks() does."""
        return None

    def link_lost(self, loss: LinkLoss) -> None:
        """The link was lost, what is not to be sent has been withdrawn, and another link may follow."""

    def repair(self) -> None:
        """What frames_dropped() broke has been withdrawn."""

    def link_made(self) -> None:
        """There is a link again (or the first one), and what is to be subscribed has been."""

    def connection_closing(self) -> None:
        """The connection is about to be closed, and can still send."""

    def connection_closed(self, reason: Exception) -> None:
        """There will be no further link."""


class Mux:
    """The table of waiters behind one inbox subscription, `<inbox>.*`."""

    def __init__(self, inbox: str) -> None:
        self.inbox = inbox.encode()
        self.wildcard = self.inbox + b".*"
        self.late = 0
        self.on_late: Callable[[bytes, list[Item]], None] | None = None  # called with the token
        self.denied: PermissionDenied | None = None  # why no answer can come on the present link
        self.waiters: dict[bytes, Waiter] = {}
        self.watchers: list[Waiter] = []  # told of the link before the waiters are; nothing is delivered to them
        self._tokens = itertools.count(1)
        self._prefix_length = len(self.inbox) + 1

    def check_allowed(self) -> None:
        """Raise PermissionDenied if the server did not let us subscribe to the inbox."""
        if self.denied is not None:
            raise PermissionDenied(str(self.denied))

    def address(self) -> tuple[bytes, bytes]:
        """A new (token, inbox subject)."""
        token = b"%d" % next(self._tokens)
        return token, b"%b.%b" % (self.inbox, token)

    def register(self, token: bytes, waiter: Waiter) -> None:
        """Messages to the token's subject go to the waiter from now on."""
        self.waiters[token] = waiter

    def unregister(self, token: bytes) -> None:
        self.waiters.pop(token, None)

    def __len__(self) -> int:
        """How many wait."""
        return sum(waiter.waits for waiter in self.waiters.copy().values())

    def deliver(self, batch: Batch) -> None:
        """Give a batch to its waiter; one that nobody waits for any more is counted as late."""
        token = self.token(batch.subject)
        waiter = self.waiters.get(token)
        if waiter is not None:
            waiter.deliver(batch.items)
        else:
            self.came_late(token, batch.items)

    def came_late(self, token: bytes, items: list[Item]) -> None:
        """Count messages that nobody waits for any more."""
        self.late += len(items)
        if self.on_late is not None:
            self.on_late(token, items)

    def token(self, subject: bytes) -> bytes:
        """Whose a message to this subject of the inbox is."""
        return subject[self._prefix_length :]

    def breaks(self, loss: LinkLoss) -> set[bytes]:
        return {subject for subject in self._each(lambda waiter: waiter.breaks(loss)) if subject is not None}

    def frames_dropped(self, dropped: list[bytes]) -> set[bytes]:
        found = self._each(lambda waiter: waiter.frames_dropped(dropped))
        return {subject for subject in found if subject is not None}

    def repair(self) -> None:
        self._each(lambda waiter: waiter.repair())

    def link_lost(self, loss: LinkLoss) -> None:
        self._each(lambda waiter: waiter.link_lost(loss))

    def link_made(self) -> None:
        self._each(lambda waiter: waiter.link_made())

    def inbox_denied(self, error: PermissionDenied) -> None:
        """The server does not let us subscribe to the inbox."""
        self.denied = error
        self._each(lambda waiter: waiter.refused(error))

    def reply_denied(self, subject: bytes, error: PermissionDenied) -> None:
        """The server did not let a message with this reply subject pass."""
        waiter = self.waiters.get(self.token(subject)) if subject.startswith(self.inbox) else None
        if waiter is not None:
            waiter.refused(error)

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        self._each(lambda waiter: waiter.publish_denied(subject, error))

    def connection_closing(self) -> None:
        self._each(lambda waiter: waiter.connection_closing())

    def connection_closed(self, reason: Exception) -> None:
        self._each(lambda waiter: waiter.connection_closed(reason))

    def _each(self, tell: Callable[[Waiter], T]) -> list[T]:
        """Tell every waiter; a fault of one is logged, and the others are told all the same."""
        results = []
        for waiter in (*self.watchers, *self.waiters.copy().values()):
            try:
                results.append(tell(waiter))
            except Exception:
                log.exception("a waiter on %r failed", self.inbox)
        return results


class DeepMux(Mux):
    """A mux whose subjects go on behind the token, `<inbox>.<token>.>`: what follows is for the waiter's peer."""

    def __init__(self, inbox: str) -> None:
        super().__init__(inbox)
        self.wildcard = self.inbox + b".>"

    def token(self, subject: bytes) -> bytes:
        return subject[self._prefix_length :].partition(b".")[0]
