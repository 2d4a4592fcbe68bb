"""Outbox: whole frames on their way to the present link, or waiting for the next one.

Any thread puts; the session's writer takes everything that has gathered and writes it at once. Where the link is idle,
who puts may write itself, which saves the way through another thread. There is a queue for
frames in order and a control lane that goes first (PONG). A frame is written whole or not at all; when a link is lost,
what its writer had not taken yet moves to the outbox of the next link, in order. When a link takes over from one that
still works, the old outbox is sealed and written to its end, and the new one held until then.

Producers, which keep what they send until it has arrived, put no frames: they say that they are ready, and are asked
for frames when the writer comes round. Nothing of theirs waits for another link.
"""

from __future__ import annotations

import enum
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeAlias

from natsync.backlog import Backlog, Giver, destination, is_message, largest_payload
from natsync.concurrency import Deadline, SafeCondition, at_home
from natsync.errors import ReconnectBufferFull, TimedOut

#: Bytes waiting for the writer beyond which publishers wait. Enough for several large writes.
HIGH_WATER_BYTES = 4 << 20
#: Bytes that may be given without a look at that.
ALLOTTED_BYTES = 512 << 10
#: Bytes joined into one write at most, so that a PONG waits for no more than that.
WRITE_BYTES = 1 << 20
#: Bytes that each producer may give at least, whenever the writer comes round.
PRODUCER_BYTES = 64 << 10
#: Seconds without a write after which a link is idle. Who sends without a pause is left to the writer, who joins.
QUIET_SECONDS = 100e-6
#: Seconds without a write after which it is idle for another thread than the one that put last. Threads that take
#: turns would wait for each other's writes; the writer joins what several put.
OTHERS_QUIET_SECONDS = 1e-3
#: Bytes of messages that a thread which is not the writer writes at most,
HERE_BYTES = 64 << 10
#: and those that it may ask a producer for.
PRODUCED_HERE_BYTES = 320 << 10
#: Has the kernel take what it can and not wait; 0 where there is no such thing (Windows).
NOWAIT: int = getattr(socket, "MSG_DONTWAIT", 0)


class OutboxClosed(Exception):
    """The link of this outbox is gone: ask the connection for the present one."""


log = logging.getLogger("natsync.session")

#: A socket's send(data, flags): how much was sent.
SendNow: TypeAlias = Callable[[bytes, int], int]


class Receipt:
    """Where a frame was put: its position, 0 before that. No interrupt comes between putting it and noting that."""

    __slots__ = ("position",)

    def __init__(self) -> None:
        self.position = 0


class Traffic(enum.Enum):
    """What a link is doing."""

    IDLE = "idle"  # what comes may be written at once, by whoever has it
    OWN = "own"  # the same thread has written a moment ago, and nobody else: it may wait for more, and write again
    BUSY = "busy"  # several threads write: the writer joins what they put


class Producer(Protocol):
    """Who is asked for frames when the writer comes round."""

    def produce(self, parts: list[bytes], most_bytes: int, *, here: bool = False) -> tuple[int, int, bool]:
        """Append frames of about most_bytes: how many bytes and messages they are, and whether more is ready.

        Called with no lock held, by one thread at a time: on the writer's, or here, on one that sends; must not block.
        """

    def produced(self) -> bool:
        """Behind produce(here=True), once the frames are on their way; whether more has become ready meanwhile."""


