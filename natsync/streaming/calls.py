"""What the streams that a connection reads share: who sends them, how much may be on its way, and how they are left.

A stream that was left early is still to be cancelled at its responder: a Farewell takes its place in the table until
the responder has answered. One that ended is remembered for a while, so that a responder whose last frames were
confirmed in vain can be told again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from natsync.concurrency import Deadline, SafeEvent
from natsync.connection import Connection
from natsync.errors import Code
from natsync.links import Status
from natsync.message import Item
from natsync.mux import Waiter
from natsync.protocol import encode_pub
from natsync.streaming import frames
from natsync.streaming.frames import Ack, Op
from natsync.streaming.peers import FIRST_REPEAT, LONGEST_REPEAT, Peers
from natsync.timers import Alarm

#: Bytes that may be on their way to one stream, at most.
WINDOW_BYTES = 4 << 20
#: The same for all streams of a connection: half of what nats-server holds for a client, max_pending.
ALL_WINDOWS_BYTES = 32 << 20
#: What streams share out beyond the least; the other half is for the least of up to 256 streams.
SHARED_WINDOWS_BYTES = ALL_WINDOWS_BYTES // 2
#: What every stream gets, and what it gets when there are so many that all of it is given.
LEAST_WINDOW_BYTES = 64 << 10
TINY_WINDOW_BYTES = 4 << 10
#: A new stream begins with this part of what the others have left to share.
FIRST_PART = 4
#: Seconds that closing waits for a responder to tell where it can be cancelled, which takes a round trip.
ADDRESS_SECONDS = 0.25
#: What a responder is told of a stream that is not known here. HTTP's 410.
GONE = 410
#: Responders that one farewell is for at most.
_MOST_RESPONDERS = 16
#: Ended streams that are remembered at most.
_TOMBSTONES = 100_000


class Share:
    """What one stream has given of its connection's budget, in bytes."""

    __slots__ = ("given", "open")

    def __init__(self, given: int) -> None:
        self.given = given
        self.open = True


class Budget:
    """The credit in bytes that all streams of a connection have given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given = 0
        self._streams = 0

    def open(self) -> Share:
        """Credit for a new stream: a part of what is left, so that something is left for the next ones."""
        with self._lock:
            first = (SHARED_WINDOWS_BYTES - self._given) // FIRST_PART
            share = Share(max(self._least_locked(0), min(WINDOW_BYTES, first)))
            self._streams += 1
            self._given += share.given
            return share

    def most(self, share: Share) -> int:
        """How much credit this stream may have out."""
        with self._lock:
            others = self._given - share.given
            fair = ALL_WINDOWS_BYTES // max(1, self._streams)
            return max(self._least_locked(share.given), min(WINDOW_BYTES, fair, SHARED_WINDOWS_BYTES - others))

    def _least_locked(self, given: int) -> int:
        others = self._given - given
        return LEAST_WINDOW_BYTES if others + LEAST_WINDOW_BYTES <= ALL_WINDOWS_BYTES else TINY_WINDOW_BYTES

    def change(self, share: Share, given: int) -> None:
        """A stream's credit is another one now."""
        with self._lock:
            if share.open:
                self._given += given - share.given
                share.given = given

    def close(self, share: Share) -> None:
        """A stream is over, and with it its credit. Idempotent."""
        with self._lock:
            if share.open:  # no call from here on, so that a Ctrl-C divides nothing
                share.open = False
                self._given -= share.given
                self._streams -= 1


