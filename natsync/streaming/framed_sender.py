"""Framed mode at the responder: credit, numbers, and everything kept until the requester has it.

A stream is OPEN, then LINGERs without a thread until the requester has its end, then is CLOSED. While the requester is
not heard from (see peers) or there is no link, nothing is sent but questions, and senders wait for credit as ever.
Frames never wait in the outbox: the writer asks for them (produce), so what a lost link took is simply sent again.
"""

from __future__ import annotations

import enum
import random
import time

from natsync.concurrency import Deadline, Happening, SafeCondition
from natsync.connection import Connection
from natsync.context import Context
from natsync.errors import ClientLost, Code, MaxPayloadExceeded, StreamClosed, TimedOut
from natsync.headers import Headers
from natsync.message import Item
from natsync.mux import LinkLoss
from natsync.options import LEAST_HEARTBEAT
from natsync.outbox import Traffic
from natsync.protocol import FORMATTED_BYTES, MAX_MESSAGE_BYTES, encode_pub
from natsync.streaming import frames, terms
from natsync.streaming.frames import Ack, Control, Op
from natsync.streaming.framing import GUARANTEED_BYTES, Framing
from natsync.streaming.peers import FIRST_REPEAT, LONGEST_REPEAT, Peer
from natsync.streaming.sender import Ending, SenderCore, fitting_error
from natsync.streaming.terms import Offer, Status
from natsync.streaming.window import Frame, Outgoing
from natsync.timers import Alarm

#: Bytes of headers that a frame needs at most where its number goes in a header, but for the stream's name.
_SEQ_BYTES = 64
#: Part of a wait that is random, so that many streams do not ask at once.
_JITTER = 0.25
#: Chunks, and bytes, that a thread which sends without a pause gathers until it writes them. A quarter of the window:
#: less costs more system calls and wakes the other processes more often, more lets them wait.
GATHER_CHUNKS = 2048
GATHER_BYTES = 256 << 10
#: Seconds after which they are written though no more have come.
GATHER_SECONDS = 1e-3
#: Frames that carry a reply subject even where that costs the server an entry (across accounts).
_ANSWERED = (Op.ACCEPT, Op.REFUSED, Op.PROBE, Op.END, Op.ERROR)


class State(enum.Enum):
    """Where a response is in its life."""

    OPEN = "open"
    LINGER = "linger"  # ended here; the requester has not confirmed the end
    CLOSED = "closed"


class Event(enum.Enum):
    """What ends a phase of it."""

    ENDED = "ended"  # by the handler: END, an error, a refusal, a deadline, a shutdown
    ARRIVED = "arrived"  # the requester has everything, the end included
    GONE = "gone"  # the requester has cancelled, or is lost; or one's own connection is closed


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.OPEN, Event.ENDED): State.LINGER,
    (State.OPEN, Event.GONE): State.CLOSED,
    (State.LINGER, Event.ARRIVED): State.CLOSED,
    (State.LINGER, Event.GONE): State.CLOSED,
}


