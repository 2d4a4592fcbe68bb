"""The requester's side of a stream: Call takes what the reader brings; Stream is what users iterate.

The reader puts whole reads into the call's queue and wakes the consumer once; the consumer takes one after the other
and hands out chunk by chunk without a lock. The first answer decides in which mode the stream is received. A call ends
once; the reason is raised in the consumer's thread.
"""

from __future__ import annotations

import logging
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from natsync import subject as _subject
from natsync.concurrency import Deadline, Finishing, Signal, in_turn
from natsync.connection import is_own
from natsync.context import Context
from natsync.errors import (
    Code,
    ConnectionLost,
    DeadlineExceeded,
    IdleTimeout,
    NoRespondersError,
    PermissionDenied,
    ServerLost,
    StreamCancelled,
    StreamEnded,
    StreamError,
    TimedOut,
)
from natsync.headers import Headers
from natsync.message import Item, Message
from natsync.mux import LinkLoss, Waiter
from natsync.streaming import frames, terms
from natsync.streaming.calls import Calls
from natsync.streaming.framed_receiver import FramedReceiver
from natsync.streaming.inlet import Receiver
from natsync.streaming.peers import OUTAGE_GRACES
from natsync.streaming.plain_receiver import PlainReceiver
from natsync.timers import Alarm, lateness

log = logging.getLogger("natsync.streaming")

Finished = Callable[[], object]

_NOTHING: Iterator[Any] = iter(())