class Outbox(Backlog):
    """A queue of frames between publishers and one writer. A new one has no writer yet: it is a buffer."""

    def __init__(self, buffer_bytes: int, frames: list[bytes] | None = None, position: int = 0) -> None:
        self._lock = threading.Lock()
        self._ready = SafeCondition(self._lock)
        self._room = SafeCondition(self._lock)
        super().__init__(frames, position)
        self._control: list[bytes] = []
        self._ready_producers: list[Producer] = []
        self._ceiling = 0  # of _size: what is put below it needs no other look; 0 unless there is a link
        self._buffer_bytes = buffer_bytes
        self._attached = False
        self._closed = False
        self._sealed = False
        self._successor: Outbox | None = None
        self.held = False  # only control frames are written
        self._writer_waits = False
        self._in_hand = False  # the writer has something to write
        self._quiet_since = 0.0  # when the last write was over
        self._send_now: SendNow | None = None
        self._last_putter = 0  # the thread that found it idle last
        self._rest = b""  # what the kernel did not take of a write that was not the writer's: goes first
        self._publishers_wait = 0
        self.produced_bytes = self.produced_messages = 0

    # -- publishers --------------------------------------------------------------------------------------------

    def try_put(
        self, frame: bytes, messages: int = 1, force: bool = False, here: bool = False, giving: bool = False
    ) -> int:
        """Queue a message (or several, joined) if there is room now; returns its position, 0 if there is no room.

        With force it is queued in any case, unless the link is gone. here: if the link is idle, it is written in this
        thread. giving: it would rather give what comes next, see Giver.

        Raises:
            ReconnectBufferFull: there is no link, and no room to wait for one.
            OutboxClosed: the link is gone, or another one takes over.
        """
        size = len(frame)
        with self._lock:
            if self.giver.given:  # as _take_in() asks, too; most often nothing is
                self._take_in()
            if self._size >= self._ceiling and not self._has_room_locked(size, force):
                return 0
            # Accounted for before it is there: an interrupt (Ctrl-C) in between errs on the safe side.
            self._size += size
            self.position = position = self.position + size
            self.messages += messages
            self._frames.append(frame)
            if self._writer_waits and not (here and self.traffic() is Traffic.IDLE and self._wrote_locked()):
                self._wake_locked()
            if giving:
                self._allot(0 if self._writer_waits else min(self._ceiling - self._size, ALLOTTED_BYTES))
        return position

    def was_taken(self, giver: Giver, frame: bytes) -> bool:
        """Whether the frame that this thread has just given is queued; else it is not here any more."""
        with self._lock:
            if giver is self.giver:
                self._take_in()
                self._wake_locked()
                return True
            for index, one in enumerate(giver.given):  # a signal handler may have given others
                if one is frame:
                    del giver.given[index]
                    return False
            return True

    def _has_room_locked(self, size: int, force: bool) -> bool:
        """Whether a message is taken though the ceiling is reached, or there is no link; raises as try_put() does."""
        if self._closed or self._sealed:
            raise OutboxClosed
        if not force and not self._attached:
            self._check_buffer_locked(size)
        return force or not self._attached

    def wait_room(self, deadline: Deadline, over: Callable[[], bool] = lambda: False) -> None:
        """Block until try_put() is worth another try: the writer has caught up, the link is gone, or it is over().

        What ends the wait early by over() must call wake_publishers().

        Raises:
            TimedOut: the deadline came first.
        """
        with self._lock:
            self._take_in()
            self._publishers_wait += 1
            try:
                while self._takes_locked() and self._size >= HIGH_WATER_BYTES and not over():
                    if not self._room.wait(deadline.remaining()) and self._size >= HIGH_WATER_BYTES:
                        raise TimedOut(f"the link took nothing for a while: {self._size} bytes wait to be written")
            finally:
                self._publishers_wait -= 1

    def wake_publishers(self) -> None:
        """Have those who wait for room look again."""
        if self._publishers_wait:
            with self._lock:
                self._room.notify_all()

    def put_now(self, frame: bytes, here: bool = False, receipt: Receipt | None = None) -> int:
        """Queue a protocol frame behind the messages without ever waiting; its position, 0 if there is no link.

        here: it is written in this thread, unless somebody else writes.
        """
        with self._lock:
            if not self._takes_locked():
                return 0
            self._take_in()
            self._size += len(frame)  # in this order, see try_put()
            self.position += len(frame)
            self._frames += (frame,)  # no call from here on, see Receipt
            if receipt is not None:
                receipt.position = self.position
            if not (here and self._is_free() and self._wrote_locked()):
                self._wake_locked()
            return self.position

    def put_first(self, frame: bytes, *, most: int | None = None) -> None:
        """Queue a control frame ahead of everything, unless `most` like it wait already."""
        with self._lock:
            if not self._closed and (most is None or self._control.count(frame) < most):
                self._control.append(frame)
                self._wake_locked()

    def ready(self, producer: Producer) -> None:
        """Have the producer asked for frames, once, as soon as there is a link.

        Raises:
            OutboxClosed: the link is gone, or another one takes over.
        """
        with self._lock:
            if self._closed or self._sealed:
                raise OutboxClosed
            self._ready_producers.append(producer)
            self._wake_locked()

    def withdraw(self, frame: bytes) -> bool:
        """Take a frame back; True if it was still here, so that it surely never left."""
        with self._lock:
            return self._remove(frame)

    def withdraw_to(self, subjects: set[bytes]) -> None:
        """Take back all messages to these subjects."""
        if not subjects:
            return
        with self._lock:
            self._take_in()
            self._keep([one for one in self._frames if not is_message(one) or destination(one) not in subjects])

    @property
    def waiting_messages(self) -> int:
        """Messages that wait for the writer; several that were put together count as one."""
        with self._lock:
            self._take_in()
            return sum(map(is_message, self._frames))

    @property
    def size_bytes(self) -> int:
        """Bytes that wait for the writer."""
        return self.amounts()[1]

    def amounts(self) -> tuple[int, int, int]:
        """At one moment: the position up to which all was taken, the bytes that wait, and the messages put so far."""
        with self._lock:
            self._take_in()
            return self.taken, self._size, self.messages

    # -- the connection ----------------------------------------------------------------------------------------

    def drop_larger(self, max_payload: int) -> list[bytes]:
        """Remove and return what the next link's server would not take: it would end that link, again and again."""
        with self._lock:
            dropped = [frame for frame in self._frames if largest_payload(frame) > max_payload]
            if dropped:
                self._keep([frame for frame in self._frames if largest_payload(frame) <= max_payload])
            return dropped

    def attach(self, first: list[bytes], send_now: SendNow | None = None) -> None:
        """A link is there: `first` goes out before all that waits. send_now: for writing in other threads."""
        with self._lock:
            self._send_now = send_now
            self._control.extend(first)
            self._attached = True
            self._ceiling = 0 if self._closed or self._sealed else HIGH_WATER_BYTES
            self._ready.notify()
            self._room.notify_all()

    def detach(self) -> None:
        """The link came to nothing: a buffer again, without what was meant for that link."""
        with self._lock:
            self._control.clear()
            self._attached = False
            self._ceiling = 0
            self._no_giver()

    # -- a link that takes over from another --------------------------------------------------------------------

    def hold(self) -> None:
        """Write control frames only until release(): the link that goes before has not finished yet."""
        self.held = True

    def seal(self, last: bytes) -> int:
        """Queue the last frame, and turn everybody away from now on; its position, 0 if there is no link.

        What is queued is still written.
        """
        with self._lock:
            if not self._takes_locked():
                return 0
            self._no_giver()
            self._size += len(last)
            self.position += len(last)
            self._frames.append(last)
            self._sealed = True
            self._ceiling = 0
            self._wake_locked()
            self._room.notify_all()
            return self.position

    def follow(self, sealed: Outbox, position: int) -> None:
        """Count on from this position of the outbox that goes before, and ask its producers; nothing was put yet."""
        with sealed._lock:
            producers, sealed._ready_producers = sealed._ready_producers, []
            sealed._successor = self
        with self._lock:
            self.position = self.taken = position
            self._ready_producers.extend(producers)

    def adopt(self, producers: list[Producer]) -> None:
        """Ask these, too, which were about to be asked on behalf of the outbox that went before."""
        with self._lock:
            if not self._closed:
                self._ready_producers.extend(producers)
                self._wake_locked()

    def release(self) -> None:
        """The link that went before has finished: write on."""
        with self._lock:
            self.held = False
            self._wake_locked()

    def close(self) -> list[bytes]:
        """The link is gone: returns the messages that its writer never took, and turns everybody away."""
        with self._lock:
            self._closed = True
            self._ceiling = 0
            self._no_giver()
            rest = [frame for frame in self._frames if is_message(frame)]
            self._frames, self._size = [], 0
            self._control = []
            self._ready_producers = []
            self._ready.notify_all()
            self._room.notify_all()
            return rest

    # -- the writer --------------------------------------------------------------------------------------------

    def take(self) -> bytes | None:
        """Block until there is something to write; None when the outbox is closed."""
        while True:
            with self._lock:
                self._in_hand = False
                while not self._is_due_locked():
                    if self._closed:
                        return None
                    self._quiet_since = time.monotonic()
                    self._writer_waits = True
                    self.giver.limit_bytes = 0
                    if not self.giver.given:  # behind that, see Giver
                        self._ready.wait()
                    self._writer_waits = False
                self._in_hand = True
                if self._rest:
                    rest, self._rest = self._rest, b""
                    return rest
                if self._control:
                    control, self._control = self._control, []
                    return b"".join(control)
                frames = self._next(WRITE_BYTES)
                if self._publishers_wait and self._size < HIGH_WATER_BYTES:
                    self._room.notify_all()
                producers: list[Producer] = []
                if not self._sealed:
                    producers, self._ready_producers = self._ready_producers, []
            if producers:
                self._ask(producers, frames, WRITE_BYTES)
            if frames:
                return frames[0] if len(frames) == 1 else b"".join(frames)

    def _is_due_locked(self) -> bool:
        """Whether there is something to write."""
        self._take_in()
        producers = self._ready_producers and not self._sealed
        waiting = self._rest or self._control or ((self._frames or producers) and not self.held)
        return self._attached and bool(waiting)

    def _ask(self, producers: list[Producer], frames: list[bytes], most_bytes: int) -> None:
        """Add what the producers give, an equal share each; those with more come again next time."""
        share = max(PRODUCER_BYTES, most_bytes // len(producers))
        left, asked = most_bytes, 0
        more: list[Producer] = []
        for producer in producers:
            if left <= 0:
                break
            asked += 1
            try:
                size, messages, has_more = producer.produce(frames, share)
            except Exception:  # a fault with one stream must not end the link of all
                log.exception("a stream could not be sent")
                continue
            left -= size
            self.produced_bytes += size
            self.produced_messages += messages
            if has_more:
                more.append(producer)
        again = producers[asked:] + more  # those whose turn it was come first
        if again:
            with self._lock:
                successor = self._successor
                if successor is None and not self._closed:
                    self._ready_producers[:0] = again
            if successor is not None:
                successor.adopt(again)

    def _takes_locked(self) -> bool:
        """Whether there is a link, and what is put goes to it."""
        return self._attached and not self._closed and not self._sealed

    def _wake_locked(self) -> None:
        if self._writer_waits:
            # In this order: a notify() that an interrupt cuts short is made up for by the next put. And once only:
            # a second call before the writer runs would keep the lock from the other publishers for nothing.
            self._ready.notify()
            self._writer_waits = False

    # -- writing in the thread that puts -----------------------------------------------------------------------

    def traffic(self) -> Traffic:
        """What the link is doing, for a thread that has something to send."""
        me, quiet = threading.get_ident(), time.monotonic() - self._quiet_since
        mine, self._last_putter = me == self._last_putter, me
        if not self._writer_waits or not self._is_free():
            return Traffic.BUSY
        if quiet > (QUIET_SECONDS if mine else OTHERS_QUIET_SECONDS):
            return Traffic.IDLE
        return Traffic.OWN if mine else Traffic.BUSY

    def _is_free(self) -> bool:
        """Whether nobody writes, and another thread than the writer may."""
        if self._in_hand or self._send_now is None or self.held or self._sealed:
            return False
        return bool(at_home[0])  # away from home, in a forked child, the socket is the parent's

    def put_produced(self, frames: bytes, messages: int) -> None:
        """Write a producer's frames at once, or queue them if somebody else writes by now."""
        with self._lock:
            if self._closed:
                return  # the producer gives them to the next link
            self._take_in()
            self.produced_messages += messages  # the bytes count as all that has a position
            self._size += len(frames)
            self.position += len(frames)
            self._frames.append(frames)
            if not self._is_free() or not self._wrote_locked(2 * PRODUCED_HERE_BYTES):
                self._wake_locked()

    def _wrote_locked(self, most_bytes: int = HERE_BYTES) -> bool:
        """Write what waits, where that may be; False if it is left to the writer.

        Under the lock, though it is I/O, because it does not wait: so the writer cannot begin meanwhile, and what was
        written is known even if an interrupt falls into it.
        """
        if self._send_now is None or self._control or self._rest or self._size > most_bytes:
            return False
        data, empty, sent = b"".join(self._frames), list[bytes](), list[int]()
        try:
            # One call, into C: an interrupt comes before or behind it, and there it is noted how much was sent.
            sent.extend(map(self._send_now, (data,), (NOWAIT,)))
        except OSError:
            return False  # the writer will meet it too, unless the kernel has room by then
        finally:
            if sent:  # no call in here, so no interrupt
                self._frames, self._rest = empty, data[sent[0] :]
                self.taken += self._size
                self._size = 0
        self._quiet_since = time.monotonic()
        return not self._rest

    def _check_buffer_locked(self, size: int) -> None:
        if self._size + size > self._buffer_bytes:
            raise ReconnectBufferFull(
                f"no link, and {self._size} of {self._buffer_bytes} bytes already wait for one: "
                f"the message of {size} bytes was not taken (raise reconnect_buffer_bytes, or wait)"
            )