class Calls(Waiter):
    """The streams of one connection, from the reading side."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.peers = Peers(connection, connection.mux)
        self.budget = Budget()
        self.grace = connection.options.resume_grace
        self.may_answer = True  # the server lets us speak to responders: else only plain streams are of use
        self.leaving = False  # the interpreter ends: responders are told, unless they end with it
        self._lock = threading.Lock()
        # token -> whose stream it was, what had come, and until when that is of interest
        self._ended: dict[bytes, tuple[bytes, int, float]] = {}
        self._farewells: set[Farewell] = set()
        connection.mux.on_late = self._late
        connection.mux.watchers.append(self)
        connection.when_closing(self._closing, self._leave)

    def tell(self, control: bytes, inbox: bytes, payload: bytes) -> bool:
        """Send a control message to a responder, with the stream's inbox for an answer.

        False if there is no link, or if the subject, which is the responder's choice, is too long for the server.
        """
        return self.connection.fits(control, inbox) and self.connection.put_now(
            encode_pub(control, inbox, None, payload), here=True
        )

    def turn_away(self, inbox: bytes, reply: bytes) -> None:
        """Tell a responder that another one was first."""
        self.tell(reply, inbox, frames.encode_cancel("taken by another responder", Code.ALREADY_EXISTS))

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        if frames.FRAMED_MARK in subject:
            self.may_answer = False

    def link_made(self) -> None:
        self.may_answer = True

    def remember(self, token: bytes, stream: bytes, received: int) -> None:
        """A stream is complete, or ended by its responder; stream: as in frames.Address."""
        now = time.monotonic()
        with self._lock:
            while self._ended:
                first = next(iter(self._ended))
                if self._ended[first][2] > now and len(self._ended) < _TOMBSTONES:
                    break
                del self._ended[first]
            self._ended[token] = (stream, received, now + self.grace + LONGEST_REPEAT)

    def _late(self, token: bytes, items: list[Item]) -> None:
        """Frames for a stream that is not read any more: confirm its end once more, or have it cancelled."""
        inbox = b"%b.%b" % (self.connection.mux.inbox, token)
        newest: dict[bytes, bytes] = {}  # of each responder's stream: where it is spoken to
        for reply, block, _ in items:
            address = frames.decode_address(reply, block)
            if address is not None and address.op not in (Op.DATA, Op.BATCH, Op.FRAGMENT):
                self.connection.mux.late -= 1  # a question, or an end that is told again: no reply that came late
            if reply is not None and address is not None and (address.seq or address.op != Op.ERROR):
                newest[address.stream] = reply
            elif reply is not None and frames.PLAIN_MARK in reply:
                newest[b""] = reply
        stream, received, _ = self._ended.get(token, (b"", 0, 0.0))
        for one, reply in newest.items():
            if one and one == stream:
                self.tell(reply, inbox, Ack(received, 0, 0).encode())
            else:
                self.tell(reply, inbox, frames.encode_cancel("nobody reads this stream", GONE))

    # -- leaving -------------------------------------------------------------------------------------------------

    def part(
        self,
        token: bytes,
        inbox: bytes,
        known: dict[bytes, bytes],
        reason: str,
        code: int = Code.CANCELLED,
        behind: Waiter | None = None,
    ) -> None:
        """Have the responder told that its stream is left.

        known: the stream, and where its responder is spoken to, if it has said anything yet. behind: who still waits
        for the end of the connection.
        """
        farewell = Farewell(self, token, inbox, known, frames.encode_cancel(reason, code), behind)
        with self._lock:
            self._farewells.add(farewell)
        self.connection.mux.register(token, farewell)
        farewell.speak()
        if self.connection.status is Status.CLOSED:  # the waiters may have been told of that already
            farewell.connection_closed(self.connection.closed_error())

    def connection_closed(self, reason: Exception) -> None:
        """There is nobody to be told any more; not by those either whose place in the table another one took."""
        with self._lock:
            farewells = list(self._farewells)
        for farewell in farewells:
            farewell.connection_closed(reason)

    def parted(self, farewell: Farewell) -> None:
        """The responder has answered, or will not."""
        with self._lock:
            self._farewells.discard(farewell)

    def _closing(self, deadline: Deadline) -> None:
        """The connection is about to be closed: whoever still sends is told, once it has said where."""
        if not self.connection.linked:
            return
        for waiter in list(self.connection.mux.waiters.values()):
            waiter.connection_closing()
        with self._lock:
            farewells = list(self._farewells)
        for farewell in farewells:
            if not farewell.spoken.is_set():
                farewell.speak()  # a Ctrl-C may have kept it from that
            if not farewell.spoken.wait(deadline.or_sooner(ADDRESS_SECONDS).remaining()):
                break  # one that says nothing; the others had as much time

    def _leave(self, deadline: Deadline) -> None:
        self.leaving = True
        self._closing(deadline)


class Farewell(Waiter):
    """A stream that was left: says so until the responder has heard it.

    Attributes:
        spoken: set once the responder has been told, or need not be.
    """

    waits = False

    def __init__(
        self,
        calls: Calls,
        token: bytes,
        inbox: bytes,
        known: dict[bytes, bytes],
        payload: bytes,
        behind: Waiter | None = None,
    ) -> None:
        self.spoken = SafeEvent()
        self._calls = calls
        self._token = token
        self._inbox = inbox
        self._known = known  # stream -> where its responder is spoken to
        self._payload = payload
        self._behind = behind
        self._over = False
        self._until = time.monotonic() + calls.grace + LONGEST_REPEAT
        self._repeat = FIRST_REPEAT
        self._alarm = Alarm(self._look)

    def speak(self) -> None:
        """Tell the responder now, if it is known where, and again later."""
        for control in list(self._known.values()):
            if self._calls.tell(control, self._inbox, self._payload):
                self.spoken.set()
        if not self._over:
            self._alarm.set(min(time.monotonic() + self._repeat, self._until))
        if self._over:  # meanwhile, maybe
            self._alarm.clear()

    def _look(self) -> None:
        if self._over or time.monotonic() >= self._until:
            self._done()
            return
        self._repeat = min(2 * self._repeat, LONGEST_REPEAT)
        self.speak()

    def deliver(self, items: list[Item]) -> None:
        for index, item in enumerate(items, 1):
            reply, block, _ = item
            address = frames.decode_address(reply, block)
            if frames.is_unheard(item):
                self._done(items[index:])
                return
            if address is None:  # a plain responder
                self._calls.connection.mux.late += 1
                if reply is not None and frames.PLAIN_MARK in reply:
                    self._calls.tell(reply, self._inbox, self._payload)
                self._done(items[index:])
                return
            if address.op in (Op.ERROR, Op.REFUSED):
                self._known.pop(address.stream, None)
                if not self._known:
                    self._done(items[index:])
                    return
            else:
                self._calls.connection.mux.late += address.op in (Op.DATA, Op.BATCH, Op.FRAGMENT)
                if reply is not None and address.stream not in self._known and len(self._known) < _MOST_RESPONDERS:
                    self._known[address.stream] = reply
                    self._calls.tell(reply, self._inbox, self._payload)
                    self.spoken.set()

    def link_made(self) -> None:
        self.speak()

    def connection_closed(self, reason: Exception) -> None:
        self._done()
        if self._behind is not None:
            self._behind.connection_closed(reason)

    def _done(self, rest: Sequence[Item] = ()) -> None:
        """Nothing more is to be said. rest: what came in the same read, behind what ended it."""
        mux = self._calls.connection.mux
        self._over = True
        self._alarm.clear()
        self._calls.parted(self)
        if self._behind is None and mux.waiters.get(self._token) is self:
            mux.unregister(self._token)
            if rest:
                mux.came_late(self._token, list(rest))
        self.spoken.set()