class Call(Waiter):
    """One attempt of one stream: registered, published, received.

    Attributes:
        batch: what the consumer iterates before it asks for more: chunks; whole messages with as_items.
        headers, trailers: of the first chunk, and of the end.
        complete: whether the consumer has learned that the stream is complete.
    """

    def __init__(
        self, calls: Calls, subject: str, idle_timeout: float | None, window: int, *, as_items: bool = False
    ) -> None:
        connection = calls.connection
        self.subject = subject
        self.blocked_seconds = 0.0
        self.headers = Headers()
        self.trailers = Headers()
        self.complete = False
        self.batch: Iterator[Any] = _NOTHING
        self._calls = calls
        self._connection = connection
        self._idle_timeout = idle_timeout
        self._idle_seconds = 0.0  # waited in vain since something came, over several waits
        self._as_items = as_items
        self._portion = max(1, window // 4)  # chunks taken from the queue at once: so often may credit be given
        self._lock = threading.Lock()
        self._taking = threading.Lock()  # one consumer waits at a time
        self._signal = Signal()
        self._queue: deque[tuple[list[Any], int]] = deque()  # portions, and their bytes
        self._waiting_chunks = 0
        self._waiting_bytes = 0
        self._taken: list[Any] = []  # what `batch` iterates,
        self._taken_bytes = 0
        self._chunks_before = 0  # and what was handed out before that
        self._bytes_before = 0
        self._credited = 0  # so many of them the receiver knows of
        self._error: Exception | None = None  # raised behind what waits,
        self._at_once = False  # or instead of it
        self._last: Item | None = None  # the message that ended it, if the consumer is to see it
        self._over = self._told = False
        self._ended_there = False
        self._leaving: Exception | None = None  # the responder is to be told that the stream is left, and why
        self._finishing = Finishing(self._lock)
        self._finished: list[Finished] = []
        self._frame = b""
        self._mark: int | None = None
        self._lost: LinkLoss | None = None  # the link that took the request was lost before there was an answer,
        self._made_up = False  # for having looked late
        self._until = 0.0  # for which it waits until then at most
        self._receiver: Receiver | None = None
        self._offered: FramedReceiver | None = None
        self._alarm = Alarm(self._unanswered)
        self.token, self.inbox = connection.mux.address()
        if connection.options.framed and calls.may_answer and connection.info.get("headers") is not False:
            self._offered = FramedReceiver(self, calls, window)

    # -- opening -------------------------------------------------------------------------------------------------

    def open(self, payload: bytes, headers: Headers, ctx: Context, attempt: int, resume: int | None = None) -> None:
        """Publish the request. On failure the call is over and the error is the caller's."""
        try:
            self._connection.mux.register(self.token, self)
            self._connection.mux.check_allowed()
            offer = None if self._offered is None else self._offered.offer
            block: bytes | None = terms.encode_opening(headers, offer, ctx.remaining(), attempt, resume)
            if self._connection.info.get("headers") is False:
                block = None  # a server without headers: the stream is plain, and its cancel unheard
            to = _subject.publish_subject(self.subject)
            self._frame = self._connection.encode(to, self.inbox, block, payload)
            self._mark = self._connection.put(self._frame, Deadline(ctx.deadline), ctx)
            loss = self._connection.loss_of(self._frame, self._mark)
            if loss is not None:
                self.link_lost(loss)
            self.when_finished(ctx.on_end(lambda: self._context_ended(ctx)))
        except BaseException:
            self._finish(leaving=StreamCancelled("the requester was interrupted"))  # told only if it has gone
            raise

    def when_finished(self, callback: Finished) -> None:
        """Have callback() called once the call is over, behind those who came before; brief and non-blocking.

        After a Ctrl-C in it callback() may be called again.
        """
        with self._lock:
            if not self._told:
                self._finished.append(callback)
                return
        callback()

    def _tell_finished(self) -> None:
        """In order, who comes meanwhile last: so the context is ended when this call does not listen to it any more."""
        while True:
            with self._lock:
                if not self._finished:
                    self._told = True
                    return
            try:
                self._finished[0]()
            except Exception:
                log.exception("what waited for the end of a stream failed")
            del self._finished[0]  # behind it: see Finishing

    # -- the reader ------------------------------------------------------------------------------------------------

    def deliver(self, items: list[Item]) -> None:
        if self._receiver is None:
            items = self._decide(items)
        if items and self._receiver is not None:
            self._receiver.deliver(items)

    def _decide(self, items: list[Item]) -> list[Item]:
        """Find out the mode, by the first answer; returns what is still to be delivered then."""
        framed = self._offered
        for index, item in enumerate(items):
            if self._receiver is not None:
                return items[index:]
            if framed is not None and frames.decode_address(item[0], item[1]) is not None:
                framed.deliver([item])  # which decides, unless it is refused
            elif not frames.is_unheard(item):
                plain = PlainReceiver(self, self._calls)
                self.decided(plain)
                if framed is not None:
                    framed.close(complete=False)
                if self._lost is not None:
                    plain.link_lost(self._lost)
                return items[index:]
            elif framed is None or not framed.refusing:
                self.finished(NoRespondersError(self.subject))
        return []

    def decided(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._alarm.clear()

    def begun(self, headers: Headers) -> None:
        self.headers = headers

    def arrived(self, chunks: list[bytes]) -> None:
        size = sum(map(len, chunks))
        if self._as_items:
            first = not (self.chunks or self._waiting_chunks) and self.headers
            blocks = [self.headers.encode() if first else None, *[None] * (len(chunks) - 1)]
            self._put([(None, block, chunk) for block, chunk in zip(blocks, chunks, strict=True)], size)
        else:
            self._put(chunks, size)

    def arrived_items(self, items: list[Item]) -> tuple[int, int]:
        chunks = [item[2] for item in items]
        self._put(items if self._as_items else chunks, sum(map(len, chunks)))
        return self._waiting_chunks, self._waiting_bytes

    def _put(self, chunks: list[Any], size: int) -> None:
        """Queue chunks for the consumer, and wake it."""
        portion = self._portion
        with self._lock:
            if self._over:
                return
            self._waiting_chunks += len(chunks)
            self._waiting_bytes += size
            if len(chunks) <= portion:
                self._queue.append((chunks, size))
            else:
                for start in range(0, len(chunks), portion):
                    part = chunks[start : start + portion]
                    self._queue.append((part, sum(map(self._size, part))))
        self._signal.set()

    def _size(self, chunk: Any) -> int:
        return len(chunk[2]) if self._as_items else len(chunk)

    def finished(self, error: Exception | None, *, item: Item | None = None, trailers: Headers | None = None) -> None:
        with self._lock:
            if self._over or self._error is not None:
                return
            self._error = error
            self._last = item
            if trailers is not None:
                self.trailers = trailers
        self._finish(complete=True)

    def frames_dropped(self, dropped: list[bytes]) -> None:
        if any(frame is self._frame for frame in dropped):
            error = ConnectionLost("the next server takes no message as large as the request", sent=False)
            self.fail(error, tell=False)

    def link_lost(self, loss: LinkLoss) -> None:
        if self._mark is None or not loss.took(self._frame, self._mark):
            return
        if self._receiver is not None:
            self._receiver.link_lost(loss)
        elif self._offered is not None:
            if self._lost is None:
                self._until = time.monotonic() + OUTAGE_GRACES * self._calls.grace
                self._made_up = False
            self._lost = loss  # a framed answer may still come: nothing of it gets lost
            self._wait_for_an_answer()
        else:
            self.fail(ServerLost(f"the link broke in mid-stream, chunks may be missing: {loss.reason}"), tell=False)

    def link_made(self) -> None:
        if self._receiver is not None:
            self._receiver.link_made()
        elif self._lost is not None and not self._over:
            self._wait_for_an_answer()

    def _wait_for_an_answer(self) -> None:
        """For a grace on a link; while there is none, silence proves nothing."""
        with self._lock:  # so that who comes last has looked last
            soon = time.monotonic() + self._calls.grace
            self._alarm.set(min(self._until, soon) if self._connection.linked else self._until)
        if self._over:  # meanwhile
            self._alarm.clear()

    def _unanswered(self) -> None:
        """The link that took the request was lost, and on the next one there is no answer either."""
        if self._receiver is not None or self._lost is None:
            return
        now, due = time.monotonic(), self._alarm.due
        if lateness(due, now) and not self._made_up:  # an answer may have come meanwhile, or the next link come now
            self._made_up = True
            self._until = now + self._calls.grace
            self._wait_for_an_answer()
        elif now >= due:  # else it was set anew in this moment
            self.fail(ServerLost(f"the link broke, and no answer came since: {self._lost.reason}"))

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        if self._receiver is None and subject == _subject.publish_subject(self.subject):
            self.fail(error, tell=False)
        elif self._offered is not None and self._offered.speaks_to(subject):
            prefix = self._connection.options.inbox_prefix
            advice = f"a requester's user needs to publish to {prefix}.*.nsy1.>; without it, streams are plain"
            self.fail(PermissionDenied(f"{error}; {advice}"), tell=False)

    def refused(self, error: Exception) -> None:
        self.fail(error, tell=False)

    def connection_closing(self) -> None:
        """The responder is told while that can still be sent; who waits here is told by connection_closed()."""
        known = {} if self._offered is None else self._offered.known
        if self._connection.linked and not (self._calls.leaving and any(map(is_own, known))):
            self._part("the requester closes", behind=self)

    def connection_closed(self, reason: Exception) -> None:
        self.fail(self._connection.closed_under(self._frame), tell=False)

    # -- the consumer ----------------------------------------------------------------------------------------------

    def next_chunk(self, deadline: Deadline) -> bytes:
        """The next chunk. Raises StreamEnded, TimedOut, or what ended the stream."""
        while True:
            batch = self.batch
            for chunk in batch:
                return chunk  # type: ignore[no-any-return]
            self._refill(batch, deadline)

    def next_message(self, deadline: Deadline) -> Message:
        """The next message in the seed's form: chunk, END or ERROR, as a Message. For a call with as_items."""
        while True:
            batch = self.batch
            for item in batch:
                return Message.received(self.inbox, item, self._connection.publish_answer)
            try:
                self._refill(batch, deadline)
            except (StreamEnded, StreamError) as error:
                item, self._last = self._last, None
                if item is None:
                    raise
                message = Message.received(self.inbox, item, self._connection.publish_answer)
                if isinstance(error, StreamError):
                    message.error = error.message
                else:
                    message.is_end = True
                return message

    def _refill(self, empty: Iterator[Any], deadline: Deadline) -> None:
        """The batch is used up: wait for more and take it; raises what there is to raise instead."""

        def refill(deadline: Deadline) -> None:
            while self.batch is empty and not self._take():  # another thread may have refilled it meanwhile
                self._wait(deadline)

        late = f"no chunk of {self.subject!r} in time: another thread is waiting for it"
        in_turn(self._taking, deadline, late, refill)

    def _take(self) -> bool:
        """Take the next portion of what has come; False if there is none yet. What was taken before is consumed."""
        with self._lock:
            self._put_aside_locked()
            if self._at_once:
                self._queue.clear()
            elif self._queue:
                chunks, size = self._queue[0]
                count, batch = len(chunks), iter(chunks)
                # From here on there is no call, behind which a Ctrl-C might come and lose them.
                self._taken, self._taken_bytes, self.batch = chunks, size, batch
                self._waiting_chunks -= count
                self._waiting_bytes -= size
                del self._queue[0]
            taken, over = bool(self._taken), self._over
            consumed, consumed_bytes = self._chunks_before, self._bytes_before
        if consumed != self._credited and self._receiver is not None:
            self._receiver.consumed(consumed, consumed_bytes)
            self._credited = consumed
        if over and not taken:
            raise self._reason()
        return taken

    def _put_aside_locked(self) -> None:
        """What `batch` iterates counts as handed out as far as it was. Requires _lock."""
        count, size = len(self._taken), self._taken_bytes
        left = operator.length_hint(self.batch)
        if left:
            size -= sum(map(self._size, self._taken[count - left :]))
            count -= left
        self._taken, self._taken_bytes, self.batch = [], 0, _NOTHING
        self._chunks_before += count
        self._bytes_before += size

    def _reason(self) -> Exception:
        """What is to be raised now that there are no chunks any more."""
        error = self._error
        if error is None:
            self.complete = True
            return StreamEnded(f"stream {self.subject!r} is complete: {self.chunks} chunks")
        if isinstance(error, StreamError):
            error.last_seq = self.chunks
        return error

    def _wait(self, deadline: Deadline) -> None:
        idle = self._idle_timeout
        until = deadline if idle is None else deadline.or_sooner(max(0.0, idle - self._idle_seconds))
        begin = time.monotonic()
        woken = self._signal.wait(until)
        waited = time.monotonic() - begin
        self.blocked_seconds += waited
        if woken or self._queue or self._over:
            self._idle_seconds = 0.0
            return
        self._idle_seconds += waited
        if deadline.expired:
            raise TimedOut(f"no chunk of {self.subject!r} in time; the stream goes on")
        self.fail(IdleTimeout(f"stream {self.subject!r}: nothing came for {self._idle_timeout} s"))

    # -- ending ----------------------------------------------------------------------------------------------------

    def cancel(self, reason: str) -> None:
        """End now, from any thread; the responder is told, a waiting consumer gets StreamCancelled."""
        self.fail(StreamCancelled(reason), at_once=True)

    def _context_ended(self, ctx: Context) -> None:
        error = ctx.error()
        if isinstance(error, DeadlineExceeded):
            self.fail(DeadlineExceeded(f"stream {self.subject!r}: deadline exceeded"), at_once=True)
        else:
            self.fail(StreamCancelled(str(error)), at_once=True)

    def fail(self, error: Exception, *, at_once: bool = False, tell: bool = True) -> None:
        """End with an error found here, behind what has come or, with at_once, instead of it."""
        if self.cut_short:
            self._finishing.run(self._let_go)
        with self._lock:
            over = self._over
            if self.complete or (over and (self._error is not None or not at_once)):
                return
            if self._error is None:
                self._error, self._at_once, self._last = error, at_once, None
            if self._at_once:
                self._put_aside_locked()
                self._queue.clear()
                self._waiting_chunks = self._waiting_bytes = 0
        if not over:
            self._finish(leaving=error if tell else None)
        self._signal.set()

    def _finish(self, *, complete: bool = False, leaving: Exception | None = None) -> None:
        """Nothing more will come: let go of the token, and tell who wants to know.

        complete: the responder ended the stream; leaving: it is still to be told that it is left, and why.
        """
        with self._lock:
            if not self._over:
                self._over, self._ended_there, self._leaving = True, complete, leaving
        self._finishing.run(self._let_go)

    def _let_go(self) -> None:
        """Until the last step the connection knows this call, and ends it if a Ctrl-C has kept us from that."""
        self._signal.set()
        if self._offered is not None:
            self._offered.close(complete=self._ended_there)
        self._alarm.clear()
        self._tell_finished()
        leaving, mux = self._leaving, self._connection.mux
        if leaving is not None:
            self._part(str(leaving), leaving.code if isinstance(leaving, StreamError) else Code.CANCELLED)
        if mux.waiters.get(self.token) is self:
            mux.unregister(self.token)
        self._frame = b""

    def _part(self, why: str, code: int = Code.CANCELLED, *, behind: Waiter | None = None) -> None:
        """Have the responder told that the stream is left. behind: who still waits here."""
        receiver = self._receiver
        if isinstance(receiver, PlainReceiver):
            if receiver.control is not None:
                self._calls.tell(receiver.control, self.inbox, frames.encode_cancel(why, code))
        elif self._mark is None:
            return
        elif self._connection.withdraw(self._frame):
            self._mark, self._frame = None, b""  # it surely never left
        else:
            known = {} if self._offered is None else self._offered.known
            self._calls.part(self.token, self.inbox, known, why, code, behind)

    # -- asking ----------------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Chunks handed out."""
        return self._chunks_before + len(self._taken) - operator.length_hint(self.batch)

    @property
    def bytes(self) -> int:
        """Bytes of the chunks handed out."""
        taken = self._taken[: len(self._taken) - operator.length_hint(self.batch)]
        return self._bytes_before + sum(map(self._size, taken))

    @property
    def mode(self) -> str | None:
        return None if self._receiver is None else self._receiver.mode

    @property
    def receiver(self) -> Receiver | None:
        """What takes the messages, once the mode is known."""
        return self._receiver

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self._over

    @property
    def cut_short(self) -> bool:
        """Whether it is over, but a Ctrl-C has kept somebody from being told: cancel() goes on with that."""
        return self._over and self._finishing.cut_short

    @property
    def outcome(self) -> Exception | None:
        """How the call ended: None if it is complete (or not over yet)."""
        return None if self.complete else self._error

    @property
    def error(self) -> Exception:
        """What the call ended with; only once it has ended with an error."""
        assert self._error is not None
        return self._error
