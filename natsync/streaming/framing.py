"""What the framed streams of one responder share: their requesters, and the memory for what may be sent again."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from natsync.concurrency import Deadline
from natsync.connection import Connection, is_own
from natsync.errors import Code
from natsync.message import Item
from natsync.mux import Mux
from natsync.protocol import encode_pub
from natsync.streaming import frames, terms
from natsync.streaming.frames import Control, Op
from natsync.streaming.peers import Member, Peers
from natsync.streaming.terms import Status

log = logging.getLogger("natsync.streaming")

#: Bytes that every stream may keep, whatever the others do.
GUARANTEED_BYTES = 64 << 10
#: Bytes that all streams of a connection may keep beyond that: sixty-four whole windows.
KEPT_BYTES = 256 << 20
#: Bytes by which a stream's share grows at a time.
STEP_BYTES = 256 << 10
#: Seconds for which closing waits for requesters to confirm what they have, at most; half of what there is, else.
SETTLE_SECONDS = 5.0
#: Streams of one connection, those included that have ended and linger, beyond which requests are refused unheard.
MOST_STREAMS = 50_000
#: What a requester says that wants an answer.
_ANSWERED = (Control.MISSING, Control.PING, Control.CANCEL)


class Kept(Member, Protocol):
    """A stream that keeps what it sends."""

    @property
    def expendable(self) -> bool:
        """Whether giving it up helps others, and harms nobody who is still there: its requester is silent."""

    @property
    def lingers(self) -> bool:
        """Whether it is over but for its requester's last word."""

    @property
    def address(self) -> bytes:
        """The reply subject of its request."""

    @property
    def name(self) -> bytes:
        """Its control subject, as in frames.Address.stream."""

    def allow(self, extra_bytes: int) -> None:
        """It may keep this much more."""

    def wake(self) -> None:
        """Something was given back: ask again."""

    def evict(self) -> None:
        """Give up, and let go of everything."""

    def settle(self, deadline: Deadline) -> bool:
        """Block until its requester has everything."""

    def connection_closing(self) -> None:
        """End, since the responder does."""


class Framing:
    """The framed streams of one connection."""

    def __init__(self, connection: Connection, control: Mux, kept_bytes: int = KEPT_BYTES) -> None:
        self.control = control
        self.peers = Peers(connection, control)
        self._connection = connection
        self._lock = threading.Lock()
        self._streams: dict[bytes, Kept] = {}  # by the reply subject of the request; the oldest first
        self._room = kept_bytes
        self._waiting: dict[Kept, None] = {}
        control.on_late = self._unknown
        connection.when_closing(self._closing, self._leaving)

    # -- streams -------------------------------------------------------------------------------------------------

    def knows(self, reply: bytes) -> bool:
        """Whether the request with this reply subject has a stream already."""
        return reply in self._streams

    def add(self, stream: Kept) -> None:
        with self._lock:
            self._streams[stream.address] = stream

    def remove(self, stream: Kept, held_bytes: int) -> None:
        """The stream is over for good, and gives back what it held."""
        with self._lock:
            if self._streams.get(stream.address) is stream:
                del self._streams[stream.address]
            self._waiting.pop(stream, None)
        self.give_back(held_bytes)

    def __len__(self) -> int:
        return len(self._streams)

    def settle(self, deadline: Deadline) -> None:
        """Block until the streams that have ended are over for good: their requesters have everything, or are gone."""
        left = deadline.remaining()
        until = Deadline.after(SETTLE_SECONDS if left is None else min(SETTLE_SECONDS, left / 2))
        for stream in self._all():
            if not self._connection.linked:
                return
            if stream.lingers and not stream.settle(until):
                log.debug("the end of %r was not confirmed", stream)

    def _closing(self, deadline: Deadline) -> None:
        for stream in self._all():
            stream.connection_closing()
        self.settle(deadline)

    def _leaving(self, deadline: Deadline) -> None:
        """The interpreter ends: requesters are told, but handlers here are not woken, only to find that out."""
        self.settle(deadline)
        text = "the responder's process ends"
        for stream in self._all():
            if is_own(stream.address):
                continue  # that end leaves with us
            status = Status(Code.UNAVAILABLE, reason=terms.LOST)
            self._connection.put_now(self.encode_gone(stream.address, stream.name, text, status))

    @property
    def is_crowded(self) -> bool:
        """Whether no stream should be added, not even to say no."""
        return len(self._streams) >= MOST_STREAMS

    def _all(self) -> list[Kept]:
        with self._lock:
            return list(self._streams.values())

    def _unknown(self, token: bytes, items: list[Item]) -> None:
        """A requester speaks to a stream that is not (or no longer) there: tell it, unless it needs no answer."""
        for reply, block, payload in items:
            # Nothing but what a requester says is answered: two responders must not come to answer each other.
            if reply is None or block is not None or payload[:1] not in _ANSWERED:
                continue
            stream = b"%b.%b" % (self.control.inbox, token)
            if not self._connection.fits(reply, b"%b.%b.0" % (stream, Op.ERROR)):
                continue
            status = Status(Code.UNAVAILABLE, reason=terms.LOST)
            text = "the responder does not know this stream (any more)"
            self._connection.put_now(self.encode_gone(reply, stream, text, status))

    @staticmethod
    def encode_gone(reply: bytes, stream: bytes, text: str, status: Status) -> bytes:
        """The frame that says, out of order, that there is no such stream."""
        headers = terms.encode_status(status, text)
        headers[terms.SEQ_HEADER] = frames.encode_seq(stream, Op.ERROR, 0)
        payload = frames.ERROR_PREFIX + text.encode("utf-8", "replace")[: terms.ERROR_TEXT]
        return encode_pub(reply, b"%b.%b.0" % (stream, Op.ERROR), headers.encode(), payload)

    # -- memory --------------------------------------------------------------------------------------------------

    def extend(self, stream: Kept, wanted_bytes: int) -> bool:
        """Let the stream keep so much more; if there is no room, the oldest one that can be spared gives way.

        False if there is none; wake() comes when there may be.
        """
        step = max(wanted_bytes, STEP_BYTES)
        while True:
            with self._lock:
                if step <= self._room:
                    self._room -= step
                    break
                victim = next((one for one in self._streams.values() if one.expendable and one is not stream), None)
                if victim is None:
                    self._waiting[stream] = None
                    return False
            log.warning("a stream was given up, because what all of them keep for resending fills its bounds")
            victim.evict()
        stream.allow(step)
        return True

    def give_back(self, held_bytes: int) -> None:
        if not held_bytes:
            return
        with self._lock:
            self._room += held_bytes
            waiting, self._waiting = self._waiting, {}
        for stream in waiting:
            stream.wake()