class FramedSender(SenderCore):
    """A response in framed mode."""

    mode = "framed"

    def __init__(
        self, connection: Connection, framing: Framing, reply: bytes, ctx: Context, subject: str, offer: Offer
    ) -> None:
        super().__init__(connection, framing.control, reply, ctx, subject)
        self.address = reply
        self.name = self._inbox
        self._framing = framing
        self._imported = reply.startswith(frames.IMPORTED)
        self._state = State.OPEN
        self._chunk_bytes = offer.chunk_bytes
        self._out = Outgoing(offer, self._max_payload(), GUARANTEED_BYTES)
        self._quarter = max(1, offer.window // 4)
        self._held_bytes = 0  # of the memory that all streams share
        self._room = SafeCondition(self.lock)
        self._waiting = 0  # threads that wait for room
        self._starved = False  # try_send() found none
        self._wakes = 0  # how often there was news of the memory that all streams share
        self._accepts = False  # the requester is to be told that its request was taken
        self._ready = False  # the writer is to ask for frames
        self._paused = not connection.linked
        self._settling = False  # nothing is sent until the requester has said what it has
        self._heard = False  # the requester has said something
        self._refusal: bytes | None = None
        self._repeat = FIRST_REPEAT
        self._moved_at = time.monotonic()  # of the last progress, or question
        self._alarm = Alarm(self._look)
        self._gathering = Alarm(self._gathered)
        self._done = Happening()
        self._arrived = False
        options = connection.options
        self._peer: Peer
        peer = reply if self._imported else reply.rpartition(b".")[0]
        heartbeat = max(LEAST_HEARTBEAT, min(offer.heartbeat, options.heartbeat))
        grace = min(offer.grace, options.resume_grace)
        framing.add(self)
        self._peer_name = framing.peers.join(peer, self, heartbeat, grace)
        self._peer.heard()  # it has just asked
        self.open()
        if self._paused:  # a link made meanwhile told nobody here
            self.resume()

    def _max_payload(self) -> int:
        """What the server takes, and the requester: a larger message would cost it its link."""
        limit: int = min(self._connection.info.get("max_payload", MAX_MESSAGE_BYTES), self._chunk_bytes)
        return limit - len(self._inbox) - _SEQ_BYTES if self._imported else limit

    def accept(self) -> None:
        with self.lock:
            if self._error is not None:
                return
            self._accepts = True
        now = time.monotonic()
        self._gathering.set(now + GATHER_SECONDS)  # a handler that answers at once saves it a write of its own
        self._alarm.set_by(now + FIRST_REPEAT)

    @property
    def count(self) -> int:
        out = self._out
        return out.number if out.giver else out.count

    @property
    def direct(self) -> Outgoing | None:
        return self._out

    @property
    def queued_bytes(self) -> int:
        return self._out.offset

    @property
    def state(self) -> str:
        if self._connection.linked and self._peer.suspended:
            return "silent"
        return "waiting" if self._connection.linked and self._waiting else super().state

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, data: bytes, deadline: Deadline) -> int:
        """The long way, if ResponseSender.send() cannot: what is large, or the first, or not of the giver."""
        size, out = len(data), self._out
        self._check_size(size)
        while True:
            with self.lock:
                if self._error is not None:
                    raise self._closed_error()
                if out.takes(size):
                    first, number = self._push_locked(data), out.count
                    break
            self._wait_room(size, deadline)
        if first or number >= out.watch_at:
            self._pushed(first)
        return number

    def gave(self) -> bool:
        with self.lock:
            taken = self._out.was_taken()
        if taken:
            self.see_to_it()
        return taken

    def see_to_it(self) -> None:
        traffic = self._connection.traffic
        with self.lock:
            out = self._out
            out.take_in()
            left = GATHER_CHUNKS - (out.last - out.sent)
            newest = len(out.kept[-1]) if out.kept else 0  # all may have been sent and confirmed meanwhile
            if traffic is Traffic.OWN and not self._ready and out.waiting_bytes < GATHER_BYTES:
                left = min(left, (GATHER_BYTES - out.waiting_bytes) // max(1, newest))
            else:
                left = 0
            wake = left <= 0 and self._wants_writer_locked()
            if not wake:
                out.watch(out.count + (left if left > 0 else GATHER_CHUNKS))
        if wake:
            self._connection.ready_here(self, traffic)
        elif left > 0:
            self._gathering.set(time.monotonic() + GATHER_SECONDS)

    def _gathered(self) -> None:
        """Some have gathered, and no more have come."""
        with self.lock:
            wake = self._wants_writer_locked()
            accepts = self._accepts and not wake and self._state is not State.CLOSED
            self._accepts = self._accepts and wake
        if accepts:
            self._put(Op.ACCEPT, 0)
        if wake:
            self._connection.ready(self)

    def try_send(self, data: bytes) -> bool:
        size = len(data)
        self._check_size(size)
        with self.lock:
            short = self._out.has_credit(size) and not self._out.takes(size)
        if short:
            self._framing.extend(self, size)
        with self.lock:
            if self._error is not None:
                raise self._closed_error()
            if not self._out.takes(size):
                self._starved = True
                self._alarm.set_by(time.monotonic() + self._repeat)
                return False
            first = self._push_locked(data)
        self._pushed(first)
        return True

    def send_many(self, chunks: list[bytes], deadline: Deadline) -> int:
        sizes = list(map(len, chunks))
        self._check_size(max(sizes, default=0))
        sent, number = 0, self.count
        while sent < len(chunks):
            first = False
            with self.lock:
                if self._error is not None:
                    raise self._closed_error()
                while sent < len(chunks) and self._out.takes(sizes[sent]):
                    until = sent + self._out.room
                    pushed = self._out.push_some(chunks[sent:until], sizes[sent:until]) if self.count else 0
                    if not pushed:
                        pushed, first = 1, self._push_locked(chunks[sent])
                    number = self.count
                    sent += pushed
            self._pushed(first)
            if sent < len(chunks):
                self._wait_room(sizes[sent], deadline)
        return number

    def _check_size(self, size: int) -> None:
        if size > self._chunk_bytes:
            raise MaxPayloadExceeded(size, self._chunk_bytes)

    def _push_locked(self, data: bytes) -> bool:
        """Queue a chunk; whether it is the first. Requires _lock."""
        headers, first = self._headers, not self.count
        self._out.push(data, headers.encode() if headers is not None and first else None)
        if first:
            self._out.allow(True)
        return first

    def _pushed(self, first: bool) -> None:
        self.see_to_it()
        if first:
            self._begun()

    def _wants_writer_locked(self) -> bool:
        """Whether the writer is to be told, which it is by whoever asks. Requires _lock."""
        if self._ready or self._paused or self._settling or not self._out.blocked:
            return False
        # First, so that _look() makes up for a Ctrl-C that keeps the writer from being told.
        self._alarm.set_by(time.monotonic() + self._repeat)
        self._ready = True
        return True

    def _wait_room(self, size: int, deadline: Deadline) -> None:
        """Block until it is worth another try to push a chunk of this size, or the stream is over.

        Raises:
            TimedOut: the deadline came first.
        """
        with self.lock:
            wakes, wake = self._wakes, self._wants_writer_locked()
            has_credit, takes = self._out.has_credit(size), self._out.takes(size)
        if wake:  # what has gathered
            self._connection.ready_here(self, self._connection.traffic)
        if has_credit:  # it is memory that is short
            if takes or self._framing.extend(self, size):
                return
            self.ask()  # what has arrived need not be kept
        with self.lock:
            self._alarm.set_by(time.monotonic() + self._repeat)
            try:
                self._waiting += 1
                while self._error is None and wakes == self._wakes and not self._out.takes(size):
                    if not has_credit and self._out.has_credit(size):
                        return
                    if not self._room.wait(deadline.remaining()) and not self._out.takes(size):
                        short = "there was no memory for it" if has_credit else "the requester gave no credit"
                        raise TimedOut(f"{short} in time; the chunk was not sent")
            finally:
                self._waiting -= 1

    def _wake_senders(self) -> None:
        with self.lock:
            self._room.notify_all()

    def settle(self, deadline: Deadline) -> bool:
        return self._done.event.wait(deadline.remaining()) and self._arrived

    # -- the writer ----------------------------------------------------------------------------------------------

    def produce(self, parts: list[bytes], most_bytes: int, *, here: bool = False) -> tuple[int, int, bool]:
        """What is to be sent next; see outbox.Producer."""
        size = messages = 0
        with self.lock:
            if self._paused or self._settling or self._state is State.CLOSED:
                self._idle_locked()
                return 0, 0, False
            if self._accepts:
                self._accepts = False
                parts.append(self._encode(Frame(Op.ACCEPT, 0, None, b"", 0)))
            while size < most_bytes:
                ones = self._next_ones()
                if ones:
                    parts += ones
                    size += sum(map(len, ones))
                    messages += len(ones)
                    continue
                frame = self._out.next()
                if frame is None:
                    if not here:
                        self._rest_locked()
                    break
                data = self._encode(frame)
                parts.append(data)
                size += len(data)
                messages += 1
            more = self._ready
            if messages:
                self._alarm.set_by(time.monotonic() + self._repeat)
        return size, messages, more

    def produced(self) -> bool:
        with self.lock:
            if self._paused or self._settling:
                self._idle_locked()
            elif self._ready and not self._out.blocked:
                self._rest_locked()
            return self._ready

    def _rest_locked(self) -> None:
        """The writer has everything, but for what is given in this very moment. Requires _lock."""
        self._idle_locked()
        self._ready = self._out.has_given

    def _idle_locked(self) -> None:
        """The writer knows of nothing. Requires _lock."""
        self._ready = False
        self._out.watch(0)

    def _next_ones(self) -> list[bytes]:
        """Frames of chunks that are due one by one, encoded; none where that takes a closer look. Requires the lock."""
        if self._imported:
            return []
        seq, run = self._out.next_ones(FORMATTED_BYTES)
        line = b"PUB %b %b.%b." % (self._reply, self._inbox, Op.DATA)
        return [b"%b%d %d\r\n%b\r\n" % (line, number, len(one), one) for number, one in enumerate(run, seq)]

    def _encode(self, frame: Frame) -> bytes:
        if self._imported:
            return self._encode_imported(frame)
        op, seq, block, payload, _ = frame
        if block is None and len(payload) <= FORMATTED_BYTES:
            parts = (self._reply, self._inbox, op, seq, len(payload), payload)
            return b"PUB %b %b.%b.%d %d\r\n%b\r\n" % parts
        return encode_pub(self._reply, b"%b.%b.%d" % (self._inbox, op, seq), block, payload)

    def _encode_imported(self, frame: Frame) -> bytes:
        """A frame whose number goes in a header, because its reply subject arrives as another one."""
        op, seq, block, payload, count = frame
        line = f"{terms.SEQ_HEADER}: {frames.encode_seq(self._inbox, op, seq)}\r\n".encode()
        whole = (block or Headers().encode()).replace(b"\r\n", b"\r\n" + line, 1)
        quarter = self._quarter
        answered = op in _ANSWERED or seq == 1 or (seq - 1) // quarter != (seq + count - 1) // quarter
        address = b"%b.%b.%d" % (self._inbox, op, seq)
        return encode_pub(self._reply, address if answered else None, whole, payload)

    def _put(self, op: bytes, seq: int, block: bytes | None = None, payload: bytes = b"") -> bytes:
        """Send a frame that is out of order, now or never; returns it."""
        frame = self._encode(Frame(op, seq, block, payload, 0))
        self._connection.put_now(frame)
        return frame

    # -- ending ------------------------------------------------------------------------------------------------

    def end(self, trailers: Headers | None = None) -> bool:
        if trailers:
            size, limit = len(trailers.encode()) + len(frames.END_PAYLOAD), self._max_payload()
            if size > limit:
                raise MaxPayloadExceeded(size, limit)
        return super().end(trailers)

    def _closing_locked(self, due: bool) -> None:
        self._out.allow(False)
        if due:
            self._state = TRANSITIONS.get((self._state, Event.ENDED), self._state)

    def _put_end(self, ending: Ending) -> None:
        headers, payload = ending.trailers, frames.END_PAYLOAD
        block = headers.encode() if headers else None
        if ending.op != Op.END:
            payload = frames.ERROR_PREFIX + ending.text.encode("utf-8", "replace")
            block, payload = fitting_error(ending.status, ending.text, payload, self._max_payload())
        if ending.op == Op.REFUSED:
            self._refusal = self._put(Op.REFUSED, 0, block, payload)
            self._alarm.set_by(time.monotonic() + FIRST_REPEAT)
            return
        with self.lock:
            if self._state is State.CLOSED:
                return
            if not self._out.ended:
                self._out.push_end(ending.op, block, payload)
            wake = self._wants_writer_locked()
        if wake:
            self._connection.ready_here(self, self._connection.traffic)

    def _on(self, event: Event) -> None:
        with self.lock:
            after = TRANSITIONS.get((self._state, event))
            if after is None:
                return
            self._state = after
            if after is not State.CLOSED:
                return
            self._arrived = event is Event.ARRIVED and self._ended
            self._out.clear()
            held, self._held_bytes = self._held_bytes, 0
            self._room.notify_all()
        super()._forget()
        self._framing.peers.leave(self._peer_name, self._peer, self)
        self._framing.remove(self, held)
        self._done.set()
        self._gathering.clear()
        self._alarm.clear()  # behind _done, which _look() looks at when it has set it

    def _forget(self) -> None:
        self._on(Event.GONE)

    def _stop(self, error: StreamClosed) -> None:
        """End at once, whatever is still to be sent."""
        self._close(error, None)
        self._forget()

    # -- what the requester says (the reader) ----------------------------------------------------------------------

    def deliver(self, items: list[Item]) -> None:
        for index, item in enumerate(items):
            if self._state is State.CLOSED:  # by one of those before
                self._control.came_late(self._token, items[index:])
                return
            if frames.is_unheard(item):
                self._peer.unreachable()
                continue
            reply, _, payload = item
            if reply != self._reply and not self._imported:
                continue  # somebody else's
            ack = frames.decode_ack(payload)
            if ack is not None:
                self._acknowledged(ack)
            elif payload[:1] == Control.PING:
                self.ask()
            else:
                cancelled = self._cancelled_by(payload)
                if cancelled is not None:
                    self._cancelled(cancelled)
            self._peer.heard()  # behind what it says, which a resumption starts from

    def _acknowledged(self, ack: Ack) -> None:
        with self.lock:
            if self._state is State.CLOSED:
                return
            news = self._out.acknowledge(ack)
            if news or not self._heard:
                self._repeat, self._moved_at = FIRST_REPEAT, time.monotonic()
            self._heard = True
            self._settling = False
            if news:
                self._starved = False
                if self._waiting:
                    self._room.notify_all()
            arrived = self._refusal is not None or (self._out.ended and self._out.acked == self._out.last)
            wake = not arrived and self._wants_writer_locked()
            nothing_missing = ack.missing and not self._out.blocked
            spare = self._spare_locked()
        if arrived:
            self._on(Event.ARRIVED)
        elif wake:
            self._connection.ready(self)
        elif nothing_missing:
            self.ask()  # which tells it so
        self._framing.give_back(spare)

    def _spare_locked(self) -> int:
        """What is held of the shared memory, if nothing is kept that needs it: given back. Requires _lock."""
        if not self._held_bytes or self._out.kept_bytes:
            return 0
        spare, self._held_bytes = self._held_bytes, 0
        self._out.quota_bytes -= spare
        return spare

    def _cancelled(self, error: StreamClosed) -> None:
        status = Status(Code.CANCELLED)
        self._connection.put_now(self._framing.encode_gone(self._reply, self._inbox, "cancelled", status))
        self._stop(error)

    # -- signs of life (the reader, the timer) -----------------------------------------------------------------------

    @property
    def _outstanding(self) -> bool:
        """Whether the requester has something to answer: a frame, or credit to give."""
        out = self._out
        unheard = not self._heard or self._refusal is not None or out.acked < out.highest
        return unheard or out.blocked or self._starved or self._waiting > 0

    def _look(self) -> None:
        """It has been quiet for a while: ask, if there is something to be answered."""
        now = time.monotonic()
        with self.lock:
            if self._state is State.CLOSED or self._paused or not self._outstanding:
                return
            due = self._moved_at + self._repeat
            if now < due:
                self._alarm.set_by(due)
                return
            self._moved_at, self._repeat = now, min(2 * self._repeat, LONGEST_REPEAT)
            self._idle_locked()  # in case that the writer does not know: being told twice does it no harm
            wake = self._wants_writer_locked()
            if self._waiting:  # and what waits for memory tries again
                self._wakes += 1
                self._room.notify_all()
        if wake:
            self._connection.ready(self)
        self.ask()
        self._peer.asked()
        self._alarm.set_by(now + self._repeat * random.uniform(1, 1 + _JITTER))
        if self._done.happened:  # it was closed meanwhile
            self._alarm.clear()

    def met(self, peer: Peer) -> None:
        self._peer = peer

    def ask(self) -> None:
        if self._refusal is not None:
            self._connection.put_now(self._refusal)
        else:
            self._put(Op.PROBE, self._out.sent)

    def suspend(self) -> None:
        with self.lock:
            self._paused = self._peer.suspended or not self._connection.linked  # it may be heard from again already

    def resume(self) -> None:
        """Heard from again, or linked again: find out what has arrived, and go on from there."""
        with self.lock:
            self._paused = self._peer.suspended or not self._connection.linked
            if self._paused or self._state is State.CLOSED:
                return
            ask = self._outstanding or not self._out.has_credit(1)
            self._settling = self._out.acked < self._out.sent
            self._repeat, self._moved_at = FIRST_REPEAT, time.monotonic()
            wake = self._wants_writer_locked()
        if ask:
            self.ask()
            self._alarm.set_by(time.monotonic() + FIRST_REPEAT)
        if wake:
            self._connection.ready(self)

    def give_up(self, why: str) -> None:
        self._stop(ClientLost(f"the requester is gone: {why}"))

    def link_lost(self, loss: LinkLoss) -> None:
        with self.lock:
            self._paused = True
            self._idle_locked()

    def link_made(self) -> None:
        with self.lock:
            fits = self._out.adapt(self._max_payload())
        if fits:
            self.resume()
        else:
            self._abandon("a chunk that was sent is larger than the responder's next server takes")

    def _abandon(self, text: str) -> None:
        """Give the stream up, and tell the requester."""
        frame = self._framing.encode_gone(self._reply, self._inbox, text, self._lost())
        self._connection.put_now(frame)
        self._stop(StreamClosed(text, code=Code.UNAVAILABLE))

    # -- shared memory -----------------------------------------------------------------------------------------------

    @property
    def expendable(self) -> bool:
        silent = self._peer.suspended or (self._state is State.LINGER and self._repeat >= 4 * FIRST_REPEAT)
        return silent and self._held_bytes > 0

    @property
    def lingers(self) -> bool:
        return self._state is State.LINGER

    def allow(self, extra_bytes: int) -> None:
        with self.lock:
            if self._state is State.CLOSED:
                spare = extra_bytes
            else:
                spare = 0
                self._held_bytes += extra_bytes
                self._out.quota_bytes += extra_bytes
                self._room.notify_all()
        self._framing.give_back(spare)

    def wake(self) -> None:
        with self.lock:
            self._wakes += 1
            self._room.notify_all()

    def evict(self) -> None:
        self._abandon("given up: the responder keeps too much for requesters that are not heard from")
